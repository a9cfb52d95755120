"""Re-rankers as a run: trained on the generalist's shortlists, and asked about them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from exported import predicted_by_run_and_export
from ranks import stage_on_ranks
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from ensemble import ShortlistEnsemble, load_ensemble
from launch.plan import plan
from launch.results import show_results
from networks import Classifier, InputSpec, ModelSpec, load_classifier
from pipeline.config import UserError, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.results import collect
from pipeline.store import read_json
from pipeline.terminal import Console
from trainer.commands.check import check
from trainer.core.loop import Interrupted
from trainer.data.shards import open_shards
from trainer.stages import features
from trainer.stages.rerank import by_rows
from trainer.stages.stored_targets import restored, rows_by_mass

K = 8
SHORT = ["train.steps=30", "students.main.steps=10", "controls.enabled=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def configured(data, *overrides, **tables):
    base = toy_config(data).dump()
    base["ensemble"] = {"kind": "rerank", "members": 2}
    base["rerank"] = {"k": K, "random": 4, "steps": 40, "log_every": 10, "checkpoint_every": 10}
    return load_config(None, [*SHORT, *overrides], base | tables)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A re-ranker of another shape than the generalist, and a student of both."""
    root = tmp_path_factory.mktemp("rerank") / "run"
    return run_all(root, configured(data, "rerank.model.width=32"))


def inputs_of(run, split="test"):
    shards = open_shards(getattr(run.config.data, split), run.config.data, split)
    return torch.from_numpy(shards.read(np.arange(len(shards)))[0]), torch.from_numpy(shards.labels)


def test_a_run_finds_the_shortlists_once_and_its_reranker_waits_for_them(run):
    assert [stage.name for stage in run.stages] == (
        "generalist shortlists member ensemble targets student evaluate report".split()
    )
    jobs = {job.name: job for job in plan(run)}
    assert jobs["shortlists"].command() == ["shortlists"]
    assert jobs["members/001"].command() == ["member", "--index", "1"]
    assert set(jobs["members/001"].waits_for) == {"generalist", "shortlists"}
    assert jobs["members/001"].chain < jobs["shortlists"].chain


