"""A head split over the ranks learns what the whole one learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ENGINES, losses, on_ranks, weights
from toy import toy_config, write_toy

from trainer.config import Engine, UserError
from trainer.distributed import ALONE
from trainer.engines import build_engine

SHARDED = ("engine.shard_head=true", "engine.head_block=5")
REST = ("train.label_smoothing=0.1", "train.balance=0.5", "train.clip_norm=0.5", "train.accumulation=2",
        "train.validate_every=10", "train.patience=9")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """One process that holds the whole head."""
    out = tmp_path_factory.mktemp("whole")
    train_all(1, data, out, "ddp", *REST)
    return out / "ddp"


@pytest.mark.parametrize("sizes, bounds", (("7", "0,29"), ("4,3", "0,10,29"), ("3,0,4", "0,3,20,29")))
def test_loss_and_gradients_are_torchs_however_rows_and_classes_are_split(sizes, bounds):
    """Labels, smoothing, dense and top-k targets, a prior; each row with a weight of its own."""
    on_ranks(len(sizes.split(",")), ENGINES / "sharded_loss.py", sizes, bounds)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_a_sharded_head_logs_the_losses_of_one_process_with_a_whole_one(data, whole, tmp_path, ranks):
    """With smoothing, a prior, clipping, accumulation and validation; and what is exported is the whole network."""
    train_all(ranks, data, tmp_path, "ddp", *REST, *SHARDED)
    np.testing.assert_allclose(losses(tmp_path / "ddp"), losses(whole), atol=1e-5)
    compare(tmp_path / "ddp", whole)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("before, after", ((2, 1), (1, 2), (2, 3)))
def test_a_sharded_run_goes_on_at_another_number_of_ranks(data, whole, tmp_path, before, after):
    train_all(before, data, tmp_path, "ddp", *REST, *SHARDED, "stop=20")
    train_all(after, data, tmp_path, "ddp", *REST, *SHARDED)
    np.testing.assert_allclose(losses(tmp_path / "ddp"), losses(whole), atol=1e-5)
    compare(tmp_path / "ddp", whole)


@pytest.mark.engines
@pytest.mark.slow
def test_adams_states_are_split_and_joined_and_a_whole_head_goes_on_from_them(data, tmp_path):
    adam = ("train.optimizer=adamw", "train.learning_rate=0.01")
    train_all(1, data, tmp_path / "whole", "ddp", *adam)
    train_all(2, data, tmp_path / "changed", "ddp", *adam, *SHARDED, "stop=20")
    train_all(3, data, tmp_path / "changed", "ddp", *adam, *SHARDED, "stop=10")  # of this attempt
    train_all(2, data, tmp_path / "changed", "ddp", *adam)
    np.testing.assert_allclose(losses(tmp_path / "changed" / "ddp"), losses(tmp_path / "whole" / "ddp"), atol=3e-5)


def train_all(ranks, *words):
    on_ranks(ranks, ENGINES / "train_all.py", *words)


def compare(run: Path, other: Path) -> None:
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(run)[name], value, atol=1e-5, rtol=1e-4)


def test_deepspeed_and_a_sharded_head_exclude_each_other(data):
    with pytest.raises(UserError, match='shard_head = true needs engine.name = "ddp"'):
        toy_config(data, "engine.shard_head=true", "engine.name=deepspeed")


def test_fp16_is_refused(monkeypatch):
    config = Engine(shard_head=True, device="cpu")
    monkeypatch.setattr("trainer.engines.ddp.precision", lambda *_: torch.float16)
    with pytest.raises(UserError, match='take "bf16"'):
        build_engine(config, ALONE)
