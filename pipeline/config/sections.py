"""The sections of the config but for schedules and Slurm.

Each key has a type, a default, a meaning.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from ..advice.levers import LEVERS, SCARCITIES
from ..choices import (
    AUGMENTATIONS,
    CHOOSE_ALL_GROUPS,
    COMBINER_ALIASES,
    COMBINERS,
    CONTROL_ROWS,
    ENGINES,
    MARGINS,
    MEANS,
    METHODS,
    NETWORKS,
    EngineKind,
)
from ..stages import SIDE_BY_SIDE
from .base import MODULE_FUNCTION, Section, each_of, one_of


class Data(Section):
    """Shards.

    Each of train, val, test is a pattern, `dir/train-{000000..000007}.tar`, several joined by `::`.
    """

    # a directory with a manifest, or a pattern of shards
    train: str = ""
    # groups, early stopping, temperatures and weights are measured on it
    val: str = ""
    # read by `evaluate` alone
    test: str = ""
    # more inputs without labels: students learn what their teacher predicts for them
    transfer: str = ""
    # inputs of other kinds: how well are they told from test's?  Labels are not read
    ood: str = ""
    # the member that holds the label. "json:FIELD" reads a field of the json member
    label: str = "cls"
    # the member that holds the input. "" takes the one member that is not the label
    input: str = ""
    # per channel, of inputs scaled to 0..1. Part of model.json
    mean: list[float] = [0.5]
    # the deviation of the same inputs
    std: list[float] = [0.25]
    # training views: none | shift | flip-crop | drop_ngrams | rrc | rrc-randaugment |
    # module:function
    augment: str = "none"
    # options of rrc and rrc-randaugment by name: pipeline.choices.AUGMENT_OPTIONS lists them
    augment_options: dict[str, Any] = {}
    # for drop_ngrams: the share of a bag's n-grams that a view leaves out
    augment_share: float = Field(default=0.2, ge=0, lt=1)
    # keep decoded inputs in one memory-mapped file under RUN/cache
    cache: Literal["auto", "decoded", "none"] = "auto"
    # the most bytes that such a file may take
    cache_bytes: int = Field(default=2 * 1024**3, gt=0)
    # reading processes per rank (None: some with a GPU, else 0)
    workers: int | None = Field(default=None, ge=0)
    # batches in page-locked memory, from where a GPU copies while it computes (None: with a GPU)
    pin_memory: bool | None = None
    # stop at the first corrupt sample, or leave them out and count them
    damage: Literal["strict", "skip"] = "strict"
    # with skip: stop when more than this fraction is corrupt
    damage_share: float = Field(default=0.01, ge=0, lt=1)
    # path or URL of the manifest, for shards without one beside them, as pipe: has
    manifest: str | None = None
    # where shards behind URLs are kept. "" is ~/.cache/referral/shards
    fetch_dir: str = ""
    # the most bytes that they may take
    fetch_bytes: int = Field(default=256 * 1024**3, gt=0)
    # how many shards of a larger split behind URLs are mixed as they stream. 0 refuses such a split
    stream_shards: int = Field(default=0, ge=0)
    # extension -> module:function, beside the built-in table
    decoders: dict[str, str] = {}
    # the label set's size, where no manifest says it
    classes: int | None = Field(default=None, gt=0)

    @field_validator("augment")
    @classmethod
    def _augment(cls, value):
        return one_of(value, AUGMENTATIONS, " or module:function", MODULE_FUNCTION)

    @field_validator("mean", "std")
    @classmethod
    def _of_channels(cls, value):
        if not value:
            raise ValueError("is empty: give one number, or one for each channel")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value):
        if min(value) <= 0:
            raise ValueError("every deviation must be greater than 0")
        return value

    @model_validator(mode="after")
    def _as_many_of_both(self):
        lengths = {len(self.mean), len(self.std)} - {1}
        if len(lengths) > 1:
            raise ValueError(
                f"data.mean has {len(self.mean)} values and data.std {len(self.std)}: "
                "each needs 1, or one for each channel"
            )
        return self


OF_COSINE = ("scale", "margin", "margin_kind")  # keys of a head of cosines alone


class Model(Section):
    """The network.  `options` is for timm models and a user's own builder."""

    # mlp | convnet | resnet | wideresnet | embedding_bag | timm:NAME | module:function
    name: str = "convnet"
    # None takes the builder's own default
    width: int | None = Field(default=None, gt=0)
    # None takes the builder's own default
    depth: int | None = Field(default=None, gt=0)
    # size of the last hidden layer. 0 = none
    embedding: int | None = Field(default=None, ge=0)
    # the share of activations that a training step sets to zero
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # further keyword arguments of the builder
    options: dict[str, Any] = {}
    # cosine: logits are scale * cos(features, row), and rows learn with norm 1
    head: Literal["linear", "cosine"] = "linear"
    # the factor of a cosine head. None: learned, starting at sqrt(2) log(C - 1)
    scale: float | None = Field(default=None, gt=0)
    # the margin of a cosine head: by how much the label's cosine, or angle, is made worse in
    # training
    margin: float = Field(default=0.0, ge=0, lt=1)
    # cosface (cos - margin) | arcface (cos(angle + margin))
    margin_kind: str = "cosface"

    @field_validator("margin_kind")
    @classmethod
    def _margin_kind(cls, value):
        return one_of(value, MARGINS)

    @model_validator(mode="after")
    def _of_cosines(self):
        for key in OF_COSINE:
            value, default = getattr(self, key), Model.model_fields[key].default
            if self.head != "cosine" and value != default:
                raise ValueError(f'model.{key} = {value!r} is of head = "cosine"; leave it out')
        return self

    def merged(self, own: dict[str, Any]) -> Model:
        """These keys, of which a section's own ones count first."""
        values = self.model_dump()
        if own.get("head", self.head) != self.head:
            values = {key: value for key, value in values.items() if key not in OF_COSINE}
        return Model.model_validate({**values, **own})

    @field_validator("name")
    @classmethod
    def _name(cls, value):
        pattern = rf"timm:.+|{MODULE_FUNCTION}"
        return one_of(value, NETWORKS, ", timm:NAME or module:function", pattern)


