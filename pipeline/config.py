"""The run's configuration: TOML in, checked values out.  No torch here: login nodes read it.

Every key has a type, a default and a meaning; an unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import datetime
import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2, no traceback."""


NETWORKS = ("mlp", "convnet", "resnet", "wideresnet")
AUGMENTATIONS = ("none", "shift", "flip-crop")
METHODS = (
    "kmeans",
    "minibatch",
    "correlation",
    "raw",
    "agglomerative",
    "graph",
    "classifier",
    "random",
)
COMBINERS = ("kl", "reverse_kl", "arithmetic", "log_ratio", "mixture")


def _one_of(value: str, names: tuple[str, ...], also: str = "", pattern: str = "") -> str:
    """`value` if it is one of `names` or matches `pattern`, which `also` describes; a ValueError with the nearest
    otherwise."""
    if value in names or (pattern and re.fullmatch(pattern, value)):
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"must be one of {', '.join(names)}{also}{hint}")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )


class Data(Section):
    """Shards.  Each of train, val, test is a pattern (`dir/train-{000000..000007}.tar`, several joined by `::`)."""

    train: str = ""
    val: str = ""
    test: str = ""
    transfer: str = ""  # more inputs, their labels absent or not read: students learn what their teacher says of them
    ood: str = ""  # inputs of other kinds: how well are they told from test's?  Labels are not read
    label: str = (
        "cls"  # the member that holds the label; "json:FIELD" reads a field of the json member
    )
    input: str = (
        ""  # the member that holds the input; "" takes the one member that is not the label
    )
    mean: list[float] = [0.5]  # per channel, of inputs scaled to 0..1; part of model.json
    std: list[float] = [0.25]
    augment: str = "none"  # training views: none | shift | flip-crop | module:function
    cache: Literal["auto", "decoded", "none"] = (
        "auto"  # keep decoded inputs in one memory-mapped file under RUN/cache
    )
    cache_bytes: int = Field(2 * 1024**3, gt=0)  # the most that such a file may take
    workers: int = Field(0, ge=0)  # reading processes per rank
    damage: Literal["strict", "skip"] = (
        "strict"  # stop at the first damaged sample, or leave them out and count them
    )
    damage_share: float = Field(
        0.01, ge=0, lt=1
    )  # with skip: stop when more than this share is damaged
    manifest: str | None = (
        None  # manifest.json (a path or URL) of shards that come without one beside them: pipe:
    )
    fetch_dir: str = ""  # where shards behind URLs are kept; "" is ~/.cache/referral/shards
    fetch_bytes: int = Field(256 * 1024**3, gt=0)  # the most that they may take
    decoders: dict[str, str] = {}  # extension -> module:function, beside the built-in table
    classes: int | None = Field(None, gt=0)  # the label set's size, where no manifest says it

    @field_validator("augment")
    @classmethod
    def _augment(cls, value):
        return _one_of(value, AUGMENTATIONS, " or module:function", r"[\w.]+:\w+")


class Model(Section):
    """The network.  `options` is for timm models and a user's own builder."""

    name: str = "convnet"  # mlp | convnet | resnet | wideresnet | timm:NAME | module:function
    width: int | None = Field(None, gt=0)  # None: the builder's own default
    depth: int | None = Field(None, gt=0)
    embedding: int | None = Field(None, ge=0)  # size of the last hidden layer; 0 = none
    dropout: float = Field(0.0, ge=0, lt=1)
    options: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _name(cls, value):
        return _one_of(value, NETWORKS, ", timm:NAME or module:function", r"timm:.+|[\w.]+:\w+")


