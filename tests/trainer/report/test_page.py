import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest
from altered import altered
from pages import Page, rows_of, text_of

from pipeline.config import Ensemble, Student
from pipeline.results import collect, verdict
from trainer.report.diversity import size_plot, size_rows
from trainer.report.evidence import Evidence, manifest_counts
from trainer.report.explanations import explain_student
from trainer.report.formatting import colours_of
from trainer.report.page import FILES, render, write_report
from trainer.report.tables import is_measurable


def test_report_writes_all_its_files(hand_worked, tmp_path):
    results = write_report(hand_worked, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results == collect(hand_worked)
    assert all((tmp_path / name).is_file() for name in FILES)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().startswith("<!doctype html>")


def test_the_page_begins_with_what_it_is_about_and_the_verdict(hand_worked):
    results = collect(hand_worked)
    lines = Page(render(hand_worked, results)).text
    about, *said = [line.replace("\xa0", " ").replace("\u2060", "") for line in lines[:3]]
    assert about.startswith(f"{hand_worked.root.name} · ") and about.endswith("seed 0")
    assert "6 classes · 10 test examples of " in about
    assert " ".join(said).startswith(verdict(results))


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_page_names_the_split_whose_errors_the_ceilings_count(
    make_hand_worked, tmp_path, split
):
    """Train: of runs whose predictions a version measured that counted errors there."""
    run = make_hand_worked(tmp_path / "run")
    if split == "train":
        log = "val has 9 examples for 6 classes: predictions are measured on train"
        run.measure.path("log-0.txt").write_text(log)
    page = text_of(render(run, collect(run)))
    other = {"val": "train", "train": "val"}[split]
    for text in (
        "what a perfect specialist would add, from errors on {}.",
        "{} errors inside a group",
        "expected on {} without labels",
        "ceiling from {}: points that a perfect specialist would add",
    ):
        assert text.format(split) in page and text.format(other) not in page


def test_coverage_of_the_hand_worked_run(hand_worked):
    rows = rows_of(render(hand_worked, collect(hand_worked)), "coverage")
    # By hand: classes 4, 5 are covered by none, 0, 1, 3 by one, 2 by two specialists.
    assert rows == [
        ["0", "2", "1", "1", "+0", "0.0 %"],
        ["1", "6", "3", "4", "+1", "+33.3 %"],
        ["2", "2", "1", "2", "+1", "+100.0 %"],
    ]


def test_deciles_of_the_hand_worked_run_are_ordered_by_training_counts(hand_worked):
    rows = rows_of(render(hand_worked, collect(hand_worked)), "frequency")
    # Six classes make six parts. 10 training examples of class 0, whose second test example the
    # ensemble fixed.
    assert [row[1] for row in rows] == ["10", "20", "30", "40", "50", "60"]
    assert rows[0] == ["1", "10", "2", "50.0 %", "100.0 %", "100.0 %", "100.0 %"]


def test_metrics_mark_the_best_and_give_the_paired_difference(hand_worked):
    html = render(hand_worked, collect(hand_worked))
    rows = {row[0]: row for row in rows_of(html, "metrics")}
    assert rows["generalist"][1] == "50.00 %" and rows["ensemble"][1] == "70.00 %"
    assert rows["control_compute"][7] == "2"  # errors
    assert rows["ensemble"][8].startswith("+20.00 ± ")
    best = re.findall(r'<td class="mark best" title="best of this column">([^<]*)<', html)
    assert "80.00\xa0%" in best


def test_equal_class_counts_have_no_deciles(hand_worked):
    html = render(hand_worked, collect(hand_worked), class_counts=[7] * 6)
    assert 'id="frequency"' not in html and "#frequency" not in html
    assert 'id="frequency"' in render(hand_worked, collect(hand_worked))


def test_test_labels_stand_in_for_a_manifest_without_counts(hand_worked):
    manifest = hand_worked.root.parent / "shards" / "manifest.json"
    manifest.unlink()
    assert manifest_counts(hand_worked.config.data.train, 6) is None
    html = render(hand_worked, collect(hand_worked))
    assert "the test split’s stand in" in text_of(html)


def test_manifest_counts_are_summed_over_shards_by_class_name(hand_worked):
    assert manifest_counts(hand_worked.config.data.train, 6).tolist() == [10, 20, 30, 40, 50, 60]


def test_no_handler_nothing_fetched_and_the_only_script_is_named_by_the_policy(glyphs):
    run, images = glyphs
    page = Page(render(run, collect(run), images))
    fetching = set("src href srcset data action poster xlink:href formaction background".split())
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    links = {"classes.csv", "confused.csv"}
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        for key in fetching & set(attributes):
            if tag == "a" and attributes[key] in links:
                continue
            assert attributes[key].startswith(("data:", "#")), (tag, attributes[key])
    style = re.search(r"<style>(.*?)</style>", render(run, collect(run), images), re.S).group(1)
    assert "url(" not in style and "@import" not in style
    policy = next(
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    (script,) = re.findall(r"<script>(.*?)</script>", render(run, collect(run), images), re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert policy.split("script-src ")[1] == f"'sha256-{digest}'"


def test_hostile_class_names_are_text(glyphs):
    run, images = glyphs
    html = render(run, collect(run), images)
    page = Page(html)
    text = " ".join(page.text)
    shown = [name for name in images.class_names[:14] if name.strip() and name in text]
    assert len(shown) >= 5  # those among the most confused of their group
    assert html.count("<script") == html.count("</script") == 1 and "<img src=x" not in html
    assert html.count("</style>") == 1 and html.count("<!--") == 0
    allowed = (
        "html head meta title link style body header h1 h2 h3 p div small nav a main section table "
        "thead tbody tr th td br wbr span dl dt dd figure figcaption svg path circle rect text ul "
        "li b article img bdi details summary pre code footer script"
    )
    assert {tag for tag, _ in page.tags} <= set(allowed.split())


@pytest.mark.parametrize(
    "name", ["nul\x00 bell\x07", "lone \ud800 surrogate", "x" * 5000, "  ", "{{ 7 * 7 }}"]
)
def test_any_string_may_be_a_class_name(hand_worked, tmp_path, name):
    model = hand_worked.generalist.path("model.json")
    model.write_text(json.dumps({"class_names": [name] * 6}))
    altered(hand_worked.generalist)
    write_report(hand_worked, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", html)
    assert "x" * 200 not in html
    assert ("class 0" in html) == (not name.strip())


def test_pictures_are_inline_and_the_file_stays_small(glyphs, tmp_path):
    run, images = glyphs
    write_report(run, tmp_path, images)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") > 80
    assert len(html) < 4_000_000


def test_colour_pictures_are_shown_small(glyphs):
    run, images = glyphs
    images.pixels = np.random.default_rng(0).integers(
        0, 256, (len(images.labels), 3, 160, 120), dtype=np.uint8
    )
    html = render(run, collect(run), images)
    assert "data:image/jpeg;base64," in html and len(html) < 4_000_000


@pytest.mark.parametrize(
    "pixels", [np.zeros((480, 40), np.int64), np.zeros((480, 5, 8, 8), np.uint8)]
)
def test_inputs_that_are_no_pictures_are_left_out_and_the_page_says_so(glyphs, pixels):
    run, images = glyphs
    images.pixels = pixels
    html = render(run, collect(run), images)
    assert "<img" not in html
    assert "No pictures: the inputs are no 8-bit gray or RGB images" in text_of(html)


def test_a_missing_specialist_is_named(tmp_path, make_hand_worked):
    run = make_hand_worked(tmp_path, missing=[1])
    html = render(run, collect(run))
    assert "Specialist 1 missing" in text_of(html)
    assert [row[:2] for row in rows_of(html, "coverage")] == [["0", "4"], ["1", "6"]]


def test_a_run_without_controls_and_students_has_a_report(tmp_path, make_hand_worked):
    run = make_hand_worked(tmp_path, controls=False, students=(), only=("generalist", "ensemble"))
    results = collect(run)
    html = render(run, results)
    assert results["student"] is None and results["controls"] == {}
    assert "no control was trained" in html


class Texts:
    """Texts as a decoder makes vectors of them: what the report needs of a ShardSet."""

    input_shape, input_dtype, input_extensions = (4,), "float32", ["txt"]

    def __init__(self, class_names):
        self.class_names = class_names

    def raw(self, ids):
        return [{"txt": f"phrase <{i}> {'x' * 300}".encode(), "cls": b"0"} for i in ids]


def test_texts_are_shown_as_they_are_and_no_frames_for_pictures(glyphs):
    run, images = glyphs
    page = render(run, collect(run), Texts(images.class_names))
    assert "No pictures: the inputs are no 8-bit gray or RGB images" in text_of(page)
    shown = re.findall(r'<q class="phrase clip" title="(phrase &lt;\d+&gt; x+…)"', page)
    assert len(shown) > 5 and all(len(html.unescape(text)) == 161 for text in shown)
    assert '<span class="blank' not in page and "<img" not in page
    assert "picture of that class" not in text_of(page)


# Calibration, members, deep ensembles


def test_calibration_of_the_hand_worked_twin(deep):
    """T = 1.25 makes .9^.8 and .02^.8 of .9 and .02 (five times). Half of the examples are right.

    Over their sum these are .80782 and .03844.
    """
    rows = {row[0]: row for row in rows_of(render(deep, collect(deep)), "calibration")}
    # NLL -(ln .9 + ln .02) / 2, Brier (.012 + 1.772) / 2 and ECE .9 - .5. Then
    # -(ln .80782 + ln .03844) / 2, (.04432 + 1.58309) / 2 and .80782 - .5.
    metrics = ["2.0087", "1.7361", "0.8920", "0.8137", "0.4000", "0.3078"]
    assert rows["student_hard"] == ["student_hard", "1.250", *metrics]


def test_each_row_has_a_diagram_as_predicted_and_one_calibrated(deep):
    html = render(deep, collect(deep))
    for name in ("generalist", "student_hard", "ensemble", "student main", "student heads"):
        assert html.count(f'aria-label="Reliability of {name}"') == 1
        assert html.count(f'aria-label="Reliability of {name}, calibrated"') == 1


def test_a_run_without_the_newer_metrics_has_a_report_without_their_tables(hand_worked):
    html = render(hand_worked, collect(hand_worked))
    assert html.count('aria-label="Reliability of') == 7 and ", calibrated" not in html
    assert 'id="diversity"' not in html and "#diversity" not in html and "at T =" not in html
    assert "DEE" not in html


def test_at_most_eight_rows_have_diagrams_and_students_come_before_controls(
    tmp_path, make_hand_worked
):
    students = ("main", *(f"s{i}" for i in range(5)))
    only = ("generalist", "ensemble", "control_wall", "control_compute", "student_hard", *students)
    run = make_hand_worked(tmp_path, only=only, students=students)
    html = render(run, collect(run))
    drawn = re.findall(r'aria-label="Reliability of ([^"]*)"', html)
    assert drawn == ["generalist", "ensemble", *(f"student {name}" for name in students)]
    assert "and 3 more, in evaluation/." in text_of(html)


def test_a_deep_ensembles_page_has_sizes_instead_of_groups(deep):
    html = render(deep, collect(deep))
    sections = re.findall(r'<section id="(\w+)"', html)
    expected = "metrics students cost learning diversity classes frequency calibration examples run"
    assert sections == expected.split()
    assert re.findall(r'<a href="#(\w+)">', html) == sections
    assert rows_of(html, "diversity") == [
        ["1", "50.00 %", "1.3000", "1.0000", "1.400"],
        ["2", "60.00 %", "1.0000", "0.8000", "1.200"],
        ["3", "70.00 %", "0.9000", "0.7000", "1.100"],
    ]
    prose = re.sub(r"<(style|pre|script)>.*?</\1>", "", html, flags=re.S)
    assert "member 2" in html and "specialist" not in prose


def test_diversity_shows_the_columns_that_some_row_fills(deep):
    html = render(deep, collect(deep))
    rows = {row[0]: row[1:] for row in rows_of(html, "diversity", table=1)}
    # members, DEE, MU, pairwise KL, disagreement, AUROC by confidence, entropy, MU
    assert rows["ensemble"] == ["3", "3.00", "0.2500", "0.5000", "37.50 %", "–", "–", "–"]
    heads = ["3", "&gt;3", "0.1250", "0.0625", "10.00 %", "0.7500", "0.8000", "0.9000"]
    assert rows["student heads"] == heads
    assert rows["student main"] == ["–", "1.50", *["–"] * 6]
    assert "student_hard" not in rows  # nothing to say of it


def test_a_prior_network_has_an_mu_and_no_members(tmp_path, make_hand_worked):
    run = make_hand_worked(tmp_path, further={"wide": {"members": {"mu": 0.5}}})
    html = render(run, collect(run))
    assert rows_of(html, "diversity") == [["student wide", "0.5000"]]
    assert re.findall(r'<section id="(\w+)"', html)[-3:] == ["diversity", "examples", "run"]


def test_a_student_that_is_worse_by_far_is_named_below_the_plot_that_it_would_press_flat(deep):
    results = collect(deep)  # one network has 1.0 and three have 0.7: the edge is at 1.3

    def plot():
        return size_plot(Evidence(deep, results))

    results["students"]["main"] |= {"dee": 1.0, "cnll": 1.31}
    assert plot().off == "main (1.310)" and "main" not in plot().svg
    assert "worse than one network: main (1.310)." in text_of(render(deep, results))
    results["students"]["main"] |= {"dee": 1.0, "cnll": 1.29}
    assert plot().off == "" and "main 1.00" in plot().svg


def test_of_many_sizes_the_first_and_the_last_are_among_ten_that_are_shown():
    rows = size_rows({"sizes": [{"size": k, "cnll": 1 / k} for k in range(1, 51)]})
    assert len(rows) == 10 and rows[0]["top1"] is None
    assert rows[0]["size"] == 1 and rows[-1]["size"] == 50


def test_students_beside_main_have_colours_of_their_own():
    colours = colours_of(["generalist", "ensemble", "student main", "student a", "student b"])
    assert len(set(colours.values())) == 5 and colours["student main"] == "student"


OF_THE_ENSEMBLE = "trained on the ensemble's distributions as targets"


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, f"One network of the generalist’s size, {OF_THE_ENSEMBLE}, starting as"),
        (
            {"method": "hard", "start": "scratch"},
            "trained on hard labels, starting from fresh weights",
        ),
        (
            {"network": "hydra", "start": "one"},
            f"4 heads, {OF_THE_ENSEMBLE}, each member from one of its own, "
            "starting as the student one. At inference the body runs once",
        ),
        (
            {"network": "batch_ensemble", "members": 2},
            "2 members, which share all but rank-one factors",
        ),
        ({"perturb": "ods"}, "targets, at inputs moved by output diversified sampling, starting"),
        (
            {"teacher": "one", "hard_weight": 0.5},
            "the student one's distributions as targets and the labels with",
        ),
        (
            {"share": 0.03, "leave_out": ["3"]},
            "with 3.0 % of the training examples, without examples of 1 class,",
        ),
        ({"method": "prior"}, "as a Prior Network"),
        ({"temperature": 4}, "as targets at temperature 4, starting"),
        ({"wrong_weight": 1}, "as targets, and where these are wrong on the labels alone, st"),
        ({"wrong_weight": 0.3}, "where these are wrong with 0.3 of it on the labels, starting"),
        (
            {"perturb": "mix_bags"},
            "targets, at inputs moved by n-grams of other examples, st",
        ),
        ({"temperature": float("inf")}, "as targets, their logits matched, starting"),
    ],
)
def test_what_a_student_is_in_words(keys, expected):
    assert expected in explain_student(Student(**keys), Ensemble(kind="deep", members=4))


@pytest.mark.parametrize(
    "answers, expected, absent",
    [
        (None, "one forward pass.", "stored"),
        ({"kind": "live"}, "one forward pass.", "stored"),
        ({"kind": "stored", "kl": None, "temperature": "inf"}, "one forward pass.", "stored"),
        (
            {"kind": "stored", "kl": 0.021, "temperature": 1.0},
            "were stored, 0.021 nats (KL) from the whole distribution at temperature 1.",
            "far",
        ),
        ({"kind": "stored", "kl": 0.35, "temperature": 1.0}, "That is far: with answers", "heart"),
        (
            {"kind": "live", "entropy": {"seen": 0.02, "val": 1.4}},
            "0.02 nats about what the student sees and 1.4 about val",
            "stored",
        ),
    ],
)
def test_a_page_says_how_a_teacher_answered(answers, expected, absent):
    text = explain_student(Student(), Ensemble(), answers)
    assert expected in text and absent not in text


SIZES_OF_ROWS = {
    "generalist": {"parameters": 1000, "multiplications": 2000},
    "ensemble": {"parameters": 9000, "multiplications": 5000, "asked": 1.5},
    "wide": {"parameters": 2400, "multiplications": 5100},
}


def with_latency(run, latencies):
    """As if evaluate had timed these rows."""
    for name, latency in latencies.items():
        path = run.evaluate.path(f"{name}.json")
        content = json.loads(path.read_text())
        content["row"]["cost"]["latency_ms"] = latency
        path.write_text(json.dumps(content))
        altered(run.evaluate)


def test_size_latency_and_training_stand_beside_every_row(tmp_path, make_hand_worked):
    run = make_hand_worked(tmp_path, further=SIZES_OF_ROWS)
    with_latency(run, {"generalist": {"1": 0.25, "64": 0.0125}, "ensemble": {"1": 12.5}})
    rows = {row[0]: row for row in rows_of(render(run, collect(run)), "cost")}
    assert rows["generalist"][1:7] == ["50.00 %", "1,000", "2,000 × 1.00", "–", "0.250", "0.0125"]
    assert rows["ensemble"][1:7] == ["70.00 %", "9,000", "5,000 × 2.50", "1.50", "12.5", "–"]
    assert rows["control_wall"][2:7] == ["–"] * 5 and rows["control_wall"][7] == "2.15 M"
    assert rows.keys() == {row[0] for row in rows_of(render(run, collect(run)), "metrics")}


def test_the_report_names_what_was_not_trained_and_the_line_that_does(hand_worked):
    text = text_of(render(hand_worked, collect(hand_worked)))
    assert "Not trained in this run" in text
    assert "wider (a generalist of the ensemble&#39;s multiplications); average (two" in text
    assert "wide_hard (the student wide on labels alone)" in text
    assert f"referral run --run {hand_worked.root.resolve()} --set" in text


def test_a_difference_whose_interval_holds_zero_is_said_not_to_be_measurable(hand_worked):
    page = render(hand_worked, collect(hand_worked))
    # Of ten examples only control_compute shows, which makes two errors instead of five.
    rows = {row[0]: row[8] for row in rows_of(page, "metrics")}
    assert [name for name, text in rows.items() if "not measurable" not in text] == [
        "generalist",
        "control_compute",
        "student_hard",
    ]
    assert rows["student_hard"].endswith("the same")  # as the generalist's, example by example
    assert "no measurable difference on 10 examples" in text_of(page)


def test_a_handful_of_examples_has_no_percentage_in_green(hand_worked):
    """Ten test examples, of which the ensemble fixes two."""
    page = render(hand_worked, collect(hand_worked))
    green = re.findall(r'class="[^"]*\bup\b[^"]*"[^>]*>([^<]*)<', page)
    assert green and all("%" not in text for text in green)
    assert all(re.fullmatch(r"\+\d+", text) for text in green)  # counts of fixed examples
    head = text_of(page.partition("<main>")[0])
    assert "no measurable difference" in head and "−40" not in head


def test_a_change_is_coloured_where_enough_examples_measure_it():
    """Of 20 examples 4 become right and none wrong: .2 ± .175. Of 19 nothing is said."""
    before = np.zeros(20, bool)
    after = np.arange(20) < 4
    assert is_measurable(before, after) and not is_measurable(before[1:], after[1:])
    assert not is_measurable(before, np.arange(20) < 3)


def test_dropped_specialists_are_named_in_the_head(hand_worked):
    path = hand_worked.evaluate.path("ensemble.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "dropped": [1]}))
    altered(hand_worked.evaluate)
    head = text_of(render(hand_worked, collect(hand_worked)).partition("<main>")[0])
    assert "Specialist 1 was never better on val than the generalist" in head


def test_no_tile_and_no_sentence_gives_a_larger_student_a_share(tmp_path, make_hand_worked):
    larger = {**SIZES_OF_ROWS, "main": {"parameters": 2400, "multiplications": 5100}}
    run = make_hand_worked(tmp_path, further=larger)
    head = text_of(render(run, collect(run)).partition("<main>")[0])
    assert "of the gain" not in head
    assert "errors of the student, a network of another size" in head
    assert "a network of 2.4 times the generalist&#39;s parameters and 2.5 times its" in head


def test_a_control_that_stays_the_generalist_is_said_to(hand_worked):
    for name, stage in hand_worked.controls.items():
        path = stage.path("summary.json")
        content = json.loads(path.read_text())
        best = 0 if name.startswith("control_wall") else 4000
        path.write_text(json.dumps({**content, "best_step": best}))
        altered(stage)
    text = text_of(render(hand_worked, collect(hand_worked)))
    assert "No step was better on val than its start, so it is the generalist itself." in text
    assert "is shown." in text and "was best" not in text
    assert "Its best step on val is kept, 4,000. Where" in text
