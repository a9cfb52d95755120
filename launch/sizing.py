"""What each stage of a run will hold, send, write and read, before anything runs.

`referral prepare --plan` prints it.  The formulas are pipeline.scaling's. How large the networks
are, the trainer says, which builds them without memory. Of the data only manifests are read.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.config import Config, ResolvedSchedule, UserError
from pipeline.controls import COMPUTE, is_wall, twins
from pipeline.graph import RunDirectory
from pipeline.label_set import SPLITS, manifest_of, num_classes
from pipeline.results.forecasts import is_thin
from pipeline.scaling import (
    EVALUATED_ROW,
    EVALUATED_SENT,
    FLOAT,
    INDEX,
    MEASURED_ROW,
    TARGET_LEAST,
    WEIGHTS_TRIED,
    Network,
    checkpoint_bytes,
    exchanged,
    held_by_ensemble,
    held_by_measuring,
    held_by_training,
    kept_checkpoints,
    most_measured,
    sent_per_step,
    steps_of,
    targets_bytes,
)
from pipeline.store import Stage

from .plan import Job

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
COLUMNS = ("stage", "ranks", "steps", "memory/rank", "sent/step", "sent", "disk", "read")
DTYPES = ("uint8", "float32", "int32")
TAUGHT = ("train", "transfer")  # splits that a teacher answers about
NOTE = """\
Not counted: activations of trunks, and what Python and its libraries take (about 0.4 GiB
a process).  Networks of groups are of average size, stored targets of 32 classes a row.
"-" is not known before it runs."""


def bytes_of(dtype: str) -> int:
    """Bytes of one number of a numpy type. The launcher's other commands start without numpy."""
    import numpy as np

    return np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Split:
    """samples, and bytes of one: as it lies in a shard, or decoded where no shard is known."""

    samples: int
    sample_bytes: float

    @property
    def bytes(self) -> float:
        return self.samples * self.sample_bytes


@dataclass(frozen=True)
class Inputs:
    """What a plan knows of the data.  shape, dtype: of one input, decoded."""

    classes: int
    shape: tuple[int, ...]
    dtype: str
    splits: dict[str, Split]

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * bytes_of(self.dtype)


@dataclass(frozen=True)
class Needs:
    """What one stage needs, or several alike, in bytes. None: not known before it runs.

    memory: of the rank that holds most.  sent: by a rank in all, sent_per_step in each.  disk: of
    all stages together while they last, checkpoints included.  read: of all ranks together.
    """

    stage: str
    ranks: int
    count: int = 1
    steps: int | None = None
    memory: float | None = None
    sent_per_step: float | None = None
    sent: float | None = None
    disk: float | None = None
    read: float | None = None


# The data


def inputs_of(config: Config, given: str = "", examples: str = "") -> Inputs:
    """What manifests say, and `given` ("uint8,3,64,64") and `examples` ("TRAIN,VAL,TEST") besides.

    Raises UserError for what neither says, with the option that does.
    """
    classes, source = num_classes(config)
    if classes is None:
        raise UserError(f"{source} is not set and no manifest is there: set data.classes")
    dtype, shape = _given_input(given) if given else _recorded_input(config)
    decoded = math.prod(shape) * bytes_of(dtype)
    counts = _given_examples(examples) if examples else {}
    splits = {}
    for split in (*SPLITS, "transfer"):
        pattern = getattr(config.data, split)
        if not pattern and split not in counts:
            continue
        recorded = None if split in counts else _recorded_split(pattern, split)
        if recorded is None and split not in counts:
            raise UserError(
                f"data.{split} = {pattern!r}: no manifest says how many examples it has; give "
                "--examples TRAIN,VAL,TEST"
            )
        splits[split] = recorded or Split(counts[split], decoded)
    return Inputs(classes, shape, dtype, splits)


def _given_input(text: str) -> tuple[str, tuple[int, ...]]:
    dtype, *lengths = text.split(",")
    if dtype not in DTYPES or not lengths or not all(word.isdigit() for word in lengths):
        raise UserError(
            f"--inputs {text}: a type ({', '.join(DTYPES)}) and the lengths of an input's axes, "
            "such as uint8,3,64,64"
        )
    return dtype, tuple(map(int, lengths))


