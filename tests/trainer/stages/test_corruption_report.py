"""data.damage = skip through the whole method: every lost sample is counted once and reported."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
from ranks import stage_on_ranks
from toy import NUM_CLASSES, toy_config, write_toy

from pipeline.config import UserError, save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.data.authoring.indexing import index_directory
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage


def corrupt(directory, shard: str, keys: set[str]) -> None:
    """Overwrite pictures' first bytes, under right checksums: only decoding detects it."""
    pictures, files = {f"{key}.png" for key in keys}, []
    with tarfile.open(directory / shard) as tar:
        for entry in tar:
            content = tar.extractfile(entry).read()
            if entry.name in pictures:
                content = b"no picture" + content[10:]
            files.append((entry, content))
    with tarfile.open(directory / shard, "w") as tar:
        for entry, content in files:
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Toy shards with pictures that cannot be decoded: how many, see LOST."""
    directory = write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 6})
    corrupt(directory, "train-000000.tar", {"000001", "000100", "000299"})
    corrupt(directory, "train-000001.tar", {"000300", "000479"})
    corrupt(directory, "val-000000.tar", {"000123"})
    corrupt(directory, "test-000000.tar", {"000000", "000077"})
    index_directory(directory)
    return directory


# Of each split: (samples that cannot be decoded, samples).
LOST = {"train": (5, 480), "val": (1, 288), "test": (2, 144)}
OVERRIDES = (
    "data.damage=skip",
    "data.damage_share=0.02",
    "controls.enabled=false",
    "train.steps=15",
    "clusters.num_groups=3",
)


def prepare(root, data, *overrides) -> RunDirectory:
    config = toy_config(data, *OVERRIDES, *overrides)
    root.mkdir(parents=True, exist_ok=True)
    save_config(config, root / "config.toml")
    return RunDirectory(root, config)


def lost_samples(path) -> dict:
    """What a stage's damage.json says, in the form of LOST."""
    splits = json.loads(path.read_text())

    def lost(split):
        return sum(n for _, n in split["where"].values())

    return {name: (lost(split), split["samples"]) for name, split in splits.items()}


@pytest.fixture(scope="module", params=["none", pytest.param("decoded", marks=pytest.mark.slow)])
def finished(request, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    run = prepare(root, data, f"data.cache={request.param}", "route.mode=copy")
    logger = logging.getLogger("referral")
    level = logger.level
    logger.setLevel(logging.INFO)  # as start_logging does
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        for stage in run.stages:
            run_stage(session, stage)
    logger.setLevel(level)
    return run


def test_results_and_report_tell_what_every_split_lost(finished):
    results = read_json(finished.report.path("results.json"))
    corruption = results["damage"]
    counts = {name: (split["lost"], split["samples"]) for name, split in corruption.items()}
    assert counts == LOST
    assert corruption["test"]["share"] == 2 / 144
    examples = corruption["test"]["examples"]
    assert any("sample 000077: cannot be decoded" in line for line in examples)
    page = finished.report.path("report.html").read_text()
    assert "2 of 144 test samples (1.39" in page and "are corrupt and were left out" in page


def test_metrics_are_of_the_examples_that_could_be_read(finished):
    for name in ("generalist", "ensemble", "main"):
        assert read_json(finished.evaluate.path(f"{name}.json"))["row"]["n"] == 6 * NUM_CLASSES - 2
    with np.load(finished.evaluate.path("ensemble.npz")) as predictions:
        assert set(range(144)) - set(predictions["ids"].tolist()) == {0, 77}


def test_the_log_reports_every_epoch(finished):
    text = finished.generalist.path("log-0.txt").read_text()
    epochs = [line.split(" ", 2)[2] for line in text.splitlines() if "epoch" in line]
    expected = [f"epoch {e} of train: 5 of 480 " for e in (1, 2, 3)]
    assert [line.split("samples")[0] for line in epochs] == expected
    assert "corrupt (1.04%), e.g. " in epochs[0] and ".tar: sample 000" in epochs[0]


def test_a_share_above_the_stated_one_stops_the_run(data, tmp_path):
    run = prepare(tmp_path, data, "data.damage_share=0.01", "data.cache=none")
    message = "5 of 480 samples are corrupt, above data.damage_share = 0.01"
    with process_group(run.config.engine) as ranks:
        with pytest.raises(UserError, match=message):
            run_stage(Session(run, ranks), run.generalist)


def test_strict_stops_at_the_first(data, tmp_path):
    run = prepare(tmp_path, data, "data.damage=strict", "data.cache=none")
    message = r'sample 000\d+: cannot be decoded.*data.damage = "skip" leaves such'
    with process_group(run.config.engine) as ranks:
        with pytest.raises(UserError, match=message):
            run_stage(Session(run, ranks), run.generalist)


@pytest.mark.slow
def test_two_ranks_count_each_loss_once(data, tmp_path):
    run = prepare(tmp_path / "run", data, "data.cache=none", "data.workers=1")
    for stage in ("generalist", "measure"):
        stage_on_ranks(2, stage, run.root)
    expected = {split: LOST[split] for split in ("train", "val")}
    assert lost_samples(run.generalist.path("damage.json")) == expected
    assert lost_samples(run.measure.path("damage.json"))["val"] == LOST["val"]
    assert run.generalist.path("log-0.txt").read_text().count(": 5 of 480 samples corrupt") == 3
    with np.load(run.measure.path("predictions.npz")) as predictions:
        assert len(predictions["ids"]) == 287
