"""Rules between sections of the config. Each check raises ValueError with one line."""

from __future__ import annotations

import difflib
import json
import os
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ..choices import AUGMENT_OPTIONS, LOSSES, NOT_OF_RERANKERS, TAKE_SHARE
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
        check_model(f"students.{name}", student.model, config)
        check_answers(name, student, config)
    check_full_softmax(config)
    check_controls(config)
    check_extend(config)
    check_negatives(config)
    check_row_rate(config)
    check_losses(config)
    check_averages(config)
    check_margin(config)
    check_start(config)
    check_mixing(config)
    check_augment_options(config)
    check_branches(config)
    check_rerank(config)


def schedules(config: Config) -> dict[str, ResolvedSchedule]:
    """Every schedule of the run by its section."""
    students = {f"students.{name}": student for name, student in config.students.items()}
    return {"train": config.train, "specialists": config.specialists, **students}


def check_student_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"students.{name}: a student's name is letters, digits, '_' and '-'")
    if name in RESERVED or name.startswith("control_"):
        raise ValueError(f"students.{name}: this name has a meaning of its own; choose another")


def check_model(section: str, model: dict, config: Config) -> None:
    """A section's own `model` table has keys of [model] alone."""
    try:
        config.model.merged(model)
    except ValidationError as errors:
        error = errors.errors()[0]
        key = ".".join([section, "model", *map(str, error["loc"])])
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(error["loc"][-1]), Model.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(Model.model_fields)}"
            raise ValueError(f"unknown key {key}; {hint}") from None
        raise ValueError(f"{key} = {error['input']!r}: {in_our_words(error)}") from None


def check_answers(name: str, student: ResolvedStudent, config: Config) -> None:
    """Stored answers are about inputs that are seen again, and a share is of an augmentation."""
    augment = student.augment or config.data.augment
    if student.augment_share is not None and augment not in TAKE_SHARE:
        able = " or ".join(f'"{name}"' for name in sorted(TAKE_SHARE))
        raise ValueError(
            f"students.{name}.augment_share is of augment = {able}, and it is "
            f'"{augment}"; leave augment_share out'
        )
    if student.answers == "stored" and augment != "none" and not student.views:
        raise ValueError(
            f'students.{name}.answers = "stored": each view of augment = "{augment}" is new; set '
            f'students.{name}.views = 4, or answers = "live"'
        )


def check_full_softmax(config: Config) -> None:
    """What dustbin = "full" and hard negatives exclude."""
    section = config.specialists
    if not section.trains_all_rows:
        return
    key = "specialists.hard_negatives"
    if section.dustbin == "full":
        key = 'specialists.dustbin = "full"'
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


def check_controls(config: Config) -> None:
    """Rows of their own names, and none that a run which adds classes cannot make."""
    section = config.controls
    check_model("controls", section.model, config)
    for name in section.rows:
        if name in config.students:
            raise ValueError(
                f"students.{name}: controls.rows makes a row of this name; choose another"
            )
    if section.rows and config.extend.run:
        raise ValueError(
            "controls.rows trains generalists anew, and extend.run inherits its own, which learned "
            "from other examples: leave controls.rows out"
        )
    if section.model and "wider" not in section.rows:
        raise ValueError('controls.model is of the row "wider": add it to controls.rows')


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


def check_ancestry(name: str, student: ResolvedStudent, config: Config) -> None:
    """Teacher and start exist and have as many members as they must. Nobody is his own ancestor."""
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
    """How many distributions a teacher or student predicts. None if its name is a path."""
    ensemble = config.ensemble.num_networks if config.is_deep else 1
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


