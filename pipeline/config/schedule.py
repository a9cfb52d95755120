"""How one network is trained: the schedule, and what specialists and students add to it.

A class comes in two forms.  `Schedule` is what a file may say, where an absent key is inherited
from [train].  `ResolvedSchedule` is what the trainer reads, where nothing is absent but what may
be None.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from ..choices import AUGMENTATIONS, LOSSES, STUDENT_METHODS
from .base import MODULE_FUNCTION, Section, UserError, one_of

GENERALIST, MEMBER = "generalist", "member"  # what specialists start from
AUGMENTED_VIEWS = 4  # that branches learn from, unless specialists.views says otherwise
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Schedule(Section):
    """How one network is trained.

    In [specialists] and [students.NAME] an absent key is taken from [train].
    """

    # optimizer steps. Exactly one of steps and epochs
    steps: int | None = Field(default=None, gt=0)
    # passes over the training data. May be a fraction
    epochs: float | None = Field(default=None, gt=0)
    # examples per optimizer step, over all ranks
    batch_size: int | None = Field(default=None, gt=0)
    # adamw or sgd
    optimizer: Literal["adamw", "sgd"] | None = None
    # the peak of the schedule
    learning_rate: float | None = Field(default=None, gt=0)
    # how the learning rate moves between its peak and zero
    schedule: Literal["cosine", "onecycle", "constant"] | None = None
    # fraction of the steps in which the rate rises linearly
    warmup: float | None = Field(default=None, ge=0, lt=1)
    # decay of weights, but not of biases and norms
    weight_decay: float | None = Field(default=None, ge=0)
    # momentum of sgd. adamw's beta1 is 0.9
    momentum: float | None = Field(default=None, ge=0, lt=1)
    # adamw's beta2. 0.99 suits short schedules
    beta2: float | None = Field(default=None, gt=0, lt=1)
    # the peak of a head with a row for every class, which then learns without averages: plain SGD.
    # None = as the other weights
    row_rate: float | None = Field(default=None, gt=0)
    # the loss of class labels: a name in pipeline.choices.LOSSES
    loss: str | None = None
    # the share of a label that is spread over all classes
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    # with engine.shard_head: other classes that labels are compared with, or their share of all
    # classes, below 1. None = all
    negatives: int | Annotated[float, Field(lt=1)] | None = Field(default=None, gt=0)
    # decay per step of the averaged weights. 0 = none
    ema: float | None = Field(default=None, ge=0, lt=1)
    # micro-batches per optimizer step
    accumulation: int | None = Field(default=None, gt=0)
    # the largest norm of a gradient. 0 = no clipping
    clip_norm: float | None = Field(default=None, ge=0)
    # 0 natural frequencies, 1 every class equally often
    balance: float | None = Field(default=None, ge=0, le=1)
    # steps between validations. 0 = only at the end
    validate_every: int | None = Field(default=None, ge=0)
    # stop after so many validations without a better loss. 0 = never
    patience: int | None = Field(default=None, ge=0)
    # steps between checkpoints
    checkpoint_every: int | None = Field(default=None, gt=0)
    # how many checkpoints are kept
    keep: int | None = Field(default=None, gt=0)
    # steps between rows of metrics.jsonl
    log_every: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_length(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    @field_validator("loss")
    @classmethod
    def _loss(cls, value):
        return None if value is None else one_of(value, LOSSES)


class ResolvedSchedule(Schedule):
    """A schedule with nothing left to inherit. The defaults are here.

    Of steps and epochs one may be None. negatives = None stands for all classes, and row_rate =
    None for the other weights' optimizer.
    """

    batch_size: int = 256
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    momentum: float = 0.9
    beta2: float = 0.999
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    ema: float = 0.0
    accumulation: int = 1
    clip_norm: float = 0.0
    balance: float = 0.0
    validate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 50


DEFAULT_SCHEDULE = ResolvedSchedule()


PARTS = ("all", "head")
NAMED_PARTS = r"last-[1-9][0-9]*-blocks?|trunk\.[\w.]+(, ?trunk\.[\w.]+)*"


def part_of_network(value: str) -> str:
    """A value of `trainable`. networks.set_trainable knows which parts a network has."""
    return one_of(value, PARTS, ' or last-N-blocks, or "trunk.NAME, trunk.NAME"', NAMED_PARTS)


class Train(Schedule):
    """The generalist's schedule. Other sections inherit the keys of Schedule alone."""

    # what learns in a generalist that starts from weights: all | head | last-N-blocks | trunk.NAME,
    # ...
    trainable: str = "all"
    # for a generalist that starts from weights: the i-th block from the top learns at learning_rate
    # * layer_decay^i, the head with i = 0
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    # a of Beta(a, a), the share that an input keeps when it is averaged with another. 0 = none
    mixup: float = Field(default=0.0, ge=0)
    # a of Beta(a, a), the area that a picture keeps when a box of another is pasted in. 0 = none
    cutmix: float = Field(default=0.0, ge=0)

    @field_validator("trainable")
    @classmethod
    def _trainable(cls, value):
        return part_of_network(value)


