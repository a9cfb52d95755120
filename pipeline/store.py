"""The run directory is the whole state of a run.  No torch here.

A stage's place holds `attempts/ID/` (one for each try), `checkpoints/`, and, once it is done, `DONE`.  The first
attempt that
hard-links its DONE into place wins, so two copies of one job cannot harm each other; the winner's files are
published by links.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path

from .config import Config, UserError

SCHEMA = 1
COMPLETE = "COMPLETE"  # in a checkpoint's directory


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest(value) -> str:
    """Hash of a JSON-able value, the same for equal values whatever the order of their keys."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def complete_checkpoints(directory: Path) -> list[Path]:
    """step-STEP/ that hold all they should, oldest first: the marker is what is written last."""
    return sorted(path.parent for path in directory.glob(f"step-*/{COMPLETE}"))


class Stage:
    """One stage's place in the run: what it is, whether it is done, and where an attempt writes.

    place: its directory below RUN.  key: the hash of the config sections it reads and of its inputs' keys, so that a
    changed
    section changes the key of every stage behind it.
    """

    def __init__(self, run: Path, place: str, key: str, name: str, inputs: Iterable[Stage] = ()):
        self.run, self.place, self.key, self.name = Path(run), place, key, name
        self.label = place
        self.inputs = tuple(inputs)
        self.directory = self.run / place

    def done(self) -> dict | None:
        """The content of DONE, or None."""
        try:
            return read_json(self.directory / "DONE")
        except FileNotFoundError:
            return None

    @property
    def is_done(self) -> bool:
        done = self.done()
        return done is not None and done["hash"] == self.key

    @property
    def is_begun(self) -> bool:
        return (self.directory / "KEY").exists()

    @property
    def is_stale(self) -> bool:
        """Finished or begun under another config."""
        try:
            return (self.directory / "KEY").read_text() != self.key
        except FileNotFoundError:
            return False

    def path(self, file: str) -> Path:
        """A finished stage's file, through the winning attempt (links are for people; DONE is what counts)."""
        done = self.done()
        assert done is not None, f"{self.place} is not done"
        return self.directory / "attempts" / done["attempt"] / file

    def begin(self, attempt: str | None = None) -> Attempt:
        """A new attempt.  Raises UserError if the directory was begun under another config."""
        if self.is_stale:
            raise UserError(
                f"{self.directory} was made with another config; run again with --force to redo it"
            )
        attempt = attempt or new_attempt_id()
        directory = self.directory / "attempts" / attempt
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / "KEY").exists():
                write_text(self.directory / "KEY", self.key)
        except OSError as mistake:
            raise UserError(f"{self.directory}: cannot be written: {mistake.strerror}") from None
        return Attempt(self, attempt, directory)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def clear(self) -> None:
        """Forget everything of this stage: checkpoints, attempts, DONE first, so that no half-cleared stage looks
        done."""
        (self.directory / "DONE").unlink(missing_ok=True)
        for child in list(self.directory.iterdir()) if self.directory.exists() else []:
            if child.is_symlink() or child.is_file():
                child.unlink()
            elif child.name in (
                "attempts",
                "checkpoints",
            ):  # other directories are stages of their own
                shutil.rmtree(child)


class Attempt:
    """One try at a stage: `path(NAME)` to write, `publish(NAME)` to show a file early, `finish()` to win."""

    def __init__(self, stage: Stage, attempt: str, directory: Path):
        self.stage, self.id, self.directory = stage, attempt, directory
        self.started = time.time()

    def path(self, file: str) -> Path:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, file: str) -> None:
        """Link STAGE/file to this attempt's, replacing an earlier attempt's link."""
        link = self.stage.directory / file
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
        os.symlink(os.path.relpath(self.directory / file, link.parent), temporary)
        os.replace(temporary, link)

    def finish(self, **facts) -> bool:
        """Declare this attempt finished.  Returns whether it won; a loser's files stay unread."""
        done = {
            "schema": SCHEMA,
            "stage": self.stage.name,
            "hash": self.stage.key,
            "attempt": self.id,
            "seconds": round(time.time() - self.started, 3),
            "finished": time.time(),
            **facts,
        }
        write_json(self.directory / "DONE", done)
        try:
            os.link(self.directory / "DONE", self.stage.directory / "DONE")
        except FileExistsError:
            return False
        for file in sorted(path.name for path in self.directory.iterdir() if path.name != "DONE"):
            self.publish(file)
        return True