class Schedule(Section):
    """How one network is trained.  In [specialists] and [students.NAME] an absent key is taken from [train]."""

    steps: int | None = Field(None, gt=0)  # optimizer steps; exactly one of steps and epochs
    epochs: float | None = Field(None, gt=0)
    batch_size: int | None = Field(None, gt=0)  # examples per optimizer step, over all ranks
    optimizer: Literal["adamw", "sgd"] | None = None
    learning_rate: float | None = Field(None, gt=0)  # the peak
    schedule: Literal["cosine", "onecycle", "constant"] | None = None
    warmup: float | None = Field(
        None, ge=0, lt=1
    )  # share of the steps in which the rate rises linearly
    weight_decay: float | None = Field(None, ge=0)
    momentum: float | None = Field(None, ge=0, lt=1)  # of sgd; of adamw it is beta1 = 0.9
    beta2: float | None = Field(None, gt=0, lt=1)  # of adamw; 0.99 suits short schedules
    label_smoothing: float | None = Field(None, ge=0, lt=1)
    negatives: int | None = Field(
        None, gt=0
    )  # with engine.shard_head: other classes that labels meet; None = all
    ema: float | None = Field(None, ge=0, lt=1)  # decay per step of the averaged weights; 0 = none
    accumulation: int | None = Field(None, gt=0)  # micro-batches per optimizer step
    clip_norm: float | None = Field(None, ge=0)  # 0 = none
    balance: float | None = Field(
        None, ge=0, le=1
    )  # 0 natural frequencies, 1 every class equally often
    validate_every: int | None = Field(None, ge=0)  # steps; 0 = only at the end
    patience: int | None = Field(
        None, ge=0
    )  # stop after so many validations without a better loss; 0 = never
    checkpoint_every: int | None = Field(None, gt=0)  # steps
    keep: int | None = Field(None, gt=0)  # checkpoints kept
    log_every: int | None = Field(None, gt=0)  # steps

    @model_validator(mode="after")
    def _one_length(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


DEFAULT_SCHEDULE = Schedule(
    batch_size=256,
    optimizer="adamw",
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.05,
    weight_decay=0.01,
    momentum=0.9,
    beta2=0.999,
    label_smoothing=0.0,
    ema=0.0,
    accumulation=1,
    clip_norm=0.0,
    balance=0.0,
    validate_every=0,
    patience=0,
    checkpoint_every=500,
    keep=2,
    log_every=50,
)


class Generalist(Section):
    init: str = Field(
        "", alias="from"
    )  # a run, a directory with model.safetensors and model.json, or a weights file
    head: str | None = (
        None  # in someone else's weights file: what its last linear layer is called; [model] is the rest
    )


class Extend(Section):
    """New classes beside those of a finished run, whose generalist, groups and specialists are taken over."""

    run: str = ""  # the finished run; its classes are found by name among the data's
    companions: int | None = Field(
        None, ge=0
    )  # old classes in the new ones' group; None = by the largest old group


class Clusters(Section):
    num_groups: int = Field(16, gt=0)
    method: str = "kmeans"
    capacity: float = Field(1.3, ge=1)  # the largest group, as a multiple of the mean size
    overlap: int = Field(1, ge=1)  # groups that a class belongs to; with coverage the most
    coverage: float | None = Field(
        None, gt=0, le=1
    )  # classes join further groups until these catch such a share
    groups_file: str = ""  # a user's own taxonomy (ClassGroups JSON) instead of clustering
    top_k: int | None = Field(
        None, gt=0
    )  # statistics keep the k largest predictions; None = all while C^2 fits
    min_gain: float = Field(
        0.0, ge=0
    )  # groups whose forecast gain (share of val examples) is below get no specialist

    @field_validator("method")
    @classmethod
    def _method(cls, value):
        return _one_of(value, METHODS)

    @model_validator(mode="after")
    def _room_for_coverage(self):
        if self.coverage is not None and (self.overlap < 2 or self.method == "random"):
            raise ValueError(
                f"coverage = {self.coverage} decides who joins a second group: "
                'it needs overlap = 2 or more and a method other than "random"'
            )
        return self


class Route(Section):
    """The samples of each group's classes, found once for its specialist."""

    mode: Literal["index", "copy"] = (
        "index"  # remember which samples they are, or copy them to shards of their own
    )
    max_bytes: int = Field(64 * 1024**3, gt=0)  # refuse to write more


class Specialists(Schedule):
    dustbin: Literal["preserving", "fresh", "full"] = "preserving"  # full: trained on all classes
    dustbin_rows: int | None = Field(
        None, gt=0
    )  # of preserving: rows that it keeps beside a fitted one; None = all
    soft_weight: float | None = Field(
        None, ge=0
    )  # of full: of the KL from the generalist's answers elsewhere; 0.1
    hard_negatives: float = Field(
        0.0, ge=0, lt=1
    )  # share of the other classes' examples drawn by confusion with it
    trainable: str = "all"  # all | head | last-N-blocks
    freeze_norm: bool = True  # batch norm keeps the generalist's statistics: a specialist's batches are not natural ones
    fraction: float = Field(0.5, gt=0, lt=1)  # share of S_m's examples in a batch
    per_job: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _rows(self):
        if self.dustbin != "preserving" and self.dustbin_rows is not None:
            rows = {"fresh": "a fresh dustbin has one row", "full": "a full softmax has them all"}[
                self.dustbin
            ]
            raise ValueError(f'dustbin_rows is of dustbin = "preserving"; {rows}; leave it out')
        if (
            self.soft_weight is None
        ):  # without a full softmax it weighs nothing: 1 is what older runs' keys say
            self.soft_weight = 0.1 if self.dustbin == "full" else 1.0
        if self.dustbin != "full" and self.soft_weight != 1:
            raise ValueError(
                'soft_weight is of dustbin = "full", which alone learns from the generalist; leave it out'
            )
        if self.hard_negatives and (self.dustbin == "fresh" or self.dustbin_rows is not None):
            raise ValueError(
                "hard_negatives are corrected for class by class, which needs every class's row: "
                'dustbin = "preserving" or "full", without dustbin_rows'
            )
        return self

    @property
    def trains_all_rows(self) -> bool:
        """With the generalist's head, whose rows of the other classes are summed when training is over."""
        return self.dustbin == "full" or self.hard_negatives > 0

    @field_validator("trainable")
    @classmethod
    def _trainable(cls, value):
        return _one_of(value, ("all", "head"), " or last-N-blocks", r"last-[1-9][0-9]*-blocks?")


class Controls(Section):
    enabled: bool = True
    learning_rates: list[
        float
    ] = []  # control_wall's peaks; [] = 1/3, 1 and 3 times the specialists'


class Ensemble(Section):
    kind: Literal["specialists", "deep"] = (
        "specialists"  # deep: generalists alone, each from another seed
    )
    members: int = Field(4, gt=0)  # of deep: generalists, the run's own among them
    gate: int = Field(
        1, gt=0
    )  # the n most probable classes of the generalist choose the specialists
    max_specialists: int | None = Field(None, gt=0)
    combine: str = "kl"
    temperatures: bool = True  # fit one temperature per specialist on val
    fit_weight: bool = (
        True  # fit the specialists' weight in the objective on val; false = the paper's 1
    )
    allow_missing: bool = False

    @field_validator("combine")
    @classmethod
    def _combine(cls, value):
        return _one_of(value, COMBINERS)


class Student(Schedule):
    method: Literal["distill", "hard", "prior"] = (
        "distill"  # learn a teacher's answers | labels | a Prior Network
    )
    network: Literal["single", "hydra", "batch_ensemble"] = "single"
    members: int | None = Field(
        None, gt=1
    )  # of hydra and batch_ensemble; None: as many as the ensemble has
    head_blocks: int = Field(
        0, ge=0
    )  # of hydra: a head is the last so many blocks of the trunk and a linear layer
    start: str = (
        "generalist"  # generalist | scratch | another student, whose network it is grown from
    )
    teacher: str = "ensemble"  # ensemble | generalist | another student | the path of a run or of a saved network
    mean: Literal["arithmetic", "geometric"] = (
        "arithmetic"  # of a deep ensemble's members, to teach a single student
    )
    temperature: float = Field(1.0, gt=0)  # inf: match the logits, the limit
    hard_weight: float = Field(0.0, ge=0, le=1)
    soft_weight: float = Field(1.0, ge=0)
    perturb: Literal["none", "gaussian", "ods", "conf_ods"] = (
        "none"  # what the inputs are moved by before both answer
    )
    perturb_size: float = Field(1 / 255, gt=0)  # of inputs scaled to 0..1
    augment: str | None = None  # training views of its own; None: data.augment
    views: int | None = Field(
        None, gt=0
    )  # of augmented inputs: the teacher answers so many views of each, once
    share: float = Field(1.0, gt=0, le=1)  # of train, of each class alike
    leave_out: list[str] = []  # classes whose examples it does not see
    bias_correction: bool = False  # fit one shift of the bias of the classes left out on val
    transfer_share: float | None = Field(
        None, ge=0, le=1
    )  # of each batch; None = by the sizes of the two
    model: dict[str, Any] = {}  # keys of [model] that differ

    @property
    def learns_from_teacher(self) -> bool:
        return self.method == "distill"

    @field_validator("augment")
    @classmethod
    def _augment(cls, value):
        return (
            value
            if value is None
            else _one_of(value, AUGMENTATIONS, " or module:function", r"[\w.]+:\w+")
        )

    @model_validator(mode="after")
    def _agree(self):
        if self.network == "single" and (self.members is not None or self.head_blocks):
            raise ValueError(
                'members and head_blocks are of network = "hydra" and "batch_ensemble"; leave them out'
            )
        if self.network == "batch_ensemble" and self.head_blocks:
            raise ValueError('head_blocks is of network = "hydra"; leave it out')
        if self.perturb != "none" and not self.learns_from_teacher:
            raise ValueError(f'perturb = "{self.perturb}" needs a teacher: method = "distill"')
        if self.perturb != "none" and self.views is not None:
            raise ValueError(
                "views are answered once, and perturbed inputs anew: leave one of views and perturb out"
            )
        if self.method == "prior" and self.network != "single":
            raise ValueError(
                'method = "prior" is of network = "single": its one output says how unsure it is'
            )
        if self.bias_correction and self.network != "single":
            raise ValueError('bias_correction is of network = "single"')
        if self.bias_correction and not self.leave_out:
            raise ValueError("bias_correction is of classes left out: name them in leave_out")
        return self


class Engine(Section):
    name: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: int = Field(
        1, ge=0, le=3
    )  # of deepspeed: 1 splits optimizer states, 2 gradients too, 3 weights too
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    )
    shard_head: bool = (
        False  # of ddp: the classifier's rows split over the ranks, its logits never held
    )
    head_block: int | None = Field(
        None, gt=0
    )  # classes whose logits are held at a time; None = what fits a cache
    device: Literal["auto", "cpu", "cuda"] = "auto"
    hang_s: float = Field(
        900, gt=0
    )  # a rank that makes no step and measures no batch for so long is ended
    track: list[Literal["tensorboard", "wandb"]] = []  # where the rows of metrics.jsonl go besides

    @model_validator(mode="after")
    def _one_head(self):
        if self.shard_head and self.name == "deepspeed":
            raise ValueError(
                'engine.shard_head = true needs engine.name = "ddp": DeepSpeed would average the rows of the ranks'
            )
        return self


