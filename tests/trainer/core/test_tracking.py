"""Trackers get the config without secrets, the rows of metrics, and the rows of results."""

import sys
import types

import pytest

from pipeline.config import UserError, load_config
from trainer.core import tracking
from trainer.core.tracking import Tracked, config_of, markdown, table_of

ROWS = {"ensemble": {"n": 10, "top1": 0.75, "nll": 1.5}, "student main": {"n": 10, "top1": 0.5}}


def config(**data):
    sections = {split: "shards" for split in ("train", "val", "test")} | data
    base = {
        "data": sections,
        "model": {"name": "mlp"},
        "train": {"steps": 3},
        "clusters": {"num_groups": 2},
    }
    return config_of(load_config(None, [], base))


# What is sent


def test_secrets_of_urls_and_whole_commands_do_not_leave_the_machine():
    sent = config(
        train="http://me:hunter2@host/train-{000..009}.tar",
        val="https://host/v.tar?X-Amz-Signature=hunter2&x=1",
        test="pipe:curl -H 'X-Own: hunter2' https://host/t.tar",
    )
    assert "hunter2" not in str(sent)
    assert sent["data.train"] == "http://***@host/train-{000..009}.tar"
    assert sent["data.test"] == "pipe:***"
    assert sent["train.steps"] == 3 and sent["controls.enabled"] is True
    assert all(isinstance(value, (str, int, float, bool)) for value in sent.values())
    assert max(len(value) for value in sent.values() if isinstance(value, str)) <= 500


def test_the_table_has_the_numbers_of_the_rows_that_are_compared():
    rows = {"ensemble": {"n": 10, "top1": 0.75, "nll": None, "cost": {"seconds": 3}, "asked": 1.0}}
    assert table_of(rows) == {"ensemble": {"n": 10, "top1": 0.75}}
    lines = markdown(ROWS).splitlines()
    assert lines[0].startswith("| | n | top1 | top5 | nll |")
    assert lines[2] == "| ensemble | 10 | 0.75 |  | 1.5 |  |  |  |  |"
    assert {line.count("|") for line in lines} == {10}


def test_a_stage_that_is_resumed_has_the_same_identity_and_others_have_not(tmp_path):
    one, again, other = (
        Tracked(tmp_path / attempt, tmp_path / "run", stage).identity
        for attempt, stage in (("1", "generalist"), ("2", "generalist"), ("1", "report"))
    )
    assert one == again != other


# TensorBoard, as it is


def test_tensorboard_holds_config_rows_and_results(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracking.trackers(
        ["tensorboard"], tmp_path, tmp_path, "report", {"train.steps": 3, "data.train": "a|b"}
    ) as (tracker,):
        tracker({"step": 5, "loss": 1.25, "time": 12.0, "steps": 9})
        tracker.table(ROWS)
    logged = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in logged.Scalars("loss")] == [(5, 1.25)]
    assert logged.Scalars("results/ensemble/top1")[0].value == 0.75
    texts = {
        tag: logged.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in ("config/text_summary", "results/text_summary")
    }
    assert texts["config/text_summary"] == '    train.steps = 3\n    data.train = "a|b"'
    assert texts["results/text_summary"] == markdown(ROWS)


# W&B, by its interface


