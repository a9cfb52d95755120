"""The whole method on a toy, stage by stage, in one process; and what a killed stage does when it is run again."""

import json
import shutil

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
from trainer.data.streams import Source, TrainingStream
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
    return run_all(
        tmp_path_factory.mktemp("run"), toy_config(data, "specialists.validate_every=15")
    )


def row(run, name):
    return read_json(run.evaluate.path(f"{name}.json"))["row"]


def test_subnormals_are_flushed_while_ranks_work_and_not_afterwards():
    tiny = torch.tensor(1e-40)
    with process_group(Engine(device="cpu")):
        assert float(tiny * 1) == 0
    assert float(tiny * 1) > 0


def test_every_stage_is_done(finished):
    assert all(stage.is_done for stage in finished.stages)


def test_every_row_has_its_figures(finished):
    for name in (
        "generalist",
        "ensemble",
        "control_wall",
        "control_compute",
        "student_hard",
        "main",
    ):
        found = row(finished, name)
        assert found["n"] == 12 * NUM_CLASSES
        assert 1 / NUM_CLASSES < found["top1"] <= found["top5"] <= 1
        assert found["nll"] > 0 and found["cost"]["examples_seen"] > 0


def test_groups_are_the_look_alikes_and_capture_most_errors(finished):
    clusters = read_json(finished.evaluate.path("ensemble.json"))["clusters"]
    assert clusters["captured_confusion"] > 2 * clusters["chance"]
    groups = ClassGroups.load(finished.cluster.path("groups.json"))
    assert sorted(np.concatenate(groups.members)) == list(range(NUM_CLASSES))


def test_controls_see_as_many_examples_as_one_specialist_and_as_all_together(finished):
    per_specialist = 30 * 96
    for name, seen in {
        "control_wall-0": per_specialist,
        "control_compute": 6 * per_specialist,
    }.items():
        assert read_json(finished.controls[name].path("summary.json"))["examples_seen"] == seen


def test_controls_are_judged_as_many_times_as_a_specialist(finished):
    for name, steps in {"control_wall-0": [15, 30], "control_compute": [90, 180]}.items():
        rows = map(
            json.loads, finished.controls[name].path("metrics.jsonl").read_text().splitlines()
        )
        assert [row["step"] for row in rows if "val/loss" in row] == steps


def test_control_compute_takes_the_rate_that_was_best_on_val(finished):
    walls = [
        read_json(finished.controls[f"control_wall-{i}"].path("summary.json")) for i in range(3)
    ]
    best = min(walls, key=lambda wall: wall["val"]["loss"])
    assert len({wall["learning_rate"] for wall in walls}) == 3
    compute = read_json(finished.controls["control_compute"].path("summary.json"))
    assert compute["learning_rate"] == best["learning_rate"]


def test_ensemble_costs_the_generalist_and_all_specialists(finished):
    assert row(finished, "ensemble")["cost"]["examples_seen"] == 60 * 96 + 6 * 30 * 96


