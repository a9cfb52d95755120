"""What kind of run it is, in one place: which stages lead to the ensemble, and whose costs it
bears.

There are six methods: specialists that are copies of the generalist (or of another network),
specialists that are its branches, a deep ensemble of generalists, generalists that are asked about
the first one's shortlist, networks that are also trained on shortlists, and specialists that add
classes to a finished run.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .config import UserError
from .identity import classifier_folder, classifier_identity, file_hash, weight_files
from .stages import KINDS, StageKind
from .store import Stage, read_json

if TYPE_CHECKING:
    from .graph import RunDirectory


class Method(Protocol):
    """has_groups: whether classes are grouped for specialists.

    kinds: rows that differ from the table.
    """

    has_groups: bool
    kinds: dict[str, StageKind]

    def generalist(self) -> Stage: ...

    def members(self) -> list[Stage]: ...

    def cluster(self) -> Stage: ...

    def specialists(self) -> list[Stage]: ...

    def ensemble(self) -> Stage: ...

    def before_ensemble(self) -> list[Stage]:
        """The stages between generalist and ensemble, in order."""
        ...

    def joined(self) -> list[Stage]:
        """The stages whose networks join the generalist. Their cost is the ensemble's."""
        ...

    def check(self, num_classes: int | None, source: str) -> None:
        """Raises UserError for what can be known to be wrong before anything runs.

        num_classes: the size of the label set, if known, as `source` says.
        """
        ...


class SpecialistMethod:
    """Hinton, Vinyals & Dean 2015, section 5: a generalist, and a specialist for each group."""

    has_groups = True
    kinds: dict[str, StageKind] = {}
    # A network from elsewhere is not trained, and is copied in the job that finds the groups.
    GIVEN = dataclasses.replace(
        KINDS["member"],
        function="trainer.stages.generalist:given_start",
        sections=(),
        job=KINDS["cluster"].job,
        slurm=KINDS["cluster"].slurm,
        trains=False,
    )

    def __init__(self, run: RunDirectory):
        self.run = run

    def generalist(self) -> Stage:
        return self.run.stage("generalist")

    def members(self) -> list[Stage]:
        """The other generalist that specialists start as, if they start as another."""
        config = self.run.config.specialists
        if not config.starts_elsewhere:
            return []
        if not config.given_start:
            return [self.run.stage("member", (), 1, index=1)]
        taken = classifier_identity(config.given_start)
        return [self.run.stage("member", (), 1, kind=self.GIVEN, index=1, taken=taken)]

    def cluster(self) -> Stage:
        groups = file_hash(self.groups_file)
        return self.run.stage("cluster", [self.run.measure], groups=groups)

    def specialists(self) -> list[Stage]:
        inputs = [self.run.route, *self.run.members]
        return [
            self.run.stage("specialist", inputs, index, index=index)
            for index in range(self.num_groups)
        ]

    def ensemble(self) -> Stage:
        return self.run.stage("ensemble", self.run.specialists)

    def before_ensemble(self) -> list[Stage]:
        groups = [self.run.measure, self.run.cluster, *self.diagnosed(), self.run.route]
        return [*self.run.members, *groups, *self.run.specialists]

    def diagnosed(self) -> list[Stage]:
        """The diagnosis. None where an earlier version went on from the groups without it."""
        behind = self.behind_groups()
        went_on = behind.is_done or behind.is_older
        return [] if went_on and not self.run.diagnosis.is_begun else [self.run.diagnosis]

    def behind_groups(self) -> Stage:
        """The stage that follows the diagnosis, and does not need it."""
        return self.run.route

    def joined(self) -> list[Stage]:
        return [*self.run.members, *self.run.specialists]

    def check(self, num_classes: int | None, source: str) -> None:
        """There are groups, not more than classes, of classes that exist, and the start exists."""
        self.check_groups(num_classes, source)
        given = self.run.config.specialists.given_start
        if given:
            check_classifier("specialists.from", given, num_classes, source)

    def check_groups(self, num_classes: int | None, source: str) -> None:
        config = self.run.config.clusters
        if self.num_groups < 1:
            raise UserError(
                f"clusters.groups_file = {config.groups_file} holds no group; "
                "at least one is needed"
            )
        if self.groups_file is None and config.overlap > config.num_groups:
            raise UserError(
                f"clusters.overlap = {config.overlap}: with clusters.num_groups = "
                f"{config.num_groups} a class can be in 1 to {config.num_groups} groups"
            )
        if num_classes is None:
            return
        if self.groups_file is None:
            if config.num_groups > num_classes:
                raise UserError(
                    f"clusters.num_groups = {config.num_groups} is more than the {num_classes} "
                    f"classes of {source}; each group needs a class"
                )
            return
        outside = [c for c in classes_in(self.groups_file) if not 0 <= c < num_classes]
        if outside:
            raise UserError(
                f"clusters.groups_file = {self.groups_file}: class index {outside[0]} is out of "
                f"range; {source} has {num_classes} classes, 0 to {num_classes - 1}"
            )
        declared = read_json(self.groups_file).get("num_classes", num_classes)
        if declared != num_classes:
            raise UserError(
                f"clusters.groups_file = {self.groups_file} is for {declared} classes, "
                f"{source} has {num_classes}; make it anew for these"
            )

    @property
    def groups_file(self) -> Path | None:
        """The user's own groups, instead of clustering."""
        file = self.run.config.clusters.groups_file
        return Path(file) if file else None

    @cached_property
    def num_groups(self) -> int:
        """The config's number, or the length of the user's groups file."""
        file = self.groups_file
        if file is None:
            return self.run.config.clusters.num_groups
        return count_groups(file, f"clusters.groups_file = {file}: not a readable ClassGroups file")