NEW_HEAD = "new"  # generalist.head: their trunk, and a fresh head


class Generalist(Section):
    """Where the generalist comes from, if it is not trained here from scratch."""

    # a run, a directory with model.safetensors and model.json, or a weights file
    init: str = Field(default="", alias="from")
    # name of the last linear layer in someone else's weights file. [model] is the rest. "new": a
    # fresh head in any case, also for a run. With None, or another number of classes, the head is
    # fresh and [train] goes on from the weights
    head: str | None = None
    # key of the state dict, in a checkpoint with several. None: averaged weights, then the others
    weights: str | None = None
    # load only tensors whose names start with this, and remove it
    prefix: str = ""

    @property
    def has_new_head(self) -> bool:
        """Whether the head is fresh whatever the weights have."""
        return self.head == NEW_HEAD


class Extend(Section):
    """New classes beside those of a finished run.

    Its generalist, groups and specialists are inherited.
    """

    # the finished run. Its classes are found by name among the data's
    run: str = ""
    # how many old classes join the new ones' group. None = as in the largest old group
    companions: int | None = Field(default=None, ge=0)


class Clusters(Section):
    """Groups of classes that the generalist confuses."""

    # number of groups, and the most specialists
    num_groups: int = Field(default=16, gt=0)
    # a name of clustering.METHODS
    method: str = "kmeans"
    # the largest group, as a multiple of the mean size
    capacity: float = Field(default=1.3, ge=1)
    # what capacity counts: classes, or their training examples
    capacity_of: Literal["classes", "examples"] = "classes"
    # groups that a class belongs to. With coverage, the maximum
    overlap: int = Field(default=1, ge=1)
    # classes join further groups until these catch such a fraction of the errors
    coverage: float | None = Field(default=None, gt=0, le=1)
    # a user's own taxonomy (ClassGroups JSON) instead of clustering
    groups_file: str = ""
    # statistics keep the k largest predictions of each example. "all" = the exact covariance.
    # None = exact of up to 2,048 classes, or where the method reads it and C^2 fits
    top_k: Annotated[int, Field(gt=0)] | Literal["all"] | None = None
    # groups whose forecast (a ceiling, fraction of val examples) is below get no specialist
    min_gain: float = Field(default=0.0, ge=0)
    # at most so many groups get a specialist, those with the largest forecasts. None = all
    specialists: int | None = Field(default=None, gt=0)
    # where groups are found on train: examples of it that are measured. None = all up to a limit
    train_examples: int | None = Field(default=None, gt=0)

    @field_validator("method")
    @classmethod
    def _method(cls, value):
        return one_of(value, METHODS)

    @model_validator(mode="after")
    def _room_for_coverage(self):
        if self.coverage is None:
            return self
        if self.overlap < 2 or self.method in CHOOSE_ALL_GROUPS:
            others = " or ".join(f'"{name}"' for name in sorted(CHOOSE_ALL_GROUPS))
            raise ValueError(
                f"coverage = {self.coverage} decides who joins a second group: "
                f"it needs overlap = 2 or more and a method other than {others}"
            )
        return self

    @model_validator(mode="after")
    def _sizes_to_bound(self):
        if self.capacity_of != "classes" and self.method in CHOOSE_ALL_GROUPS:
            raise ValueError(
                f'capacity_of = "{self.capacity_of}" bounds what groups hold: '
                f'method = "{self.method}" does not; take another method, or "classes"'
            )
        return self