class ResolvedTrain(ResolvedSchedule, Train):
    pass


DEFAULT_TRAIN = ResolvedTrain()


class Specialists(Schedule):
    """One network for each group of confusable classes, started from the generalist."""

    # copy: the generalist again, trained on. branch: a correction of its logits
    kind: Literal["copy", "branch"] = "copy"
    # what a copy starts as: generalist | member (another one that the run trains) | the path, with
    # a /, of a run or of a saved network of the same classes
    start: str = Field(default=GENERALIST, alias="from")
    # how many of the trunk's last blocks a branch has for itself. 0 = it shares the whole trunk
    blocks: int = Field(default=0, ge=0)
    # a branch's layers: {embedding = 64} is its width, {dropout = 0.1} drops of what it reads
    model: dict[str, Any] = {}
    # for branches: fixed views kept of each training input. 0 = 4 if data.augment is set, else 1
    views: int = Field(default=0, ge=0)
    # for branches: the most bytes that kept features may take
    features_bytes: int = Field(default=64 * 1024**3, gt=0)
    # preserving: keeps the generalist's rows. fresh: one new row. full: trained on all classes
    dustbin: Literal["preserving", "fresh", "full"] = "preserving"
    # for preserving: rows that it keeps beside a fitted one. None = all
    dustbin_rows: int | None = Field(default=None, gt=0)
    # for full: weight of the KL from the generalist's predictions on other classes. None = 0.1
    soft_weight: float | None = Field(default=None, ge=0)
    # fraction of the other classes' examples drawn by confusion with the group
    hard_negatives: float = Field(default=0.0, ge=0, lt=1)
    # all | head | last-N-blocks | trunk.NAME, ...
    trainable: str = "all"
    # for copies: the i-th block from the top learns at learning_rate * layer_decay^i
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    # batch norm keeps the generalist's statistics: a specialist's batches are not natural ones
    freeze_norm: bool = True
    # fraction of a batch drawn from the group's classes
    fraction: float = Field(default=0.5, gt=0, lt=1)
    # specialists that one job trains. None: one copy, or all branches at once
    per_job: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _rows(self):
        if self.dustbin != "preserving" and self.dustbin_rows is not None:
            rows = {"fresh": "a fresh dustbin has one row", "full": "a full softmax has them all"}
            raise ValueError(
                f'dustbin_rows is of dustbin = "preserving"; {rows[self.dustbin]}; leave it out'
            )
        if self.soft_weight is None:
            # Without a full softmax it has no effect.
            self.soft_weight = 0.1 if self.dustbin == "full" else 1.0
        if self.dustbin != "full" and self.soft_weight != 1:
            raise ValueError(
                'soft_weight is of dustbin = "full", which alone learns from the generalist; '
                "leave it out"
            )
        if self.hard_negatives and (self.dustbin == "fresh" or self.dustbin_rows is not None):
            raise ValueError(
                "hard_negatives are corrected for class by class, which needs every class's row: "
                'dustbin = "preserving" or "full", without dustbin_rows'
            )
        return self

    @model_validator(mode="after")
    def _branches(self):
        if self.is_branch:
            self._check_branch()
            return self
        of_branch = {"blocks": 0, "model": {}, "views": 0}
        for key, default in of_branch.items():
            if getattr(self, key) != default:
                raise ValueError(f'{key} is of kind = "branch"; leave it out')
        return self

    def _check_branch(self) -> None:
        if self.start != GENERALIST:
            raise ValueError(
                f'from = {self.start!r} is of kind = "copy"; a branch corrects the logits of the '
                "generalist that asks it, and has no network of its own to start as: leave it out"
            )
        of_copy = {
            "dustbin": "preserving",
            "dustbin_rows": None,
            "hard_negatives": 0,
            "trainable": "all",
            "layer_decay": 1,
        }
        for key, default in of_copy.items():
            if getattr(self, key) != default:
                raise ValueError(
                    f'{key} is of kind = "copy"; a branch corrects the generalist\'s logits and '
                    "has one row for all other classes: leave it out"
                )
        if not self.freeze_norm:
            raise ValueError('freeze_norm = false is of kind = "copy"; leave it out')
        unknown = sorted(self.model.keys() - {"embedding", "dropout"})
        if unknown:
            raise ValueError(f"model.{unknown[0]}: a branch has embedding and dropout alone")
        if self.embedding is not None and (type(self.embedding) is not int or self.embedding < 1):
            raise ValueError(f"model.embedding = {self.embedding!r}: a whole number, at least 1")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout = {self.dropout!r}: a number from 0 to below 1")

    @property
    def is_branch(self) -> bool:
        return self.kind == "branch"

    @property
    def embedding(self) -> int | None:
        """Width of a branch's embedding. None: as many numbers as the generalist's head reads."""
        return self.model.get("embedding")

    @property
    def dropout(self) -> float:
        """Dropout on what a branch's embedding reads."""
        return self.model.get("dropout", 0.0)

    def views_of(self, augment: str) -> int:
        """How often each training input is kept, with the training stream's augmentation."""
        if self.views:
            return self.views
        return 1 if augment == "none" else AUGMENTED_VIEWS

    def in_one_job(self, count: int) -> int:
        """How many of `count` specialists one job trains."""
        if self.per_job is not None:
            return self.per_job
        return max(1, count) if self.is_branch else 1

    @property
    def trains_all_rows(self) -> bool:
        """Whether it has the generalist's head while it learns.

        The rows of the other classes are then summed into a dustbin when training is over.
        """
        return self.dustbin == "full" or self.hard_negatives > 0

    @property
    def starts_elsewhere(self) -> bool:
        """Whether they start as another network than the generalist that asks them."""
        return self.start != GENERALIST

    @property
    def given_start(self) -> str:
        """The path of the network that they start as. "" where the run trains it."""
        return "" if self.start in (GENERALIST, MEMBER) else self.start

    @field_validator("start")
    @classmethod
    def _start(cls, value):
        if os.sep in value:
            return value
        return one_of(value, (GENERALIST, MEMBER), ", or a path with a /")

    @field_validator("trainable")
    @classmethod
    def _trainable(cls, value):
        return part_of_network(value)


