"""The graph of a run's stages, a function of its config and of files that it names."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .advice.graph import AdviceGraph
from .choices import CONTROL_ROWS
from .config import Config, ResolvedSchedule, ResolvedStudent, UserError, load_config
from .config.frozen import SINCE_SCHEMA_1
from .controls import COMPUTE, HARD_TWIN, is_wall, twins, wall_names
from .identity import Identity, digest, network_identity
from .methods import Method, method_of
from .stages import KINDS, StageKind
from .store import Stage


class Before(NamedTuple):
    """What a stage's key was made of in earlier versions."""

    inputs: Iterable[Stage]
    extra: dict[str, Any]


class RunDirectory:
    """RUN: its config and its stages.

    `method` is what kind of run it is: of specialists, of a deep ensemble, or one that adds
    classes. Families are lists (members, specialists) or dicts by name (targets, controls,
    students).
    """

    def __init__(self, root: str | Path, config: Config):
        self.root = Path(root)
        self.config = config
        self.identity = Identity(config)
        self.student = cache(self._student)
        self.targets_for = cache(self._targets_for)
        self.method: Method = method_of(self)

    def stage(
        self,
        name: str,
        inputs: Iterable[Stage] = (),
        address: int | str | None = None,
        sections: tuple[str, ...] | None = None,
        kind: StageKind | None = None,
        before: Before | None = None,
        **extra,
    ) -> Stage:
        """A stage of the kind `name`, with its key.

        address: its index or name, in a family.  sections: instead of its row's.  kind: a row of
        the run's own, instead of the table's.  before: what else entered its key in earlier
        versions, whose results can still be read.  extra: what enters its key beside config and
        inputs.
        """
        kind = kind or KINDS[name]
        inputs = list(inputs)
        before = before or Before(inputs, extra)
        names = (name, kind.former_name or name)
        read = kind.sections if sections is None else sections
        keys = self.identity.keys(names, read, [_ends(each.keys) for each in inputs], extra)
        former = self.identity.keys(
            names, read, [_ends(each.former) for each in before.inputs], before.extra
        )
        return Stage(self.root, kind, keys, inputs, address, former)

    # The way to the ensemble

    @cached_property
    def generalist(self) -> Stage:
        return self.method.generalist()

    @cached_property
    def members(self) -> list[Stage]:
        """The further networks beside the generalist, which is the first of the ensemble."""
        return self.method.members()

    @cached_property
    def measure(self) -> Stage:
        return self.stage("measure", [self.generalist], top_k=self.config.clusters.top_k)

    @cached_property
    def cluster(self) -> Stage:
        return self.method.cluster()

    @cached_property
    def route(self) -> Stage:
        return self.stage("route", [self.cluster], mode=self.config.route.mode)

    @cached_property
    def diagnosis(self) -> Stage:
        """What keeps the generalist from being better, by what it says of train and val."""
        run = self.advice.run
        return run.stage("diagnosis", [run.cluster])

    @cached_property
    def features(self) -> Stage:
        """What branches learn from: what the generalist has where they part from it."""
        section, augment = self.config.specialists, self.config.data.augment
        return self.stage(
            "features",
            [self.generalist],
            blocks=section.blocks,
            views=section.views_of(augment),
        )

    @cached_property
    def shortlists(self) -> Stage:
        """What re-rankers learn from: each example's likeliest classes of the generalist."""
        return self.stage("shortlists", [self.generalist], k=self.config.rerank.k)

    @cached_property
    def specialists(self) -> list[Stage]:
        return self.method.specialists()

    @cached_property
    def ensemble(self) -> Stage:
        """How the networks are joined: what is fitted on val.  RUN/ensemble.json is its file."""
        return self.method.ensemble()

    # Beside it and behind it

    @cached_property
    def controls(self) -> dict[str, Stage]:
        """control_wall-0, -1, ... (one peak rate each), control_compute, rows and twins.

        pipeline.controls says what each is.
        """
        controls = {}
        if self.config.controls.enabled and self.method.has_groups:
            for name in wall_names(self.config):
                controls[name] = self._trained_on(name, [])
            controls[COMPUTE] = self._trained_on(COMPUTE, list(controls.values()))
        controls |= {name: self.control_row(name) for name in self.config.controls.rows}
        return controls | {name: self._twin(name, of) for name, of in twins(self.config).items()}

    def _trained_on(self, name: str, walls: list[Stage]) -> Stage:
        """Train the generalist on. Specialists may stop early, so only when they are done is it
        known for how long.
        """
        behind = walls or [self.cluster]
        lengths = []
        if self.config.specialists.patience:
            lengths = [stage for stage in self.specialists if stage.kind.trains]
        extra: dict[str, Any] = {"called": name, "keeps": "best"}
        if name == COMPUTE and self.config.controls.max_share != 1:
            extra["max_share"] = self.config.controls.max_share
        return self.stage(
            "control",
            [*behind, *lengths],
            name,
            before=Before(behind, {"called": name}),
            **extra,
        )

    def control_row(self, name: str) -> Stage:
        """One of pipeline.choices.CONTROL_ROWS, whether controls.rows asks for it or not."""
        row = CONTROL_ROWS[name]
        kind = dataclasses.replace(KINDS["control"], function=row.function, sections=())
        if row.of_second:
            settings = self.config.ensemble
            extra: dict[str, Any] = {"temperatures": settings.temperatures}
            extra |= {"shortlist": settings.shortlist, "order": settings.order}
            extra["fit_weight"] = settings.fit_weight
            evaluate = KINDS["evaluate"]
            kind = dataclasses.replace(
                kind, trains=row.trains, job=evaluate.job, slurm=evaluate.slurm
            )
            return self.stage(
                "control", [self.generalist, self.second], name, kind=kind, called=name, **extra
            )
        model = self.config.controls.model
        kind = dataclasses.replace(
            kind, sections=("seed", "data", "model", "train"), schedule="train"
        )
        if row.goes_on:
            return self.stage("control", [self.generalist], name, kind=kind, called=name)
        # Without widths of the user's, those of the ensemble's multiplications.
        inputs = [] if model else [self.ensemble]
        return self.stage("control", inputs, name, kind=kind, called=name, own_model=model)

    @cached_property
    def second(self) -> Stage:
        """A further generalist from another seed, which a deep ensemble has among its members."""
        trained = [stage for stage in self.members if stage.kind is KINDS["member"]]
        index = len(self.members) + 1
        return trained[0] if trained else self.stage("member", (), index, index=index)

    def _twin(self, name: str, student: str) -> Stage:
        inputs = self._ancestors(self.config.students[student].start)
        sections = ("seed", "data", "model", f"students.{student}")
        return self.stage("control", inputs, name, sections, called=name)

    @cached_property
    def students(self) -> dict[str, Stage]:
        return {name: self.student(name) for name in self.config.students}

    @cached_property
    def targets(self) -> dict[str, Stage]:
        """Stored predictions of teachers by their directory's name. Students may share them."""
        stages = [self.targets_for(name) for name in self.config.students]
        return {stage.directory.name: stage for stage in stages if stage is not None}

    @cached_property
    def evaluate(self) -> Stage:
        inputs = [self.ensemble, *self.controls.values(), *self.students.values()]
        kind = self.method.kinds.get("evaluate")
        extra = {"ood": self.identity.ood}
        known = [stage for name, stage in self.controls.items() if _is_of_all_versions(name)]
        before = Before([self.ensemble, *known, *self.students.values()], extra)
        return self.stage("evaluate", inputs, kind=kind, before=before, **extra)

    @cached_property
    def report(self) -> Stage:
        """The stage `report`, whose results.json and report.html are published in RUN itself."""
        return self.stage("report", [self.evaluate])

    @cached_property
    def advice(self) -> AdviceGraph:
        """What `referral advise` does in this run. No stage of the run itself waits for it."""
        return AdviceGraph(self)

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage, in an order in which each stands behind its inputs."""
        stages = [self.generalist, *self.method.before_ensemble(), self.ensemble]
        known = {stage.place for stage in stages}
        stages += [stage for stage in self._learners() if stage.place not in known]
        stages += [self.evaluate, self.report]
        return stages + self._further(stages)

    def _further(self, stages: list[Stage]) -> list[Stage]:
        """Those of rows that say what they wait for, and that nothing above makes.

        A kind that waits for one that this run has not (a deep ensemble has no groups) has no
        stage.
        """
        known: dict[str, list[Stage]] = {}
        for stage in stages:
            known.setdefault(stage.name, []).append(stage)
        further = []
        for kind in KINDS.values():
            assert KINDS.keys() >= set(kind.inputs), f"{kind.name} waits for {kind.inputs}"
            if kind.inputs and kind.name not in known and known.keys() >= set(kind.inputs):
                inputs = [stage for name in kind.inputs for stage in known[name]]
                stage = self.stage(kind.name, inputs)
                known[kind.name] = [stage]
                further.append(stage)
        return further

    def find(self, name: str) -> list[Stage]:
        """Every stage of one kind. Those of an advice alone, too."""
        own = [stage for stage in self.stages if stage.name == name]
        return own or [stage for stage in self.advice.stages if stage.name == name]

    def with_stages(self, names: Iterable[str]) -> RunDirectory:
        """The run that has stages of these kinds: this one, or what is advised on instead."""
        own = {stage.name for stage in self.stages}
        return self if own.issuperset(names) else self.advice.run

    def schedule(self, stage: Stage) -> ResolvedSchedule:
        """The schedule by which a stage trains its network."""
        of_twin = twins(self.config).get(str(stage.address))
        if stage.name == "control" and of_twin is not None:
            return self.config.students[of_twin]
        if stage.kind.schedule == "students":
            return self.config.students[str(stage.address)]
        return getattr(self.config, stage.kind.schedule)

    def augment_of(self, student: ResolvedStudent) -> str:
        return student.augment or self.config.data.augment

    def augment_share_of(self, student: ResolvedStudent) -> float:
        if student.augment_share is None:
            return self.config.data.augment_share
        return student.augment_share

    # Students and what they learn from

    def _ancestors(self, name: str) -> list[Stage]:
        """The stage of a teacher, or of the network that a student starts from.

        None for those that come from elsewhere.
        """
        if name == "generalist":
            return [self.generalist]
        if name == "ensemble":
            return [self.ensemble]
        return [self.student(name)] if name in self.config.students else []

    def _student(self, name: str) -> Stage:
        student = self.config.students[name]
        inputs = self._ancestors(student.start)
        extra: dict[str, Any] = {}
        if student.learns_from_teacher:
            inputs = [*inputs, *self._ancestors(student.teacher)]
            targets = self.targets_for(name)
            if targets is not None:
                inputs.append(targets)
            if os.sep in student.teacher:
                extra = {"teacher": network_identity(student.teacher)}
        unique = {stage.place: stage for stage in inputs}.values()
        sections = ("seed", "data", "model", f"students.{name}")
        return self.stage("student", unique, name, sections, called=name, **extra)

    def _targets_for(self, name: str) -> Stage | None:
        """Where the predictions of a student's teacher are stored.

        Inputs that are always seen alike are predicted once each. Augmented ones in as many views
        as the student says.  None where the teacher predicts while the student trains.
        """
        student = self.config.students[name]
        augment = self.augment_of(student)
        if not student.learns_from_teacher or student.perturb != "none":
            return None
        if student.answers == "live" or (augment != "none" and not student.views):
            return None
        directory = teacher = student.teacher
        if os.sep in student.teacher:
            directory = f"given-{digest(student.teacher)[:8]}"
            teacher = network_identity(student.teacher)
        extra: dict[str, Any] = {"teacher": teacher}
        if augment != "none":
            extra |= {"augment": augment, "views": student.views}
            directory += f"-{student.views}-views"
            if augment != self.config.data.augment:
                directory += f"-{digest(augment)[:4]}"
            share = self.augment_share_of(student)
            if share != self.config.data.augment_share:
                extra |= {"augment_share": share}
                directory += f"-{digest(share)[:4]}"
        kept = {key: getattr(student, key) for key in ("answers_mass", "answers_bytes")}
        other = {key: each for key, each in kept.items() if each != SINCE_SCHEMA_1["students"][key]}
        if other:
            extra |= other
            directory += f"-{digest(other)[:4]}"
        return self.stage("targets", self._ancestors(student.teacher), directory, **extra)

    def _learners(self) -> list[Stage]:
        """Controls, stored targets and students, each behind those it needs."""
        ordered: dict[str, Stage] = {}

        def add(stage: Stage) -> None:
            for needed in stage.inputs:
                if needed.name in ("student", "targets", "member"):
                    add(needed)
            ordered.setdefault(stage.place, stage)

        of_ensemble = [stage for stage in self.targets.values() if stage.inputs == (self.ensemble,)]
        for stage in (*of_ensemble, *self.controls.values(), *self.students.values()):
            add(stage)
        # Those that go in the job of `evaluate` stand beside it: a job stands behind its inputs.
        last = KINDS["evaluate"].job
        return sorted(ordered.values(), key=lambda stage: stage.kind.job == last)


def _ends(keys: tuple[str, ...]) -> tuple[str, str]:
    return keys[0], keys[-1]


def _is_of_all_versions(control: str) -> bool:
    """Whether versions before there were rows and further twins had this control too."""
    return is_wall(control) or control in (COMPUTE, HARD_TWIN)


def open_run(directory: str | Path) -> RunDirectory:
    """The run that RUN/config.toml describes.  Raises UserError if there is none."""
    root = Path(directory)
    if not (root / "config.toml").is_file():
        raise UserError(
            f"{root} is not a run: it has no config.toml; "
            f"`referral prepare CONFIG --run {shlex.quote(str(root))}` makes one"
        )
    return RunDirectory(root, load_config(root / "config.toml"))