def test_a_stage_killed_between_checkpoints_ends_with_the_same_weights(
    data, finished, tmp_path, monkeypatch
):
    """The process dies after step 47; the same stage again goes on from step 40 with the same batches."""
    steps = []
    original = checkpoints.save_checkpoint

    def die_later(directory, step, *rest, **more):
        original(directory, step, *rest, **more)
        steps.append(step)
        if step == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", die_later)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert steps == [20, 40]
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert steps == [20, 40, 60]
    resumed = run.generalist.path("model.safetensors").read_bytes()
    assert resumed == finished.generalist.path("model.safetensors").read_bytes()
    rows = [
        json.loads(line) for line in run.generalist.path("metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows if "loss" in r] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.ema=0.9", "train.validate_every=15"),
        ("train.clip_norm=0.5", "train.schedule=onecycle", "train.label_smoothing=0.1"),
        ("train.optimizer=sgd", "train.learning_rate=0.3", "model.dropout=0.2"),
        ("train.patience=3", "train.validate_every=10"),
        ("engine.precision=bf16", "train.balance=0.5"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_each_way_to_train_learns_and_resumes_exactly(data, tmp_path, monkeypatch, overrides):
    """Averages, dropout's random state and the best weights so far are all in a checkpoint."""
    config = toy_config(data, *overrides)
    whole = run_all(tmp_path / "whole", config, only={"generalist"})
    original = checkpoints.save_checkpoint

    def die_at_40(directory, step, *rest, **more):
        original(directory, step, *rest, **more)
        if step == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", die_at_40)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "killed", config, only={"generalist"})
    monkeypatch.undo()
    killed = run_all(tmp_path / "killed", config, only={"generalist"})
    weights = [run.generalist.path("model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
    assert read_json(whole.generalist.path("summary.json"))["val"]["top1"] > 5 / NUM_CLASSES


def test_a_stop_signal_leaves_a_checkpoint_and_asks_for_requeue(
    data, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop.StopSignal, "agreed", lambda self, ranks: next(counter) == 13)
    counter = iter(range(1000))
    with pytest.raises(SystemExit) as stopped:
        run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    assert stopped.value.code == 75
    monkeypatch.undo()
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    resumed = run.generalist.path("model.safetensors").read_bytes()
    assert resumed == finished.generalist.path("model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_figures(data, finished, tmp_path):
    again = run_all(
        tmp_path / "run",
        toy_config(data),
        only={"generalist", "measure", "cluster", "route", "specialist"},
    )
    for one, other in zip(again.specialists, finished.specialists, strict=True):
        assert (
            one.path("model.safetensors").read_bytes()
            == other.path("model.safetensors").read_bytes()
        )


def test_a_specialist_that_only_gets_worse_stays_the_generalist(data, finished, tmp_path):
    """With patience the start is a candidate too; a ruinous rate never beats it."""
    config = toy_config(
        data,
        "specialists.learning_rate=30",
        "specialists.patience=1",
        "specialists.validate_every=5",
    )
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
        generalist, specialist = (
            load_network(session, run.generalist),
            load_network(session, run.specialists[0]),
        )
        members = torch.tensor(groups_of(session).members[0])
        inputs = torch.as_tensor(session.shards("test").inputs(np.arange(20)))
        inside = generalist(inputs).softmax(1)[:, members]
        torch.testing.assert_close(
            specialist(inputs).softmax(1)[:, :-1], inside, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_a_student_learns_on_unlabelled_inputs_too(data, finished, tmp_path, augment):
    """Stored answers (fixed views) and live ones (augmented) alike; labels of transfer inputs are never needed."""
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
    until = {"generalist", "measure", "cluster", "route", "specialist"}
    run = run_all(tmp_path / "run", toy_config(data, "train.balance=1.0"), only=until)
    assert all(stage.is_done for stage in run.specialists)


@pytest.mark.parametrize("method", ["classifier", "raw", "random"])
def test_every_kind_of_columns_makes_groups(data, finished, tmp_path, method):
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, symlinks=True)
    config = toy_config(data, f"clusters.method={method}")
    RunDirectory(root, config).cluster.clear()
    run = run_all(root, config, only={"cluster"})
    assert len(ClassGroups.load(run.cluster.path("groups.json"))) == 6


def test_a_loss_that_is_not_finite_stops_with_the_step(data, tmp_path):
    config = toy_config(
        data, "train.optimizer=sgd", "train.learning_rate=1e30", "train.weight_decay=1"
    )
    with pytest.raises(
        UserError,
        match=r"the loss is (nan|inf) at step \d+; it began at .* Lower the learning rate",
    ):
        run_all(tmp_path / "run", config, only={"generalist"})


def test_a_batch_that_ranks_cannot_share_names_what_would_do():
    with pytest.raises(
        UserError,
        match="batch 1000 is not divisible by 8 ranks x 3 accumulation steps; try 984 or 1008",
    ):
        loop.check_batch_size(1000, 8, 3)


def test_balanced_prior_is_flat_for_equal_classes_and_lifts_rare_ones():
    assert torch.equal(balanced_log_prior(np.array([5, 5, 5]), 1.0), torch.zeros(3))
    log_prior = balanced_log_prior(np.array([90, 10, 0]), 1.0)
    # Every class half of the stream: .5 / .9 and .5 / .1.
    torch.testing.assert_close(log_prior, torch.tensor([0.5 / 0.9, 0.5 / 0.1, 1.0]).log())


def test_accumulated_micro_batches_give_the_same_weights(data, finished, tmp_path):
    run = run_all(tmp_path / "run", toy_config(data, "train.accumulation=4"), only={"generalist"})
    with process_group(run.config.engine) as ranks:
        whole, parts = (
            load_network(Session(each, ranks), each.generalist) for each in (finished, run)
        )
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_global_batch_does_not_depend_on_the_number_of_ranks(data, finished):
    with process_group(finished.config.engine) as ranks:
        shards = Session(finished, ranks).shards("train")
    from trainer.data.streams import shuffled

    stream = TrainingStream([Source(shards, shuffled(np.arange(shards.num_samples), 7), 12)], 7)
    whole = stream.batch(5).ids
    parts = torch.stack([stream.batch(5, rank, 3).ids for rank in range(3)], dim=1).flatten()
    assert torch.equal(whole, parts)