class ResolvedSpecialists(ResolvedSchedule, Specialists):
    soft_weight: float = 1.0


class Student(Schedule):
    """One network that learns from a teacher, or from labels as a twin does."""

    # distill: a teacher's predictions | hard: labels | prior: a Prior Network
    method: str = "distill"
    # single | hydra: one trunk, a head for each member | batch_ensemble: shared weights, scaled
    network: Literal["single", "hydra", "batch_ensemble"] = "single"
    # members of a hydra or batch_ensemble. None: as many as the ensemble has
    members: int | None = Field(default=None, gt=1)
    # for hydra: how many of the trunk's last blocks each head has, beside a linear layer
    head_blocks: int = Field(default=0, ge=0)
    # generalist | scratch | another student, whose network it is grown from
    start: str = "generalist"
    # ensemble | generalist | another student | the path of a run or of a saved network
    teacher: str = "ensemble"
    # of a deep ensemble's members, to teach a single student. None: as ensemble.combine joins them
    mean: Literal["arithmetic", "geometric"] | None = None
    # temperature of teacher and student. inf: match the logits, the limit
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    # weight of the cross-entropy with the label
    hard_weight: float = Field(default=0.0, ge=0, le=1)
    # weight of temperature^2 KL(teacher || student)
    soft_weight: float = Field(default=1.0, ge=0)
    # how much of soft_weight goes to the label where the teacher's likeliest class is another
    wrong_weight: float = Field(default=0.0, ge=0, le=1)
    # live: the teacher predicts while the student trains. auto: stored where inputs are always
    # seen alike
    answers: Literal["auto", "live", "stored"] = "auto"
    # for stored: keep as many classes of a row as hold this mass, at the student's temperature
    answers_mass: float = Field(default=0.999, ge=0, le=1)
    # for stored: the most bytes that answers about train may take, and those about transfer
    answers_bytes: int = Field(default=4 * 1024**3, gt=0)
    # what the inputs are moved by before teacher and student see them
    perturb: Literal["none", "gaussian", "ods", "conf_ods", "mix_bags"] = "none"
    # size of the perturbation, for inputs scaled to 0..1
    perturb_size: float = Field(default=1 / 255, gt=0)
    # for mix_bags: the share of another bag's n-grams that joins a bag. As many of its own leave
    perturb_share: float = Field(default=0.5, gt=0, le=0.5)
    # training views of its own. None: data.augment
    augment: str | None = None
    # for drop_ngrams: the share of a bag's n-grams that a view leaves out. None: data.augment_share
    augment_share: float | None = Field(default=None, ge=0, lt=1)
    # how many fixed views of each augmented input the teacher predicts, once
    views: int | None = Field(default=None, gt=0)
    # the share of train that it sees, the same of each class
    share: float = Field(default=1.0, gt=0, le=1)
    # classes whose examples it does not see
    leave_out: list[str] = []
    # fit one shift of the bias of the classes left out on val
    bias_correction: bool = False
    # the share of transfer inputs in a batch. None = by the sizes of train and transfer
    transfer_share: float | None = Field(default=None, ge=0, le=1)
    # keys of [model] that differ
    model: dict[str, Any] = {}

    @property
    def learns_from_teacher(self) -> bool:
        return STUDENT_METHODS[self.method].learns_from_teacher

    @field_validator("method")
    @classmethod
    def _method(cls, value):
        return one_of(value, STUDENT_METHODS)

    @field_validator("augment")
    @classmethod
    def _augment(cls, value):
        if value is None:
            return None
        return one_of(value, AUGMENTATIONS, " or module:function", MODULE_FUNCTION)

    @model_validator(mode="after")
    def _agree(self):
        single, method = self.network == "single", STUDENT_METHODS[self.method]
        if single and (self.members is not None or self.head_blocks):
            raise ValueError(
                'members and head_blocks are of network = "hydra" and "batch_ensemble"; '
                "leave them out"
            )
        if self.network == "batch_ensemble" and self.head_blocks:
            raise ValueError('head_blocks is of network = "hydra"; leave it out')
        if self.perturb != "none" and not self.learns_from_teacher:
            raise ValueError(f'perturb = "{self.perturb}" needs a teacher: method = "distill"')
        if self.perturb != "none" and self.views is not None:
            raise ValueError(
                "views are predicted once, and perturbed inputs anew: "
                "leave one of views and perturb out"
            )
        self._check_answers()
        if method.single_only and not single:
            raise ValueError(f'method = "{self.method}" is of network = "single": {method.why}')
        if self.bias_correction and not single:
            raise ValueError('bias_correction is of network = "single"')
        if self.bias_correction and not self.leave_out:
            raise ValueError("bias_correction is of classes left out: name them in leave_out")
        return self

    def _check_answers(self) -> None:
        """What a teacher's answers exclude."""
        if self.wrong_weight and not self.learns_from_teacher:
            raise ValueError('wrong_weight needs a teacher who can be wrong: method = "distill"')
        if self.wrong_weight and self.perturb != "none":
            raise ValueError(
                "perturbed inputs are the teacher's alone, labels stay with the clean ones: "
                "leave one of wrong_weight and perturb out"
            )
        if self.answers == "live" and self.views is not None:
            raise ValueError(
                'answers = "live" are given to a new view each time, and views are predicted '
                "once: leave one of them out"
            )
        if self.answers == "stored" and self.perturb != "none":
            raise ValueError(
                'answers = "stored" are given once, and perturbed inputs are new each time: '
                "leave one of answers and perturb out"
            )


