"""Send what a run measures to TensorBoard, Weights & Biases or MLflow: extras, imported on demand.

Each stage that trains sends the config and the rows of metrics.jsonl, the last one the rows of
results.json.  What is sent leaves the machine, so that secrets of the config are hidden first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.loading import flat
from pipeline.extras import require
from pipeline.redaction import HIDDEN, shown

Row = dict[str, float]
# {name of a row of results.json: {metric: number}}
Table = Mapping[str, Mapping[str, float]]
TEXT_BYTES = 500  # of a value that a tracker gets: MLflow's oldest limit
PARAMETERS = 100  # that MLflow takes at once
IN_TABLE = ("n", "top1", "top5", "nll", "brier", "ece", "macro_top1", "parameters")


@dataclass(frozen=True)
class Tracker:
    """log: takes a row of metrics.jsonl.  table: takes the rows of results.json."""

    log: Callable[[Row], None]
    table: Callable[[Table], None]

    def __call__(self, row: Row) -> None:
        self.log(row)


@dataclass(frozen=True)
class Tracked:
    """What is tracked: a stage, called by its place, of a run.

    directory: the attempt's own, so that its files are whole.  config: see `config_of`.
    """

    directory: Path
    run: Path
    stage: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """A name that stays the same when the stage is resumed."""
        return hashlib.sha256(f"{self.run.resolve()}/{self.stage}".encode()).hexdigest()[:16]


def config_of(config: Config) -> dict[str, Any]:
    """{"section.key": number, bool or text} of a config, without secrets.

    Of a command whose output is read (`pipe:`) nothing is said: it may hold a secret anywhere.
    """
    return {key: _sendable(value) for key, value in flat(config.dump()).items()}


def _sendable(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if "pipe:" in text:
        return f"pipe:{HIDDEN}"
    return shown(text)[:TEXT_BYTES]


def table_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The numbers of results.json's rows that are compared."""
    return {
        name: {key: row[key] for key in IN_TABLE if isinstance(row.get(key), (int, float))}
        for name, row in rows.items()
    }


@contextmanager
def trackers(
    names: Sequence[str],
    directory: Path,
    run: Path,
    stage: str,
    config: Mapping[str, Any] | None = None,
) -> Iterator[list[Tracker]]:
    """A tracker for each of `names`.

    directory, run, stage, config: as in `Tracked`.
    """
    of = Tracked(directory, run, stage, config or {})
    with ExitStack() as stack:
        yield [stack.enter_context(KINDS[name](of)) for name in dict.fromkeys(names)]


@contextmanager
def tensorboard(of: Tracked) -> Iterator[Tracker]:
    """Event files under the attempt. `tensorboard --logdir RUN` shows every stage."""
    require("tensorboard", 'engine.track = ["tensorboard"]')
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(of.directory / "tensorboard")) as writer:
        if of.config:
            writer.add_text("config", _indented(of.config))

        def log(row: Row) -> None:
            for key, value in row.items():
                if key not in ("step", "steps", "time"):
                    writer.add_scalar(key, value, int(row["step"]), walltime=row.get("time"))

        def table(rows: Table) -> None:
            writer.add_text("results", markdown(rows))
            for key, value in _flat_table(rows).items():
                writer.add_scalar(key, value, 0)

        yield Tracker(log, table)


@contextmanager
def wandb(of: Tracked) -> Iterator[Tracker]:
    """One W&B run per stage, grouped by RUN. A resumed stage continues its own.

    W&B's environment variables (WANDB_PROJECT and the like) apply.
    """
    require("wandb", 'engine.track = ["wandb"]')
    import wandb  # pyright: ignore[reportMissingImports]  # an extra

    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "referral"),
        group=of.run.name,
        name=of.stage,
        id=of.identity,
        resume="allow",
        dir=str(of.directory),
        config=dict(of.config),
        allow_val_change=True,  # a stage may be resumed at another pace
    )

    def log(row: Row) -> None:
        values = {key: value for key, value in row.items() if key != "step"}
        session.log(values, step=row["step"])

    def table(rows: Table) -> None:
        columns = ["row", *IN_TABLE]
        data = [[name, *(row.get(key) for key in IN_TABLE)] for name, row in rows.items()]
        session.log({"results": wandb.Table(columns=columns, data=data)})
        session.summary.update(_flat_table(rows))

    try:
        yield Tracker(log, table)
    finally:
        session.finish()


@contextmanager
def mlflow(of: Tracked) -> Iterator[Tracker]:
    """One MLflow run per stage, tagged with RUN. A resumed stage continues its own.

    MLflow's environment variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME) apply.
    """
    require("mlflow", 'engine.track = ["mlflow"]')
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # an extra
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

    client = MlflowClient()
    experiment = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", "referral"))
    identity = _mlflow_run(client, experiment, of)
    if identity is None:
        tags = {"referral.identity": of.identity, "referral.run": of.run.name}
        name = f"{of.run.name}/{of.stage}"
        identity = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        # MLflow changes no parameter: those of the first attempt stay.
        parameters = [Param(key, str(value)) for key, value in of.config.items()]
        for start in range(0, len(parameters), PARAMETERS):
            client.log_batch(identity, params=parameters[start : start + PARAMETERS])
    else:
        client.update_run(identity, status="RUNNING")

    def log_all(values: Mapping[str, float], step: int, when: float) -> None:
        metrics = [
            Metric(key.replace(" ", "_"), float(value), int(when * 1000), step)
            for key, value in values.items()
        ]
        client.log_batch(identity, metrics=metrics)

    def log(row: Row) -> None:
        values = {key: value for key, value in row.items() if key not in ("step", "time")}
        log_all(values, int(row["step"]), row.get("time", time.time()))

    def table(rows: Table) -> None:
        log_all(_flat_table(rows), 0, time.time())
        client.log_dict(identity, {name: dict(row) for name, row in rows.items()}, "results.json")

    status = "FAILED"
    try:
        yield Tracker(log, table)
        status = "FINISHED"
    finally:
        client.set_terminated(identity, status)


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment. It is made where there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    return client.create_experiment(name)


def _mlflow_run(client: Any, experiment: str, of: Tracked) -> str | None:
    """The id of the run that an earlier attempt at the stage made."""
    found = client.search_runs(
        [experiment], filter_string=f"tags.`referral.identity` = '{of.identity}'", max_results=1
    )
    return found[0].info.run_id if found else None


# Texts


def _flat_table(rows: Table) -> dict[str, float]:
    return {
        f"results/{name}/{key}": value for name, row in rows.items() for key, value in row.items()
    }


def _indented(config: Mapping[str, Any]) -> str:
    """A block of code in Markdown, in which nothing is markup."""
    return "\n".join(f"    {key} = {json.dumps(value)}" for key, value in config.items())


def markdown(rows: Table) -> str:
    """A table of the rows.  Names of rows are keys of the config: letters, digits, - and _."""
    lines = [f"| | {' | '.join(IN_TABLE)} |", "| --- " * (1 + len(IN_TABLE)) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:.6g}" if key in row else "" for key in IN_TABLE]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


KINDS: dict[str, Callable[[Tracked], AbstractContextManager[Tracker]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
}