class Launch(Section):
    processes: int | None = Field(
        None, gt=0
    )  # ranks of the generalist (None: one per GPU, or per core up to 2)
    pool: int | None = Field(
        None, gt=0
    )  # jobs of one process side by side (None: as many as devices or cores)
    retries: int = Field(1, ge=0)  # of a job that fails


TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class Resources(Section):
    """What Slurm is asked for.  An absent key is taken from [slurm.default]; where that has none, the site decides."""

    nodes: int | None = Field(None, gt=0)
    gpus: int | None = Field(None, ge=0)  # on each node
    cpus: int | None = Field(None, gt=0)  # on each node
    memory: str | None = Field(None, pattern=r"^[0-9]+[KMGT]?$")  # of each node
    time: str | None = None  # "90" (minutes), "HH:MM:SS", "DAYS-HH:MM:SS"
    partition: str | None = Field(None, min_length=1)
    constraint: str | None = Field(None, min_length=1)
    qos: str | None = Field(None, min_length=1)
    account: str | None = Field(None, min_length=1)
    extra: list[str] = []  # further options of sbatch; those of [slurm.default] and the stage's own

    @field_validator("time", "memory", mode="before")
    @classmethod
    def _bare(cls, value):
        """TOML without quotes: 90 is a number, 04:00:00 a time of day."""
        is_plain = isinstance(value, (int, datetime.time)) and not isinstance(value, bool)
        return str(value) if is_plain else value

    @field_validator("time")
    @classmethod
    def _time(cls, value):
        if value is not None and not TIME.fullmatch(value):
            raise ValueError('write minutes, "HH:MM:SS" or "DAYS-HH:MM:SS"')
        return value

    @field_validator("extra")
    @classmethod
    def _extra(cls, value):
        for option in value:
            if not re.match(r"--[a-z]", option):
                raise ValueError(
                    f'{option!r} is no long option of sbatch; write it as one word: "--name=value"'
                )
            if option.partition("=")[0] in (
                "--array",
                "--dependency",
                "--output",
                "--wrap",
                "--parsable",
            ):
                raise ValueError(f"{option} is what referral itself says to sbatch")
        return value

    @property
    def seconds(self) -> int | None:
        """The time limit."""
        if self.time is None:
            return None
        days, first, second, third = TIME.fullmatch(self.time).groups()
        if days is not None:  # days-hours[:minutes[:seconds]]
            return int(days) * 86400 + int(first) * 3600 + int(second or 0) * 60 + int(third or 0)
        if third is not None:
            return int(first) * 3600 + int(second) * 60 + int(third)
        return int(first) * 60 + int(second or 0)  # minutes[:seconds]


