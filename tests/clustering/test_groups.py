"""ClassGroups: sorted, immutable, checked, and saved as JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clustering
from clustering import ClassGroups


@st.composite
def groups_of_classes(draw):
    num_classes = draw(st.integers(1, 30))
    group = st.lists(st.integers(0, num_classes - 1), min_size=1, unique=True)
    return ClassGroups(draw(st.lists(group, min_size=1, max_size=6)), num_classes)


def test_members_are_sorted_int64_and_groups_keep_their_order():
    groups = ClassGroups([[5, 1], torch.tensor([2, 0]), np.array([3], dtype=np.uint8), {4}], 6)
    assert [classes.tolist() for classes in groups.members] == [[1, 5], [0, 2], [3], [4]]
    assert all(classes.dtype == np.int64 for classes in groups.members)
    assert len(groups) == 4 and groups.sizes.tolist() == [2, 2, 1, 1]


def test_groups_may_overlap_and_leave_classes_out():
    groups = ClassGroups([[0, 1], [1, 2]], 5)
    assert groups.membership().sum(axis=1).tolist() == [1, 2, 1, 0, 0]


def test_members_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        ClassGroups([[0, 1]], 2).members[0][0] = 1


def test_the_callers_array_is_left_alone():
    mine = np.array([2, 1])
    ClassGroups([mine], 3)
    mine[0] = 0
    assert mine.tolist() == [0, 1]


@pytest.mark.parametrize(
    "members, num_classes, message",
    [
        ([], 3, "no groups"),
        ([[0], []], 3, "group 1 is empty"),
        ([[0, 3]], 3, "group 0 holds class 3; with 3 classes they go from 0 to 2"),
        ([[0], [-1]], 3, "group 1 holds class -1"),
        ([[1, 0, 1]], 3, "group 0 holds class 1 more than once"),
        ([[0.5]], 3, "group 0 has dtype float64"),
        ([[True, False, True]], 3, "group 0 has dtype bool"),
        ([[[0, 1]]], 3, "flat list"),
        ([3], 5, "group 0 is 3; it must be a list"),
        ([["a"]], 3, "class indices"),
        ([[0]], 0, "num_classes is 0"),
        ([[0]], 2.5, "num_classes is 2.5"),
    ],
)
def test_an_error_names_the_value(members, num_classes, message):
    with pytest.raises(ValueError, match=message):
        ClassGroups(members, num_classes)


def test_membership_says_which_class_is_in_which_group():
    membership = ClassGroups([[0, 2], [2, 3], [1]], 5).membership()
    assert membership.dtype == bool
    by_hand = [[1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert membership.toarray().tolist() == by_hand


@given(groups_of_classes())
def test_saving_and_loading_is_the_identity(tmp_path_factory, groups):
    path = tmp_path_factory.mktemp("members") / "groups.json"
    groups.save(path)
    assert ClassGroups.load(path) == groups
    assert [file.name for file in path.parent.iterdir()] == ["groups.json"]


def test_the_file_is_json_with_a_schema(tmp_path):
    ClassGroups([[1, 0], [2]], 4).save(tmp_path / "g.json")
    content = {"schema": 1, "num_classes": 4, "members": [[0, 1], [2]]}
    assert json.loads((tmp_path / "g.json").read_text()) == content


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"schema": 99, "num_classes": 2, "members": [[0]]}', "schema 99, this version reads 1"),
        ('{"members": [[0]]}', "no groups file"),
        ("[[0], [1]]", "no groups file"),
        ("hello", "not JSON"),
        ('{"schema": 1, "num_classes": 2, "members": [[7]]}', "g.json: group 0 holds class 7"),
        ('{"schema": 1, "num_classes": 2, "members": 7}', "list of lists"),
        ('{"schema": 1, "num_classes": "2", "members": [[0]]}', "must be an integer"),
    ],
)
def test_a_file_that_is_no_groups_file_is_refused_with_its_path(tmp_path, text, message):
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ClassGroups.load(path)
    assert str(path) in str(error.value)


def test_importing_groups_loads_neither_torch_nor_scikit_learn_nor_scipy():
    code = (
        "import sys, clustering, clustering.groups; clustering.ClassGroups([[0]], 1); "
        "heavy = {'torch', 'sklearn', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clustering.nothing  # noqa: B018
