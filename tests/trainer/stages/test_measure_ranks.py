"""Statistics that ranks with unequal counts gather, each in its own file, against one pass over everything."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy import toy_config, write_toy

from clustering import PredictionStatistics, group_classes
from pipeline.config import Data, save_config
from pipeline.graph import RunDirectory
from trainer.data.shards import open_shards
from trainer.data.streams import MeasuringStream
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage

VAL = 60  # images per class: 1,440 in all, three batches of 512 at most


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 10, "val": VAL, "test": 2})


def assert_same(merged, whole, atol):
    assert (merged.num_examples, merged.num_labelled) == (whole.num_examples, whole.num_labelled)
    np.testing.assert_array_equal(merged.confusion.toarray(), whole.confusion.toarray())
    np.testing.assert_allclose(merged.frequency, whole.frequency, atol=atol)
    np.testing.assert_allclose(merged.covariance, whole.covariance, atol=atol)
    np.testing.assert_allclose(
        merged.expected_confusion.toarray(),
        whole.expected_confusion.toarray(),
        atol=atol * whole.num_examples,
    )


@pytest.mark.parametrize("top_k", [None, 5], ids=["exact", "top5"])
@pytest.mark.parametrize(
    "world, counts", [(1, [1440]), (2, [928, 512]), (3, [512, 512, 416]), (4, [512, 512, 416, 0])]
)
def test_files_of_unequal_ranks_merge_to_one_pass(data, tmp_path, top_k, world, counts):
    shards = open_shards(str(data), Data(), "val")
    weights = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) / 300

    def gather(statistics, rank, world_size):
        for batch in MeasuringStream(shards, 512).loader(rank, world_size):
            statistics.update((batch.inputs.flatten(1).float() @ weights).softmax(1), batch.labels)
        return statistics

    for rank in range(world):
        share = gather(PredictionStatistics(24, top_k), rank, world)
        assert share.num_examples == counts[rank]
        share.save(tmp_path / f"{rank}.npz")
    merged = PredictionStatistics.load(tmp_path / "0.npz")
    for rank in range(1, world):
        merged.merge(PredictionStatistics.load(tmp_path / f"{rank}.npz"))
    assert_same(merged, gather(PredictionStatistics(24, top_k), 0, 1), 1e-12)


@pytest.mark.slow
def test_measure_with_1_2_and_3_processes_gives_the_same_statistics_and_groups(data, tmp_path):
    config = toy_config(data, "train.steps=30")
    trained = RunDirectory(tmp_path / "trained", config)
    with process_group(config.engine) as ranks:
        run_stage(Session(trained, ranks), trained.generalist)
    save_config(config, trained.root / "config.toml")
    found = {}
    for processes in (1, 2, 3):
        root = tmp_path / str(processes)
        shutil.copytree(trained.root, root, symlinks=True)
        command = [
            sys.executable,
            "-m",
            "trainer.distributed.torchrun",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "--",
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        subprocess.run(
            [*command, "measure", "--run", str(root)], env=environment, check=True, timeout=240
        )
        measured = RunDirectory(root, config).measure
        assert (
            len(list(measured.path("statistics.npz").parent.glob("statistics-*.npz"))) == processes
        )
        found[processes] = PredictionStatistics.load(measured.path("statistics.npz"))
    assert found[1].num_examples == 24 * VAL
    for processes in (2, 3):
        assert_same(found[processes], found[1], 1e-9)
        assert group_classes(found[processes], 6, overlap=2) == group_classes(
            found[1], 6, overlap=2
        )
