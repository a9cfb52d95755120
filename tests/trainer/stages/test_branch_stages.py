"""Branches in a run: features kept once, all branches of a job trained at once, and resumed."""

import json
import shutil

import numpy as np
import pytest
import torch
from toy import NUM_CLASSES, toy_config, write_toy

from ensemble import SpecialistEnsemble
from networks import BranchedClassifier, load_branch, load_classifier
from pipeline.config import UserError, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.__main__ import in_a_row, run_stages
from trainer.core import checkpoints
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage, run_together
from trainer.stages.features import kept_features

BRANCHES = (
    "specialists.kind=branch",
    "specialists.model={embedding=16}",
    "model.name=convnet",
    "model.options={channels=[4,6]}",
    "model.embedding=3",
    "controls.enabled=false",
    "students={}",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 6})


def prepared(root, config):
    root.mkdir(parents=True, exist_ok=True)
    save_config(config, root / "config.toml")
    return RunDirectory(root, config)


def do(run, *names):
    """The stages of these kinds, or all, as the trainer's command does them."""
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        pending = [s for s in run.stages if not s.is_done and (not names or s.name in names)]
        for alike in in_a_row(pending):
            run_together(session, alike)
    return session


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = prepared(tmp_path_factory.mktemp("run"), toy_config(data, *BRANCHES))
    do(run)
    return run


@pytest.fixture
def begun(finished, tmp_path):
    """A run that has its features, to train branches in."""

    def make(*overrides):
        root = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(finished.root, root, symlinks=True)
        shutil.rmtree(root / "specialists")
        config = toy_config(finished.config.data.train, *BRANCHES, *overrides)
        return prepared(root, config)

    return make


def weights_of(run):
    return [load_branch(stage.path("model.json").parent).state_dict() for stage in run.specialists]


def same(one, other, tolerance=0.0):
    for mine, theirs in zip(one, other, strict=True):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], atol=tolerance, rtol=0)


def test_a_run_of_branches_routes_nothing_and_is_done(finished):
    assert all(stage.is_done for stage in finished.stages)
    assert "route" not in {stage.name for stage in finished.stages}
    assert read_json(finished.root / "results.json")["ensemble"]["n"] == 6 * NUM_CLASSES


def test_evaluation_counts_what_an_example_is_multiplied_with(finished):
    counted = read_json(finished.evaluate.path("ensemble.json"))["multiplications"]
    # Two convolutions, the embedding of 3 and 24 classes. A branch has 24 x 16 and 5 rows of 16.
    assert counted["generalist"] == 16 * 4 * 9 + 4 * 6 * 36 + 24 * 3 + 3 * 24
    each = counted["ensemble"] - counted["generalist"]
    assert 0 < each <= 24 * 16 + 16 * 8


def test_a_branch_is_saved_as_its_own_tensors(finished):
    head = read_json(finished.specialists[0].path("model.json"))["head"]
    assert (head["kind"], head["embedding"], head["blocks"]) == ("branch", 16, 0)
    assert head["features"] == 6 * 2 * 2  # the last map
    assert set(weights_of(finished)[0]) == {
        "hidden.weight",
        "hidden.bias",
        "correction.weight",
        "correction.bias",
    }


def test_kept_features_are_the_generalists(finished):
    with process_group(finished.config.engine) as ranks:
        session = Session(finished, ranks)
        kept = kept_features(session, "val")
        raw = torch.from_numpy(np.asarray(session.shards("val").inputs(np.arange(30))))
    network = load_classifier(finished.generalist.path("model.json").parent)
    with torch.no_grad():
        logits = network(raw)
    features = torch.from_numpy(kept.general[:30].copy())
    torch.testing.assert_close(network.head(features), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.from_numpy(kept.total[:30].copy()), logits.double().logsumexp(1), atol=1e-6, rtol=0
    )


