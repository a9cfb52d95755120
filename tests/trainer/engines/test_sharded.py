"""A head split over the ranks learns what the whole one learns."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ENGINES, losses, on_ranks, weights
from running import run_all
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from toy import toy_config, write_toy

from clustering import ClassGroups
from networks import Classifier, InputSpec, ModelSpec, add_classes, build_classifier
from networks.sphere import open_rows
from pipeline.config import Engine, ResolvedSchedule, UserError
from pipeline.store import read_json
from trainer.core.checkpoints import load_checkpoint, save_checkpoint
from trainer.core.losses import classification_loss
from trainer.core.optim import AveragedWeights
from trainer.distributed.ranks import ALONE, process_group
from trainer.engines import build_engine

SHARDED = ("engine.shard_head=true", "engine.head_block=5")
REST = (
    "train.label_smoothing=0.1",
    "train.balance=0.5",
    "train.clip_norm=0.5",
    "train.accumulation=2",
    "train.validate_every=10",
    "train.patience=9",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """One process that holds the whole head."""
    out = tmp_path_factory.mktemp("whole")
    train_all(1, data, out, "ddp", *REST)
    return out / "ddp"


SPLITS = [("7", "0,29"), ("4,3", "0,10,29"), ("3,3", "0,10,29"), ("3,0,4", "0,3,20,29")]


@pytest.mark.parametrize("sizes, bounds", SPLITS)
def test_loss_and_gradients_are_torchs_however_rows_and_classes_are_split(sizes, bounds):
    """Labels, smoothing, dense and top-k targets, a prior. Each row with a weight of its own."""
    on_ranks(len(sizes.split(",")), ENGINES / "sharded_loss.py", sizes, bounds)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_a_sharded_head_logs_the_losses_of_one_process_with_a_whole_one(
    data, whole, tmp_path, ranks
):
    """With smoothing, a prior, clipping, accumulation and validation. It exports a whole head."""
    train_all(ranks, data, tmp_path, "ddp", *REST, *SHARDED)
    np.testing.assert_allclose(losses(tmp_path / "ddp"), losses(whole), atol=1e-5)
    compare(tmp_path / "ddp", whole)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("before, after", ((2, 1), (1, 2), (2, 3)))
def test_a_sharded_run_resumes_at_another_number_of_ranks(data, whole, tmp_path, before, after):
    train_all(before, data, tmp_path, "ddp", *REST, *SHARDED, "stop=20")
    train_all(after, data, tmp_path, "ddp", *REST, *SHARDED)
    np.testing.assert_allclose(losses(tmp_path / "ddp"), losses(whole), atol=1e-5)
    compare(tmp_path / "ddp", whole)


@pytest.mark.engines
@pytest.mark.slow
def test_adams_states_are_split_and_joined_and_a_whole_head_resumes_from_them(data, tmp_path):
    adam = ("train.optimizer=adamw", "train.learning_rate=0.01")
    train_all(1, data, tmp_path / "whole", "ddp", *adam)
    train_all(2, data, tmp_path / "changed", "ddp", *adam, *SHARDED, "stop=20")
    train_all(3, data, tmp_path / "changed", "ddp", *adam, *SHARDED, "stop=10")  # of this attempt
    train_all(2, data, tmp_path / "changed", "ddp", *adam)
    expected = losses(tmp_path / "whole" / "ddp")
    np.testing.assert_allclose(losses(tmp_path / "changed" / "ddp"), expected, atol=3e-5)


@pytest.mark.engines
@pytest.mark.slow
def test_negatives_are_the_same_on_any_number_of_ranks_and_after_a_resume(data, tmp_path):
    words = ("train.negatives=6", "train.balance=0.5", *SHARDED)
    for ranks in (1, 3):
        train_all(ranks, data, tmp_path / str(ranks), "ddp", *words)
    train_all(2, data, tmp_path / "2", "ddp", *words, "stop=20")
    train_all(3, data, tmp_path / "2", "ddp", *words)
    alone = losses(tmp_path / "1" / "ddp")
    assert alone[-1] < 0.7 * alone[0]
    for ranks in (2, 3):
        np.testing.assert_allclose(losses(tmp_path / str(ranks) / "ddp"), alone, atol=1e-5)


def learner(kind: str) -> Classifier:
    """A network of six classes. Of the grown one two rows alone learn."""
    torch.manual_seed(0)
    known = 4 if kind == "grown" else 6
    cosine = {"scale": 5.0, "learned": True} if kind == "cosine" else None
    spec = ModelSpec("mlp", known, InputSpec((3,), "float32"), {"width": 4}, cosine=cosine)
    network = build_classifier(spec)
    open_rows(network)
    return add_classes(network, list("012345")) if kind == "grown" else network


def steps(kind, shard, count, root, state=None):
    """The weights after some more steps, which are saved in `root`, too."""
    config, schedule = Engine(shard_head=shard, device="cpu"), ResolvedSchedule(clip_norm=0.5)
    network = learner(kind)
    with process_group(config) as ranks, closing(build_engine(config, ranks)) as engine:
        if state is not None:
            state = load_checkpoint(state, 1, own_rows=engine.own_rows(network))
        module = engine.prepare(network, schedule, state).train()
        average = AveragedWeights(network, 0.5, (state or {}).get("average"))
        for seed in count:
            torch.manual_seed(seed)
            raw, labels = torch.randn(8, 3), torch.randint(6, (8,))
            for part in (0, 4):
                with engine.accumulating(last=part == 4):
                    logits = module(raw[part : part + 4])
                    engine.backward(classification_loss(logits, labels[part : part + 4]) / 2)
            engine.step(0.1)
            average.update(network, seed)
        saved = {**engine.state(), "average": average.average, "best": None}
        save_checkpoint(root, 1, saved, 1, ranks=ranks)
        exported = engine.export(average.average).state_dict()
        return {name: value.clone() for name, value in exported.items()}


@pytest.mark.parametrize("kind", ("linear", "cosine", "grown"))
def test_split_and_whole_heads_go_on_from_each_others_checkpoints(kind, tmp_path):
    expected = steps(kind, False, range(4), tmp_path / "whole")
    for before, after in ((True, False), (False, True), (True, True)):
        root = tmp_path / f"{before}{after}"
        root.mkdir()
        steps(kind, before, range(2), root / "first")
        weights = steps(kind, after, range(2, 4), root / "second", state=root / "first")
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=1e-5)


AVERAGED = (
    "train.ema=0.8",
    "train.patience=9",
    "train.validate_every=10",
    "model.head=cosine",
    "model.width=20",
    "model.embedding=13",
    "model.margin=0.1",
    "model.margin_kind=arcface",
    "train.clip_norm=0.5",
)


@pytest.mark.engines
@pytest.mark.slow
def test_averaged_rows_of_cosines_are_those_of_one_process_and_no_rank_ever_has_all(data, tmp_path):
    """Drawn, trained, averaged, validated, saved, resumed on other ranks and exported in parts."""
    train_all(1, data, tmp_path / "whole", "ddp", *AVERAGED)
    narrow = (*AVERAGED, *SHARDED, "narrow=24,13")
    train_all(2, data, tmp_path / "split", "ddp", *narrow, "stop=20")
    train_all(3, data, tmp_path / "split", "ddp", *narrow)
    split, whole = tmp_path / "split" / "ddp", tmp_path / "whole" / "ddp"
    np.testing.assert_allclose(losses(split), losses(whole), atol=1e-5)
    compare(split, whole)
    generalist = split / "generalist"
    files = sorted(path.name for path in generalist.glob("model*.safetensors*"))
    assert files == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    checkpoint = generalist / "checkpoints" / "step-00000050"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert not [name for name in state["network"] if name.startswith("head.")]
    train_all(1, data, tmp_path / "split", "ddp", *AVERAGED)  # a whole head reads it
    compare(split, whole)


@pytest.mark.engines
@pytest.mark.slow
def test_in_bf16_a_split_head_learns_what_a_head_in_one_part_does(data, tmp_path):
    words = ("engine.precision=bf16", *SHARDED, "train.learning_rate=0.03")
    for ranks in (1, 2):
        train_all(ranks, data, tmp_path / str(ranks), "ddp", *words)
    one, two = (losses(tmp_path / str(ranks) / "ddp") for ranks in (1, 2))
    np.testing.assert_allclose(two, one, atol=0.02)
    assert one[-1] < 0.7 * one[0]


@pytest.mark.slow
def test_every_stage_in_blocks_gives_what_dense_logits_give(data, tmp_path):
    """Groups are given: where k-means has several optima a last digit decides between them."""
    ClassGroups(np.arange(24).reshape(4, 6).tolist(), 24).save(tmp_path / "groups.json")
    student = ("students.main.temperature=2.0", "students.main.hard_weight=0.3")
    run = (f"clusters.groups_file={tmp_path}/groups.json", "train.steps=40")
    words = (*run, *student, "controls.enabled=false")
    run_all(tmp_path / "dense", toy_config(data, *words))
    run_all(tmp_path / "blocks", toy_config(data, *words, *SHARDED))
    for stage in ("generalist", "specialists/003", "students/main"):
        dense = read_losses(tmp_path / "dense" / stage / "metrics.jsonl")
        blocks = read_losses(tmp_path / "blocks" / stage / "metrics.jsonl")
        np.testing.assert_allclose(blocks, dense, atol=1e-5)
    dense = read_json(tmp_path / "dense" / "results.json")
    blocks = read_json(tmp_path / "blocks" / "results.json")
    for row in ("generalist", "ensemble", "student"):
        for metric in ("top1", "top5", "nll", "brier", "ece"):
            expected = pytest.approx(dense[row][metric], abs=1e-5)
            assert blocks[row][metric] == expected, (row, metric)


@pytest.mark.slow
def test_a_specialist_with_a_fitted_row_reports_its_error_and_learns(data, tmp_path):
    words = ("clusters.num_groups=4", "train.steps=40", "controls.enabled=false")
    run_all(tmp_path / "run", toy_config(data, *words, "specialists.dustbin_rows=6"))
    for m in range(4):
        specialist = tmp_path / "run" / "specialists" / f"{m:03d}"
        dustbin = read_json(specialist / "summary.json")["dustbin"]
        head = read_json(specialist / "model.json")["head"]
        assert len(head["kept"]) == dustbin["rows"] == 6
        assert 0 < dustbin["kl"] < 0.1
    results = read_json(tmp_path / "run" / "results.json")
    assert results["ensemble"]["top1"] > results["generalist"]["top1"]


def read_losses(path):
    rows = map(json.loads, path.read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def train_all(ranks, *words):
    on_ranks(ranks, ENGINES / "train_all.py", *words)


def compare(run: Path, other: Path) -> None:
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(run)[name], value, atol=1e-5, rtol=1e-4)


def test_deepspeed_and_a_sharded_head_exclude_each_other(data):
    with pytest.raises(UserError, match='shard_head = true needs engine.name = "ddp"'):
        toy_config(data, "engine.shard_head=true", "engine.name=deepspeed")


def test_negatives_need_a_sharded_head_and_no_smoothing(data):
    with pytest.raises(UserError, match="train.negatives needs engine.shard_head = true"):
        toy_config(data, "train.negatives=5")
    with pytest.raises(UserError, match="leave one of them out"):
        toy_config(data, "train.negatives=5", "train.label_smoothing=0.1", "engine.shard_head=true")


def test_in_fp16_ranks_agree_on_steps_that_overflow(monkeypatch):
    """sharded_loss.py tries the scaler on ranks of which one overflows."""
    config = Engine(shard_head=True, device="cpu")
    monkeypatch.setattr("trainer.engines.ddp.precision", lambda *_: torch.float16)
    assert isinstance(build_engine(config, ALONE).scaler, ShardedGradScaler)