class Route(Section):
    """The samples of each group's classes, found once for its specialist."""

    # remember which samples they are, or copy them to shards of their own
    mode: Literal["index", "copy"] = "index"
    # refuse to write more
    max_bytes: int = Field(default=64 * 1024**3, gt=0)


class Controls(Section):
    """What the same examples, or multiplications, do without specialists."""

    # train control_wall, control_compute and the students' twins
    enabled: bool = True
    # peak rates to try for control_wall. [] = 1/3, 1 and 3 times the specialists'
    learning_rates: list[PositiveFloat] = []
    # students that have a twin on labels: all that a teacher teaches, main alone, or none
    twins: Literal["all", "main", "none"] = "all"
    # the most that control_compute trains, as a share of all specialists together
    max_share: float = Field(default=1.0, gt=0, le=1)
    # further rivals to train: train_on, wider, average, shortlist
    rows: list[str] = []
    # for wider: keys of [model] that differ. {} = as wide as the ensemble multiplies
    model: dict[str, Any] = {}

    @field_validator("rows")
    @classmethod
    def _rows(cls, value):
        return each_of(value, CONTROL_ROWS)


class Advise(Section):
    """`referral advise`: small pilots that say what pays, before it is paid for in full."""

    # the most that all pilots may cost, as a share of the generalist's training
    budget: float = Field(default=0.3, gt=0)
    # the levers to try. [] = all that network and data allow
    levers: list[str] = []
    # what you are short of: "" | training | wall_clock | multiplications | latency | parameters |
    # trunk
    scarce: str = ""
    # how much of it a step may take, in multiples of the generalist's own. None: a default for each
    limit: float | None = Field(default=None, gt=0)
    # jobs that train side by side, on which wall_clock depends
    workers: int = Field(default=1, gt=0)

    @field_validator("levers")
    @classmethod
    def _levers(cls, value):
        return each_of(value, LEVERS)

    @field_validator("scarce")
    @classmethod
    def _scarce(cls, value):
        return value and one_of(value, SCARCITIES)

    @model_validator(mode="after")
    def _limit_of_something(self):
        if self.limit is not None and not self._has_limit:
            able = ", ".join(name for name, row in SCARCITIES.items() if row.limit is not None)
            raise ValueError(
                f'limit = {self.limit:g} is of what is scarce, and scarce = "{self.scarce}": set '
                f"scarce to one of {able}, or leave limit out"
            )
        return self

    @property
    def _has_limit(self) -> bool:
        """Whether what is scarce is taken by degrees."""
        return bool(self.scarce) and SCARCITIES[self.scarce].limit is not None