class ResolvedStudent(ResolvedSchedule, Student):
    mean: Literal["arithmetic", "geometric"] = "arithmetic"


class Rerank(Schedule):
    """For ensemble.kind = "rerank": networks trained on the generalist's shortlists alone.

    [train] hands down all but what no re-ranker is trained by (choices.NOT_OF_RERANKERS).
    """

    # the generalist's likeliest classes of each training example, which it learns to tell apart
    k: int = Field(default=50, gt=1)
    # classes drawn at random for each batch, which stand for all others. 0 = none
    random: int = Field(default=1024, ge=0)
    # scratch | generalist
    start: Literal["scratch", "generalist"] = "scratch"
    # keys of [model] that differ
    model: dict[str, Any] = {}
    # the most bytes that kept shortlists may take
    shortlists_bytes: int = Field(default=64 * 1024**3, gt=0)

    @model_validator(mode="after")
    def _same_network(self):
        if self.start == "generalist" and self.model:
            raise ValueError(
                'model differs from the generalist\'s: that is of start = "scratch"; leave one out'
            )
        return self


class ResolvedRerank(ResolvedSchedule, Rerank):
    pass


Resolved = TypeVar("Resolved", bound=ResolvedSchedule)


def resolve(section: Schedule, parent: ResolvedSchedule, form: type[Resolved]) -> Resolved:
    """`section` in its resolved form, each absent schedule key taken from `parent`.

    Its own steps hide the parent's epochs, and the other way round.
    """
    own = section.model_dump(exclude_none=True, by_alias=True)
    inherited = {key: getattr(parent, key) for key in Schedule.model_fields}
    if "steps" in own or "epochs" in own:
        del inherited["steps"], inherited["epochs"]
    return form.model_validate({**inherited, **own})


def check_batch_size(batch: int, ranks: int, accumulation: int) -> None:
    """UserError where `batch` does not divide into ranks x accumulation equal parts."""
    parts = ranks * accumulation
    if batch % parts == 0:
        return
    proposal = str(parts)
    if batch > parts:
        proposal = f"{batch // parts * parts} or {(batch // parts + 1) * parts}"
    raise UserError(
        f"batch {batch} is not divisible by {ranks} ranks x {accumulation} accumulation steps; "
        f"try {proposal}"
    )