class Slurm(Section):
    """`referral run --on slurm`: what each kind of job asks for."""

    throttle: int | None = Field(None, gt=0)  # specialists at work at the same time
    signal_s: int = Field(
        120, gt=0
    )  # so long before its time limit a job is asked for a checkpoint
    default: Resources = Resources()
    generalist: Resources = Resources()
    members: Resources = Resources()
    clusters: Resources = Resources()
    specialists: Resources = Resources()
    combine: Resources = Resources()
    controls: Resources = Resources()
    students: Resources = Resources()
    report: Resources = Resources()

    @model_validator(mode="after")
    def _sound(self):
        for kind in type(self).model_fields:
            found = getattr(self, kind)
            if not isinstance(found, Resources):
                continue
            if kind != "generalist" and (found.nodes or 1) > 1:
                raise ValueError(
                    f"slurm.{kind}.nodes = {found.nodes}: only the generalist trains on several nodes"
                )
            if found.seconds is not None and found.seconds <= 2 * self.signal_s:
                raise ValueError(
                    f'slurm.{kind}.time = "{found.time}": a job is asked for a checkpoint slurm.signal_s = '
                    f"{self.signal_s} s before its end; give it more than twice that"
                )
        return self

    def resources(self, kind: str) -> Resources:
        """Those of one kind of job, with [slurm.default] where they say nothing."""
        own = getattr(self, kind)
        values = {
            key: value
            for key, value in self.default.model_dump().items()
            if getattr(own, key) is None
        }
        return own.model_copy(update={**values, "extra": [*self.default.extra, *own.extra]})


