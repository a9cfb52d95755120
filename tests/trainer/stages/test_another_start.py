"""Specialists that start as another generalist than the one that asks them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from clustering import ClassGroups
from ensemble import SpecialistEnsemble
from ensemble.fitting import WEIGHTS
from launch.plan import plan, planned_steps
from launch.results import show_results
from networks import load_classifier, save_classifier
from pipeline.config import UserError, load_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from pipeline.terminal import Console
from trainer.__main__ import main
from trainer.commands.check import check
from trainer.data.shards import open_shards

SHORT = ("students.main.steps=10", "train.steps=40", "specialists.steps=10")
ONE_WALL = "controls.learning_rates=[0.001]"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Its specialists start as a generalist of another seed, and keep that where nothing is better.

    Their learning rate is ruinous, so that the best step on val is the start.
    """
    ruinous = ("specialists.learning_rate=30", "specialists.patience=1")
    config = toy_config(data, *SHORT, ONE_WALL, *ruinous, "specialists.from=member")
    return run_all(tmp_path_factory.mktemp("another") / "run", config)


def some_inputs(run, count=20):
    shards = open_shards(run.config.data.test, run.config.data, "test")
    return torch.as_tensor(shards.inputs(np.arange(count)))


def test_it_is_trained_beside_the_generalist_and_specialists_wait_for_both(run):
    jobs = {job.name: job for job in plan(run)}
    assert jobs["members/001"].waits_for == ()
    assert jobs["clusters"].waits_for == ("generalist",)
    assert set(jobs["specialists/000"].waits_for) == {"clusters", "members/001"}
    one, other = (stage.path("model.safetensors") for stage in (run.generalist, *run.members))
    assert one.read_bytes() != other.read_bytes()


def test_a_specialist_at_step_0_is_the_other_generalist_with_the_rest_summed(run):
    for stage in run.specialists:
        assert read_json(stage.path("summary.json"))["best_step"] == 0
    groups = ClassGroups.load(run.cluster.path("groups.json"))
    p = load_classifier(run.root / "members/001")(some_inputs(run)).softmax(1)
    for m, classes in enumerate(groups.members):
        own = load_classifier(run.root / f"specialists/{m:03d}")(some_inputs(run)).softmax(1)
        inside = p[:, torch.tensor(classes)]
        torch.testing.assert_close(own[:, :-1], inside, rtol=0, atol=1e-6)
        torch.testing.assert_close(own[:, -1], 1 - inside.sum(1), rtol=0, atol=1e-6)


def test_groups_and_gate_are_those_of_the_generalist_that_asks(run, data, tmp_path):
    plain = run_all(
        tmp_path / "run",
        toy_config(data, *SHORT),
        only={"generalist", "measure", "cluster"},
    )
    assert plain.cluster.key == run.cluster.key
    groups = run.cluster.path("groups.json").read_bytes()
    assert plain.cluster.path("groups.json").read_bytes() == groups
    ensemble = SpecialistEnsemble.load(run.root)
    output = ensemble.forward_with_details(some_inputs(run))
    generalist = load_classifier(run.root / "generalist")
    expected = generalist(some_inputs(run)).softmax(1)
    torch.testing.assert_close(output.p_general, expected, rtol=0, atol=1e-6)
    held = [
        [int(top) in classes for classes in ensemble.groups.members] for top in expected.argmax(1)
    ]
    assert output.active.tolist() == held


def test_its_training_is_the_ensembles_and_its_multiplications_are_not(run):
    rows = {
        name: read_json(run.evaluate.path(f"{name}.json"))["row"]
        for name in ("generalist", "ensemble", "main")
    }
    seen = {name: row["cost"]["examples_seen"] for name, row in rows.items()}
    trained = sum(read_json(s.path("summary.json"))["examples_seen"] for s in run.specialists)
    assert seen["ensemble"] == 2 * 40 * 96 + trained
    assert seen["main"] == seen["ensemble"] + 10 * 96
    counted = read_json(run.evaluate.path("ensemble.json"))["multiplications"]
    asked = SpecialistEnsemble.load(run.root)
    everybody = torch.ones(1, len(asked.groups.members), dtype=torch.bool)
    alone = counted["generalist"]
    # No block is the generalist's, so that each copy multiplies as much as it does.
    assert asked.multiplications(everybody) == alone * (1 + len(asked.groups.members))