def check_row_rate(config: Config) -> None:
    """Rows that learn without averages need an optimizer that treats them by themselves."""
    for name, section in schedules(config).items():
        if section.row_rate is None:
            continue
        if config.engine.name != "ddp":
            raise ValueError(
                f'{name}.row_rate needs engine.name = "ddp": "{config.engine.name}" steps all '
                "weights alike"
            )
        if config.engine.precision == "fp16":
            raise ValueError(
                f'{name}.row_rate is not of engine.precision = "fp16", whose gradients AdamW '
                'unscales itself; take "bf16"'
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
        if section.ema and engine.splits_weights:
            remedy = "set ema = 0"
            if engine.kind.whole_weights:
                remedy = f"take engine.{engine.kind.whole_weights}, or ema = 0"
            raise ValueError(
                f"{name}.ema = {section.ema}: no rank holds the weights to average; {remedy}"
            )


def check_margin(config: Config) -> None:
    """A margin moves the logit of a label, from the head's rows, in the cross-entropy alone."""
    margin = config.model.margin
    if not margin:
        return
    if config.engine.splits_weights:
        raise ValueError(
            f"model.margin = {margin}: the loss reads the head's rows, which no rank holds; take "
            f"engine.{config.engine.kind.whole_weights}, or margin = 0"
        )
    if config.train.loss != DEFAULT_SCHEDULE.loss:
        raise ValueError(
            f'model.margin = {margin} is of loss = "{DEFAULT_SCHEDULE.loss}", and train.loss = '
            f'"{config.train.loss}"; leave one of them out'
        )


def check_start(config: Config) -> None:
    """Layers are frozen, or learn slower, where somebody trained them."""
    if config.generalist.init:
        return
    for key, usual in (("trainable", "all"), ("layer_decay", 1)):
        value = getattr(config.train, key)
        if value != usual:
            raise ValueError(
                f"train.{key} = {json.dumps(value)} is of a generalist that starts from weights, "
                "and this one's are drawn at random: name some in generalist.from, or leave it out"
            )


def check_mixing(config: Config) -> None:
    """What inputs with two labels are not trained with."""
    for key in ("mixup", "cutmix"):
        value = getattr(config.train, key)
        if not value:
            continue
        others = {
            "train.loss": (config.train.loss, DEFAULT_SCHEDULE.loss, "has one label"),
            "train.negatives": (config.train.negatives, None, "compares one label with others"),
            "model.margin": (config.model.margin, 0.0, "moves the logit of one label"),
        }
        for name, (other, usual, why) in others.items():
            if other != usual:
                raise ValueError(
                    f"train.{key} = {value} gives inputs two labels, and {name} = "
                    f"{json.dumps(other)} {why}; leave one of them out"
                )


def check_augment_options(config: Config) -> None:
    """Each option is of an augmentation that the run makes."""
    students = [student.augment for student in config.students.values()]
    names = {config.data.augment, *filter(None, students)}
    known = sorted({key for name in names for key in AUGMENT_OPTIONS.get(name, {})})
    for key in config.data.augment_options:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        if not known:
            able = " or ".join(f'"{name}"' for name in AUGMENT_OPTIONS)
            hint = f"options are of data.augment = {able}; leave it out"
        raise ValueError(f"data.augment_options.{key}: {hint}")


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


def check_rerank(config: Config) -> None:
    """No re-ranker is trained by NOT_OF_RERANKERS."""
    if not config.has_rerankers:
        return
    section, default = config.rerank, DEFAULT_SCHEDULE
    check_model("rerank", section.model, config)
    for key, reason in NOT_OF_RERANKERS.items():
        value, usual = getattr(section, key), getattr(default, key)
        if value != usual:
            remedy = "leave it out" if usual is None else f"set rerank.{key} = {json.dumps(usual)}"
            raise ValueError(f"rerank.{key} = {json.dumps(value)} {reason}; {remedy}")
    if config.engine.precision == "fp16":
        raise ValueError(
            'engine.precision = "fp16": rows of a re-ranker\'s head are stepped without loss '
            'scaling; take "bf16"'
        )
    asked = config.ensemble.shortlist
    if asked is not None and asked > section.k:
        raise ValueError(
            f"ensemble.shortlist = {asked}: the re-rankers learn on shortlists of {section.k}; "
            f"ask about fewer classes, or raise rerank.k"
        )


def _known(key: str, value: str, names: tuple[str, ...], also: str = "") -> None:
    try:
        one_of(value, names, also)
    except ValueError as error:
        raise ValueError(f"{key} = {value!r}: {error}") from None
