"""What sections ask of each other.  Each check raises ValueError with one line."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ..choices import LOSSES
from .base import one_of
from .messages import in_our_words
from .schedule import DEFAULT_SCHEDULE, NAME, ResolvedSchedule, ResolvedStudent
from .sections import Model

if TYPE_CHECKING:
    from .run import Config

RESERVED = ("generalist", "ensemble", "scratch", "student_hard")  # names of rows in results.json


def check_all(config: Config) -> None:
    for name, student in config.students.items():
        check_student_name(name)
        check_ancestry(name, student, config)
        check_model(name, student, config)
    check_full_softmax(config)
    check_extend(config)
    check_negatives(config)
    check_losses(config)
    check_averages(config)
    check_branches(config)


def schedules(config: Config) -> dict[str, ResolvedSchedule]:
    """Every schedule of the run by its section."""
    students = {f"students.{name}": student for name, student in config.students.items()}
    return {"train": config.train, "specialists": config.specialists, **students}


def check_student_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"students.{name}: a student's name is letters, digits, '_' and '-'")
    if name in RESERVED or name.startswith("control_"):
        raise ValueError(f"students.{name}: this name has a meaning of its own; choose another")


def check_model(name: str, student: ResolvedStudent, config: Config) -> None:
    """A student's own keys of [model] are keys of [model]."""
    try:
        Model.model_validate({**config.model.model_dump(), **student.model})
    except ValidationError as errors:
        error = errors.errors()[0]
        key = ".".join(["students", name, "model", *map(str, error["loc"])])
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(error["loc"][-1]), Model.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(Model.model_fields)}"
            raise ValueError(f"unknown key {key}; {hint}") from None
        raise ValueError(f"{key} = {error['input']!r}: {in_our_words(error)}") from None


def check_full_softmax(config: Config) -> None:
    """What dustbin = "full" and hard negatives exclude."""
    section = config.specialists
    if not section.trains_all_rows:
        return
    key = "specialists.hard_negatives"
    if section.dustbin == "full":
        key = 'specialists.dustbin = "full"'
    if config.engine.shard_head:
        raise ValueError(
            f"{key} computes all logits, engine.shard_head = true never does; leave one out"
        )
    if section.label_smoothing:
        raise ValueError(
            f"{key} has a loss of its own, without label_smoothing = {section.label_smoothing}: "
            "set specialists.label_smoothing = 0"
        )
    if section.loss != DEFAULT_SCHEDULE.loss:
        raise ValueError(
            f"{key} has a loss of its own instead of loss = {section.loss!r}: "
            f'set specialists.loss = "{DEFAULT_SCHEDULE.loss}"'
        )


def check_extend(config: Config) -> None:
    """What a run that adds classes inherits is not also asked of something else."""
    if not config.extend.run:
        return
    if config.generalist.init:
        raise ValueError("extend.run brings its own generalist; leave generalist.from out")
    if config.clusters.groups_file:
        raise ValueError(
            "extend.run brings its own groups, to which one is added; "
            "leave clusters.groups_file out"
        )
    if not config.has_specialists:
        raise ValueError(
            "extend.run adds a specialist for the new classes, "
            f'and ensemble.kind = "{config.ensemble.kind}" has none; leave one of them out'
        )
    if config.specialists.starts_elsewhere:
        raise ValueError(
            f"specialists.from = {config.specialists.start!r}: with extend.run the new classes' "
            "specialist starts as the generalist that got rows for them; leave it out"
        )
    if config.engine.shard_head:
        raise ValueError(
            "extend.run trains a few rows of the head, and engine.shard_head = true "
            "splits them all over the ranks; set it to false"
        )


