"""One rule for labels and class names of a whole data set."""

import time

import numpy as np
import pytest

from pipeline.config import UserError
from trainer.data.labels import (
    NONE,
    LabelSet,
    clean,
    label_text,
    printable,
    read_class_list,
    settle,
    settle_given,
    settle_numbers,
)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# Numbers or names


@pytest.mark.parametrize(
    "labels, names, kind",
    [
        (["1", "0", "2"], ["0", "1", "2"], "indices"),
        ([str(n) for n in range(12)], [str(n) for n in range(12)], "indices"),
        (["01", "02", "1A", "2B"], ["01", "02", "1A", "2B"], "names"),
        (["00", "01"], ["00", "01"], "names"),
        (["1", "2", "3"], ["1", "2", "3"], "names"),
        (["1000", "77", "3"], ["3", "77", "1000"], "names"),
        (["1.0", "0.0"], ["0", "1"], "indices"),
        (["3.0", "77.0"], ["3", "77"], "names"),
        (["1.0", "1.5"], ["1.0", "1.5"], "names"),
        (["0", "1.0"], ["0", "1.0"], "names"),
        (["-1", "0", "1"], ["-1", "0", "1"], "names"),
        (["1_0", "0"], ["0", "1_0"], "names"),
        (["\u0661", "0"], ["0", "\u0661"], "names"),
        (["9" * 5000, "0"], ["0", "9" * 5000], "names"),
    ],
)
def test_labels_are_indices_only_where_all_are_the_numbers_0_to_c_minus_1(labels, names, kind):
    label_set = settle(labels)
    assert (label_set.names, label_set.kind) == (names, kind)
    known = [label if label in names else label.removesuffix(".0") for label in labels]
    assert label_set.indices(labels).tolist() == [names.index(name) for name in known]


@pytest.mark.parametrize("dtype", ["u1", "i8", "u8", "f4", "f8", "?"])
def test_numbers_of_any_type_are_indices_where_none_is_absent(dtype):
    label_set, classes = settle_numbers(np.array([1, 0, 1, 0], dtype))
    assert label_set.names == ["0", "1"] and label_set.kind == "indices"
    assert classes.tolist() == [1, 0, 1, 0]


def test_ids_take_memory_for_the_classes_that_there_are():
    start = time.perf_counter()
    label_set, classes = settle_numbers(np.array([300000789, 100000123, 2**63 + 5], np.uint64))
    assert time.perf_counter() - start < 1
    assert label_set.names == ["100000123", "300000789", str(2**63 + 5)]
    assert classes.tolist() == [1, 0, 2]
    assert "3 classes, named by their labels" in label_set.notes[0]


def test_nan_is_an_empty_label_and_other_numbers_are_refused():
    label_set, classes = settle_numbers(np.array([0, np.nan, 1]))
    assert classes.tolist() == [0, NONE, 1] and label_set.names == ["0", "1"]
    assert "label -1 is below 0" in refusal(settle_numbers, np.array([0, -1]))
    assert "neither whole numbers" in refusal(settle_numbers, np.array([0, 0.5]))
    assert "neither whole numbers" in refusal(settle_numbers, np.array([0, np.inf]))
    assert "is not exact" in refusal(settle_numbers, np.array([0, 100000124], np.float32))


# A list of classes


@pytest.mark.parametrize(
    "labels, names, kind, classes",
    [
        (["1", "0"], ["ant", "bee"], "indices", [1, 0]),
        (["bee", "ant"], ["ant", "bee"], "names", [1, 0]),
        (["3", "1"], ["1", "2", "3"], "names", [2, 0]),
        (["1", "0"], ["1", "0"], "names", [0, 1]),
        (["1.0", "0.0"], ["ant", "bee"], "indices", [1, 0]),
        (["bee", "cow"], ["ant", "bee"], "names", [1, NONE]),
        (["1", "7"], ["ant", "bee"], "indices", [1, NONE]),
        (["caf\u00e9"], ["ant", "cafe\u0301"], "names", [1]),
    ],
)
def test_with_a_list_labels_are_names_where_all_are_in_it(labels, names, kind, classes):
    label_set = settle_given(labels, names)
    assert label_set.kind == kind and label_set.indices(labels).tolist() == classes