def _recorded_input(config: Config) -> tuple[str, tuple[int, ...]]:
    """The input that the manifest of train records, for pictures made by rules."""
    manifest = manifest_of(config.data.train)
    rules = manifest[1].get("inputs", {}).get("pictures", {}) if manifest else {}
    if not rules.get("size") or not rules.get("channels"):
        raise UserError(
            f"data.train = {config.data.train!r}: no manifest says what one input is like; give "
            "--inputs TYPE,LENGTH,... such as --inputs uint8,3,64,64 of pictures, float32,64 of "
            "vectors, or int32,85 of bags of at most 85 n-grams"
        )
    return "uint8", (rules["channels"], *rules["size"])


def _given_examples(text: str) -> dict[str, int]:
    words = text.split(",")
    if len(words) != len(SPLITS) or not all(word.isdigit() for word in words):
        raise UserError(f"--examples {text}: three numbers, of train, val and test")
    return dict(zip(SPLITS, map(int, words), strict=True))


def _recorded_split(pattern: str, split: str) -> Split | None:
    manifest = manifest_of(pattern)
    entry = manifest[1].get("splits", {}).get(split) if manifest else None
    if entry is None or not entry["samples"]:
        return None
    samples = entry["samples"]
    return Split(samples, sum(shard["bytes"] for shard in entry["shards"]) / samples)


# The networks


