"""Per-class accuracy and confusions: on the page bounded, in the files whole."""

import csv
import io
import json
import time

import numpy as np
import pytest
from altered import altered
from hypothesis import given
from hypothesis import strategies as st
from pages import rows_of, text_of

from pipeline.results import collect
from trainer.report.classes import (
    MOST_BEST,
    MOST_PAIRS,
    MOST_WORST,
    class_files,
    class_section,
)
from trainer.report.evidence import Evidence
from trainer.report.page import render, write_report
from trainer.report.tables import class_table, confused_pairs, distinctive


def read(text):
    return list(csv.reader(io.StringIO(text)))


def test_classes_of_the_hand_worked_run(hand_worked):
    """Labels 0 0 1 1 2 2 3 3 4 5. The ensemble errs at the 4th, 8th and 10th: as 0, 2 and 4."""
    rows = rows_of(render(hand_worked, collect(hand_worked)), "classes")
    by_count = {row[0]: row[1:4] + row[6:] for row in rows}
    assert len(rows) == 6 and [row[4] for row in rows] == sorted(
        (row[4] for row in rows), key=lambda text: int(text.split()[0])
    )
    assert list(by_count.values())[0] == ["1", "0", "0", "1"]  # class 5: never right, taken for 4
    assert rows[-1][5] == "–"  # all right: taken for nothing


def test_confused_pairs_of_the_hand_worked_run_say_whether_a_group_holds_both(hand_worked):
    page = render(hand_worked, collect(hand_worked))
    rows = rows_of(page, "classes", table=1)
    # generalist: 0 as 1, 1 as 0, 2 as 3, 3 as 2, 5 as 0. ensemble: 1 as 0, 3 as 2, 5 as 4.
    assert [row[2:] for row in rows] == [
        ["1", "1", "2", "yes"],
        ["1", "1", "2", "yes"],
        ["0", "1", "1", "no"],
        ["1", "0", "2", "yes"],
        ["1", "0", "2", "yes"],
        ["1", "0", "1", "no"],
    ]


def test_the_files_have_every_class_and_pair_and_the_page_links_to_them(hand_worked, tmp_path):
    write_report(hand_worked, tmp_path)
    head, *rows = read((tmp_path / "classes.csv").read_text(encoding="utf-8"))
    assert head[:5] == ["class", "name", "examples", "right_generalist", "right_control_wall"]
    assert [(row[0], row[2], row[3]) for row in rows][:2] == [("0", "2", "1"), ("1", "2", "1")]
    assert sum(int(row[head.index("right_ensemble")]) for row in rows) == 7
    head, *pairs = read((tmp_path / "confused.csv").read_text(encoding="utf-8"))
    assert head[-2:] == ["generalist", "ensemble"] and len(pairs) == 6
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<a href="classes.csv">' in page and '<a href="confused.csv">' in page


@pytest.mark.parametrize(
    "name", ["=1+1", "+A1", "-2", "@SUM(A1)", "\tx", 'a,"b"\nc', "lone \ud800"]
)
def test_a_name_is_one_cell_that_no_spreadsheet_calculates(hand_worked, name):
    model = hand_worked.generalist.path("model.json")
    model.write_text(json.dumps({"class_names": [name] * 6}))
    altered(hand_worked.generalist)
    files = class_files(Evidence(hand_worked, collect(hand_worked)))
    _, *rows = read(files["classes.csv"])
    assert len(rows) == 6 and len({len(row) for row in rows}) == 1
    assert not rows[0][1].startswith(("=", "+", "-", "@", "\t"))


def many_classes(run, num_classes, per_class=2):
    """Evidence of a run whose test split has many classes. One in three examples is wrong."""
    evidence = Evidence(run, collect(run))
    labels = np.repeat(np.arange(num_classes), per_class)
    predicted = np.where(np.arange(len(labels)) % 3 == 0, (labels + 1) % num_classes, labels)
    top5 = np.stack([predicted] * 5, axis=1)
    for predictions in (evidence.before, evidence.after):
        vars(predictions).update(labels=labels, top5=top5)
    names = [f"class number {c}" for c in range(num_classes)]
    correct = {"generalist": predicted == labels, "ensemble": predicted == labels}
    vars(evidence).update(num_classes=num_classes, class_names=names, correct=correct)
    return evidence


def test_of_26386_classes_the_page_shows_the_worst_and_the_best_and_the_files_have_all(hand_worked):
    evidence = many_classes(hand_worked, 26_386)
    began = time.process_time()
    section, files = class_section(evidence), class_files(evidence)
    assert time.process_time() - began < 10
    assert len(section.worst) == MOST_WORST and len(section.best) == MOST_BEST
    assert section.left_out == 26_386 - MOST_WORST - MOST_BEST
    assert {row.after for row in section.worst} == {1} and {row.after for row in section.best} == {
        2
    }
    assert len(section.pairs) == MOST_PAIRS
    assert files["classes.csv"].count("\n") == 26_387


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=60
    )
)
def test_class_table_and_pairs_count_as_a_loop_does(examples):
    labels, predicted, hits = (np.array(each) for each in zip(*examples, strict=True))
    table = class_table(labels, predicted, {"row": hits})
    pairs = confused_pairs(labels, predicted)
    for i, c in enumerate(table.classes):
        own = [(p, hit) for label, p, hit in examples if label == c]
        assert table.n[i] == len(own) and table.right["row"][i] == sum(hit for _, hit in own)
        wrong = [p for p, _ in own if p != c]
        assert table.times[i] == max((wrong.count(p) for p in wrong), default=0)
        assert all(pairs[(c, p)] == wrong.count(p) for p in wrong)
    assert sum(pairs.values()) == int((labels != predicted).sum())


def test_names_of_a_box_go_without_the_words_that_all_of_them_share():
    names = ["é U+00E9 LATIN LETTER E WITH ACUTE", "è U+00E8 LATIN LETTER E WITH GRAVE"]
    assert distinctive(names) == ["é U+00E9 ACUTE", "è U+00E8 GRAVE"]
    assert distinctive(["tench"]) == ["tench"] and distinctive(["a b", "a b"]) == ["a b", "a b"]
    assert distinctive(["red fox", "red"]) == ["fox", "red"]


def test_a_table_can_be_sorted_and_the_page_says_so(hand_worked):
    page = render(hand_worked, collect(hand_worked))
    assert page.count('<table class="sortable">') == 2
    assert "A click on a head sorts a table." in text_of(page)