class BranchMethod(SpecialistMethod):
    """Specialists that correct the generalist's logits, and learn from its kept features."""

    BRANCH = dataclasses.replace(
        KINDS["specialist"],
        function="trainer.stages.branches:branch",
        together="trainer.stages.branches:branches",
        scales=False,
        alone="all branches of a job learn in one product",
    )

    def specialists(self) -> list[Stage]:
        inputs = [self.run.cluster, self.run.features]
        return [
            self.run.stage("specialist", inputs, index, kind=self.BRANCH, index=index)
            for index in range(self.num_groups)
        ]

    def before_ensemble(self) -> list[Stage]:
        groups = [self.run.measure, self.run.cluster, *self.diagnosed(), self.run.features]
        return [*groups, *self.run.specialists]

    def behind_groups(self) -> Stage:
        return self.run.features

    def joined(self) -> list[Stage]:
        return [self.run.features, *self.run.specialists]


class DeepMethod:
    """A deep ensemble: generalists alone, each from a seed of its own, or given."""

    has_groups = False
    # A network from elsewhere is not trained, and is copied in the job that fits the ensemble.
    GIVEN = dataclasses.replace(
        KINDS["member"],
        function="trainer.stages.generalist:given_member",
        sections=(),
        job=KINDS["ensemble"].job,
        slurm=KINDS["ensemble"].slurm,
        trains=False,
    )
    kinds = {
        "evaluate": dataclasses.replace(
            KINDS["evaluate"], function="trainer.stages.evaluate:evaluate_deep"
        )
    }

    def __init__(self, run: RunDirectory):
        self.run = run

    def generalist(self) -> Stage:
        return self.run.stage("generalist")

    def trained(self) -> list[Stage]:
        """The members that this run trains. The others are given."""
        count = self.run.config.ensemble.members
        return [self.run.stage("member", (), index, index=index) for index in range(1, count)]

    def members(self) -> list[Stage]:
        trained = self.trained()
        given = []
        for index, path in enumerate(self.run.config.ensemble.networks, len(trained) + 1):
            taken = classifier_identity(path)
            given.append(
                self.run.stage("member", (), index, kind=self.GIVEN, index=index, taken=taken)
            )
        return [*trained, *given]

    def cluster(self) -> Stage:
        raise AssertionError("a deep ensemble has no groups")

    def specialists(self) -> list[Stage]:
        return []

    def ensemble(self) -> Stage:
        kind = dataclasses.replace(
            KINDS["ensemble"],
            function="trainer.stages.joining:deep_ensemble",
            scales=False,
            alone="there is nothing to fit",
        )
        inputs = [self.run.generalist, *self.run.members]
        return self.run.stage("ensemble", inputs, kind=kind)

    def before_ensemble(self) -> list[Stage]:
        return self.run.members

    def joined(self) -> list[Stage]:
        return self.run.members

    def check(self, num_classes: int | None, source: str) -> None:
        """Networks from elsewhere exist, and know as many classes."""
        for path in self.run.config.ensemble.networks:
            check_classifier("ensemble.networks", path, num_classes, source)