class FakeWandb(types.SimpleNamespace):
    """wandb.init, a run's log, summary and finish, and wandb.Table."""

    def __init__(self):
        super().__init__(opened=[], logged=[], summary={}, Table=dict, finished=0)

    def init(self, **settings):
        self.opened.append(settings)
        return self

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_config_rows_and_results(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracking.trackers(["wandb"], tmp_path, tmp_path / "run", "report", {"seed": 0}) as (one,):
        one({"step": 5, "loss": 1.0})
        one.table(ROWS)
    assert fake.opened[0]["config"] == {"seed": 0} and fake.opened[0]["group"] == "run"
    (step, row), (_, table) = fake.logged
    assert (step, row) == (5, {"loss": 1.0})
    assert table["results"]["columns"] == ["row", *tracking.IN_TABLE]
    assert table["results"]["data"][0] == ["ensemble", 10, 0.75, None, 1.5, *[None] * 4]
    assert fake.summary["results/student main/top1"] == 0.5 and fake.finished == 1


# MLflow, by its client's interface


class FakeClient:
    """The calls of MlflowClient that are used, over a store that all clients share."""

    runs: dict = {}
    experiments: dict = {}

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return None if known is None else types.SimpleNamespace(experiment_id=known)

    def create_experiment(self, name):
        self.experiments[name] = f"e{len(self.experiments)}"
        return self.experiments[name]

    def search_runs(self, experiments, filter_string, max_results):
        identity = filter_string.split("'")[1]
        assert filter_string.startswith("tags.`referral.identity` = ")
        return [
            types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))
            for run_id, run in self.runs.items()
            if run["tags"]["referral.identity"] == identity and run["experiment"] in experiments
        ][:max_results]

    def create_run(self, experiment_id, tags, run_name):
        run_id = f"r{len(self.runs)}"
        self.runs[run_id] = {
            "experiment": experiment_id,
            "tags": tags,
            "name": run_name,
            "params": {},
            "metrics": [],
            "files": {},
            "status": "RUNNING",
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        for key, value in params:
            assert key not in self.runs[run_id]["params"], "MLflow changes no parameter"
            self.runs[run_id]["params"][key] = value
        self.runs[run_id]["metrics"] += metrics

    def log_dict(self, run_id, dictionary, artifact_file):
        self.runs[run_id]["files"][artifact_file] = dictionary

    def update_run(self, run_id, status):
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id, status):
        self.runs[run_id]["status"] = status


@pytest.fixture
def runs(monkeypatch):
    """What the fake MLflow holds."""
    monkeypatch.setattr(FakeClient, "runs", {})
    monkeypatch.setattr(FakeClient, "experiments", {})
    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, timestamp, step),
        Param=lambda key, value: (key, value),
    )
    fake = types.SimpleNamespace(MlflowClient=FakeClient, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return FakeClient.runs


def test_mlflow_gets_config_rows_and_results_and_a_resumed_stage_goes_on(tmp_path, runs):
    settings = {f"key{n}": n for n in range(150)}
    for attempt in ("1", "2"):
        with tracking.trackers(
            ["mlflow"], tmp_path / attempt, tmp_path / "run", "report", settings
        ) as (tracker,):
            tracker({"step": 5, "loss": 1.0, "time": 2.5})
            tracker.table(ROWS)
    (run,) = runs.values()
    assert run["name"] == "run/report" and run["status"] == "FINISHED"
    assert run["params"] == {key: str(value) for key, value in settings.items()}
    assert run["metrics"].count(("loss", 1.0, 2500, 5)) == 2
    keys = {key for key, *_ in run["metrics"]}
    assert "results/student_main/top1" in keys and "results/ensemble/nll" in keys
    assert run["files"]["results.json"] == ROWS


def test_a_stage_that_fails_is_failed_in_mlflow_too(tmp_path, runs):
    with pytest.raises(ZeroDivisionError):
        with tracking.trackers(["mlflow"], tmp_path, tmp_path / "run", "generalist"):
            raise ZeroDivisionError
    assert [run["status"] for run in runs.values()] == ["FAILED"]


def test_an_experiment_of_the_users_name_is_made_once(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for stage in ("generalist", "report"):
        with tracking.trackers(["mlflow"], tmp_path, tmp_path / "run", stage):
            pass
    assert list(FakeClient.experiments) == ["mine"] and len(runs) == 2


def test_the_real_mlflow_takes_it(tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with tracking.trackers(
            ["mlflow"], tmp_path, tmp_path / "run", "report", {"train.steps": 3}
        ) as (tracker,):
            tracker({"step": 5, "loss": 1.0, "val/top1": 0.5})
            tracker.table(ROWS)
    known = client(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = known.get_experiment_by_name("referral")
    (run,) = known.search_runs([experiment.experiment_id])
    assert run.data.params == {"train.steps": "3"}
    assert run.data.metrics["results/student_main/top1"] == 0.5
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} is not installed; pip install .*{name}"):
        with tracking.trackers([name], tmp_path, tmp_path, "generalist"):
            pass
