"""Settings as TOML: what is read back is what was written."""

import tomllib

import pytest

from trainer.proposal.document import document, toml
from trainer.proposal.settings import Setting


@pytest.mark.parametrize(
    "value",
    [
        3,
        -2.5,
        20.0,
        1e-07,
        True,
        "plain",
        'quotes " and \\ and \u00e9 and \x7f and \n',
        [0.1] * 200,
        [],
        {"txt": "module:function", "a b.c": "x"},
    ],
)
def test_values_come_back_as_they_were(value):
    read = tomllib.loads(f"key = {toml(value)}")["key"]
    assert read == value and type(read) is type(value)


def test_a_reason_stands_behind_its_key_or_above_it_where_it_is_long():
    settings = [
        Setting("seed", 0, "short"),
        Setting("data.train", "x" * 60, "a reason"),
        Setting("data.val", "s", "a long reason " * 12),
    ]
    text = document(["title"], settings)
    assert "seed = 0                                # short\n\n[data]\n# a reason\ntrain" in text
    assert max(map(len, text.splitlines())) <= 100
    assert tomllib.loads(text) == {"seed": 0, "data": {"train": "x" * 60, "val": "s"}}