@pytest.mark.parametrize("split", ["train", "val"])
def test_kept_are_the_generalists_likeliest_classes(run, split):
    kept = np.load(run.shortlists.path(f"{split}/classes.npy"))
    inputs, labels = inputs_of(run, split)
    logits = load_classifier(run.root / "generalist")(inputs)
    assert kept.dtype == np.int32 and kept.shape == (len(labels), K)
    np.testing.assert_array_equal(kept, logits.topk(K, dim=1).indices.numpy())
    summary = read_json(run.shortlists.path("summary.json"))["splits"][split]
    assert summary["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_its_steps_are_its_own_and_val_is_asked_about_shortlists_alone(run):
    summary = read_json(run.members[0].path("summary.json"))
    assert summary["steps"] == 40 and summary["examples_seen"] == 40 * 96
    inputs, labels = inputs_of(run, "val")
    network = load_classifier(run.root / "members/001")
    assert network.head.weight.shape == (NUM_CLASSES, 32)
    listed = torch.from_numpy(np.load(run.shortlists.path("val/classes.npy"))).long()
    z = network(inputs).gather(1, listed)
    chosen = listed.gather(1, z.argmax(1, keepdim=True))[:, 0]
    assert summary["val"]["top1"] == pytest.approx(float((chosen == labels).double().mean()))
    hits = listed == labels[:, None]
    nll = -(z.log_softmax(1) * hits).sum(1)[hits.any(1)].mean().detach()
    assert summary["val"]["loss"] == pytest.approx(float(nll), rel=1e-5)


def test_it_is_joined_as_second_opinions_are_and_asked_of_no_more_than_it_has_learnt(run):
    content = read_json(run.root / "ensemble.json")
    assert content["kind"] == "shortlist" and content["members"] == 2
    assert content["shortlist"] in (5, K)
    inputs, labels = inputs_of(run)
    ensemble = load_ensemble(run.root)
    assert isinstance(ensemble, ShortlistEnsemble)
    q = ensemble.probabilities(inputs)
    results = collect(run)
    assert results["ensemble"]["nll"] == pytest.approx(
        float(-q[range(len(q)), labels].log().mean()), rel=1e-5
    )
    assert results["ensemble"]["nll"] < results["generalist"]["nll"]
    assert [each["size"] for each in results["sizes"]] == [1, 2]


def test_its_cost_is_its_examples_and_the_time_that_the_shortlists_took(run):
    results = collect(run)
    stages = [run.generalist, run.shortlists, *run.members]
    summaries = [read_json(stage.path("summary.json")) for stage in stages]
    cost = results["ensemble"]["cost"]
    assert cost["examples_seen"] == (30 + 40) * 96
    assert cost["seconds"] == pytest.approx(sum(each["seconds"] for each in summaries), abs=1e-3)


def test_a_student_learns_what_it_predicts(run):
    train, _ = inputs_of(run, "train")
    q = load_ensemble(run.root).probabilities(train[:4])
    read = rows_by_mass(run.targets["ensemble"].path("train"), q.shape[1], 1, len(train))
    kept = restored(read(np.arange(4)), q.shape[1], "cpu")
    torch.testing.assert_close(kept.spread()[0], q.float(), atol=2e-3, rtol=0)


def test_its_page_and_its_last_lines_say_what_it_is(run):
    page = (run.root / "report.html").read_text()
    length = read_json(run.root / "ensemble.json")["shortlist"]
    said = " ".join(page.split())
    assert "2 networks: the generalist, and others of the same classes" in said
    assert f"trained on its {K} likeliest classes of each example, and 4 drawn ones" in said
    assert f"asked about its {length} likeliest classes" in said
    console = Console(record=True, width=300)
    show_results(run, console)
    assert "One further network was asked about each example's" in console.export_text()


def test_it_is_exported_and_predicts_as_the_run_does(run, tmp_path, capsys):
    inputs, _ = inputs_of(run)
    first = predicted_by_run_and_export(run.root, inputs, tmp_path, capsys)
    p = load_ensemble(run.root).probabilities(inputs[:1])
    assert first["classes"] == p.topk(2).indices[0].tolist()


def begun(run, config, root):
    """A run of the same generalist and shortlists."""
    again = RunDirectory(root, config)
    for stage in (again.generalist, again.shortlists):
        shutil.copytree(run.root / stage.place, root / stage.place, symlinks=True)
        assert stage.is_done
    return again


def trained(run, config, root):
    """The weights of its re-ranker, and the losses that it logged."""
    again = begun(run, config, root)
    run_all(root, config, only=["member"])
    return load_classifier(root / "members/001").state_dict(), losses_of(again)


def losses_of(run):
    rows = map(json.loads, run.members[0].path("metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("words", [(), ("rerank.optimizer=sgd", "rerank.balance=0.5")])
def test_resumed_in_the_middle_it_ends_with_the_same_weights(
    run, data, tmp_path, monkeypatch, words
):
    config = configured(data, "rerank.patience=3", "rerank.validate_every=10", *words)
    undisturbed, losses = trained(run, config, tmp_path / "undisturbed")
    seen = []

    def agreed(self, ranks):
        seen.append(1)
        return len(seen) == 17

    monkeypatch.setattr("trainer.core.loop.StopSignal.agreed", agreed)
    with pytest.raises(Interrupted):
        trained(run, config, tmp_path / "interrupted")
    run_all(tmp_path / "interrupted", config, only=["member"])
    resumed = RunDirectory(tmp_path / "interrupted", config)
    again = load_classifier(tmp_path / "interrupted/members/001").state_dict()
    attempts = resumed.members[0].directory / "attempts"
    assert len(seen) > 17 and len(list(attempts.iterdir())) == 2
    for name, value in undisturbed.items():
        assert again[name].equal(value), name
    assert losses_of(resumed)[-1] == losses[-1]


@pytest.mark.slow
def test_two_ranks_log_the_losses_of_one(run, data, tmp_path):
    """Of the same batches, and of the same classes drawn for them."""
    config = configured(data, "rerank.accumulation=2", "rerank.optimizer=sgd")
    _, alone = trained(run, config, tmp_path / "1")
    again = begun(run, config, tmp_path / "2")
    save_config(config, again.root / "config.toml")
    stage_on_ranks(2, "member --index 1", again.root)
    np.testing.assert_allclose(losses_of(again), alone, atol=1e-5)


def test_one_that_starts_as_the_generalist_begins_with_its_weights(run, data, tmp_path):
    config = configured(data, "rerank.start=generalist", "rerank.steps=1", "rerank.optimizer=sgd")
    config.rerank.learning_rate = 1e-12
    weights, _ = trained(run, config, tmp_path / "run")
    generalist = load_classifier(run.root / "generalist").state_dict()
    for name, value in generalist.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


def test_shortlists_that_were_begun_go_on(run, data, tmp_path, monkeypatch):
    """A second attempt finds the blocks that the first one wrote."""
    monkeypatch.setattr(features, "BLOCK_ROWS", 100)
    config = configured(data)
    again = RunDirectory(tmp_path / "run", config)
    shutil.copytree(run.root / "generalist", again.root / "generalist", symlinks=True)
    written = []

    def write_json(path, values):
        from pipeline.files import write_json as write

        write(path, values)
        written.append(values["blocks"])
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(features, "write_json", write_json)
    with pytest.raises(KeyboardInterrupt):
        run_all(again.root, config, only=["shortlists"])
    run_all(again.root, config, only=["shortlists"])
    assert written[:4] == [1, 2, 3, 4]
    for split in ("train", "val"):
        ours = np.load(again.shortlists.path(f"{split}/classes.npy"))
        np.testing.assert_array_equal(ours, np.load(run.shortlists.path(f"{split}/classes.npy")))


@pytest.mark.parametrize(
    "words, message",
    [
        (["rerank.k=25"], f"rerank.k = 25 is more than the {NUM_CLASSES} classes"),
        (["rerank.k=1"], "rerank.k = 1"),
        (["rerank.random=-1"], "rerank.random = -1"),
        (["rerank.shortlists_bytes=1000"], "shortlists_bytes = 1,000 allows less"),
        (["ensemble.shortlist=9"], "the re-rankers learn on shortlists of 8"),
        (["ensemble.members=1"], "trains networks beside the generalist: set members = 2"),
        (["rerank.ema=0.9"], "set rerank.ema = 0.0"),
        (["rerank.clip_norm=1.0"], "set rerank.clip_norm = 0.0"),
        (["rerank.label_smoothing=0.1"], "set rerank.label_smoothing = 0.0"),
        (["rerank.negatives=5"], "rerank.random says how many; leave it out"),
        (["engine.precision=fp16"], "without loss scaling"),
        (["rerank.start=elsewhere"], "rerank.start"),
        (["rerank.start=generalist", "rerank.model.width=9"], "leave one out"),
        (["rerank.model.widht=9"], "unknown key rerank.model.widht; did you mean width?"),
        (["rerank.batch_size=95", "rerank.accumulation=2"], "batch 95 is not divisible"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(data, tmp_path, words, message):
    with pytest.raises(UserError) as error:
        config = configured(data, *words)
        RunDirectory(tmp_path / "new", config).method.check(NUM_CLASSES, "the data")
        check(config, 1, tmp_path / "new")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_network_without_a_trunk_that_learns_is_refused():
    spec = ModelSpec("mlp", 5, InputSpec((3,), "float32"), {"width": 4, "depth": 1})
    network = Classifier(spec, torch.nn.Flatten(), torch.nn.Linear(3, 5))
    with pytest.raises(UserError, match="no weights but its head's"):
        by_rows(network)


def test_it_is_tried_before_anything_is_trained(data, tmp_path):
    (warning,) = check(configured(data), 1, tmp_path / "new")
    assert "below about 2,000 a re-ranker's step takes longer" in warning


@pytest.mark.parametrize("words", [["engine.shard_head=true", "train.negatives=4"], []])
def test_what_a_sharded_generalist_inherits_does_not_reach_it(data, words):
    config = configured(data, *words)
    assert config.rerank.negatives is None and config.rerank.batch_size == 96
