"""What is wrong in a builder of the user's own is one line that says where, and the contract."""

import sys

import pytest

from networks import InputSpec, ModelSpec, build_classifier
from networks.user_code import CONTRACT

HEAD = """
import torch
from torch import nn

class Trunk(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
    def forward(self, x):
        return FORWARD

"""
GOOD = "self.conv(x).mean((2, 3))"
SPEC = {"num_classes": 5, "input": InputSpec(shape=(1, 8, 8))}


def builder_of(tmp_path, monkeypatch, definition, forward=GOOD):
    """The function `build` of a module of the user's."""
    text = HEAD.replace("FORWARD", forward) + definition
    (tmp_path / "mine_to_try.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine_to_try", None)
    import mine_to_try

    return mine_to_try.build


PLAIN = "def build(shape): return Trunk()"


@pytest.mark.parametrize(
    "definition, forward, options, words",
    [
        ("def build(): return Trunk()", GOOD, {}, "TypeError: build() takes 0 positional"),
        ("def build(shape, width): return Trunk(width)", GOOD, {}, "missing 1 required positional"),
        (
            "def build(shape): return Trunk(wdth=3)",
            GOOD,
            {},
            "argument 'wdth' (",
        ),
        ("def build(shape): return 1 / 0", GOOD, {}, "ZeroDivisionError: division by zero ("),
        ("def build(shape): return [Trunk()]", GOOD, {}, "gives list, not an nn.Module"),
        ("def build(shape): return Trunk", GOOD, {}, "gives type, not an nn.Module"),
        ("build = Trunk()", GOOD, {}, "is a network, not a function that builds one"),
        (PLAIN, "self.conv(x)", {}, "gives [1, 4, 6, 6] for one input; features [1, D]"),
        (PLAIN, "(self.conv(x), x)", {}, "gives tuple for one input"),
        (PLAIN, "self.conv(x).mean()", {}, "gives [] for one input"),
        (PLAIN, "self.fc(x)", {}, "fails for an input of [1, 1, 8, 8]: AttributeError"),
        (PLAIN, "self.conv(x.view(2, 3))", {}, "RuntimeError: shape '[2, 3]' is invalid"),
    ],
)
def test_a_builder_against_the_contract_is_one_line_that_quotes_it(
    tmp_path, monkeypatch, definition, forward, options, words
):
    build = builder_of(tmp_path, monkeypatch, definition, forward)
    with pytest.raises(ValueError) as error:
        build_classifier(ModelSpec("mine:build", options=options, **SPEC), {"mine:build": build})
    message = str(error.value)
    assert words in message and message.endswith(CONTRACT)
    assert "mine:build" in message and "\n" not in message


def test_the_line_in_the_users_code_is_named(tmp_path, monkeypatch):
    build = builder_of(tmp_path, monkeypatch, PLAIN, "self.conv(x.flatten())")
    line = HEAD.splitlines().index("        return FORWARD") + 1
    with pytest.raises(ValueError, match=rf"\({tmp_path}/mine_to_try.py:{line}\)"):
        build_classifier(ModelSpec("mine:build", **SPEC), {"mine:build": build})


def test_a_value_error_of_the_builder_keeps_its_words(tmp_path, monkeypatch):
    definition = "def build(shape, n=2):\n    raise ValueError(f'n = {n}: must be odd')"
    build = builder_of(tmp_path, monkeypatch, definition)
    with pytest.raises(ValueError, match=r"^n = 2: must be odd \(.*mine_to_try.py:\d+\)$"):
        build_classifier(ModelSpec("mine:build", **SPEC), {"mine:build": build})


def test_a_class_is_a_builder_if_its_constructor_takes_the_shape():
    from torch import nn

    class Flat(nn.Module):
        def __init__(self, shape, width=3):
            super().__init__()
            self.linear = nn.Linear(shape[0] * shape[1] * shape[2], width)

        def forward(self, x):
            return self.linear(x.flatten(1))

    classifier = build_classifier(ModelSpec("mine:Flat", **SPEC), {"mine:Flat": Flat})
    assert classifier.linear_head.in_features == 3
