"""The stages of a run, one row each.

The graph, the launcher, sbatch, status, costs, the report and the tests read this table.  A new
stage is one row and one function, locally and on Slurm: docs/extending.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageKind:
    """What all stages of one kind have in common.

    name: what `python -P -m trainer NAME` calls it.
    place: its directory below RUN; a family has one for each {index} or {name}.
    function: "module:function" of (session, stage), and of the index or name of its family.
    sections: keys of the config that change what it makes; with its inputs they are its identity.
    inputs: the kinds that it waits for, all stages of each, where it has no family itself.  It is
        in every run that has them.  Stages whose inputs depend on the config are put together by
        pipeline.graph.
    addressed_by: how one of a family is named on the command line.
    job: the job that it shares a process with; "" has a job of its own, called by its place.
    slurm: the section of [slurm] that says what its job asks for.
    trains: whether it takes optimizer steps, so that its cost counts.
    scales: whether it trains on several ranks.
    schedule: the section of the config by which it trains.
    former_name, former_place: what versions before schema 2 called it.
    together: "module:function" of (session, stages), for a kind whose stages are done at once where
        one command names several.
    """

    name: str
    place: str
    function: str
    sections: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    addressed_by: Literal["nothing", "index", "name"] = "nothing"
    job: str = ""
    slurm: str = "report"
    trains: bool = False
    scales: bool = False
    schedule: Literal["train", "specialists", "rerank", "students"] = "train"
    former_name: str = ""
    former_place: str = ""
    together: str = ""

    def place_of(self, address: int | str | None) -> str:
        """The directory below RUN of one stage of this kind."""
        if self.addressed_by == "index":
            return self.place.format(index=address)
        return self.place.format(name=address)


_ROWS = [
    StageKind(
        "generalist",
        "generalist",
        "trainer.stages.generalist:generalist",
        sections=("seed", "data", "model", "train", "generalist"),
        slurm="generalist",
        trains=True,
        scales=True,
    ),
    StageKind(
        "member",
        "members/{index:03d}",
        "trainer.stages.generalist:member",
        sections=("seed", "data", "model", "train"),
        addressed_by="index",
        slurm="members",
        trains=True,
    ),
    StageKind(
        "shortlists",
        "shortlists",
        "trainer.stages.rerank:shortlists",
        sections=("data",),
        slurm="ensemble",
    ),
    StageKind(
        "measure",
        "clusters/statistics",
        "trainer.stages.grouping:measure",
        job="clusters",
        slurm="clusters",
    ),
    StageKind(
        "cluster",
        "clusters",
        "trainer.stages.grouping:cluster",
        sections=("clusters",),
        job="clusters",
        slurm="clusters",
    ),
    StageKind(
        "diagnosis",
        "diagnosis",
        "trainer.stages.diagnosis:diagnosis",
        job="clusters",
        slurm="clusters",
    ),
    StageKind(
        "route",
        "routed",
        "trainer.stages.grouping:route",
        job="clusters",
        slurm="clusters",
    ),
    StageKind(
        "features",
        "features",
        "trainer.stages.features:features",
        sections=("seed", "data"),
        job="clusters",
        slurm="clusters",
    ),
    StageKind(
        "specialist",
        "specialists/{index:03d}",
        "trainer.stages.specialist:specialist",
        sections=("specialists",),
        addressed_by="index",
        slurm="specialists",
        trains=True,
        schedule="specialists",
    ),
    StageKind(
        "ensemble",
        "ensemble",
        "trainer.stages.joining:ensemble",
        sections=("ensemble",),
        job="ensemble",
        slurm="ensemble",
        former_name="combine",
    ),
    StageKind(
        "targets",
        "targets/{name}",
        "trainer.stages.targets:targets",
        sections=("seed", "data"),
        addressed_by="name",
        slurm="ensemble",
        former_name="answers",
        former_place="answers/{name}",
    ),
    StageKind(
        "control",
        "controls/{name}",
        "trainer.stages.control:control",
        sections=("specialists", "controls", "clusters"),
        addressed_by="name",
        slurm="controls",
        trains=True,
        schedule="specialists",
    ),
    StageKind(
        "student",
        "students/{name}",
        "trainer.stages.student:student",
        sections=("seed", "data", "model"),
        addressed_by="name",
        slurm="students",
        trains=True,
        schedule="students",
    ),
    StageKind(
        "evaluate",
        "evaluation",
        "trainer.stages.evaluate:evaluate",
        job="report",
        slurm="report",
    ),
    StageKind(
        "report",
        "report",
        "trainer.stages.report:report",
        inputs=("evaluate",),
        job="report",
        slurm="report",
    ),
    StageKind(
        "pilot",
        "pilots/{name}",
        "trainer.stages.pilots:pilot",
        addressed_by="name",
        slurm="specialists",
        trains=True,
    ),
    StageKind(
        "advice",
        "advice",
        "trainer.stages.advice:advice",
        slurm="report",
    ),
]
KINDS: dict[str, StageKind] = {row.name: row for row in _ROWS}
