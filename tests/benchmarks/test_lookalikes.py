"""Pairs that look alike, and how many of them groups hold, worked by hand."""

import numpy as np
import pytest

from benchmarks import lookalikes
from clustering import ClassGroups

LIST = """\ufeff# a comment
0031 ;\t006C ;\tMA\t# ( 1 → l ) DIGIT ONE → LATIN SMALL LETTER L\t#

0049 ;\t006C ;\tMA\t# ( I → l )\t#
0057 ;\t0056 0056 ;\tMA\t# ( W → VV )\t#
0430 ;\t0061 ;\tMA\t# ( а → a )\t#
"""


def test_the_list_gives_prototypes_of_single_characters():
    assert lookalikes.prototypes(LIST) == {"1": "l", "I": "l", "\u0430": "a"}


def test_classes_of_one_prototype_are_pairs_and_a_class_of_several_characters_counts_for_each():
    # Classes: 1, W, I and l, Cyrillic a and b, x, a.  1 I and 1 l are one pair of classes.
    characters = ["1", "W", "Il", "\u0430b", "x", "a"]
    pairs = lookalikes.listed_pairs(lookalikes.prototypes(LIST), characters)
    assert pairs == [(0, 2), (3, 5)]


def test_two_of_three_pairs_share_a_group_where_one_pair_in_three_would_by_chance():
    groups = ClassGroups([[0, 1], [2, 3]], 4)
    assert lookalikes.together(groups, [(0, 1), (2, 3), (1, 2)]) == (
        pytest.approx(2 / 3),
        pytest.approx(2 / 6),
    )


def test_the_nearest_image_is_of_the_same_shape_whatever_its_contrast():
    means = np.array([[9, 0, 0, 9], [4, 1, 1, 4], [0, 9, 9, 0], [1, 9, 8, 0.0]])
    assert lookalikes.nearest_pairs(means) == [(0, 1), (2, 3)]


def test_the_characters_of_a_class_come_from_its_name_or_from_those_merged_into_it():
    names = ["A U+0041 LATIN CAPITAL LETTER A", "土 U+571F CJK UNIFIED IDEOGRAPH-571F"]
    both = ["A U+0041 LATIN CAPITAL LETTER A", "Α U+0391 GREEK CAPITAL LETTER ALPHA"]
    merged = [{"class": 0, "characters": both}]
    assert lookalikes.characters_of(names, []) == ["A", "土"]
    assert lookalikes.characters_of(names, merged) == ["AΑ", "土"]


@pytest.mark.skipif(not lookalikes.LISTED.exists(), reason=f"{lookalikes.LISTED} is absent")
def test_unicode_lists_earth_beside_scholar():
    import gzip

    with gzip.open(lookalikes.LISTED, "rt", encoding="utf-8-sig") as file:
        prototype_of = lookalikes.prototypes(file.read())
    assert lookalikes.listed_pairs(prototype_of, ["土", "一", "士"]) == [(0, 2)]
    assert len(prototype_of) > 4000