class Config(Section):
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data = Data()
    model: Model = Model()
    train: Schedule = DEFAULT_SCHEDULE
    generalist: Generalist = Generalist()
    extend: Extend = Extend()
    clusters: Clusters = Clusters()
    route: Route = Route()
    specialists: Specialists = Specialists()
    controls: Controls = Controls()
    ensemble: Ensemble = Ensemble()
    students: dict[str, Student] = {}
    engine: Engine = Engine()
    launch: Launch = Launch()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _fill(self):
        self.train = _inherit(self.train, DEFAULT_SCHEDULE)
        self.specialists = _inherit(self.specialists, self.train)
        for name, student in self.students.items():
            if student.balance:
                raise ValueError(
                    f"students.{name}.balance: students learn at natural frequencies; leave it out"
                )
            self.students[name] = _inherit(student.model_copy(update={"balance": 0.0}), self.train)
        for name in self.students:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"students.{name}: a student's name is letters, digits, '_' and '-'"
                )
            if name in ("generalist", "ensemble", "scratch", "student_hard") or name.startswith(
                "control_"
            ):
                raise ValueError(
                    f"students.{name}: this name has a meaning of its own; choose another"
                )
        for name, student in self.students.items():
            _check_ancestry(name, student, self)
        _check_full_softmax(self)
        _check_extend(self)
        if not self.controls.learning_rates:
            peak = self.specialists.learning_rate
            self.controls.learning_rates = [peak / 3, peak, peak * 3]
        return self

    @model_validator(mode="after")
    def _negatives(self):
        for name, section in (
            ("train", self.train),
            ("specialists", self.specialists),
            *self.students.items(),
        ):
            if section.negatives is not None and not self.engine.shard_head:
                raise ValueError(
                    f"{name}.negatives needs engine.shard_head = true: a whole head has all logits anyway"
                )
            if section.negatives is not None and section.label_smoothing:
                raise ValueError(
                    f"{name}.negatives leaves classes out and label_smoothing spreads over all: leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _averages(self):
        """Averaged weights are of networks that a rank holds."""
        whole = "zero_stage 0, 1 or 2" if self.engine.name == "deepspeed" else "shard_head = false"
        splits = self.engine.name == "deepspeed" and self.engine.zero_stage == 3
        sections = {
            "train": self.train,
            **{f"students.{name}": each for name, each in self.students.items()},
        }
        sections |= (
            {"specialists": self.specialists} if splits else {}
        )  # a specialist's head is not split
        for name, section in sections.items():
            if section.ema and (splits or self.engine.shard_head):
                raise ValueError(
                    f"{name}.ema = {section.ema}: no rank holds the weights to average; take engine.{whole}, or ema = 0"
                )
        return self

    @property
    def is_deep(self) -> bool:
        return self.ensemble.kind == "deep"

    def dump(self) -> dict:
        """Plain JSON-able values, absent ones left out; loads back to an equal Config."""
        return json.loads(self.model_dump_json(exclude_none=True, by_alias=True))


def _check_full_softmax(config: Config) -> None:
    """What dustbin = "full" and hard negatives do not go with."""
    section = config.specialists
    if not section.trains_all_rows:
        return
    what = (
        'specialists.dustbin = "full"'
        if section.dustbin == "full"
        else "specialists.hard_negatives"
    )
    if config.engine.shard_head:
        raise ValueError(f"{what} holds all logits, engine.shard_head = true none; leave one out")
    if section.label_smoothing:
        raise ValueError(
            f"{what} has a loss of its own, without label_smoothing = {section.label_smoothing}: set "
            "specialists.label_smoothing = 0"
        )


def _check_extend(config: Config) -> None:
    """What a run that adds classes takes over is not also asked of something else."""
    if not config.extend.run:
        return
    if config.generalist.init:
        raise ValueError("extend.run brings its own generalist; leave generalist.from out")
    if config.clusters.groups_file:
        raise ValueError(
            "extend.run brings its own groups, to which one is added; leave clusters.groups_file out"
        )
    if config.is_deep:
        raise ValueError(
            'extend.run adds a specialist for the new classes, and ensemble.kind = "deep" has none; '
            "leave one of them out"
        )
    if config.engine.shard_head:
        raise ValueError(
            "extend.run trains a few rows of the head, and engine.shard_head = true splits them all over "
            "the ranks; set it to false"
        )


def _check_ancestry(name: str, student: Student, config: Config) -> None:
    """Teacher and start name what there is, and nobody is his own ancestor."""
    place = f"students.{name}"
    if os.sep not in student.teacher:
        _known(
            f"{place}.teacher",
            student.teacher,
            ("ensemble", "generalist", *config.students),
            ", or a path with a /",
        )
    _known(f"{place}.start", student.start, ("generalist", "scratch", *config.students))
    seen, waiting = set(), [name]
    while waiting:
        one = config.students[waiting.pop()]
        waiting += [
            each
            for each in (one.teacher, one.start)
            if each in config.students and each not in seen
        ]
        seen.update((one.teacher, one.start))
    taught = {"ensemble": config.ensemble.members if config.is_deep else 1, "generalist": 1}
    taught |= {
        key: 1 if each.network == "single" else each.members or taught["ensemble"]
        for key, each in config.students.items()
    }
    teachers = taught.get(student.teacher) if student.learns_from_teacher else None
    if teachers is not None and taught[name] > 1 and teachers != taught[name]:
        raise ValueError(
            f"{place} has {taught[name]} members, its teacher {student.teacher} {teachers}: member k learns from "
            'member k; give it as many, or network = "single"'
        )
    if config.engine.shard_head and student.network != "single":
        raise ValueError(
            f'{place}.network = "{student.network}" has several heads; engine.shard_head splits one'
        )
    if name in seen:
        raise ValueError(f"{place}: its teacher or its start comes from itself")
    if student.network != "single" and student.members is None and not config.is_deep:
        raise ValueError(
            f'{place}.members: how many? Only an ensemble.kind = "deep" says it by itself'
        )


def _known(place: str, value: str, names: tuple[str, ...], also: str = "") -> None:
    try:
        _one_of(value, names, also)
    except ValueError as mistake:
        raise ValueError(f"{place} = {value!r}: {mistake}") from None


def _inherit(section: Schedule, parent: Schedule) -> Schedule:
    """`section` with each absent schedule key taken from `parent`; its own steps hide the parent's epochs."""
    values = {
        key: getattr(parent, key) for key in Schedule.model_fields if getattr(section, key) is None
    }
    if section.steps is not None or section.epochs is not None:
        values.pop("steps", None), values.pop("epochs", None)
    return section.model_copy(update=values)


def load_config(
    path: str | Path | None = None, overrides: list[str] = (), base: dict | None = None
) -> Config:
    """Read a TOML file (or take `base`), apply `section.key=value` overrides, and check everything.

    Raises UserError with one line per mistake, each naming the value, the rule and the nearest valid key.
    """
    values = dict(base or {})
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such config file") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a directory; give a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as mistake:
            raise UserError(f"{path}: not valid TOML: {mistake}") from None
        except OSError as mistake:
            raise UserError(f"{path}: cannot be read: {mistake.strerror}") from None
    for override in overrides:
        _override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as mistakes:
        source = str(path) if path is not None else "config"
        lines = [f"{source}: {_explain(mistake)}" for mistake in mistakes.errors()]
        raise UserError("\n".join(lines)) from None


def _override(values: dict, override: str) -> None:
    """Apply one `a.b=value` to nested `values`; the value is TOML, or a bare string."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section} is not a section")
    values[last] = value


def _explain(mistake: dict) -> str:
    place = [str(part) for part in mistake["loc"]]
    where = ".".join(place)
    if mistake["type"] == "extra_forbidden":
        valid = _valid_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], valid, n=1, cutoff=0.4)
        hint = (
            f"; did you mean {'.'.join([*place[:-1], near[0]])}?"
            if near
            else f"; valid keys: {', '.join(valid)}"
        )
        return f"unknown key {where}{hint}"
    message = mistake["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where} = {mistake['input']!r}: {message}"


def _valid_keys(place: list[str]) -> list[str]:
    section: Any = Config
    for index, part in enumerate(place):
        if section is Config and part == "students":
            section = Student
            if index + 1 < len(place):
                return _fields(Student)
            return []
        section = section.model_fields[part].annotation
    return _fields(section)


def _fields(section) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def save_config(config: Config, path: Path) -> None:
    path.write_text(tomli_w.dumps(config.dump()), encoding="utf-8")
