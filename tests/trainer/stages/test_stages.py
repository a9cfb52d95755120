"""The whole method on a toy, stage by stage, in one process, and killed stages that resume."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy, write_unlabelled

from clustering import ClassGroups
from pipeline.config import Engine, UserError
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.core import checkpoints, loop
from trainer.data.streams import Source, TrainingStream, shuffled
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.grouping import groups_of
from trainer.stages.networks import load_network
from trainer.stages.training import balanced_log_prior


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    config = toy_config(data, "specialists.validate_every=15")
    return run_all(tmp_path_factory.mktemp("run"), config)


def row(run, name):
    return read_json(run.evaluate.path(f"{name}.json"))["row"]


def metrics_of(stage):
    """The rows of a stage's metrics.jsonl."""
    return [json.loads(line) for line in stage.path("metrics.jsonl").read_text().splitlines()]


def weights_of(stage):
    return stage.path("model.safetensors").read_bytes()


def saves(monkeypatch, die_at):
    """The steps of the checkpoints saved from now on. The process dies after that of `die_at`."""
    steps, original = [], checkpoints.save_checkpoint

    def save_checkpoint(directory, step, *rest, **more):
        original(directory, step, *rest, **more)
        steps.append(step)
        if step == die_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_checkpoint)
    return steps


def test_subnormals_are_flushed_while_ranks_work_and_not_afterwards():
    tiny = torch.tensor(1e-40)
    with process_group(Engine(device="cpu")):
        assert float(tiny * 1) == 0
    assert float(tiny * 1) > 0


def test_every_stage_is_done(finished):
    assert all(stage.is_done for stage in finished.stages)


def test_every_link_of_a_run_leads_somewhere(finished, tmp_path):
    root = finished.generalist.run
    assert any(path.is_symlink() for path in root.rglob("*"))
    subprocess.run(["cp", "-rL", str(root), str(tmp_path / "copy")], check=True)


ROWS = ("generalist", "ensemble", "control_wall", "control_compute", "student_hard", "main")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_its_metrics(finished, name):
    metrics = row(finished, name)
    assert metrics["n"] == 12 * NUM_CLASSES
    assert 1 / NUM_CLASSES < metrics["top1"] <= metrics["top5"] <= 1
    assert metrics["nll"] > 0 and metrics["cost"]["examples_seen"] > 0


def test_groups_are_the_look_alikes_and_capture_most_errors(finished):
    clusters = read_json(finished.evaluate.path("ensemble.json"))["clusters"]
    assert clusters["captured_confusion"] > 2 * clusters["chance"]
    groups = ClassGroups.load(finished.cluster.path("groups.json"))
    assert sorted(np.concatenate(groups.members)) == list(range(NUM_CLASSES))


def test_controls_see_as_many_examples_as_one_specialist_and_as_all_together(finished):
    per_specialist = 30 * 96
    assert control_summary(finished, "control_wall-0")["examples_seen"] == per_specialist
    assert control_summary(finished, "control_compute")["examples_seen"] == 6 * per_specialist


def control_summary(run, name):
    return read_json(run.controls[name].path("summary.json"))


def test_controls_are_validated_as_many_times_as_a_specialist(finished):
    for name, steps in {"control_wall-0": [0, 15, 30], "control_compute": [0, 90, 180]}.items():
        rows = metrics_of(finished.controls[name])
        assert [row["step"] for row in rows if "val/loss" in row] == steps


def test_control_compute_takes_the_rate_that_was_best_on_val(finished):
    walls = [control_summary(finished, f"control_wall-{i}") for i in range(3)]
    best = min(walls, key=lambda wall: wall["last"]["raw_loss"])
    assert len({wall["learning_rate"] for wall in walls}) == 3
    compute = control_summary(finished, "control_compute")
    assert compute["learning_rate"] == best["learning_rate"]


def test_ensemble_costs_the_generalist_and_all_specialists(finished):
    assert row(finished, "ensemble")["cost"]["examples_seen"] == 60 * 96 + 6 * 30 * 96


def test_a_stage_killed_between_checkpoints_ends_with_the_same_weights(
    data, finished, tmp_path, monkeypatch
):
    """The process dies at step 40. The same stage again resumes there, with the same batches."""
    steps = saves(monkeypatch, die_at=40)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert steps == [20, 40]
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert steps == [20, 40, 60]
    assert weights_of(run.generalist) == weights_of(finished.generalist)
    rows = metrics_of(run.generalist)
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.ema=0.9", "train.validate_every=15"),
        ("train.clip_norm=0.5", "train.schedule=onecycle", "train.label_smoothing=0.1"),
        ("train.optimizer=sgd", "train.learning_rate=0.3", "model.dropout=0.2"),
        ("train.patience=3", "train.validate_every=10"),
        ("engine.precision=bf16", "train.balance=0.5"),
        ("train.mixup=0.3", "train.cutmix=1.0", "train.label_smoothing=0.1"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_each_way_to_train_learns_and_resumes_exactly(data, tmp_path, monkeypatch, overrides):
    """Averages, dropout's random state and the best weights so far are all in a checkpoint."""
    config = toy_config(data, *overrides)
    whole = run_all(tmp_path / "whole", config, only={"generalist"})
    saves(monkeypatch, die_at=40)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "killed", config, only={"generalist"})
    monkeypatch.undo()
    killed = run_all(tmp_path / "killed", config, only={"generalist"})
    assert weights_of(killed.generalist) == weights_of(whole.generalist)
    assert read_json(whole.generalist.path("summary.json"))["val"]["top1"] > 5 / NUM_CLASSES


