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
    place: its directory below RUN. A family has one for each {index} or {name}.
    function: "module:function" of (session, stage), and of the index or name of its family.
    sections: keys of the config that change what it makes, with its inputs they are its identity.
    inputs: the kinds that it waits for, all stages of each, where it has no family itself.  It is
        in every run that has them.  Stages whose inputs depend on the config are put together by
        pipeline.graph.
    addressed_by: how one of a family is named on the command line.
    job: the job that it shares a process with. "" has a job of its own, called by its place.
    slurm: the section of [slurm] that says what its job asks for.
    trains: whether it takes optimizer steps, so that its cost counts.
    scales: whether several ranks share its work.
    alone: why one rank does it, where it does not scale.
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
    alone: str = "its function is made for one rank"
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
        scales=True,
    ),
    StageKind(
        "shortlists",
        "shortlists",
        "trainer.stages.rerank:shortlists",
        sections=("data",),
        slurm="ensemble",
        scales=True,
    ),
    StageKind(
        "measure",
        "clusters/statistics",
        "trainer.stages.grouping:measure",
        job="clusters",
        slurm="clusters",
        scales=True,
    ),
    StageKind(
        "cluster",
        "clusters",
        "trainer.stages.grouping:cluster",
        sections=("clusters",),
        job="clusters",
        slurm="clusters",
        alone="groups are found in one piece, from statistics that all ranks have gathered",
    ),
    StageKind(
        "diagnosis",
        "diagnosis",
        "trainer.stages.diagnosis:diagnosis",
        job="clusters",
        slurm="clusters",
        scales=True,
    ),
    StageKind(
        "route",
        "routed",
        "trainer.stages.grouping:route",
        job="clusters",
        slurm="clusters",
        alone="the shards are read in one pass",
    ),
    StageKind(
        "features",
        "features",
        "trainer.stages.features:features",
        sections=("seed", "data"),
        job="clusters",
        slurm="clusters",
        scales=True,
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
        scales=True,
    ),
    StageKind(
        "ensemble",
        "ensemble",
        "trainer.stages.joining:ensemble",
        sections=("ensemble",),
        job="ensemble",
        slurm="ensemble",
        former_name="combine",
        scales=True,
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
        scales=True,
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
        scales=True,
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
        scales=True,
    ),
    StageKind(
        "evaluate",
        "evaluation",
        "trainer.stages.evaluate:evaluate",
        job="report",
        slurm="report",
        scales=True,
    ),
    StageKind(
        "report",
        "report",
        "trainer.stages.report:report",
        inputs=("evaluate",),
        job="report",
        slurm="report",
        alone="it writes a page from what was measured",
    ),
    StageKind(
        "pilot",
        "pilots/{name}",
        "trainer.stages.pilots:pilot",
        addressed_by="name",
        slurm="specialists",
        trains=True,
        alone="pilots are short, and train beside each other",
    ),
    StageKind(
        "advice",
        "advice",
        "trainer.stages.advice:advice",
        slurm="report",
        alone="it writes a page from what the pilots measured",
    ),
]
KINDS: dict[str, StageKind] = {row.name: row for row in _ROWS}
# Sections of [slurm] whose jobs are independent trainings of one kind.
SIDE_BY_SIDE = tuple(
    dict.fromkeys(
        kind.slurm
        for kind in _ROWS
        if kind.scales and kind.trains and kind.addressed_by != "nothing"
    )
)
