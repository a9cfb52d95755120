"""Where plots put what: read back from the SVG."""

import math
import re

import pytest

from trainer.report.plots import FEWEST, Dot, equivalents, reliability

SIZES = [(1, 1.0), (2, 0.8), (3, 0.7)]


def point(name, x, y):
    return Dot(name, "student", x, y, label=name)


def dots(svg):
    """Name -> (x, y) of its dot, in units of the drawing: y grows downwards."""
    located = re.findall(
        r'<circle class="[^"]*" cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"><title>([^<]*)</title>',
        str(svg),
    )
    return {name: (float(x), float(y)) for x, y, name in located}


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
    located = dots(equivalents(SIZES, [point("main", 1.5, 0.9)], "networks", "cNLL"))
    (x1, y1), (x2, y2) = located["1 networks: 1.0000"], located["2 networks: 0.8000"]
    # One decimal is kept.
    assert located["main"] == pytest.approx(((x1 + x2) / 2, (y1 + y2) / 2), abs=0.11)


def test_what_is_beyond_the_largest_lies_right_of_it_and_has_no_size_below():
    svg = str(equivalents(SIZES, [point("heads", math.inf, 0.65)], "networks", "cNLL"))
    located = dots(svg)
    (x, y), (x_largest, y_largest) = located["heads"], located["3 networks: 0.7000"]
    assert x > x_largest and y > y_largest
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