def test_control_compute_sees_what_the_other_generalist_saw_too(run):
    compute = read_json(run.controls["control_compute"].path("summary.json"))
    assert compute["steps"] == 6 * 10 + 40
    assert planned_steps(run.controls["control_compute"], run) == 6 * 10 + 40
    wall = read_json(run.controls["control_wall-0"].path("summary.json"))
    assert wall["steps"] == 10


def test_report_and_terminal_name_it(run):
    page = (run.root / "report.html").read_text()
    assert "The specialists start as another generalist" in page
    assert "and the other generalist that they start as saw together" in page
    console = Console(record=True, width=300)
    show_results(run, console)
    said = "specialists start as another generalist, trained from another seed (members/001)"
    assert said in console.export_text()


def test_it_is_exported_without_the_network_that_nobody_asks(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run.root), "--to", str(out), "--what", "ensemble"]) == 0
    assert read_json(out / "export.json")["largest_difference"]["bundle"] == 0
    assert not (out / "members").exists()
    inputs = some_inputs(run)
    p = SpecialistEnsemble.load(run.root).probabilities(inputs)
    torch.testing.assert_close(SpecialistEnsemble.load(out).probabilities(inputs), p)


@pytest.fixture(scope="module")
def shortlisted(run, data, tmp_path_factory):
    """The same specialists, asked about each example's 5 likeliest classes alone."""
    root = tmp_path_factory.mktemp("shortlisted") / "run"
    for place in ("generalist", "members", "clusters", "routed", "specialists"):
        shutil.copytree(run.root / place, root / place, symlinks=True)
    base = run.config.dump() | {"students": {}, "controls": {"enabled": False}}
    return run_all(root, load_config(None, ["ensemble.shortlist=5"], base))


def test_a_shortlist_stales_the_ensemble_alone(shortlisted, run):
    assert [stage.key for stage in shortlisted.specialists] == [s.key for s in run.specialists]
    assert shortlisted.ensemble.key != run.ensemble.key


def test_the_row_of_a_shortlist_is_that_of_the_library_call(shortlisted):
    settings = read_json(shortlisted.root / "ensemble.json")
    assert settings["shortlist"] == 5 and settings["weights"][0] == 1
    assert len(set(settings["weights"][1:])) == 1 and settings["weights"][1] not in WEIGHTS
    ensemble = SpecialistEnsemble.load(shortlisted.root)
    shards = open_shards(shortlisted.config.data.test, shortlisted.config.data, "test")
    inputs = torch.as_tensor(shards.inputs(np.arange(len(shards))))
    output = ensemble.forward_with_details(inputs)
    labels = torch.as_tensor(shards.labels)
    row = read_json(shortlisted.evaluate.path("ensemble.json"))["row"]
    nll = -output.q.gather(1, labels[:, None]).log().mean()
    assert row["nll"] == pytest.approx(float(nll), rel=1e-5)
    alone = read_json(shortlisted.evaluate.path("generalist.json"))["row"]
    assert row["nll"] < alone["nll"]


def test_the_weight_is_where_val_is_best(shortlisted):
    ensemble = SpecialistEnsemble.load(shortlisted.root)
    shards = open_shards(shortlisted.config.data.val, shortlisted.config.data, "val")
    join = ensemble.ask(torch.as_tensor(shards.inputs(np.arange(len(shards)))))
    labels = torch.as_tensor(shards.labels)[:, None]
    fitted = ensemble.weights[1]

    def loss(weight):
        log_q = join([1.0, *[weight] * 6]).gather(1, labels).log()
        return -float(log_q.mean()) + np.log(weight) ** 2 / (2 * len(labels))

    lowest = loss(fitted)
    assert all(loss(fitted * factor) > lowest for factor in (0.5, 0.8, 1.25, 2))


