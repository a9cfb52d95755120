"""The advice on a page of its own, and in the report of a run that pulled a lever."""

import math
import re

import pytest
from advised import GENERALIST, LEVERS, lever, made_up
from evaluated import HOSTILE
from pages import Page, rows_of, text_of

from pipeline.results import collect
from pipeline.store import write_json
from trainer.report.advice_page import advice_html
from trainer.report.page import render
from trainer.report.plots import Estimate, estimates
from trainer.report.svg import HEIGHT, WIDTH

COLUMNS = [
    "name",
    "gain",
    "interval",
    "pilot",
    "training",
    "time",
    "mults",
    "params",
    "ms",
]


def plain(text):
    return text.replace("\xa0", " ").replace("\u2060", "")


def levers_of(page, section="levers"):
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(plain(page), section)]
    return {row["name"].split()[0]: row for row in rows}


# The page


def test_the_sentence_is_the_first_line_of_the_page():
    advice = made_up()
    assert plain(Page(advice_html(advice)).text[0]) == advice["sentence"]


def test_every_lever_has_a_row_and_one_is_advised():
    rows = levers_of(advice_html(made_up()))
    assert set(rows) == {each["name"] for each in LEVERS} | {"stop"}
    assert [name for name, row in rows.items() if "advised" in row["name"]] == ["shortlist"]
    assert rows["copies"] == {
        "name": "copies 24 jobs, side by side; no pilot after round 0",
        "gain": "+1.2",
        "interval": "0.3 to 2.1",
        "pilot": "+0.4 at 15 %",
        "training": "× 1.40",
        "time": "× 0.20",
        "mults": "× 2.10",
        "params": "× 7.00",
        "ms": "0.264",
    }


def test_a_number_of_a_front_is_marked():
    page = advice_html(made_up())
    marked = re.findall(r'<td class="mark best"[^>]*>([^<]*)</td>', page)
    fronts = sum(len(each["pareto"]) for each in made_up()["levers"])
    assert len(marked) == fronts > 0


def test_what_is_not_possible_is_said_with_why():
    page = advice_html(made_up())
    assert "<dt>rerank is not possible</dt><dd>10,000 classes, but a head without bias</dd>" in page


@pytest.mark.parametrize("hostile", HOSTILE[:8] + HOSTILE[11:15])
def test_no_text_of_an_advice_becomes_markup(hostile):
    advice = made_up(not_possible={hostile: hostile}, sentence=hostile, elsewhere=hostile)
    advice["diagnosis"]["sentences"] = [hostile]
    advice["levers"][0] |= {"needs": hostile, "command": hostile}
    harmless = Page(advice_html(made_up())).tags
    tags = Page(advice_html(advice)).tags
    assert {tag for tag, _ in tags} <= {tag for tag, _ in harmless} | {"pre"}
    assert all(not name.startswith("on") for _, attributes in tags for name in attributes)


def test_a_page_needs_no_script_and_asks_nobody():
    tags = Page(advice_html(made_up())).tags
    assert "script" not in {tag for tag, _ in tags}
    urls = [attributes.get(key) for _, attributes in tags for key in ("src", "href")]
    assert {url for url in urls if url} == {"data:,"}


@pytest.mark.parametrize("levers", [[], LEVERS[:1]])
def test_few_levers_or_none_can_be_shown(levers):
    page = advice_html(made_up(levers=levers))
    assert set(levers_of(page)) == {"stop", *(each["name"] for each in levers)}


def test_what_nobody_measured_is_a_dash():
    unknown = lever("wider", 1.0, 0.5, 2.0, 2.0, 2.0, 2.0, measured=None) | {"latency_ms": None}
    row = levers_of(advice_html(made_up(levers=[unknown])))["wider"]
    assert (row["pilot"], row["ms"]) == ("–", "–")


def test_the_command_that_goes_on_is_shown_but_to_who_is_advised_to_stop():
    go_on = "referral run --advised --run runs/mine"
    for levers, is_shown in ((LEVERS, True), ([], False)):
        advice = made_up(levers=levers)
        advice["levers"] = [each | {"command": go_on} for each in advice["levers"]]
        assert (f"<pre>{go_on}</pre>" in advice_html(advice)) == is_shown


# In the report


def advised_run(run, scarce="wall_clock"):
    write_json(run.root / "advice.json", made_up(scarce))
    return render(run, collect(run))