def new_attempt_id() -> str:
    """Unique on a cluster, and in the order of time."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{job}-{uuid.uuid4().hex[:4]}"


class RunDirectory:
    """RUN: its config and its stages.  launch.plan makes jobs of them."""

    def __init__(self, root: str | Path, config: Config):
        self.root, self.config = Path(root), config
        values = config.dump()
        for split in ("train", "val", "test", "transfer", "ood"):
            values["data"][split] = _identities(values["data"][split])
        self._ood = values["data"].pop("ood")  # of evaluation alone
        for key in ("cache", "cache_bytes", "workers", "fetch_dir", "fetch_bytes"):
            values["data"].pop(key, None)
        schedule_only_pace = ("checkpoint_every", "keep", "log_every")
        for section in (values["train"], values["specialists"], *values["students"].values()):
            for key in schedule_only_pace:
                section.pop(key, None)
        values["specialists"].pop("per_job", None)
        values["ensemble"].pop("allow_missing", None)
        self.hashed = (
            values  # what stages' keys are made of: the config without what changes no figure
        )
        self.student, self.answers_for = cache(self._student), cache(self._answers_for)

    def _stage(
        self, name: str, place: str, sections: Iterable[str], inputs: Iterable[Stage] = (), **extra
    ) -> Stage:
        parts, inputs = {section: self._section(section) for section in sections}, list(inputs)
        key = digest([SCHEMA, name, parts, [stage.key for stage in inputs], extra])
        return Stage(self.root, place, key, name, inputs)

    def _section(self, name: str):
        value = self.hashed
        for part in name.split("."):
            value = value[part]
        return value

    @cached_property
    def generalist(self) -> Stage:
        sections = ["seed", "data", "model", "train", "generalist"]
        return self._stage("generalist", "generalist", sections, **self._of_old("generalist"))

    @cached_property
    def members(self) -> list[Stage]:
        """The further generalists of a deep ensemble, each from a seed of its own; the run's is its first."""
        count = self.config.ensemble.members if self.config.is_deep else 1
        sections = ["seed", "data", "model", "train"]
        return [
            self._stage("member", f"members/{index:03d}", sections, index=index)
            for index in range(1, count)
        ]

    @cached_property
    def measure(self) -> Stage:
        return self._stage(
            "measure",
            "clusters/statistics",
            [],
            [self.generalist],
            top_k=self.config.clusters.top_k,
        )

    @cached_property
    def cluster(self) -> Stage:
        extra = self._of_old("clusters") | (
            {"companions": self.config.extend.companions} if self.old else {}
        )
        groups = _file_hash(self.groups_file)
        return self._stage(
            "cluster", "clusters", ["clusters"], [self.measure], groups=groups, **extra
        )

    @property
    def old(self) -> Path | None:
        """The finished run to whose classes this one adds."""
        return Path(self.config.extend.run) if self.config.extend.run else None

    def _of_old(self, place: str) -> dict:
        """What is taken over from there, by the attempt that made it; nothing where no classes are added."""
        return {"taken": _file_hash(self.old / place / "DONE")} if self.old else {}

    @property
    def groups_file(self) -> Path | None:
        return Path(self.config.clusters.groups_file) if self.config.clusters.groups_file else None

    @cached_property
    def num_specialists(self) -> int:
        """As many as groups: the config's number, or the length of the user's groups file, or the old run's and one."""
        if self.config.is_deep:
            return 0
        if self.old:
            return self.num_inherited + 1
        if self.groups_file is None:
            return self.config.clusters.num_groups
        file = self.groups_file
        return _count_groups(
            file, f"clusters.groups_file = {file}: not a readable ClassGroups file"
        )

    @cached_property
    def num_inherited(self) -> int:
        """The first so many specialists are the old run's; 0 where no classes are added."""
        if not self.old:
            return 0
        file = self.old / "clusters" / "groups.json"
        return _count_groups(
            file, f"extend.run = {self.old}: no run of specialists, it has no clusters/groups.json"
        )

    @cached_property
    def route(self) -> Stage:
        return self._stage("route", "routed", [], [self.cluster], mode=self.config.route.mode)

    @cached_property
    def specialists(self) -> list[Stage]:
        found = []
        for index in range(self.num_specialists):
            place, sections, inputs, extra = (
                f"specialists/{index:03d}",
                ["specialists"],
                [self.route],
                {},
            )
            if index < self.num_inherited:
                sections, inputs, extra = [], [self.cluster], self._of_old(place)
            found.append(self._stage("specialist", place, sections, inputs, index=index, **extra))
        return found

    @cached_property
    def controls(self) -> dict[str, Stage]:
        """control_wall-0, -1, ... (one peak rate each), control_compute, and student_hard, the twin of
        students.main."""
        if not self.config.controls.enabled:
            return {}
        sections, found = ["specialists", "controls", "clusters"], {}

        def control(name, sections, inputs):
            return self._stage("control", f"controls/{name}", sections, inputs, called=name)

        if not self.config.is_deep:
            names = [
                f"control_wall-{index}" for index in range(len(self.config.controls.learning_rates))
            ]
            found = {name: control(name, sections, [self.cluster]) for name in names}
            found["control_compute"] = control("control_compute", sections, list(found.values()))
        if "main" in self.config.students:
            inputs = self._ancestors(self.config.students["main"].start)
            found["student_hard"] = control(
                "student_hard", ["seed", "data", "model", "students.main"], inputs
            )
        return found

    @cached_property
    def combine(self) -> Stage:
        """The joint opinion: what is fitted on val.  RUN/ensemble.json is its file."""
        inputs = [self.generalist, *self.members] if self.config.is_deep else self.specialists
        return self._stage("combine", "ensemble", ["ensemble"], inputs)

    def _ancestors(self, name: str) -> list[Stage]:
        """The stage of a teacher, or of the network that a student starts from; none of those that come from
        elsewhere."""
        if name in ("generalist", "ensemble"):
            return [self.generalist if name == "generalist" else self.combine]
        return [self.student(name)] if name in self.config.students else []

    @cached_property
    def students(self) -> dict[str, Stage]:
        return {name: self.student(name) for name in self.config.students}

    @cached_property
    def answers(self) -> dict[str, Stage]:
        """Stored answers of teachers by the name of their directory; several students may read the same."""
        found = [self.answers_for(name) for name in self.config.students]
        return {stage.directory.name: stage for stage in found if stage is not None}

    def _student(self, name: str) -> Stage:
        student, extra = self.config.students[name], {}
        inputs = self._ancestors(student.start)
        if student.learns_from_teacher:
            answers = self.answers_for(name)
            inputs += [*self._ancestors(student.teacher), *([answers] if answers else [])]
            extra = (
                {"teacher": _given_identity(student.teacher)} if os.sep in student.teacher else {}
            )
        unique = {stage.place: stage for stage in inputs}.values()
        sections = ["seed", "data", "model", f"students.{name}"]
        return self._stage("student", f"students/{name}", sections, unique, called=name, **extra)

    def _answers_for(self, name: str) -> Stage | None:
        """Where the answers of a student's teacher are stored: of inputs that are always seen alike, once each; of
        augmented ones, where the student says how many views.  None where the teacher answers as they come."""
        student = self.config.students[name]
        augment = self.augment_of(student)
        if (
            not student.learns_from_teacher
            or student.perturb != "none"
            or (augment != "none" and not student.views)
        ):
            return None
        given = os.sep in student.teacher
        slug = f"given-{digest(student.teacher)[:8]}" if given else student.teacher
        lesson = {"teacher": _given_identity(student.teacher) if given else student.teacher}
        if augment != "none":
            lesson |= {"augment": augment, "views": student.views}
            slug += f"-{student.views}-views"
            slug += "" if augment == self.config.data.augment else f"-{digest(augment)[:4]}"
        inputs = self._ancestors(student.teacher)
        return self._stage("answers", f"answers/{slug}", ["seed", "data"], inputs, **lesson)

    def augment_of(self, student) -> str:
        return student.augment or self.config.data.augment

    @cached_property
    def evaluate(self) -> Stage:
        inputs = [self.combine, *self.controls.values(), *self.students.values()]
        return self._stage("evaluate", "evaluation", [], inputs, ood=self._ood)

    @cached_property
    def report(self) -> Stage:
        """Its files, results.json and report.html, are published in RUN itself."""
        return self._stage("report", "report", [], [self.evaluate])

    @property
    def stages(self) -> list[Stage]:
        """Every stage, in an order in which each stands behind its inputs."""
        specialising = (
            []
            if self.config.is_deep
            else [self.measure, self.cluster, self.route, *self.specialists]
        )
        return [
            self.generalist,
            *self.members,
            *specialising,
            self.combine,
            *self._taught,
            self.evaluate,
            self.report,
        ]

    @property
    def _taught(self) -> list[Stage]:
        """Controls, stored answers and students, each behind those it needs."""
        found: dict[str, Stage] = {}

        def add(stage: Stage) -> None:
            for wanted in stage.inputs:
                if wanted.name in ("student", "answers"):
                    add(wanted)
            found.setdefault(stage.place, stage)

        joint = [stage for stage in self.answers.values() if stage.inputs == (self.combine,)]
        for stage in (*joint, *self.controls.values(), *self.students.values()):
            add(stage)
        return list(found.values())


def _count_groups(file: Path, otherwise: str) -> int:
    """Groups in a ClassGroups file; UserError(otherwise) where it is none."""
    try:
        return len(read_json(file)["members"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(otherwise) from None


def _file_hash(path: Path | None) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else None
    except OSError:
        return None


def _given_identity(place: str) -> list:
    """What a teacher from elsewhere is: the contents of the files that describe and hold it."""
    root = Path(place)
    names = ("ensemble.json", "generalist/model.safetensors", "model.json", "model.safetensors")
    return [_file_hash(root / name) for name in names]


def _identities(pattern: str) -> list:
    """What a split's shards are, whatever directory they lie in: per source its file names and its manifest's hash.

    Data made anew under the same name is other data, data moved elsewhere the same.  Without a manifest the path
    counts.
    """
    found = []
    for source in pattern.split("::"):
        path = Path(source)
        directory, files = (path, "") if path.is_dir() else (path.parent, path.name)
        manifest = _file_hash(directory / "manifest.json")
        found.append([files, manifest] if manifest else source)
    return found