class ShortlistMethod(DeepMethod):
    """Further networks are asked about each example's likeliest classes of the generalist's.

    They are generalists from other seeds, and networks that exist already.
    """

    kinds = {
        "evaluate": dataclasses.replace(
            KINDS["evaluate"], function="trainer.stages.evaluate:evaluate_shortlist"
        )
    }

    def ensemble(self) -> Stage:
        kind = dataclasses.replace(
            KINDS["ensemble"], function="trainer.stages.joining:shortlist_ensemble"
        )
        inputs = [self.run.generalist, *self.run.members]
        return self.run.stage("ensemble", inputs, kind=kind)


class RerankMethod(ShortlistMethod):
    """The further networks are trained on the generalist's shortlists, too."""

    RERANKER = dataclasses.replace(
        KINDS["member"],
        function="trainer.stages.rerank:reranker",
        sections=("seed", "data", "model", "rerank"),
        schedule="rerank",
    )

    def trained(self) -> list[Stage]:
        inputs = [self.run.generalist, self.run.shortlists]
        count = self.run.config.ensemble.members
        return [
            self.run.stage("member", inputs, index, kind=self.RERANKER, index=index)
            for index in range(1, count)
        ]

    def before_ensemble(self) -> list[Stage]:
        return [self.run.shortlists, *self.run.members]

    def joined(self) -> list[Stage]:
        return [self.run.shortlists, *self.run.members]

    def check(self, num_classes: int | None, source: str) -> None:
        """Also checks that shortlists are not longer than the label set."""
        super().check(num_classes, source)
        k = self.run.config.rerank.k
        if num_classes is not None and k > num_classes:
            raise UserError(
                f"rerank.k = {k} is more than the {num_classes} classes of {source}; set rerank.k "
                f"to at most {num_classes}"
            )