def test_the_report_shows_predicted_beside_measured(hand_worked):
    """Copies, +1.2 (0.3 to 2.1) predicted: here they are right on 2 of 10 examples more."""
    levers = [each for each in LEVERS if each["name"] == "copies"]
    write_json(hand_worked.root / "advice.json", made_up("wall_clock", levers=levers))
    page = plain(render(hand_worked, collect(hand_worked)))
    row = next(row for row in rows_of(page, "advice") if row[0].startswith("copies"))
    assert re.fullmatch(r"\+20\.0 \(.* to .*\) above", row[3])
    assert "Predicted of copies, on val: +1.2 points (0.3 to 2.1). Measured on test: +20.0" in (
        text_of(page)
    )


def test_a_report_of_a_run_that_pulled_another_lever_says_nothing_of_the_best(hand_worked):
    page = plain(advised_run(hand_worked, ""))
    assert "shortlist advised" in text_of(page)
    assert "Predicted of" not in text_of(page)


def test_a_report_without_advice_has_no_such_section(hand_worked):
    page = render(hand_worked, collect(hand_worked))
    assert 'id="advice"' not in page and "#advice" not in page


def test_a_report_that_measured_no_lever_says_so(deep):
    page = text_of(advised_run(deep, ""))
    assert "This run pulled none of the levers in full" in page


# The drawing

NUMBER = r"([\d.]+)"


def estimate(name, x, y, half=1.0, style="dot"):
    return Estimate(name, "generalist", x, y, y - half, y + half, label=name, style=style)


def dots(svg):
    pattern = rf'<circle class="dot[^"]*" cx="{NUMBER}" cy="{NUMBER}" r="[\d.]+"><title>([^:]*):'
    return {name: (float(x), float(y)) for x, y, name in re.findall(pattern, str(svg))}


def whiskers(svg):
    pattern = rf'class="whisker [^"]*" d="M{NUMBER} {NUMBER} V{NUMBER}"'
    return [tuple(map(float, each)) for each in re.findall(pattern, str(svg))]


def test_a_dot_stands_in_the_middle_of_its_even_interval():
    svg = estimates([estimate("a", 0, 1), estimate("b", 2, 4)], [], "cost", "gain")
    for (x, y), (across, top, bottom) in zip(dots(svg).values(), whiskers(svg), strict=True):
        assert x == across
        assert y == pytest.approx((top + bottom) / 2, abs=0.11)


def test_values_of_one_cost_stand_beside_each_other_in_the_order_of_their_gains():
    values = [estimate(name, 1.0, gain) for name, gain in zip("abc", (3, 1, 2), strict=True)]
    located = dots(estimates([*values, estimate("d", 3, 0)], [], "cost", "gain"))
    columns = sorted("abc", key=lambda name: located[name][0])
    assert columns == ["b", "c", "a"]
    steps = [located[two][0] - located[one][0] for one, two in zip("bc", "ca", strict=True)]
    assert steps == pytest.approx([9, 9], abs=0.11)


def test_the_front_goes_along_and_then_up_through_its_dots():
    values = [estimate("a", 0, 0), estimate("b", 1, 2), estimate("c", 3, 1), estimate("d", 4, 5)]
    svg = estimates(values, ["a", "b", "d"], "cost", "gain")
    (path,) = re.findall(r'class="line front [^"]*" d="M([^"]*)"', str(svg))
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    expected = [value for name in "abd" for value in dots(svg)[name]]
    assert numbers == expected


def test_what_was_measured_is_hollow_and_on_no_front():
    values = [estimate("a", 0, 0), estimate("b", 1, 2), estimate("b", 1, 9, style="hollow")]
    svg = str(estimates(values, ["a", "b"], "cost", "gain"))
    assert len(re.findall(r'class="dot k-generalist hollow"', svg)) == 1
    (path,) = re.findall(r'class="line front [^"]*" d="M([^"]*)"', svg)
    assert len(re.findall(r"V", path)) == 1


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 50.0])
def test_everything_is_drawn_inside(spread):
    values = [estimate(str(i), 1 + spread * i % 3, math.sin(i) * 5, 2.0) for i in range(9)]
    svg = str(estimates(values, [], "cost", "gain"))
    for x, y in dots(svg).values():
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_one_cost_for_all_is_no_drawing():
    own = made_up(levers=[lever("train_on", 1.0, 0.5, 1.0, 1.0, 1.0, 1.0)])
    assert "against multiplications" not in advice_html(own)
    assert GENERALIST["multiplications"] == own["levers"][0]["multiplications"]


def test_nothing_to_draw_is_no_drawing():
    assert estimates([], [], "cost", "gain") == ""