def test_labels_that_could_be_read_both_ways_and_fit_neither_are_refused():
    message = refusal(settle_given, ["0", "1", "7"], ["1", "2", "3"])
    assert "label 1 is the name of class 0 and could be a class index" in message


def test_a_list_of_classes_is_read_as_notepad_saves_it(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfant\r\nbee \r\nca\xc2\x85t\r\nd\xe2\x80\xa8g\r\n\r\n\r\n")
    assert read_class_list(path) == ["ant", "bee", "ca\x85t", "d\u2028g"]
    for content, message in (
        (b"", "it is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\n a\n", "lines 1 and 3 are both 'a'"),
        ("a\nb".encode("utf-16"), "is not UTF-8"),
    ):
        path.write_bytes(content)
        assert message in refusal(read_class_list, path)
    assert "cannot be read" in refusal(read_class_list, tmp_path / "none.txt")


# Texts


def test_a_name_has_one_form():
    assert clean("\ufeff Cafe\u0301\t") == "Caf\u00e9"
    label_set = settle(["cafe\u0301", "caf\u00e9", " ant ", "\ufeffbee"])
    assert label_set.names == ["ant", "bee", "caf\u00e9"]
    assert label_set.indices(["cafe\u0301", "caf\u00e9", "ant", "bee"]).tolist() == [2, 2, 0, 1]
    merged, changed = label_set.notes
    assert "one class: 'cafe\\u0301' = 'caf\\xe9'" in merged and "2 class names" in changed


@pytest.mark.parametrize(
    "a, b", [("Cat", "cat"), ("red fox", "red  fox"), ("1", "01"), ("1.0", "1"), ("ﬁn", "fin")]
)
def test_names_that_look_alike_stay_apart_and_are_named(a, b):
    label_set = settle([a, b, "other"])
    assert len(label_set.names) == 3
    assert any("look alike stay apart" in note and ascii(a) in note for note in label_set.notes)


def test_invisible_characters_are_named():
    (note,) = settle(["a\u2028b", "c\x07", "d"]).notes
    assert "'a\\u2028b', 'c\\x07'" in note
    assert printable("a\u2028b\udce9") == "a\\u2028b\\udce9"


@pytest.mark.parametrize(
    "raw, label, reason",
    [
        (b"caf\xe9", "cls", "has label b'caf\\xe9', which is not UTF-8"),
        (b"", "cls", "has an empty label"),
        (b"\xef\xbb\xbf", "cls", "has an empty label"),
        (b'" "', "json:x", "has an empty label"),
        (b"NaN", "json:x", "has label nan, which is no number"),
        (b'"\\ud800"', "json:x", "cannot be written as UTF-8"),
        ("\udce9", "cls", "cannot be written as UTF-8"),
    ],
)
def test_an_unreadable_label_says_why(raw, label, reason):
    with pytest.raises(ValueError) as error:
        label_text(raw, label)
    assert reason in str(error.value)


# Manifests of earlier versions


def test_labels_of_earlier_manifests_mean_what_they_meant():
    earlier = LabelSet(["ant", "bee", "01"], "earlier")
    classes, reasons = earlier.read([b"0", b"2", b"002", b"bee", b"01", b"3", b"-1"], "cls")
    assert classes.tolist() == [0, 2, 2, 1, 2, NONE, NONE]
    assert reasons[5] == "has label 3, which is none of the 3 classes"
    swapped = LabelSet(["1", "0"], "earlier")
    assert swapped.read([b"1", b"0"], "cls")[0].tolist() == [1, 0]
    assert swapped.read([b'"1"', b'"0"'], "json:x")[0].tolist() == [0, 1]


def test_an_earlier_manifest_that_mixes_indices_and_names_is_refused():
    earlier = LabelSet(["0", "1A", "1"], "earlier")
    message = refusal(earlier.read, [b"1A", b"1"], "cls")
    assert "the manifest does not say which is meant; make it anew" in message
