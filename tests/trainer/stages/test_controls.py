"""Controls: rows of other networks, twins, best steps, and specialists that are dropped."""

import json
import shutil

import numpy as np
import pytest
import torch
from altered import altered
from running import run_all
from toy import toy_config, write_toy

from ensemble import EnsembleSettings
from networks import load_classifier, multiplications, parameter_count
from pipeline.config import UserError
from pipeline.controls import missing_controls
from pipeline.graph import RunDirectory
from pipeline.results import dropped_line
from pipeline.store import read_json, write_json
from trainer.distributed.ranks import Ranks, process_group
from trainer.report.explanations import CONTROLS
from trainer.session import Session
from trainer.stages.control import never, trained_lengths, wall_or_compute
from trainer.stages.rehearsal import rehearse
from trainer.stages.validate import validate_calibrated

ROWS = 'controls.rows=["train_on", "wider", "average", "shortlist"]'
EARLY = (
    "specialists.patience=1",
    "specialists.validate_every=5",
    "specialists.learning_rate=0.03",
    "controls.learning_rates=[0.003]",
)
WIDE = "students.wide={steps=10, learning_rate=0.003, model={width=40}}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 8})


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("run"), toy_config(data, ROWS, *EARLY, WIDE))


@pytest.fixture(scope="module")
def results(finished):
    return read_json(finished.root / "results.json")


def summary_of(stage):
    return read_json(stage.path("summary.json"))


def networks_of(*stages):
    return [load_classifier(stage.path("model.json").parent).eval() for stage in stages]


def test_every_rival_has_a_row_and_nothing_is_missing(results):
    rows = ["control_wall", "control_compute", "train_on", "wider", "average", "shortlist"]
    assert list(results["controls"]) == [*rows, "student_hard", "wide_hard"]
    assert results["missing_controls"] is None


def test_wider_multiplies_as_much_as_the_ensemble(finished, results):
    wider = results["controls"]["wider"]["multiplications"]
    target = results["ensemble"]["multiplications"]  # on test. It was chosen on val
    assert wider == pytest.approx(target, rel=0.1) and wider > 1.2 * own_multiplications(results)
    (network,) = networks_of(finished.controls["wider"])
    assert multiplications(network, network.zero_input()) == wider
    assert parameter_count(network) == results["controls"]["wider"]["parameters"]
    assert summary_of(finished.controls["wider"])["steps"] == finished.config.train.steps


def own_multiplications(results):
    return results["generalist"]["multiplications"]


def test_average_is_the_mean_of_two_generalists_of_other_seeds(finished, results):
    networks = networks_of(finished.generalist, finished.second)
    with process_group(finished.config.engine) as ranks:
        shards = Session(finished, ranks).shards("test")
    raw = torch.as_tensor(shards.inputs(np.arange(len(shards))))
    with torch.no_grad():
        p = sum(network(raw).softmax(1) for network in networks) / 2
    hit = p.argmax(1).numpy() == shards.labels
    assert results["controls"]["average"]["top1"] == pytest.approx(hit.mean(), abs=1e-9)
    assert results["controls"]["average"]["multiplications"] == 2 * own_multiplications(results)
    assert results["controls"]["average"]["cost"]["examples_seen"] == 2 * 60 * 96


def test_shortlist_is_fitted_on_val_and_costs_its_rows_alone(finished, results):
    settings = EnsembleSettings.load(finished.controls["shortlist"].path("ensemble.json").parent)
    row = results["controls"]["shortlist"]
    saved = (24 - settings.shortlist) * 24  # classes, numbers of the last layer
    assert row["multiplications"] == 2 * own_multiplications(results) - saved
    assert row["asked"] == 1


def test_size_and_latency_stand_beside_every_row(results):
    rows = [results["generalist"], results["ensemble"]]
    rows += [*results["controls"].values(), *results["students"].values()]
    for row in rows:
        assert row["parameters"] > 0 and row["multiplications"] > 0
        assert all(0 < ms < 1000 for ms in row["cost"]["latency_ms"].values())
    assert len({tuple(row["cost"]["latency_ms"]) for row in rows}) == 1
    assert "1" in results["generalist"]["cost"]["softmax_ms"]
    assert 0 < results["ensemble"]["asked"] <= 6


def test_control_compute_sees_what_the_specialists_saw(finished, results):
    seen = [summary_of(stage)["examples_seen"] for stage in finished.specialists]
    assert min(seen) < 30 * 96  # some stopped early
    assert summary_of(finished.controls["control_compute"])["examples_seen"] == sum(seen)
    assert summary_of(finished.controls["control_wall-0"])["examples_seen"] == max(seen)


