"""What `referral advise` prints, of a made-up advice.json."""

import io
import json
import re

import pytest
from advised import LEVERS, lever, made_up

from launch.advice import show_advice
from pipeline.config import UserError
from pipeline.files import DamagedFile
from pipeline.terminal import Console


def shown(ward, advice, width=120) -> str:
    run = ward.run()
    (run.root / "advice.json").write_text(json.dumps(advice))
    console = Console(file=io.StringIO(), width=width)
    show_advice(run, console)
    return console.file.getvalue()


def table_of(text, first="points"):
    """The lines of the table whose head has this word, as lists of cells."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == [first])
    rows = []
    for line in lines[head + 1 :]:
        if not line.strip():
            break
        rows.append(re.split(r" {2,}", line.strip()))
    return rows


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("scarce", ["", "multiplications", "trunk"])
def test_no_line_is_wider_than_the_terminal_but_the_command(ward, width, scarce):
    lines = shown(ward, made_up(scarce), width).splitlines()
    assert len(lines) > 20
    assert [line for line in lines if len(line) > width] == [
        line for line in lines if line.startswith("next: ") and len(line) > width
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_advice_comes_first_and_the_command_that_goes_on_last(ward, width):
    advice = made_up()
    text = shown(ward, advice, width)
    assert " ".join(text.split()).startswith(advice["sentence"])
    assert text.rstrip().endswith("referral run --advised --run " + str(ward.run_path))


@pytest.mark.parametrize("width", [80, 120])
def test_a_lever_has_its_gain_its_costs_and_the_fronts_that_it_is_on(ward, width):
    (row,) = [row for row in table_of(shown(ward, made_up(), width)) if "▸ shortlist" in row[0]]
    expected = ["▸ shortlist", "+4.8", "4.0 to 5.6", "× 1.00 ●"]
    expected += ["× 1.00 ●"] if width == 120 else []  # time
    expected += ["× 1.00 ●", "× 2.00 ●", "0.132 ●"]
    assert row[: len(expected)] == expected


@pytest.mark.parametrize("width", [80, 120])
def test_every_lever_says_what_it_needs_and_where_its_pilots_ended(ward, width):
    text = " ".join(shown(ward, made_up(), width).split())
    assert "a network of twice the width" in text
    assert "rerank is not possible: 10,000 classes, but a head without bias" in text
    assert "stopped: on, copies" in text
    if width == 80:
        assert "train_on: as many steps again; no pilot after round 0" in text


def test_a_lever_that_was_piloted_to_the_end_is_not_called_dropped(ward):
    lines = shown(ward, made_up(), 80).splitlines()
    assert "  wider: a network of twice the width" in lines


def test_a_re_ranker_without_pilots_of_its_own_ends_with_the_second_generalist(ward):
    rerank = lever("rerank", 3.0, 0.5, 0.5, 1.01, 2.0, 1.1, needs="few steps")
    advice = made_up(levers=[*LEVERS, rerank])
    assert "  rerank: few steps" in shown(ward, advice, 80).splitlines()
    advice["rounds"][0]["dropped"] = ["second"]
    assert "  rerank: few steps; no pilot after round 0" in shown(ward, advice, 80).splitlines()
    advice["rounds"][0] = {"families": ["second", "rerank"], "dropped": ["second"], "share": 0.1}
    assert "  rerank: few steps" in shown(ward, advice, 80).splitlines()


def test_each_scarcity_has_its_best_lever_and_its_limit(ward):
    rows = table_of(shown(ward, made_up("parameters", 1.0)), "where")
    assert rows == [
        ["training", "shortlist", "+4.8", "4.0 to 5.6", "× 1.00"],
        ["time", "shortlist", "+4.8", "4.0 to 5.6", "× 1.00"],
        ["multiplications", "shortlist", "+4.8", "4.0 to 5.6", "× 1.10"],
        ["latency", "shortlist", "+4.8", "4.0 to 5.6", "× 1.50"],
        ["parameters", "average_student", "+2.1", "1.0 to 3.2", "× 1.00"],
        ["an untouched trunk", "branches", "+1.5", "0.7 to 2.3", "it alone"],
    ]


def test_who_is_advised_to_stop_is_not_told_to_go_on_with_a_lever(ward):
    text = shown(ward, made_up(levers=[]))
    assert text.startswith("Stop here: no other lever keeps to 1.00 × the generalist's training.")
    assert "--advised" not in text
    assert text.rstrip().endswith(f"next: referral run --run {ward.run_path}")


def test_markup_of_a_name_is_text(ward):
    advice = made_up(not_possible={"rerank": "[bold]no[/bold]"})
    assert "[bold]no[/bold]" in shown(ward, advice)


def test_without_advice_the_message_says_how_to_get_some(ward):
    with pytest.raises(UserError, match="has no advice.json.*referral advise"):
        show_advice(ward.run(), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "change, reason",
    [({"best": "rerank"}, "no lever 'rerank'"), ({"levers": None}, "lacks levers")],
)
def test_a_damaged_file_is_named(ward, change, reason):
    advice = {k: v for k, v in (made_up() | change).items() if v is not None}
    with pytest.raises(DamagedFile, match=f"advice.json is damaged .*{reason}"):
        shown(ward, advice)