def check_ancestry(name: str, student: ResolvedStudent, config: Config) -> None:
    """Teacher and start exist and have as many members as they must; nobody is his own ancestor."""
    section = f"students.{name}"
    names = tuple(config.students)
    if os.sep not in student.teacher:
        teachers = ("ensemble", "generalist", *names)
        _known(f"{section}.teacher", student.teacher, teachers, ", or a path with a /")
    _known(f"{section}.start", student.start, ("generalist", "scratch", *names))
    own = members_of(name, config) or 1
    teachers = members_of(student.teacher, config) if student.learns_from_teacher else None
    if teachers is not None and own > 1 and teachers != own:
        raise ValueError(
            f"{section} has {own} members, its teacher {student.teacher} {teachers}: member k "
            'learns from member k; give it as many, or network = "single"'
        )
    if config.engine.shard_head and student.network != "single":
        raise ValueError(
            f'{section}.network = "{student.network}" has several heads; '
            "engine.shard_head splits one"
        )
    if name in ancestors(name, config):
        raise ValueError(f"{section}: its teacher or its start comes from itself")
    if student.network != "single" and student.members is None and not config.is_deep:
        raise ValueError(
            f'{section}.members: how many? Only an ensemble.kind = "deep" says it by itself'
        )


def members_of(name: str, config: Config) -> int | None:
    """How many distributions a teacher or student predicts; None if its name is a path."""
    ensemble = config.ensemble.members if config.is_deep else 1
    if name in config.students:
        student = config.students[name]
        return 1 if student.network == "single" else student.members or ensemble
    return {"ensemble": ensemble, "generalist": 1}.get(name)


def ancestors(name: str, config: Config) -> set[str]:
    """Everyone whom a student learns from or starts as, directly or through others."""
    known: set[str] = set()
    waiting = [name]
    while waiting:
        student = config.students[waiting.pop()]
        parents = {student.teacher, student.start}
        waiting += [parent for parent in parents - known if parent in config.students]
        known |= parents
    return known


def check_negatives(config: Config) -> None:
    for name, section in schedules(config).items():
        if section.negatives is None:
            continue
        if not config.engine.shard_head:
            raise ValueError(
                f"{name}.negatives needs engine.shard_head = true: "
                "a whole head has all logits anyway"
            )
        if section.label_smoothing:
            raise ValueError(
                f"{name}.negatives leaves classes out and label_smoothing spreads over all: "
                "leave one of them out"
            )


def check_losses(config: Config) -> None:
    """A head that is split over ranks, and a student with a teacher, do not take just any loss."""
    for name, section in schedules(config).items():
        if config.engine.shard_head and not LOSSES[section.loss].on_lazy_logits:
            able = ", ".join(key for key, loss in LOSSES.items() if loss.on_lazy_logits)
            raise ValueError(
                f"{name}.loss = {section.loss!r}: engine.shard_head = true has {able} alone"
            )
    for name, student in config.students.items():
        learns_both = student.learns_from_teacher and student.hard_weight
        if learns_both and student.loss != DEFAULT_SCHEDULE.loss:
            raise ValueError(
                f"students.{name}.loss = {student.loss!r}: beside a teacher labels are learnt by "
                f"{DEFAULT_SCHEDULE.loss}; take that, or hard_weight = 0"
            )


def check_averages(config: Config) -> None:
    """Averaged weights are of networks that a rank holds whole."""
    engine = config.engine
    for name, section in schedules(config).items():
        # A specialist's head is never split over the ranks.
        split = engine.splits_weights or (engine.shard_head and name != "specialists")
        if section.ema and split:
            remedy = "set ema = 0"
            if engine.kind.whole_weights:
                remedy = f"take engine.{engine.kind.whole_weights}, or ema = 0"
            raise ValueError(
                f"{name}.ema = {section.ema}: no rank holds the weights to average; {remedy}"
            )


def check_branches(config: Config) -> None:
    """What branches are not trained with: they learn from kept features, all at once."""
    section = config.specialists
    if not section.is_branch:
        return
    if section.views > 1 and config.data.augment == "none":
        raise ValueError(
            f"specialists.views = {section.views}: without data.augment all views are the same; "
            "leave it out"
        )
    if section.ema:
        raise ValueError(
            f"specialists.ema = {section.ema}: a branch keeps its best step on val instead; "
            "set specialists.ema = 0"
        )
    if section.negatives is not None:
        raise ValueError(
            "specialists.negatives is of a sharded head, which no branch has; leave it out"
        )
    if config.extend.run:
        raise ValueError(
            'specialists.kind = "branch" and extend.run: the new classes get a copy; '
            'set specialists.kind = "copy"'
        )


def _known(key: str, value: str, names: tuple[str, ...], also: str = "") -> None:
    try:
        one_of(value, names, also)
    except ValueError as error:
        raise ValueError(f"{key} = {value!r}: {error}") from None