def test_a_shortlist_is_said_predicted_and_exported(shortlisted, tmp_path):
    assert "asked about its 5 likeliest classes" in (shortlisted.root / "report.html").read_text()
    console = Console(record=True, width=300)
    show_results(shortlisted, console)
    assert "asked about each example's 5 likeliest classes" in console.export_text()
    out = tmp_path / "out"
    assert main(["export", str(shortlisted.root), "--to", str(out), "--what", "ensemble"]) == 0
    assert read_json(out / "export.json")["largest_difference"]["bundle"] == 0
    inputs = some_inputs(shortlisted)
    expected = SpecialistEnsemble.load(shortlisted.root).probabilities(inputs)
    torch.testing.assert_close(SpecialistEnsemble.load(out).probabilities(inputs), expected)


def test_a_network_that_exists_already_is_copied_in_the_job_of_the_groups(run, data, tmp_path):
    wider = load_classifier(run.root / "members/001")
    save_classifier(wider, tmp_path / "saved")
    overrides = (*SHORT, "controls.enabled=false", "students={}")
    config = toy_config(data, *overrides, f"specialists.from={tmp_path / 'saved'}")
    check(config, 1, tmp_path / "new")
    given = RunDirectory(tmp_path / "given", config)
    jobs = {job.name: job for job in plan(given)}
    assert jobs["clusters"].command() == [
        *("member", "measure", "cluster", "diagnosis", "route"),
        *("--index", "1"),
    ]
    assert jobs["specialists/000"].waits_for == ("clusters",)
    shutil.copytree(run.root / "generalist", given.root / "generalist", symlinks=True)
    given = run_all(given.root, config)
    cost = read_json(given.evaluate.path("ensemble.json"))["row"]["cost"]
    assert cost["examples_seen"] == 40 * 96 + 6 * 10 * 96  # nothing for the one that was there
    assert f"the network of {tmp_path / 'saved'}" in (given.root / "report.html").read_text()

    (tmp_path / "saved").rename(tmp_path / "moved")
    moved = toy_config(data, *overrides, f"specialists.from={tmp_path / 'moved'}")
    again = RunDirectory(given.root, moved)
    assert all(stage.is_done for stage in again.stages)
    with torch.no_grad():
        wider.linear_head.bias.add_(1)
    save_classifier(wider, tmp_path / "moved")
    changed = RunDirectory(given.root, moved)
    assert changed.cluster.is_done and not changed.members[0].is_done
    assert changed.specialists[0].is_stale


def message(data, tmp_path, path):
    config = toy_config(data, f"specialists.from={path}")
    with pytest.raises(UserError) as error:
        RunDirectory(tmp_path / "new", config).method.check(NUM_CLASSES, "the data")
        check(config, 1, tmp_path / "new")
    return str(error.value)


def test_what_cannot_be_started_from_is_named_before_anything_is_trained(run, data, tmp_path):
    empty = f"specialists.from: {tmp_path} holds no network"
    assert empty in message(data, tmp_path, tmp_path)
    network = load_classifier(run.root / "generalist")
    names = tuple(reversed(network.spec.class_names))
    network.spec = network.spec.__class__(**{**vars(network.spec), "class_names": names})
    save_classifier(network, tmp_path / "names")
    said = message(data, tmp_path, tmp_path / "names")
    assert "specialists.from" in said and "its class 0 is 'class 23', the data's 'class 0'" in said


def test_who_cannot_start_elsewhere_says_why(data):
    with pytest.raises(UserError, match="must be one of generalist, member, or a path with a /"):
        toy_config(data, "specialists.from=membr")
    with pytest.raises(UserError, match="a branch corrects the logits of the generalist that asks"):
        toy_config(data, "specialists.from=member", "specialists.kind=branch")
    with pytest.raises(UserError, match="with extend.run the new classes' specialist starts as"):
        toy_config(data, "specialists.from=member", "extend.run=runs/old")


def test_at_its_default_the_key_stales_nothing_and_another_start_stales_the_specialists(data):
    plain = RunDirectory("/nowhere", toy_config(data))
    same = RunDirectory("/nowhere", toy_config(data, "specialists.from=generalist"))
    other = RunDirectory("/nowhere", toy_config(data, "specialists.from=member"))
    assert [stage.key for stage in plain.stages] == [stage.key for stage in same.stages]
    assert other.route.key == plain.route.key
    assert other.specialists[0].key != plain.specialists[0].key
    deep = RunDirectory("/nowhere", toy_config(data, "ensemble.kind=deep", "ensemble.members=2"))
    assert other.members[0].key == deep.members[0].key  # either may be copied from the other