def test_a_control_keeps_its_best_step_and_the_start_is_a_candidate(finished):
    generalist = summary_of(finished.generalist)["val"]
    for name, stage in finished.controls.items():
        if not name.startswith("control_"):
            continue
        rows = [json.loads(line) for line in stage.path("metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
        start = next(row for row in rows if row["step"] == 0)
        assert start["val/raw_loss"] == pytest.approx(generalist["loss"], rel=1e-5)
        assert start["val/loss"] <= start["val/raw_loss"]
        assert start["val/top1"] == pytest.approx(generalist["top1"], rel=1e-5)
        summary = summary_of(stage)
        assert summary["best_step"] == min(losses, key=lambda step: losses[step])
        assert summary["val"]["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
        assert summary["last"]["loss"] == losses[summary["steps"]] and not summary["stopped_early"]
    assert never(30) > 30


def test_the_best_step_of_a_control_is_found_after_calibration(finished):
    """Logits ten times as large are as right as before: raw loss is worse, calibrated the same."""
    (network,) = networks_of(finished.generalist)
    with process_group(finished.config.engine) as ranks:
        validate = validate_calibrated(Session(finished, ranks))
        before = validate(network)
        with torch.no_grad():
            network.head.weight *= 10
            network.head.bias *= 10
        after = validate(network)
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
    assert after["raw_loss"] > 1.2 * before["raw_loss"] and after["top1"] == before["top1"]


def test_a_control_that_only_gets_worse_is_the_generalist(data, finished, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    config = toy_config(data, ROWS, *EARLY, WIDE, "controls.learning_rates=[30.0]")
    run = RunDirectory(root, config)
    for stage in run.controls.values():
        stage.clear()
    run = run_all(root, config, only={"control"})
    summary = summary_of(run.controls["control_wall-0"])
    assert summary["best_step"] == 0 and summary["steps"] > 0
    one, other = networks_of(run.generalist, run.controls["control_wall-0"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_taught_student_has_a_twin_of_its_network_and_steps(finished, results):
    for name, twin in {"main": "student_hard", "wide": "wide_hard"}.items():
        student, of_labels = finished.students[name], finished.controls[twin]
        assert summary_of(student)["steps"] == summary_of(of_labels)["steps"]
        sizes = results["students"][name], results["controls"][twin]
        assert len({row["parameters"] for row in sizes}) == 1
        assert twin in results["students"][name]["versus"]
        assert finished.schedule(of_labels) is finished.config.students[name]


@pytest.mark.parametrize("twins, named", [("main", ["student_hard"]), ("none", [])])
def test_twins_can_be_switched_off_and_are_named(data, twins, named):
    config = toy_config(data, f"controls.twins={twins}", WIDE)
    run = RunDirectory("/nowhere", config)
    assert [name for name in run.controls if name.endswith("_hard")] == named


def test_a_student_of_the_users_own_stands_for_the_twin(data):
    own = 'students.wide_hard={method="hard"}'
    run = RunDirectory("/nowhere", toy_config(data, "students.wide={}", own))
    assert [name for name in run.controls if name.endswith("_hard")] == ["student_hard"]


def test_specialists_that_never_beat_the_generalist_are_dropped(data, finished, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    config = toy_config(data, ROWS, *EARLY, WIDE)
    run = RunDirectory(root, config)
    for index in (1, 4):
        path = run.specialists[index].path("summary.json")
        write_json(path, read_json(path) | {"best_step": 0})
        altered(run.specialists[index])
    for name in ("ensemble", "evaluate", "report"):
        for stage in run.find(name):
            stage.clear()
    run = run_all(root, config, only={"ensemble", "evaluate", "report"})
    results = read_json(root / "results.json")
    assert read_json(root / "ensemble.json")["skipped"] == [1, 4] == results["dropped"]
    assert [row["index"] for row in results["specialists"]] == [0, 2, 3, 5]
    line = dropped_line(results)
    assert line is not None and line in (root / "report.html").read_text()


def test_an_ensemble_whose_every_specialist_is_dropped_is_the_generalist(data, finished, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    config = toy_config(data, *EARLY, "controls.enabled=false", "students={}")
    run = RunDirectory(root, config)
    for stage in run.specialists:
        path = stage.path("summary.json")
        write_json(path, read_json(path) | {"best_step": 0})
        altered(stage)
    for name in ("ensemble", "evaluate", "report"):
        for stage in run.find(name):
            stage.clear()
    run_all(root, config, only={"ensemble", "evaluate", "report"})
    results = read_json(root / "results.json")
    assert results["dropped"] == [0, 1, 2, 3, 4, 5] and results["ensemble"]["asked"] == 0
    assert results["ensemble"]["top1"] == results["generalist"]["top1"]


def test_missing_specialists_count_nothing_for_the_controls(finished, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    run = RunDirectory(root, finished.config)
    run.specialists[0].clear()
    steps = [summary_of(stage)["steps"] for stage in run.specialists[1:]]
    session = Session(run, Ranks(0, 1, torch.device("cpu")))
    assert trained_lengths(session) == steps


def test_control_compute_trains_a_share_of_the_specialists_steps(finished):
    bounded = finished.config.controls.model_copy(update={"max_share": 0.25})
    config = finished.config.model_copy(update={"controls": bounded})
    run = RunDirectory(finished.root, config)
    changed = [name for name, stage in run.controls.items() if not stage.is_done]
    assert changed == ["control_compute"]  # the walls, twins and rows stay as they are
    session = Session(run, Ranks(0, 1, torch.device("cpu")))
    lengths = [40, 40, 20]
    whole = Session(finished, session.ranks)
    assert wall_or_compute(whole, "control_compute", lengths)[1] == 100
    assert wall_or_compute(session, "control_compute", lengths)[1] == 25
    assert wall_or_compute(session, "control_wall-0", lengths)[1] == 40
    explained = CONTROLS["control_compute"](run)
    assert "for 25 % (controls.max_share) as many further examples as all" in explained


def test_a_network_without_a_width_needs_controls_model(data, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from torch import nn\n"
        "def build(shape, units=7):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, units))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = toy_config(
        data,
        'controls.rows=["wider"]',
        "model.name=of_mine:build",
        "students={}",
        "controls.enabled=false",
    )
    session = Session(RunDirectory(tmp_path / "run", config), Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match="name another network in controls.model"):
        rehearse(session, 1)
    chosen = config.controls.model_copy(update={"model": {"options": {"units": 9}}})
    able = config.model_copy(update={"controls": chosen})
    session = Session(RunDirectory(tmp_path / "run", able), Ranks(0, 1, torch.device("cpu")))
    parts, _ = rehearse(session, 1)
    heads = [part.network.head for part in parts if part.section == "train"]
    assert [head.in_features for head in heads] == [7, 9]


def test_a_deep_ensemble_of_two_is_the_average(data):
    words = ("ensemble.kind=deep", "ensemble.members=2", "students={}")
    run = RunDirectory("/nowhere", toy_config(data, *words))
    assert missing_controls(run, []) == ["train_on", "wider", "shortlist"]


def test_nobody_misses_train_on_where_control_compute_trains_the_generalist_on(data):
    run = RunDirectory("/nowhere", toy_config(data, "students={}"))
    assert missing_controls(run, ["control_compute"]) == ["wider", "average", "shortlist"]


def test_train_on_is_the_generalist_for_as_long_again_and_its_best_step(finished, results):
    stage = finished.controls["train_on"]
    summary = summary_of(stage)
    assert stage.inputs == (finished.generalist,)
    assert summary["steps"] == finished.config.train.steps
    rows = [json.loads(line) for line in stage.path("metrics.jsonl").read_text().splitlines()]
    validated = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    assert sorted(validated) == list(range(0, 61, 6))
    assert summary["best_step"] == min(validated, key=lambda step: validated[step])
    # The start is the generalist itself, at the same top-1.
    started = [row for row in rows if "val/top1" in row][0]
    before = summary_of(finished.generalist)["val"]["top1"]
    assert started["val/top1"] == pytest.approx(before)
    seen = results["controls"]["train_on"]["cost"]["examples_seen"]
    assert seen == 2 * results["generalist"]["cost"]["examples_seen"]


def test_an_ensemble_of_one_is_the_generalist_and_wider_is_twice_it(data, tmp_path):
    words = ("ensemble.kind=deep", "ensemble.members=1", "students={}")
    rows = 'controls.rows=["train_on", "wider"]'
    run = run_all(tmp_path / "run", toy_config(data, *words, rows))
    assert {stage.place for stage in run.stages} == {
        "generalist",
        "ensemble",
        "controls/train_on",
        "controls/wider",
        "evaluation",
        "report",
    }
    alone = read_json(run.root / "results.json")
    for metric in ("top1", "nll", "multiplications"):
        assert alone["ensemble"][metric] == pytest.approx(alone["generalist"][metric], rel=1e-5)
    assert len(alone["sizes"]) == 1
    assert (
        alone["ensemble"]["cost"]["examples_seen"] == alone["generalist"]["cost"]["examples_seen"]
    )
    own = alone["generalist"]["multiplications"]
    assert alone["controls"]["wider"]["multiplications"] == pytest.approx(2 * own, rel=0.1)
    assert (run.root / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    "overrides, message",
    [
        (('controls.rows=["widest"]',), "did you mean wider?"),
        (('controls.rows=["wider"]', "students.wider.steps=3"), "choose another"),
        (('controls.model={"width"=3}',), 'of the row "wider"'),
        (('controls.rows=["wider"]', 'controls.model={"widht"=3}'), "controls.model.widht"),
        (('controls.rows=["average"]', "extend.run=somewhere"), "leave controls.rows out"),
    ],
)
def test_mistakes_about_rows_are_one_line(data, overrides, message):
    with pytest.raises(UserError, match=message):
        toy_config(data, *overrides)