class ExtendingMethod(SpecialistMethod):
    """New classes beside those of a finished run.

    Its generalist gets rows for them, its groups and specialists are inherited, and there is one
    new group and specialist.
    """

    # An inherited specialist is not trained, and is handed on in the job that finds the groups.
    INHERITED = dataclasses.replace(
        KINDS["specialist"],
        function="trainer.stages.extending:inherit_specialist",
        sections=(),
        job=KINDS["cluster"].job,
        slurm=KINDS["cluster"].slurm,
        trains=False,
    )
    kinds = {
        "evaluate": dataclasses.replace(
            KINDS["evaluate"], function="trainer.stages.evaluate:evaluate_extended"
        )
    }

    def __init__(self, run: RunDirectory):
        super().__init__(run)
        self.old = Path(run.config.extend.run)

    def generalist(self) -> Stage:
        kind = dataclasses.replace(
            KINDS["generalist"], function="trainer.stages.extending:generalist"
        )
        return self.run.stage("generalist", kind=kind, **self._inherited("generalist"))

    def cluster(self) -> Stage:
        kind = dataclasses.replace(KINDS["cluster"], function="trainer.stages.extending:cluster")
        return self.run.stage(
            "cluster",
            [self.run.measure],
            kind=kind,
            groups=None,
            companions=self.run.config.extend.companions,
            **self._inherited("clusters"),
        )

    def diagnosed(self) -> list[Stage]:
        """None: the generalist learned from other examples, in another run."""
        return []

    def specialists(self) -> list[Stage]:
        stages = []
        for index in range(self.num_inherited):
            extra = self._inherited(f"specialists/{index:03d}")
            kind = self.INHERITED
            inputs = [self.run.cluster]
            stages.append(
                self.run.stage("specialist", inputs, index, kind=kind, index=index, **extra)
            )
        index = self.num_inherited
        return [*stages, self.run.stage("specialist", [self.run.route], index, index=index)]

    def _inherited(self, place: str) -> dict:
        """What is inherited from a place of the old run: the attempt that made it."""
        return {"taken": file_hash(self.old / place / "DONE")}

    @cached_property
    def num_inherited(self) -> int:
        """The first so many specialists are the old run's."""
        file = self.old / "clusters" / "groups.json"
        return count_groups(
            file, f"extend.run = {self.old}: no run of specialists, it has no clusters/groups.json"
        )

    def check(self, num_classes: int | None, source: str) -> None:
        """The old run is another one, and all that is inherited is done."""
        if self.old.resolve() == self.run.root.resolve():
            raise UserError(
                f"extend.run = {self.old} is this run itself; give the new one another --run"
            )
        try:
            skipped = self.skipped()
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"extend.run = {self.old}: its clusters are not done; finish that run first"
            ) from None
        specialists = [
            f"specialists/{m:03d}" for m in range(self.num_inherited) if m not in skipped
        ]
        places = ["generalist", *specialists]
        absent = [place for place in places if not (self.old / place / "DONE").is_file()]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise UserError(
                f"extend.run = {self.old}: {', '.join(absent[:3])}{more} not done; "
                "finish that run first"
            )

    def skipped(self) -> list[int]:
        """Groups of the old run that got no specialist."""
        return read_json(self.old / "clusters" / "summary.json")["skipped"]

    @property
    def groups_file(self) -> None:
        return None

    @cached_property
    def num_groups(self) -> int:
        return self.num_inherited + 1


def method_of(run: RunDirectory) -> Method:
    if run.config.ensemble.kind == "shortlist":
        return ShortlistMethod(run)
    if run.config.has_rerankers:
        return RerankMethod(run)
    if run.config.is_deep:
        return DeepMethod(run)
    if run.config.specialists.is_branch:
        return BranchMethod(run)
    return ExtendingMethod(run) if run.config.extend.run else SpecialistMethod(run)


def check_classifier(key: str, path: str, num_classes: int | None, source: str) -> None:
    """Raises UserError unless a saved network of so many classes lies where `key` says.

    num_classes: None is any number.
    """
    folder = classifier_folder(Path(path))
    try:
        theirs = read_json(folder / "model.json")["num_classes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{key}: {path} holds no network (no readable model.json); name a "
            "run whose generalist is done, or a directory of a saved network"
        ) from None
    if not weight_files(folder):
        raise UserError(f"{key}: {path} has no model.safetensors; finish that run first")
    if num_classes not in (None, theirs):
        raise UserError(
            f"{key}: {path} knows {theirs} classes, {source} has "
            f"{num_classes}; name a network of the same classes"
        )


def classes_in(groups_file: Path) -> list[int]:
    """Every class index in a ClassGroups file."""
    try:
        groups = read_json(groups_file)["members"]
        return [int(index) for classes in groups for index in classes]
    except (TypeError, ValueError):
        raise UserError(
            f"clusters.groups_file = {groups_file}: its members are not lists of class indices"
        ) from None


def count_groups(file: Path, otherwise: str) -> int:
    """Groups in a ClassGroups file.  Raises UserError(otherwise) where it is none."""
    try:
        return len(read_json(file)["members"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(otherwise) from None
