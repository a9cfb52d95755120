"""Which GPU a rank has, as its launcher gave it one."""

import os

import pytest
import torch

from pipeline.config import Engine, UserError
from trainer.distributed.ranks import Ranks, check_own_gpus, choose_device
from trainer.engines.zero import import_deepspeed


def test_each_rank_with_a_gpu_of_its_own_is_let_through():
    check_own_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-4")])
    check_own_gpus([("a", "GPU-1"), ("b", "GPU-1")])  # no two GPUs have one id, two hosts might


def test_two_ranks_with_one_gpu_are_refused_by_name_with_how_many_there_may_be():
    gpus = [("a", "GPU-1"), ("b", "GPU-3"), ("b", "GPU-4"), ("b", "GPU-3"), ("b", "GPU-4")]
    with pytest.raises(UserError, match="ranks 1 and 3 have one GPU on b.*start 2 there"):
        check_own_gpus(gpus)


@pytest.mark.parametrize("visible, index", [(8, 3), (1, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_it_sees(visible, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(Engine()) == torch.device("cuda", index)
    assert choose_device(Engine(device="cpu")) == torch.device("cpu")


def test_a_run_that_asks_for_cuda_says_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(Engine()) == torch.device("cpu")
    with pytest.raises(UserError, match='engine.device = "cuda", but torch sees no CUDA device'):
        choose_device(Engine(device="cuda"))


@pytest.mark.parametrize("device", [torch.device("cuda", 0), torch.device("cpu")])
def test_deepspeed_takes_the_gpu_of_its_rank_not_that_of_its_number(device, monkeypatch):
    """It counts GPUs by LOCAL_RANK, of which there is one where each process sees its own alone."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    import_deepspeed(Ranks(3, 4, device))
    assert os.environ["LOCAL_RANK"] == ("0" if device.type == "cuda" else "3")
