"""Shapes by which a damaged model.json is told are made once for all networks that have them."""

from dataclasses import replace

from networks import InputSpec, ModelSpec, build_classifier
from networks.files import shapes_of

SPEC = ModelSpec("mlp", 9, InputSpec((4,), "float32"), {"width": 5, "depth": 1})


def specialist(members, kept=(8,), **more):
    head = {"kind": "dustbin", "members": members, "rows": "kept", "kept": list(kept)}
    return replace(SPEC, head=head, class_names=(), **more)


def test_they_are_those_of_the_network_and_take_no_memory():
    for spec in (SPEC, specialist([0, 1])):
        shapes, network = shapes_of(spec, build_classifier), build_classifier(spec)
        real = network.state_dict()
        assert {name: t.shape for name, t in shapes.items()} == {
            k: t.shape for k, t in real.items()
        }
        assert all(tensor.is_meta for tensor in shapes.values())


def test_which_classes_does_not_matter_and_how_many_does():
    first = shapes_of(specialist([0, 1]), build_classifier)
    assert shapes_of(specialist([5, 7], kept=(2,)), build_classifier) is first
    others = (
        specialist([0, 1, 2]),
        specialist([0, 1], kept=(4, 5)),
        specialist([0, 1], options={"width": 6, "depth": 1}),
        specialist([0, 1], input=InputSpec((3,), "float32")),
        replace(specialist([0, 1]), num_classes=10),
        SPEC,
    )
    for spec in others:
        assert shapes_of(spec, build_classifier) is not first