class Ensemble(Section):
    """How the predictions of several networks become one distribution."""

    # deep: generalists alone, each from another seed. shortlist: the same, but all further ones are
    # asked about the first one's likeliest classes alone. rerank: these are trained on them, too
    kind: Literal["specialists", "deep", "shortlist", "rerank"] = "specialists"
    # for deep, shortlist and rerank: number of networks that the run trains, its generalist among
    # them
    members: int = Field(default=4, gt=0)
    # of shortlist and rerank: how many classes. None = chosen on val.  Of specialists: so many of
    # the generalist's likeliest classes of each example they are asked about. None = all
    shortlist: int | None = Field(default=None, gt=0)
    # for these: 0 joins by the geometric mean, 1 by the arithmetic. "fit" = chosen on val
    order: float | Literal["fit"] = 0.0
    # for deep, shortlist and rerank: paths of runs or saved networks with the same classes
    networks: list[str] = []
    # the n most probable classes of the generalist choose the specialists
    gate: int = Field(default=1, gt=0)
    # the most specialists for one example. None = no limit
    max_specialists: int | None = Field(default=None, gt=0)
    # kl (eq. 5) | reverse_kl | arithmetic (or mean) | log_ratio | mixture
    combine: str = "kl"
    # fit one temperature per specialist on val
    temperatures: bool = True
    # fit the specialists' weight in the objective on val. false = the paper's 1
    fit_weight: bool = True
    # go on without specialists that failed
    allow_missing: bool = False

    @field_validator("combine")
    @classmethod
    def _combine(cls, value):
        value = COMBINER_ALIASES.get(value) or value
        return value if value in MEANS else one_of(value, COMBINERS)

    @field_validator("order")
    @classmethod
    def _order(cls, value):
        if value != "fit" and not 0 <= value <= 1:
            raise ValueError(
                f'{value} is no order of a mean: 0 (geometric) to 1 (arithmetic), or "fit"'
            )
        return value

    @model_validator(mode="after")
    def _of_its_kind(self):
        """Keys of another kind would be read by nobody."""
        default = Ensemble.model_fields
        if self.kind == "specialists" and self.shortlist is not None:
            self._check_shortlist_of_specialists(self.shortlist)
        if self.kind == "specialists" and self.networks:
            raise ValueError(
                'ensemble.networks is of kind = "deep", "shortlist" and "rerank"; this is '
                '"specialists"'
            )
        if not self.asks_shortlists:
            keys = ["order"]
            if self.kind == "deep":
                keys.append("shortlist")
            for key in keys:
                if getattr(self, key) != default[key].default:
                    raise ValueError(
                        f'ensemble.{key} is of kind = "shortlist" and "rerank"; this is '
                        f'"{self.kind}"'
                    )
        elif self.kind == "rerank" and self.members < 2:
            raise ValueError(
                'kind = "rerank" trains networks beside the generalist: set members = 2, or take '
                'kind = "shortlist" for networks that exist already'
            )
        elif self.num_networks < 2:
            raise ValueError(
                'kind = "shortlist" asks a second network: set members = 2, or name one in networks'
            )
        default_combine = default["combine"].default
        known = {"specialists": COMBINERS, "deep": [default_combine, *MEANS]}
        if self.combine not in known.get(self.kind, [default_combine]):
            means = ", ".join(MEANS)
            raise ValueError(
                f'ensemble.combine = "{self.combine}" is not of kind = "{self.kind}": specialists '
                f"take one of {', '.join(COMBINERS)}, a deep ensemble {means}, and of a shortlist "
                "ensemble.order says it"
            )
        return self

    def _check_shortlist_of_specialists(self, shortlist: int) -> None:
        if self.combine != "kl":
            raise ValueError(
                f'ensemble.combine = "{self.combine}" is not solved on a shortlist: take "kl", or '
                "leave ensemble.shortlist out"
            )
        if shortlist < self.gate:
            raise ValueError(
                f"ensemble.shortlist = {shortlist} is shorter than ensemble.gate = {self.gate}: "
                f"specialists would be asked for classes that are not on it; take {self.gate} or "
                "more"
            )

    @property
    def num_networks(self) -> int:
        """How many networks answer in a deep or shortlist ensemble, trained here or given."""
        return self.members + len(self.networks)

    @property
    def asks_shortlists(self) -> bool:
        """Whether further networks are asked about the generalist's likeliest classes alone."""
        return self.kind in ("shortlist", "rerank")

    @property
    def mean_order(self) -> float:
        """The order of the mean that joins a deep ensemble."""
        return MEANS.get(self.combine, MEANS["arithmetic"])