def network_sizes(config: Config, inputs: Inputs, trainer: Sequence[str]) -> Sizes:
    """Asks the trainer.  Raises UserError, in its words, where a network cannot be built."""
    shape, dtype = inputs.shape, inputs.dtype
    asked = {"config": config.dump(), "classes": inputs.classes, "shape": shape, "dtype": dtype}
    done = subprocess.run(
        [*trainer, "sizes"], input=json.dumps(asked), capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: "))
    answer = json.loads(done.stdout.splitlines()[-1])
    networks = {name: Network(**each) for name, each in answer["networks"].items()}
    return Sizes(networks, answer["branch"])


@dataclass(frozen=True)
class Sizes:
    """networks: by name.  branch: as `trainer.commands.sizes` says."""

    networks: dict[str, Network]
    branch: dict[str, int] | None

    @property
    def generalist(self) -> Network:
        return self.networks["generalist"]


# The stages


class Sizing:
    """The needs of each stage of a run."""

    def __init__(self, run: RunDirectory, jobs: Sequence[Job], inputs: Inputs, sizes: Sizes):
        self.run = run
        self.config = run.config
        self.inputs = inputs
        self.sizes = sizes
        self.ranks = {stage.place: job.processes for job in jobs for stage in job.stages}
        self.together = {stage.place: len(job.stages) for job in jobs for stage in job.stages}

    def rows(self) -> list[Needs]:
        """In the order of the run. Stages of one kind that need the same are one row."""
        alike: dict[tuple, list[tuple[Stage, Needs]]] = {}
        for stage in self.run.stages:
            needs = self.of(stage)
            values = tuple(asdict(replace(needs, stage="")).values())
            alike.setdefault((stage.name, values), []).append((stage, needs))
        rows = [_joined(group) for group in alike.values()]
        cache = self.cache()
        return [*rows, cache] if cache.disk else rows

    def of(self, stage: Stage) -> Needs:
        """The needs of one stage. Without a formula for its kind, only its ranks."""
        ranks = self.ranks[stage.place] if stage.kind.scales else 1
        needs = Needs(stage.place, ranks)
        make = OF_KIND.get(stage.name)
        return needs if make is None else make(self, stage, needs)

    def cache(self) -> Needs:
        """Decoded inputs of the splits that are small enough to be kept."""
        data = self.config.data
        sizes = [split.samples * self.inputs.input_bytes for split in self.inputs.splits.values()]
        kept = sum(size for size in sizes if size <= data.cache_bytes)
        return Needs("cache", 1, disk=0 if data.cache == "none" else kept)

    @property
    def device(self) -> str:
        """Where GPUs are reserved, or may be there."""
        return "cpu" if self.config.engine.device == "cpu" else "cuda"

    # Training

    def trained(
        self,
        needs: Needs,
        network: Network,
        schedule: ResolvedSchedule,
        steps: int,
        starts_whole: bool = True,
    ) -> Needs:
        engine = self.config.engine
        held = held_by_training(network, schedule, engine, needs.ranks, self.device, starts_whole)
        sent = sent_per_step(network, schedule, engine, needs.ranks)
        kept = kept_checkpoints(schedule, steps) * checkpoint_bytes(network, schedule)
        return replace(
            needs,
            steps=steps,
            memory=held.total,
            sent_per_step=sent,
            sent=sent * steps,
            disk=network.bytes + kept,
            read=self.seen(schedule, steps) + self.inputs.splits["val"].bytes,
        )

    def seen(self, schedule: ResolvedSchedule, steps: int) -> float:
        """Bytes of the examples that a training reads, each anew."""
        return steps * schedule.batch_size * self.inputs.splits["train"].sample_bytes

    def generalist(self, stage: Stage, needs: Needs) -> Needs:
        schedule = self.config.train
        steps = steps_of(schedule, self.inputs.splits["train"].samples)
        return self.trained(needs, self.sizes.generalist, schedule, steps, starts_whole=False)

    def specialist(self, stage: Stage, needs: Needs) -> Needs:
        schedule, steps = self.config.specialists, self.specialist_steps
        row = self.trained(needs, self.specialist_network(), schedule, steps)
        if not schedule.is_branch:
            # Validated on what the generalist refers to it.
            referred = self.config.ensemble.gate * self.config.clusters.overlap
            share = min(1, referred / len(self.run.specialists))
            val, seen = self.inputs.splits["val"], self.seen(schedule, steps)
            return replace(row, read=seen + share * val.bytes)
        assert row.memory is not None
        beside = self.together[stage.place] * row.memory  # all branches of a job learn at once
        features = steps * schedule.batch_size * self.feature_bytes
        return replace(row, memory=beside, sent_per_step=None, sent=None, read=features)

    @property
    def specialist_steps(self) -> int:
        """Steps of a specialist of average size. An epoch is a pass over its own classes."""
        schedule, train = self.config.specialists, self.inputs.splits["train"].samples
        own = math.ceil(train * self.group_size / self.inputs.classes)
        return steps_of(schedule, math.ceil(own / schedule.fraction))

    @property
    def group_size(self) -> int:
        """Classes of a group, on average."""
        config = self.config.clusters
        return max(1, math.ceil(self.inputs.classes * config.overlap / len(self.run.specialists)))

    def specialist_network(self) -> Network:
        """The network of a specialist of average size."""
        generalist, schedule = self.sizes.generalist, self.config.specialists
        outputs = self.group_size + 1
        if schedule.is_branch:
            assert self.sizes.branch is not None
            embedding = schedule.embedding or generalist.features
            own = self.sizes.branch["own"] + embedding * (self.sizes.branch["features"] + 1)
            return Network(own + outputs * (embedding + 1), 0, embedding, outputs)
        rows = generalist.classes
        if schedule.dustbin == "fresh":
            rows = outputs
        elif schedule.dustbin_rows is not None:
            rows = min(rows, outputs + schedule.dustbin_rows)
        trunk = generalist.weights - generalist.head
        if schedule.trains_all_rows:
            return generalist
        frozen = trunk if schedule.trainable == "head" else 0
        head = rows * (generalist.features + 1)
        return Network(trunk + head, 0, generalist.features, rows, frozen)

    def control(self, stage: Stage, needs: Needs) -> Needs:
        if not stage.kind.trains:
            return needs
        name, network = str(stage.address), self.sizes.generalist
        schedule, train = self.run.schedule(stage), self.inputs.splits["train"].samples
        if name in twins(self.config):
            network = self.sizes.networks[f"students.{twins(self.config)[name]}"]
        elif name in self.sizes.networks:  # wider, of a model of its own
            network = self.sizes.networks[name]
        steps = steps_of(schedule, train)
        if is_wall(name):
            steps = self.specialist_steps
        if name == COMPUTE:
            of_all = self.specialist_steps * self.trained_specialists
            steps = max(1, round(self.config.controls.max_share * of_all))
        return self.trained(needs, network, schedule, steps)

    def student(self, stage: Stage, needs: Needs) -> Needs:
        name = str(stage.address)
        schedule = self.config.students[name]
        network = self.sizes.networks[f"students.{name}"]
        steps = steps_of(schedule, math.ceil(schedule.share * self.inputs.splits["train"].samples))
        row = self.trained(needs, network, schedule, steps)
        asked = 0
        if schedule.learns_from_teacher and self.run.targets_for(name) is None:
            asked = self.asking(0)  # its teacher answers beside it
        assert row.memory is not None
        return replace(row, memory=row.memory + asked)

    # Measuring

    def measured(self, needs: Needs, splits: Sequence[Split], row_bytes: int, disk: float) -> Needs:
        """The generalist, over some splits one after the other."""
        collected = max(split.samples for split in splits) * row_bytes
        examples = sum(split.samples for split in splits)
        return replace(
            needs,
            memory=held_by_measuring(self.sizes.generalist, collected, self.device),
            sent=exchanged(examples, row_bytes, needs.ranks),
            disk=disk,
            read=sum(split.bytes for split in splits),
        )

    def measure(self, stage: Stage, needs: Needs) -> Needs:
        """Needs of measuring val, and where that is thin also train, or a part of it."""
        val, train = self.inputs.splits["val"], self.inputs.splits["train"]
        splits = [val]
        if is_thin(val.samples, self.inputs.classes):
            most = most_measured(self.config.clusters.train_examples, self.inputs.classes)
            splits.append(replace(train, samples=min(most, train.samples)))
        return self.measured(needs, splits, MEASURED_ROW, val.samples * MEASURED_ROW)

    def route(self, stage: Stage, needs: Needs) -> Needs:
        """Needs of routing: ids of each group's samples, and their files where they are copied."""
        train, overlap = self.inputs.splits["train"], self.config.clusters.overlap
        files = train.bytes if self.config.route.mode == "copy" else 0
        disk = overlap * (INDEX * train.samples + files)
        return replace(needs, disk=disk, read=files)

    @property
    def feature_bytes(self) -> int:
        """Bytes of a row of kept features."""
        assert self.sizes.branch is not None
        return FLOAT * (self.sizes.branch["at_cut"] + self.sizes.branch["general"]) + 8

    def features(self, stage: Stage, needs: Needs) -> Needs:
        views = self.config.specialists.views_of(self.config.data.augment)
        train, val = self.inputs.splits["train"], self.inputs.splits["val"]
        rows = views * train.samples + val.samples
        row = self.measured(needs, [train, val], 0, rows * self.feature_bytes)
        block = min(2**26, train.samples * self.feature_bytes)
        assert row.memory is not None
        sent = exchanged(rows, self.feature_bytes + INDEX + 1, needs.ranks)
        read = views * train.bytes + val.bytes
        return replace(row, memory=row.memory + 2 * block, sent=sent, read=read)

    def asking(self, collected: int) -> int:
        """Held by a rank that asks the run's ensemble."""
        if self.config.has_specialists:
            members = self.specialist_network().bytes * self.trained_specialists
        else:
            members = len(self.run.members) * self.sizes.generalist.bytes
        return held_by_ensemble(self.sizes.generalist, members, collected)

    @property
    def trained_specialists(self) -> int:
        count = sum(stage.kind.trains for stage in self.run.specialists)
        most = self.config.clusters.specialists
        return count if most is None else min(most, count)

    def ensemble(self, stage: Stage, needs: Needs) -> Needs:
        val = self.inputs.splits["val"]
        losses = INDEX + 8 * WEIGHTS_TRIED
        return replace(
            needs,
            memory=self.asking(val.samples * losses),
            sent=exchanged(val.samples, losses, needs.ranks),
            read=val.bytes,
        )

    def targets(self, stage: Stage, needs: Needs) -> Needs:
        students = [
            student
            for name, student in self.config.students.items()
            if (of_student := self.run.targets_for(name)) and of_student.place == stage.place
        ]
        student, classes = students[0], self.inputs.classes
        views, members = student.views or 1, 1
        if not self.config.has_specialists and student.teacher == "ensemble":
            members = len(self.run.members) + 1
        splits = [self.inputs.splits[name] for name in TAUGHT if name in self.inputs.splits]
        rows = sum(split.samples for split in splits) * views * members
        least = targets_bytes(rows, min(TARGET_LEAST, classes), classes)
        return replace(
            needs,
            memory=self.asking(2 * 2**26),
            disk=least,
            read=views * sum(split.bytes for split in splits),
        )

    def evaluate(self, stage: Stage, needs: Needs) -> Needs:
        val, test = self.inputs.splits["val"], self.inputs.splits["test"]
        predictors = 2 + len(self.config.students)
        predictors += sum(each.kind.trains for each in self.run.controls.values())
        collected = test.samples * EVALUATED_SENT
        return replace(
            needs,
            memory=self.asking(collected),
            sent=predictors * exchanged(test.samples, EVALUATED_SENT, needs.ranks),
            disk=predictors * test.samples * EVALUATED_ROW,
            read=predictors * (val.bytes + test.bytes),
        )


Formula = Callable[[Sizing, Stage, Needs], Needs]
OF_KIND: dict[str, Formula] = {
    "generalist": Sizing.generalist,
    "member": Sizing.generalist,
    "measure": Sizing.measure,
    "route": Sizing.route,
    "features": Sizing.features,
    "specialist": Sizing.specialist,
    "control": Sizing.control,
    "ensemble": Sizing.ensemble,
    "targets": Sizing.targets,
    "student": Sizing.student,
    "evaluate": Sizing.evaluate,
}


def _joined(group: list[tuple[Stage, Needs]]) -> Needs:
    """Stages of one kind that need the same as one row: disk and read are of all of them."""
    first, needs = group[0]
    count = len(group)
    if count == 1:
        return needs
    name = f"{first.kind.place.partition('/{')[0]} x {count}"
    total = {"disk": needs.disk, "read": needs.read}
    summed = {key: None if value is None else count * value for key, value in total.items()}
    return replace(needs, stage=name, count=count, **summed)


def warnings(rows: Sequence[Needs], config: Config) -> list[str]:
    """What a stage would refuse to write. One line each."""
    limits = {"features": ("specialists.features_bytes", config.specialists.features_bytes)}
    limits["routed"] = ("route.max_bytes", config.route.max_bytes)
    return [
        f"{row.stage} takes {size_text(row.disk)}, and {limits[row.stage][0]} = "
        f"{limits[row.stage][1]:,} allows less"
        for row in rows
        if row.stage in limits and row.disk and row.disk > limits[row.stage][1]
    ]


# Shown


def table(rows: Sequence[Needs]) -> str:
    """Rows of text."""
    cells: list[list[str]] = [list(COLUMNS)]
    for row in rows:
        sizes = (row.memory, row.sent_per_step, row.sent, row.disk, row.read)
        steps = "-" if row.steps is None else f"{row.steps:,}"
        cells.append([row.stage, str(row.ranks), steps, *map(size_text, sizes)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(lines)


def size_text(size: float | None) -> str:
    """Three digits and a unit."""
    if size is None:
        return "-"
    for unit, name in UNITS:
        if size >= unit:
            number = f"{size / unit:.3g}" if size < 999.5 * unit else f"{size / unit:,.0f}"
            return f"{number} {name}"
    return f"{size:.0f} B"


def as_json(rows: Sequence[Needs], inputs: Inputs) -> dict:
    """What `--json` prints."""
    stages = [asdict(row) for row in rows]
    return {"classes": inputs.classes, "stages": stages}
