"""Statistics that ranks with unequal counts gather, each in its own file, against a single pass."""

import shutil

import numpy as np
import pytest
import torch
from ranks import stage_on_ranks
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
        part = gather(PredictionStatistics(24, top_k), rank, world)
        assert part.num_examples == counts[rank]
        part.save(tmp_path / f"{rank}.npz")
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
    statistics = {}
    for processes in (1, 2, 3):
        root = tmp_path / str(processes)
        shutil.copytree(trained.root, root, symlinks=True)
        stage_on_ranks(processes, "measure", root, timeout=240)
        path = RunDirectory(root, config).measure.path("statistics.npz")
        assert len(list(path.parent.glob("statistics-*.npz"))) == processes
        statistics[processes] = PredictionStatistics.load(path)
    assert statistics[1].num_examples == 24 * VAL
    groups = {n: group_classes(each, 6, overlap=2) for n, each in statistics.items()}
    for processes in (2, 3):
        assert_same(statistics[processes], statistics[1], 1e-9)
        assert groups[processes] == groups[1]
