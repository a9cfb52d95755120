"""Where plots put what: read back from the SVG."""

import re

import pytest

from trainer.report.plots import FEWEST, equivalents, reliability

SIZES = [(1, 1.0), (2, 0.8), (3, 0.7)]


def point(name, x, y):
    return {"name": name, "label": name, "kind": "student", "x": x, "y": y}


def dots(svg):
    """Name -> (x, y) of its dot, in units of the drawing: y grows downwards."""
    found = re.findall(
        r'<circle class="[^"]*" cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"><title>([^<]*)</title>',
        str(svg),
    )
    return {name: (float(x), float(y)) for x, y, name in found}


def bins(*counts):
    return [
        {
            "lo": i / 15,
            "hi": (i + 1) / 15,
            "count": n,
            "confidence": (i + 0.5) / 15,
            "accuracy": 0.5,
        }
        for i, n in enumerate(counts)
    ]


def test_a_student_half_way_between_two_ensembles_lies_on_the_line_between_their_dots():
    found = dots(equivalents(SIZES, [point("main", 1.5, 0.9)], "networks", "cNLL"))
    (x1, y1), (x2, y2) = found["1 networks: 1.0000"], found["2 networks: 0.8000"]
    assert found["main"] == pytest.approx(
        ((x1 + x2) / 2, (y1 + y2) / 2), abs=0.11
    )  # a decimal is kept


def test_what_is_beyond_the_largest_lies_right_of_it_and_has_no_size_below():
    svg = str(equivalents(SIZES, [point("heads", None, 0.65)], "networks", "cNLL"))
    found = dots(svg)
    assert (
        found["heads"][0] > found["3 networks: 0.7000"][0]
        and found["heads"][1] > found["3 networks: 0.7000"][1]
    )
    (lead,) = re.findall(r'class="lead k-student" d="([^"]*)"', svg)
    assert "V" not in lead


def test_a_single_size_or_equal_ones_can_be_drawn():
    assert dots(equivalents([(1, 0.5)], [point("main", 1.0, 0.5)], "networks", "cNLL"))
    assert dots(equivalents([(1, 0.5), (2, 0.5)], [], "networks", "cNLL"))


def test_bars_of_few_examples_are_pale_and_empty_bins_have_none():
    svg = str(reliability(bins(0, FEWEST - 1, FEWEST), "ensemble", "Reliability"))
    assert len(re.findall(r'<rect class="bar k-ensemble pale"', svg)) == 1
    assert len(re.findall(r'<rect class="bar k-ensemble"', svg)) == 1
    assert len(re.findall(r'<rect class="bar k-ensemble faint"', svg)) == 2  # the strip of counts
