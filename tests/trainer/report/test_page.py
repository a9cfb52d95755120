import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from trainer.report.page import manifest_counts, render, write_report
from trainer.report.results import collect, verdict


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "title"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if not self.open and data.strip():
            self.text.append(data.strip())


def rows_of(html, section):
    """The cells of the first table of a section, as text."""
    part = re.search(rf'<section id="{section}".*?</section>', html, re.S).group()
    body = re.search(r"<tbody>(.*?)</tbody>", part, re.S).group(1)
    clean = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", body, re.S)]
    return [[re.sub(r"<[^>]*>", "", cell).replace("\xa0", " ").strip() for cell in row] for row in clean]


def test_report_writes_both_files(hand_worked, tmp_path):
    results = write_report(hand_worked, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results == collect(hand_worked)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")


def test_the_verdict_is_the_first_line_of_the_page(hand_worked):
    results = collect(hand_worked)
    first = Page(render(hand_worked, results)).text[0]
    assert first.replace("\xa0", " ").replace("\u2060", "") == verdict(results)


def test_coverage_of_the_hand_worked_run(hand_worked):
    rows = rows_of(render(hand_worked, collect(hand_worked)), "coverage")
    # By hand: classes 4, 5 are covered by none, 0, 1, 3 by one, 2 by two specialists.
    assert rows == [
        ["0", "2", "1", "1", "+0", "0.0 %"], ["1", "6", "3", "4", "+1", "+33.3 %"],
        ["2", "2", "1", "2", "+1", "+100.0 %"],
    ]  # fmt: skip


def test_deciles_of_the_hand_worked_run_are_ordered_by_training_counts(hand_worked):
    rows = rows_of(render(hand_worked, collect(hand_worked)), "frequency")
    # Six classes make six parts; 10 training examples of class 0, whose second test example the ensemble put right.
    assert [row[1] for row in rows] == ["10", "20", "30", "40", "50", "60"]
    assert rows[0] == ["1", "10", "2", "50.0 %", "100.0 %", "100.0 %", "100.0 %"]


def test_figures_mark_the_best_and_give_the_paired_difference(hand_worked):
    html = render(hand_worked, collect(hand_worked))
    rows = {row[0]: row for row in rows_of(html, "figures")}
    assert rows["generalist"][1] == "50.00 %" and rows["ensemble"][1] == "70.00 %"
    assert rows["control_compute"][7] == "2"  # errors
    assert rows["ensemble"][8].startswith("+20.00 ± ")
    best = re.findall(r'<td class="mark best" title="best of this column">([^<]*)<', html)
    assert "80.00\xa0%" in best


def test_equal_class_counts_have_no_deciles(hand_worked):
    html = render(hand_worked, collect(hand_worked), class_counts=[7] * 6)
    assert "Every class has the same number of training examples, 7" in html


def test_test_labels_stand_in_for_a_manifest_without_counts(hand_worked):
    manifest = hand_worked.root.parent / "shards" / "manifest.json"
    manifest.unlink()
    assert manifest_counts(hand_worked.config.data.train, 6) is None
    assert "the test split’s stand in" in render(hand_worked, collect(hand_worked))


def test_manifest_counts_are_summed_over_shards_by_class_name(hand_worked):
    assert manifest_counts(hand_worked.config.data.train, 6).tolist() == [10, 20, 30, 40, 50, 60]


def test_no_script_no_handler_and_nothing_fetched(glyphs):
    run, images = glyphs
    page = Page(render(run, collect(run), images))
    fetching = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "formaction", "background"}
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        for key in fetching & set(attributes):
            assert attributes[key].startswith(("data:", "#")), (tag, attributes[key])
    style = re.search(r"<style>(.*?)</style>", render(run, collect(run), images), re.S).group(1)
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_hostile_class_names_are_text(glyphs):
    run, images = glyphs
    html = render(run, collect(run), images)
    page = Page(html)
    text = " ".join(page.text)
    shown = [name for name in images.class_names[:14] if name.strip() and name in text]
    assert len(shown) >= 5  # those among the most confused of their group
    assert "<script" not in html and "<img src=x" not in html and "</script" not in html
    assert html.count("</style>") == 1 and html.count("<!--") == 0
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title link style body header h1 h2 h3 p div small nav a main section table thead tbody tr th "
        "td br span dl dt dd figure figcaption svg path circle rect text ul li b article img bdi details summary pre "
        "footer".split()
    )


@pytest.mark.parametrize("name", ["nul\x00 bell\x07", "lone \ud800 surrogate", "x" * 5000, "  ", "{{ 7 * 7 }}"])
def test_any_string_may_be_a_class_name(hand_worked, tmp_path, name):
    model = hand_worked.generalist.path("model.json")
    model.write_text(json.dumps({"class_names": [name] * 6}))
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
    images.pixels = np.random.default_rng(0).integers(0, 256, (len(images.labels), 3, 160, 120), dtype=np.uint8)
    html = render(run, collect(run), images)
    assert "data:image/jpeg;base64," in html and len(html) < 4_000_000


@pytest.mark.parametrize("pixels", [np.zeros((480, 40), np.int64), np.zeros((480, 5, 8, 8), np.uint8)])
def test_inputs_that_are_no_pictures_are_left_out_and_the_page_says_so(glyphs, pixels):
    run, images = glyphs
    images.pixels = pixels
    html = render(run, collect(run), images)
    assert "<img" not in html and "No pictures: the inputs are no 8-bit gray or RGB images" in html


def test_a_missing_specialist_is_named(tmp_path, make_hand_worked):
    run = make_hand_worked(tmp_path, missing=[1])
    html = render(run, collect(run))
    assert "Specialist 1 missing" in html
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
    assert "No pictures: the inputs are no 8-bit gray or RGB images" in page
    shown = re.findall(r'<q class="phrase clip" title="(phrase &lt;\d+&gt; x+…)"', page)
    assert len(shown) > 5 and all(len(html.unescape(text)) == 161 for text in shown)
    assert '<span class="blank' not in page and "<img" not in page and "picture of that class" not in page
