"""tests/readability.py counts as a reader would, and what people read here holds its bars."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import readability
from readability import BARS, Reading, read_docstring, read_markdown, sentences_of

PAGE = """# A heading of five words

Two words. This sentence has five words.  And `referral run --on slurm`; this has five.

* An item is one sentence
* and this one is another

| a | b |
|---|---|
| 3.5 | a short cell; not prose |
| 4 | This cell is prose because it has at least ten words in it. |

    a line of code; it is not prose

See [the results](https://host/a;b.html), eq. 5 and Hinton et al. 2015.
"""


def lengths(reading):
    return [sentence.words for sentence in reading.sentences]


def test_prose_of_a_page_is_its_paragraphs_items_and_long_cells():
    reading = Reading("page")
    read_markdown(reading, PAGE, "page.md")
    assert lengths(reading) == [5, 5, 5, 5, 13, 10]
    assert reading.semicolons == 1  # neither those of code, of a link's address nor of short cells
    assert reading.wide == []


def test_a_line_of_code_above_90_columns_is_wide():
    reading = Reading("page")
    read_markdown(reading, f"    {'a' * 90}\n    {'b' * 91}\n\n```\n{'c' * 91}\n```\n", "page.md")
    assert [line[-1] for line in reading.wide] == ["b", "c"]


@pytest.mark.parametrize(
    "text, count",
    [
        ("One ends. Another ends! A third?", 3),
        ("By e.g. Hinton et al. 2015, eq. 5, i.e. the paper.", 1),
        ("Top-1 is .645 at 3.5 s. (So it was.) Then more.", 3),
    ],
)
def test_sentences_end_at_full_stops_that_are_no_abbreviations(text, count):
    assert len(sentences_of(text)) == count


def test_a_docstring_has_a_sentence_for_each_parameter_and_none_for_code():
    reading = Reading("package")
    text = (
        "Reads four words here; yes.\n\nParameters\n----------\nwidth : int\n"
        "    How wide it is.\n\n    code = that(is, not, read)\n\n"
        "p: [B, C], rows sum to 1\nq: [B], the other one of these\n"
    )
    read_docstring(reading, text, "file.py:1")
    # a name and its type, `width : int`, are no sentence
    assert lengths(reading) == [5, 4, 7, 7]
    assert reading.semicolons == 1


def test_comments_below_each_other_are_one_and_directives_none():
    text = "# A comment that\n# has six words.\nx = 1  # three words here\ny = 2  # noqa: E501\n"
    assert [words for _, words in readability.comments_of(text)] == [
        "A comment that has six words.",
        "three words here",
    ]


def test_a_row_is_above_where_it_has_more_than_the_bars():
    long = Reading("long")
    long.read(f"{'word ' * 41}. {'word ' * 41}. A short one is here.", "page.md:1")
    assert long.above == ["words", "long"]
    held = Reading("held")
    held.read("Five words are in this. " * 50 + "One; two; three.", "page.md:1")
    assert held.semicolons == 2 and held.semicolons_per_1000 > BARS.semicolons
    assert held.above == ["semicolons"]


def test_pages_and_totals_of_this_repository_hold_the_bars():
    rows, held = readability.everything()
    assert {"README.md", "docs/combiner.md", "all"} <= {reading.name for reading in held}
    assert len(rows) > len(held) > 20
    above = [f"{reading.name}: {', '.join(reading.above)}" for reading in held if reading.above]
    assert not above, f"{above}; python tests/readability.py --sentences 5 says where"