def test_a_stop_signal_leaves_a_checkpoint_and_asks_for_requeue(
    data, finished, tmp_path, monkeypatch
):
    counter = iter(range(1000))
    monkeypatch.setattr(loop.StopSignal, "agreed", lambda self, ranks: next(counter) == 13)
    with pytest.raises(SystemExit) as stopped:
        run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert stopped.value.code == 75
    monkeypatch.undo()
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert weights_of(run.generalist) == weights_of(finished.generalist)


UP_TO_SPECIALISTS = {"generalist", "measure", "cluster", "route", "specialist"}


def test_the_same_seed_gives_the_same_weights(data, finished, tmp_path):
    again = run_all(tmp_path / "run", toy_config(data), only=UP_TO_SPECIALISTS)
    for one, other in zip(again.specialists, finished.specialists, strict=True):
        assert weights_of(one) == weights_of(other)


def test_a_specialist_that_only_gets_worse_stays_the_generalist(data, finished, tmp_path):
    """With patience the start is a candidate too. A ruinous rate never beats it."""
    ruinous = ("specialists.learning_rate=30", "specialists.patience=1")
    config = toy_config(data, *ruinous, "specialists.validate_every=5")
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    run = RunDirectory(root, config)
    for stage in run.specialists:
        stage.clear()
    run = run_all(root, config, only={"specialist"})
    summary = read_json(run.specialists[0].path("summary.json"))
    assert summary["best_step"] == 0 and summary["stopped_early"]
    with process_group(config.engine) as ranks:
        session = Session(run, ranks)
        generalist = load_network(session, run.generalist)
        specialist = load_network(session, run.specialists[0])
        classes = torch.tensor(groups_of(session).members[0])
        inputs = torch.as_tensor(session.shards("test").inputs(np.arange(20)))
    expected = generalist(inputs).softmax(1)[:, classes]
    inside = specialist(inputs).softmax(1)[:, :-1]
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_a_student_learns_on_unlabelled_inputs_too(data, finished, tmp_path, augment):
    """From stored predictions, or live ones where augmented. Transfer inputs need no labels."""
    transfer = write_unlabelled(tmp_path / "transfer")
    config = toy_config(
        data,
        f"data.transfer={transfer}/transfer-{{000000..000001}}.tar",
        f"data.augment={augment}",
        "students.main.transfer_share=0.5",
    )
    run = run_all(tmp_path / "run", config)
    assert row(run, "main")["n"] == 12 * NUM_CLASSES
    stored = run.targets_for("main")
    assert (stored is not None) == (augment == "none")
    if stored is not None:
        assert read_json(stored.path("transfer/answers.json"))["samples"] == 10 * NUM_CLASSES


def test_a_balanced_run_trains_specialists_on_balanced_groups(data, tmp_path):
    config = toy_config(data, "train.balance=1.0")
    run = run_all(tmp_path / "run", config, only=UP_TO_SPECIALISTS)
    assert all(stage.is_done for stage in run.specialists)


@pytest.mark.parametrize("method", ["classifier", "raw", "random"])
def test_every_clustering_method_makes_groups(data, finished, tmp_path, method):
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    config = toy_config(data, f"clusters.method={method}")
    RunDirectory(root, config).cluster.clear()
    run = run_all(root, config, only={"cluster"})
    assert len(ClassGroups.load(run.cluster.path("groups.json"))) == 6


def test_a_loss_that_is_not_finite_stops_with_the_step(data, tmp_path):
    divergent = ("train.optimizer=sgd", "train.learning_rate=1e30", "train.weight_decay=1")
    message = r"the loss is (nan|inf) at step \d+; it began at .* Lower the learning rate"
    with pytest.raises(UserError, match=message):
        run_all(tmp_path / "run", toy_config(data, *divergent), only={"generalist"})


def test_the_error_of_an_indivisible_batch_names_sizes_that_work():
    message = "batch 1000 is not divisible by 8 ranks x 3 accumulation steps; try 984 or 1008"
    with pytest.raises(UserError, match=message):
        loop.check_batch_size(1000, 8, 3)


def test_balanced_prior_is_flat_for_equal_classes_and_lifts_rare_ones():
    assert torch.equal(balanced_log_prior(np.array([5, 5, 5]), 1.0), torch.zeros(3))
    log_prior = balanced_log_prior(np.array([90, 10, 0]), 1.0)
    # Every class half of the stream: .5 / .9 and .5 / .1.
    torch.testing.assert_close(log_prior, torch.tensor([0.5 / 0.9, 0.5 / 0.1, 1.0]).log())


def test_accumulated_micro_batches_give_the_same_weights(data, finished, tmp_path):
    run = run_all(tmp_path / "run", toy_config(data, "train.accumulation=4"), only={"generalist"})
    with process_group(run.config.engine) as ranks:
        whole = load_network(Session(finished, ranks), finished.generalist)
        parts = load_network(Session(run, ranks), run.generalist)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_global_batch_does_not_depend_on_the_number_of_ranks(data, finished):
    with process_group(finished.config.engine) as ranks:
        shards = Session(finished, ranks).shards("train")
    stream = TrainingStream([Source(shards, shuffled(np.arange(shards.num_samples), 7), 12)], 7)
    whole = stream.batch(5).ids
    parts = torch.stack([stream.batch(5, rank, 3).ids for rank in range(3)], dim=1).flatten()
    assert torch.equal(whole, parts)
