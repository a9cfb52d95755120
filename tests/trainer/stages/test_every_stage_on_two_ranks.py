"""Each stage of a run by two gloo ranks, against one rank: the same files and the same metrics."""

from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks
from running import run_all
from toy import toy_config, write_toy, write_unlabelled

from clustering import ClassGroups
from pipeline.config import save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.data.ragged import RaggedRows

EVERY_STAGE = Path(__file__).with_name("every_stage.py")
PACE = {"cost", "seconds", "cpu_seconds", "latency_ms", "softmax_ms", "peak_memory_bytes"}
# Adam divides by the size of a gradient and so would make much of its last digit.
STEADY = ("train.optimizer=sgd", "train.learning_rate=0.1", "specialists.learning_rate=0.03")
STUDENTS = (
    "students.main.learning_rate=0.03",
    'students.live={steps=12, learning_rate=0.03, answers="live", temperature=2.0}',
    "specialists.patience=3",
    "specialists.validate_every=10",
    "specialists.dustbin_rows=9",
    "controls.learning_rates=[0.01]",
    'controls.rows=["average", "shortlist"]',
    "clusters.overlap=2",
    "ensemble.gate=2",
)
ALONE = ("controls.enabled=false", "students={}")
RERANK = (
    'ensemble={kind="rerank", members=2}',
    "rerank.k=6",
    "rerank.random=8",
    "rerank.steps=20",
    "rerank.learning_rate=0.01",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 and 50 examples a class, so that three batches of 512 fall to two ranks unevenly."""
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 50, "test": 60})


@pytest.fixture(scope="module")
def all_runs(data, tmp_path_factory) -> dict[str, dict[int, RunDirectory]]:
    """Runs of three kinds by one rank, in this process, and by two, in one start of torchrun."""
    transfer = write_unlabelled(tmp_path_factory.mktemp("more") / "transfer")
    configs = {
        "specialists": toy_config(data, *STEADY, *STUDENTS, f"data.transfer={transfer}"),
        "branches": toy_config(data, *STEADY, *ALONE, "specialists.kind=branch"),
        "rerank": toy_config(data, *STEADY, *ALONE, *RERANK),
    }
    root = tmp_path_factory.mktemp("runs")
    for name, config in configs.items():
        (root / "2" / name).mkdir(parents=True)
        save_config(config, root / "2" / name / "config.toml")
    on_ranks(2, EVERY_STAGE, *(root / "2" / name for name in configs), timeout=900)
    found = {}
    for name, config in configs.items():
        two = RunDirectory(root / "2" / name, config)
        done = {stage.name for stage in two.stages if stage.is_done}
        found[name] = {1: run_all(root / "1" / name, config, done), 2: two}
    return found


@pytest.fixture
def runs(all_runs):
    return all_runs["specialists"]


def without_pace(value):
    if isinstance(value, dict):
        return {key: without_pace(each) for key, each in value.items() if key not in PACE}
    return [without_pace(each) for each in value] if isinstance(value, list) else value


def assert_alike(one, other, where="", atol=1e-5):
    """The same keys and lengths, and numbers that differ by `atol` at most."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key, value in one.items():
            assert_alike(value, other[key], f"{where}/{key}", atol)
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}/{index}", atol)
    elif isinstance(one, float):
        np.testing.assert_allclose(one, other, atol=atol, rtol=atol, err_msg=where)
    else:
        assert one == other, where


def files(stage) -> list[str]:
    """What a stage left, but for what each rank has of its own."""
    directory = stage.path("")
    found = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    return sorted(name for name in found if "-1." not in name)


@pytest.mark.parametrize(
    "name, last", [("specialists", "report"), ("branches", "features"), ("rerank", "report")]
)
def test_two_ranks_leave_the_files_of_one(all_runs, name, last):
    one, two = all_runs[name].values()
    done = [stage for stage in two.stages if stage.is_done]
    assert done[-1].name == last
    for mine, theirs in zip(one.stages, done, strict=False):
        assert files(mine) == files(theirs), mine.place


def test_kept_features_and_shortlists_are_those_of_one_rank(all_runs):
    for name, stage, file in (
        ("branches", "features", "train/at_cut.npy"),
        ("branches", "features", "val/total.npy"),
        ("rerank", "shortlists", "train/classes.npy"),
    ):
        one, two = (np.load(run.find(stage)[0].path(file)) for run in all_runs[name].values())
        np.testing.assert_allclose(one, two, atol=1e-5, err_msg=file)


@pytest.mark.parametrize("name, controls, students", [("specialists", 6, 2), ("rerank", 0, 0)])
def test_results_agree_to_1e_5(all_runs, name, controls, students):
    runs = all_runs[name].values()
    results = [without_pace(read_json(run.root / "results.json")) for run in runs]
    assert len(results[0]["controls"]) == controls and len(results[0]["students"]) == students
    for each in results:
        for key in ("run", "environment", "conditions"):
            each.pop(key, None)
    assert_alike(*results)


def test_groups_and_the_ensembles_settings_agree(runs):
    groups = [ClassGroups.load(run.cluster.path("groups.json")) for run in runs.values()]
    assert groups[0] == groups[1]
    assert_alike(*(read_json(run.root / "ensemble.json") for run in runs.values()))
    assert_alike(*(read_json(run.diagnosis.path("diagnosis.json")) for run in runs.values()))


def test_rows_stand_in_the_order_of_one_rank(runs):
    for name in ("generalist", "ensemble", "main"):
        paths = [run.evaluate.path(f"{name}.npz") for run in runs.values()]
        one, two = (np.load(path) for path in paths)
        assert one.files == two.files
        for key in one.files:
            np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)
    predictions = [np.load(run.measure.path("predictions.npz")) for run in runs.values()]
    for key in ("ids", "labels", "top"):
        np.testing.assert_array_equal(predictions[0][key], predictions[1][key])


def test_targets_stand_in_the_order_of_one_rank(runs):
    stages = [run.targets["ensemble"] for run in runs.values()]
    entries = {"indices": np.dtype(np.uint16), "log_values": np.dtype(np.float16)}
    for split in ("train", "transfer"):
        one, two = (RaggedRows(s.path(split), entries, ("log_tail",)) for s in stages)
        np.testing.assert_array_equal(one.starts, two.starts)
        np.testing.assert_array_equal(one.counts, two.counts)
        np.testing.assert_array_equal(one.entries["indices"], two.entries["indices"])
        np.testing.assert_allclose(one.entries["log_values"], two.entries["log_values"], atol=1e-2)
