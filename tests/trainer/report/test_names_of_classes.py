"""Names of classes that a page reads one by one."""

import pytest

from trainer.report.evidence import Names


def test_a_name_is_made_when_it_is_read():
    made = []

    def shown(name, c):
        made.append(c)
        return name or f"class {c}"

    names = Names(["one", 2], 4, shown)
    assert names[1] == "2"
    assert made == [1]
    assert list(names) == ["one", "2", "class 2", "class 3"]
    assert len(names) == 4


@pytest.mark.parametrize("c", [-1, 4])
def test_a_class_that_is_none_has_no_name(c):
    with pytest.raises(IndexError, match=f"class {c}; there are 4"):
        Names(["one"], 4, lambda name, c: name)[c]
