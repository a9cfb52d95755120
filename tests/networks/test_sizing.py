"""Specs scaled to so many multiplications."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import InputSpec, ModelSpec, count_multiplications, scale, widened_to

PICTURES = InputSpec((1, 12, 12))
SPECS = {
    "mlp": ModelSpec("mlp", 50, PICTURES, {"width": 24, "depth": 2, "embedding": 8}),
    "convnet": ModelSpec("convnet", 50, PICTURES, {"channels": [4, 8], "embedding": 6}),
    "convnet of one width": ModelSpec("convnet", 50, PICTURES, {"width": 4, "depth": 2}),
    "resnet": ModelSpec("resnet", 20, PICTURES, {"width": 8, "depth": 8}),
    "wideresnet": ModelSpec("wideresnet", 20, PICTURES, {"width": 1, "depth": 10, "base": 8}),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("times", [1.3, 2.0, 3.7])
def test_multiplications_are_those_asked_for(name, times):
    spec = SPECS[name]
    target = times * count_multiplications(spec)
    assert count_multiplications(widened_to(spec, target)) == pytest.approx(target, rel=0.13)


def test_a_bag_grows_by_its_embedding_and_keeps_its_table():
    bag = ModelSpec("embedding_bag", 40, InputSpec((5,), "int32"), {"width": 64, "embedding": 8})
    wider = widened_to(bag, 2 * count_multiplications(bag))
    assert wider.options == {"width": 64, "embedding": 16}


def test_nothing_is_made_narrower():
    spec = SPECS["mlp"]
    assert widened_to(spec, 1) is spec


def test_scaling_touches_widths_alone():
    wider = scale(SPECS["convnet"], 2.0)
    assert wider.options == {"channels": [8, 16], "embedding": 12, "width": 32}
    assert scale(SPECS["mlp"], 1.5).options == {"width": 36, "depth": 2, "embedding": 12}


def test_a_network_without_widths_cannot_be_scaled():
    spec = ModelSpec("timm:resnet18", 10, InputSpec((3, 32, 32)))
    with pytest.raises(ValueError, match="none of the options width, channels, embedding"):
        scale(spec, 2.0)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 40), target=st.floats(1, 1e5))
def test_the_nearest_of_all_widths_is_found(width, target):
    """Against every width in turn, of a network that multiplies w^2 + 10 w."""

    def count(spec):
        w = spec.options["width"]
        return w * w + 10 * w

    spec = ModelSpec("mlp", 10, PICTURES, {"width": width, "depth": 2})
    found = count(widened_to(spec, target, count))
    nearest = min(
        (count(scale(spec, w / width)) for w in range(width, 400)),
        key=lambda each: abs(each - target),
    )
    assert abs(found - target) == pytest.approx(abs(nearest - target))