class Engine(Section):
    """How a step is taken on many ranks.  Never in a stage's key: it changes no metric."""

    # ddp, or deepspeed: what takes a step on many ranks
    name: str = "ddp"
    # for deepspeed: 1 splits optimizer states over ranks, 2 gradients too, 3 weights too
    zero_stage: int = Field(default=1, ge=0, le=3)
    # auto: bf16 on CUDA, fp32 elsewhere
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # products of float32: high is TF32 on a GPU, medium bf16
    matmul: Literal["highest", "high", "medium"] = "highest"
    # give the same numbers each time, with slower kernels
    deterministic: bool = False
    # cuDNN times its kernels for each new shape and takes the fastest
    cudnn_benchmark: bool = False
    # for ddp: keep pictures and kernels in the order that tensor cores read
    channels_last: bool = False
    # for ddp: torch.compile the network that trains
    compile: bool = False
    # for ddp on GPUs: batch norm uses the statistics of the global batch
    sync_batchnorm: bool = False
    # for ddp: split the head's rows over the ranks, and never store the [B, C] logits
    shard_head: bool = False
    # classes whose logits are computed at a time. None = what fits a cache
    head_block: int | None = Field(default=None, gt=0)
    # a trunk's blocks are computed again in the backward pass, and what they made is not kept
    checkpoint_activations: bool = False
    # further keys of DeepSpeed's own config
    deepspeed: dict[str, Any] = {}
    # auto: cuda where there is one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # seconds without a step or a measured batch after which a rank is ended
    hang_s: float = Field(default=900, gt=0)
    # trackers that also get the metrics: tensorboard, wandb, mlflow
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []

    @field_validator("name")
    @classmethod
    def _name(cls, value):
        return one_of(value, ENGINES)

    @model_validator(mode="after")
    def _one_head(self):
        if self.shard_head and self.kind.sharded_head is None:
            able = next(name for name, kind in ENGINES.items() if kind.sharded_head)
            raise ValueError(
                f'engine.shard_head = true needs engine.name = "{able}": '
                f'"{self.name}" would average the rows of the ranks'
            )
        return self

    @model_validator(mode="after")
    def _layers(self):
        able = next(name for name, kind in ENGINES.items() if kind.changes_layers)
        for key in ("compile", "channels_last", "sync_batchnorm"):
            if getattr(self, key) and not self.kind.changes_layers:
                raise ValueError(
                    f'engine.{key} = true needs engine.name = "{able}", and it is "{self.name}"; '
                    "leave one of them out"
                )
        for key in ("shard_head", "checkpoint_activations"):
            if self.compile and getattr(self, key):
                raise ValueError(
                    f"engine.compile = true and engine.{key} = true: what is compiled is a whole "
                    "network that keeps its activations; set one of them to false"
                )
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError(
                "engine.cudnn_benchmark = true takes whichever kernel is fastest, and "
                "engine.deterministic = true always the same; set one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _of_deepspeed(self):
        if self.deepspeed and self.name != "deepspeed":
            raise ValueError(
                f'engine.deepspeed is of engine.name = "deepspeed", and it is "{self.name}"; '
                "leave it out"
            )
        if self.checkpoint_activations and self.splits_weights:
            raise ValueError(
                f"engine.checkpoint_activations = true computes blocks again whose weights are "
                f"given back by then; take engine.{self.kind.whole_weights}, or set it to false"
            )
        return self

    @property
    def kind(self) -> EngineKind:
        """The engine and what it can do."""
        return ENGINES[self.name]

    @property
    def splits_weights(self) -> bool:
        """Whether no rank holds the whole network."""
        return self.kind.splits_weights(self.zero_stage)


class Launch(Section):
    """How the launcher runs jobs on this machine."""

    # ranks of each stage that scales (None: one per GPU, or per core up to 2)
    processes: int | None = Field(default=None, gt=0)
    # sections of [slurm] whose jobs have one rank each and run beside each other (None: those that
    # have at least as many jobs as ranks)
    side_by_side: list[str] | None = None
    # jobs of one process side by side (None: as many as devices or cores)
    pool: int | None = Field(default=None, gt=0)
    # how often a failed job is tried again
    retries: int = Field(default=1, ge=0)

    @field_validator("side_by_side")
    @classmethod
    def _side_by_side(cls, value):
        return None if value is None else each_of(value, SIDE_BY_SIDE)