def test_the_start_of_every_branch_is_the_generalist(finished):
    """The first validation, of step 0, is the generalist's loss on the examples referred."""
    network = load_classifier(finished.generalist.path("model.json").parent)
    with process_group(finished.config.engine) as ranks:
        val = Session(finished, ranks).shards("val")
        raw, labels = torch.from_numpy(np.asarray(val.inputs(np.arange(len(val))))), val.labels
    with torch.no_grad():
        p = network(raw).double().softmax(1).numpy()
    for stage in finished.specialists:
        classes = read_json(stage.path("model.json"))["head"]["members"]
        referred = np.isin(p.argmax(1), classes)
        if not referred.any():
            referred[:] = True
        own = np.where(
            np.isin(labels, classes),
            p[np.arange(len(labels)), labels],
            1 - p[:, classes].sum(1),
        )
        first = json.loads(stage.path("metrics.jsonl").read_text().splitlines()[0])
        assert first["step"] == 0
        assert first["val/loss"] == pytest.approx(-np.log(own[referred]).mean(), abs=1e-6)


def test_branches_that_learn_are_better_on_val_than_the_generalist(finished):
    for stage in finished.specialists:
        summary = read_json(stage.path("summary.json"))
        rows = [json.loads(line) for line in stage.path("metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
        assert summary["val"]["loss"] == pytest.approx(min(losses.values()), abs=1e-6)
        assert losses[summary["best_step"]] == min(losses.values())


def test_branches_trained_at_once_are_those_trained_alone(begun):
    at_once, alone = begun(), begun()
    do(at_once, "specialist")
    with process_group(alone.config.engine) as ranks:
        session = Session(alone, ranks)
        for stage in alone.specialists:
            run_stage(session, stage)
    same(weights_of(at_once), weights_of(alone), 1e-5)
    assert read_json(alone.specialists[0].path("summary.json"))["together"] == 1
    assert read_json(at_once.specialists[0].path("summary.json"))["together"] == 6


def test_the_branches_of_a_job_open_each_splits_features_once(begun, monkeypatch):
    # Each split as often as there are branches would lie on a GPU that often.
    opened = []

    def counted(session, split):
        opened.append(split)
        return kept_features(session, split)

    monkeypatch.setattr("trainer.stages.branches.kept_features", counted)
    do(begun(), "specialist")
    assert opened == ["train", "val"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["specialists.model={embedding=16, dropout=0.3}"],
        ["specialists.blocks=1", "specialists.clip_norm=1.0"],
        ["specialists.optimizer=sgd", "specialists.label_smoothing=0.1"],
    ],
)
def test_a_resumed_training_of_branches_equals_an_uninterrupted_one(
    data, overrides, tmp_path, monkeypatch
):
    config = toy_config(data, *BRANCHES, *overrides, "specialists.checkpoint_every=10")
    whole = prepared(tmp_path / "whole", config)
    do(whole, "generalist", "measure", "cluster", "features")
    shutil.copytree(whole.root, tmp_path / "killed", symlinks=True)
    do(whole, "specialist")
    killed = prepared(tmp_path / "killed", config)
    original, saved = checkpoints.save_checkpoint, []

    def save_checkpoint(directory, step, *rest, **more):
        original(directory, step, *rest, **more)
        saved.append(step)
        if saved.count(20) == 3:  # half of the branches have their checkpoint of step 20
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        do(killed, "specialist")
    monkeypatch.setattr(checkpoints, "save_checkpoint", original)
    do(killed, "specialist")
    same(weights_of(whole), weights_of(killed))


def test_a_branch_resumes_from_its_own_checkpoint_in_any_company(begun, monkeypatch):
    whole, parted = (begun("specialists.checkpoint_every=10") for _ in range(2))
    do(whole, "specialist")
    original = checkpoints.save_checkpoint

    def dies_at_twenty(directory, step, *rest, **more):
        if step == 20:
            raise KeyboardInterrupt
        original(directory, step, *rest, **more)

    monkeypatch.setattr(checkpoints, "save_checkpoint", dies_at_twenty)
    with pytest.raises(KeyboardInterrupt):
        do(parted, "specialist")
    monkeypatch.setattr(checkpoints, "save_checkpoint", original)
    for part in ([2], [0, 1, 3, 4, 5]):
        indices = map(str, part)
        assert run_stages(["specialist", "--index", *indices, "--run", str(parted.root)]) == 0
    same(weights_of(whole), weights_of(parted), 1e-5)
    summaries = [read_json(stage.path("summary.json")) for stage in parted.specialists]
    assert [each["together"] for each in summaries] == [5, 5, 1, 5, 5, 5]
    rows = parted.specialists[2].path("metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["step"] == 0  # what was logged before the kill is there


def test_interrupted_features_go_on_where_they_stopped(data, tmp_path, monkeypatch):
    from trainer.stages import features

    monkeypatch.setattr(features, "BLOCK_BYTES", 2**13)
    config = toy_config(data, *BRANCHES, "data.augment=shift", "specialists.views=2")
    run = prepared(tmp_path / "run", config)
    do(run, "generalist")
    shutil.copytree(run.root, tmp_path / "whole", symlinks=True)
    measured, calls = Session.measured, []

    def dies(session, *rest, **more):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return measured(session, *rest, **more)

    monkeypatch.setattr(Session, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        do(run, "features")
    before = len(calls)
    do(run, "features")
    resumed = len(calls) - before
    whole = prepared(tmp_path / "whole", config)
    calls[:] = [1] * 100
    do(whole, "features")
    assert resumed == len(calls) - 100 - 8
    for name in ("at_cut", "general", "total"):
        both = [np.load(r.features.path(f"train/{name}.npy")) for r in (run, whole)]
        assert np.array_equal(*both)
        assert len(both[0]) == 2 * 20 * NUM_CLASSES
    views = np.load(run.features.path("train/at_cut.npy")).reshape(20 * NUM_CLASSES, 2, -1)
    assert not np.array_equal(views[:, 0], views[:, 1])  # two views of each


def test_features_that_take_too_much_are_refused_before_a_byte_is_written(begun):
    run = begun("specialists.features_bytes=1000")
    run.features.clear()
    with pytest.raises(UserError, match="features_bytes = 1,000 allows less: raise it, or lower"):
        do(run, "features")
    assert not list(run.root.glob("features/**/*.npy"))


def test_a_branch_that_never_gets_better_stays_out_of_the_ensemble(begun):
    run = begun("specialists.steps=1", "specialists.learning_rate=100", "specialists.warmup=0")
    do(run, "specialist")
    bests = [read_json(stage.path("summary.json"))["best_step"] for stage in run.specialists]
    assert bests == [0] * 6
    for name in ("ensemble", "evaluation", "report"):
        shutil.rmtree(run.root / name)
    do(run)
    assert read_json(run.root / "ensemble.json")["skipped"] == [0, 1, 2, 3, 4, 5]
    rows = read_json(run.root / "results.json")
    assert rows["ensemble"]["top1"] == rows["generalist"]["top1"]
    assert SpecialistEnsemble.load(run.root).available == [False] * 6


def test_the_ensemble_of_a_run_answers_as_its_branches_do_one_by_one(finished):
    ensemble = SpecialistEnsemble.load(finished.root)
    raw = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    _, special, active = ensemble.logits(raw)
    assert active.any()
    for m, entry in enumerate(special):
        if entry is not None:
            rows, logits = entry
            branched = BranchedClassifier(ensemble.generalist, ensemble.specialists[m])
            with torch.no_grad():
                torch.testing.assert_close(branched(raw)[rows], logits, atol=1e-5, rtol=0)


def test_one_command_names_every_pending_branch_of_a_job(begun, capsys):
    run = begun()
    indices = [str(stage.address) for stage in run.specialists]
    assert run_stages(["specialist", "--index", *indices, "--run", str(run.root)]) == 0
    assert all(stage.is_done for stage in run.specialists)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["specialists.dustbin=fresh"], 'dustbin is of kind = "copy"'),
        (["specialists.hard_negatives=0.5"], 'hard_negatives is of kind = "copy"'),
        (["specialists.trainable=head"], 'trainable is of kind = "copy"'),
        (["specialists.model={width=3}"], "model.width: a branch has embedding and dropout"),
        (["specialists.model={embedding=0}"], "model.embedding = 0: a whole number"),
        (["train.ema=0.9"], "set specialists.ema = 0"),
        (["specialists.views=3"], "without data.augment all views are the same"),
    ],
)
def test_what_branches_cannot_be_combined_with_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, ["specialists.kind=branch", *overrides])


def test_keys_of_branches_are_refused_for_copies():
    with pytest.raises(UserError, match='blocks is of kind = "branch"; leave it out'):
        load_config(None, ["specialists.blocks=1"])
