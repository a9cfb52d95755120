"""What fits on a terminal, what it explains, and what is typed next."""

import io
import json
import shlex

import pytest

import launch.cli
from launch.display import Display
from launch.journal import JobRecord, Journal
from launch.results import COLUMNS, _show_results, comparison_tables, cost_columns, legend
from launch.results import shown_columns as shown
from launch.status import StageStatus, next_command, progress, table
from pipeline.terminal import Console

WIDTHS = pytest.mark.parametrize("width", [60, 80])


def terminal(width):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def lines_of(console):
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(top1):
    return {
        "n": 25_320,
        "top1": top1,
        "top5": 0.97,
        "nll": 0.7333,
        "cnll": 0.694,
        "brier": 0.3287,
        "ece": 0.0652,
        "macro_top1": top1,
        "parameters": 39_822,
        "multiplications": 128_208,
        "asked": 2.0,
        "cost": {
            "seconds": 7261.0,
            "examples_seen": 2_048_000,
            "peak_memory_bytes": 2**29,
            "latency_ms": {"1": 0.143, "256": 0.00555},
        },
    }


RESULTS = {
    "generalist": row(0.76),
    "ensemble": row(0.78),
    "controls": {"control_compute": row(0.77), "student_hard": row(0.765)},
    "missing_controls": {
        "names": ["wider"],
        "command": 'referral run --run RUN --set \'controls.rows=["wider", "average"]\' --force',
    },
    "students": {"main": row(0.77), "wide": row(0.8)},
    "damage": {},
}
COMMANDS = ("report: ", "next: ", "  referral ")  # lines that are copied as they are


@WIDTHS
def test_results_fit_the_terminal_and_wrap_between_words(ward, width):
    console = terminal(width)
    _show_results(RESULTS, ward.run(), console)
    lines = lines_of(console)
    assert max(len(line) for line in lines if not line.startswith(COMMANDS)) <= width
    words = " ".join(" ".join(lines).split())
    assert "fewer top-1 errors than the generalist" in words
    assert "The student main, one network, keeps" in words and "student_hard" in words
    assert lines[-1].startswith("next: referral predict ") and lines[-1].endswith(" FILES")
    (command,) = [line for line in lines if "controls.rows" in line]
    assert shlex.split(command)[-1] == "--force"  # whole, on a line of its own


def test_a_line_below_the_table_explains_the_columns_that_are_shown():
    explained = legend(shown(RESULTS, cost_columns(RESULTS), 120))
    assert "time: of that training on the clock, summed over jobs that may run side by side" in (
        explained
    )
    assert explained.count("ms (1), ms (256): an example") == 1
    narrow = shown(RESULTS, cost_columns(RESULTS), 60)
    assert "time" not in [column.title for column in narrow]
    assert "time: " not in legend(narrow)
    assert legend(shown(RESULTS, COLUMNS)).startswith("NLL: nats; cNLL: after temperature")


STAGES = [
    StageStatus(
        stage="controls/control_compute",
        job="controls",
        state="running",
        step=7200,
        steps=7200,
        loss=0.227,
        learning_rate=0.0017,
        val_top1=0.771,
        samples_per_s=42_966.0,
        eta_s=185.0,
        seconds=94.0,
    ),
    StageStatus(stage="evaluation", job="report", state="running", seconds=12.0),
    StageStatus(stage="report", job="report", state="failed", detail="exit code 1, no words"),
]


@WIDTHS
def test_the_table_of_stages_fits_the_terminal_with_metric_and_time_to_go(width):
    console = terminal(width)
    console.print(table(STAGES, width=width))
    lines = lines_of(console)
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    assert "77.1" in words and "3 min" in words and "samples/s" not in words


def test_a_running_stage_without_steps_says_how_long_it_has_run():
    assert progress(STAGES[1]) == "for 12 s"
    assert progress(STAGES[0]).endswith("42,966 samples/s · 3 min 05 s to go")


def stage(state):
    return StageStatus(stage="generalist", job="generalist", state=state)


@pytest.mark.parametrize(
    "states, launched, aim, command",
    [
        (["done", "done"], True, "run", "referral report runs/a"),
        (["done"], True, "advise", "referral run --advised --run runs/a"),
        (["done", "running", "failed"], True, "run", "referral status runs/a --watch"),
        (["done", "stale", "waiting"], True, "run", "referral run --run runs/a --force"),
        (["done", "failed", "blocked"], True, "run", "referral retry runs/a"),
        (["interrupted", "waiting"], True, "run", "referral retry runs/a"),
        (["waiting"], False, "run", "referral run --run runs/a"),
    ],
)
def test_what_is_typed_next_follows_from_how_the_stages_stand(states, launched, aim, command):
    jobs = {"generalist": JobRecord("done")} if launched else {}
    stages = [stage(state) for state in states]
    assert next_command(stages, Journal(jobs, aim=aim), "runs/a") == command


def test_status_ends_with_what_is_typed_next_and_explains_time(ward, referral):
    ward.run()
    code, out, _ = referral("status", ward.run_path)
    assert code == 0 and "time: on the clock, since a running stage began" in out
    assert out.splitlines()[-1] == f"next: referral run --run {ward.run_path}"


def test_the_quick_demo_ends_by_saying_that_its_figures_mean_little(referral, monkeypatch):
    monkeypatch.setattr(launch.cli.demos, "make_glyphs", lambda *_: None)
    monkeypatch.setattr(launch.cli, "start", lambda *args, **options: 0)
    out = referral("demo", "--run", "run", "--quick")[1]
    *_, why, command = out.splitlines()
    assert why.startswith("These figures mean little")
    assert command == "next: referral demo --run run-whole"
    assert "mean little" not in referral("demo", "--run", "whole")[1]


def test_events_wrap_between_words_on_a_terminal_and_are_one_line_in_a_file():
    text = "24 groups of 45 to 137 classes hold 96.9 % of the errors; " * 3
    narrow = terminal(60)
    Display(narrow, narrow).event(text)
    assert max(map(len, lines_of(narrow))) <= 60
    assert " ".join(narrow.file.getvalue().split()).endswith("of the errors;")
    file = Console(file=io.StringIO(), width=60)
    Display(file, file).event(text)
    assert len(lines_of(file)) == 1


@WIDTHS
def test_a_comparison_of_many_metrics_is_several_tables_that_fit(width):
    metrics = ["top1", "nll", "cnll", "ece", "seconds"]
    spread = {"n": 2, "mean": 0.5, "sd": 0.01, "deviation": 0.01, "values": [0.4, 0.6]}
    comparison = {
        "metrics": metrics,
        "versus": None,
        "variants": [{"name": "a", "runs": 2}],
        "rows": [
            {
                "row": name,
                "variant": "a",
                "runs": 2,
                "figures": dict.fromkeys(metrics, spread),
            }
            for name in ("generalist", "control_compute")
        ],
    }
    console = terminal(width)
    tables = comparison_tables(json.loads(json.dumps(comparison)), width)
    for part in tables:
        console.print(part)
    lines = lines_of(console)
    assert len(tables) > 1 and max(map(len, lines)) <= width
    assert sum(line.startswith("generalist") for line in lines) == len(tables)
    assert len(comparison_tables(comparison)) == 1
