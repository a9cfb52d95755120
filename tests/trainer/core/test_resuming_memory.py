"""A run that is resumed holds what a run that began here holds."""

import pytest
from running import run_all
from toy import toy_config, write_toy

from benchmarks.scaling import storages
from networks import parameter_count
from trainer.core import loop

WORDS = (
    "model.width=400",
    "train.steps=12",
    "train.checkpoint_every=5",
    "train.validate_every=5",
    "train.patience=9",
    "train.ema=0.9",
)


class Died(Exception):
    pass


def held_at(step, monkeypatch, root, config):
    """Bytes of a weight that all living tensors take before this step."""
    held, plain = [], loop.Trainer.train_step

    def train_step(trainer, batch, rate):
        if trainer.progress.step == step:
            held.append(storages() / parameter_count(trainer.network))
            raise Died
        return plain(trainer, batch, rate)

    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(loop.Trainer, "train_step", train_step)
        run_all(root, config, ["generalist"])
    return held[0]


@pytest.mark.parametrize("sharded", (False, True))
def test_bytes_of_a_weight_after_a_resume_are_those_before(sharded, tmp_path, monkeypatch):
    data = write_toy(tmp_path / "data", {"train": 12, "val": 6, "test": 6})
    words = (*WORDS, "engine.shard_head=true") if sharded else WORDS
    config = toy_config(data, *words)
    before = held_at(8, monkeypatch, tmp_path / "run", config)
    after = held_at(8, monkeypatch, tmp_path / "run", config)
    assert before > 20  # weights, gradients, Adam's averages, averaged weights, the best ones
    assert after == pytest.approx(before, abs=0.5)
