"""What every stage needs: the run, its ranks, its data and its networks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clustering import ClassGroups
from ensemble import DeepEnsemble, SpecialistEnsemble
from networks import (
    Classifier,
    ModelSpec,
    add_classes,
    adopt_weights,
    batch_ensemble,
    build_classifier,
    hydra,
    load_classifier,
    match_classes,
    remap_specialist,
    save_classifier,
    widen,
)
from pipeline.config import Config, Schedule, Student, UserError, load_config
from pipeline.store import (
    Attempt,
    RunDirectory,
    Stage,
    digest,
    new_attempt_id,
    read_json,
    write_bytes,
    write_json,
)

from .core.loop import Trainer, TrainingFiles, TrainingTask
from .core.objectives import Objective
from .core.tracking import trackers
from .data.cache import cached
from .data.sample_accounting import LostSamples
from .data.shards import ShardSet, open_shards
from .data.streams import Batch, MeasuringStream
from .distributed.ranks import Ranks, broadcast, gather
from .engines import build_engine

MEASURING_BATCH = 512
HELD = (
    2**26
)  # probabilities of a batch that are held while measuring, at most: an ensemble's are of all classes
log = logging.getLogger("referral")


class Session:
    """One process's view of one run."""

    def __init__(self, run: RunDirectory, ranks: Ranks):
        self.run, self.ranks, self.config = run, ranks, run.config
        self._shards: dict[str, ShardSet] = {}
        self.losses = LostSamples()

    def shards(self, split: str) -> ShardSet:
        """The train, val, test, transfer or ood split, decoded once for all stages where [data] cache allows."""
        if split not in self._shards:
            data = self.config.data
            if split in ("transfer", "ood"):
                data = data.model_copy(update={"label": "", "classes": None})
            opened = open_shards(getattr(data, split), data, split)
            self.losses.add(opened, {})
            self._shards[split] = cached(opened, self.run.root / "cache" / split, data)
        return self._shards[split]

    @property
    def class_names(self) -> list[str]:
        return self.shards("train").class_names

    @property
    def num_classes(self) -> int:
        return self.shards("train").num_classes

    @contextmanager
    def attempt(self, stage: Stage) -> Iterator[Attempt]:
        """One attempt, shared by all ranks; rank 0 declares it finished when the block ends without an error."""
        identity = broadcast(new_attempt_id() if self.ranks.is_main else None, self.ranks)
        attempt = stage.begin(identity)
        handler = logging.FileHandler(attempt.path(f"log-{self.ranks.rank}.txt"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        if self.ranks.is_main:
            attempt.publish("metrics.jsonl")
            attempt.publish("log-0.txt")
        log.info(
            "%s: attempt %s on %s, %d ranks",
            stage.label,
            identity,
            self.ranks.device,
            self.ranks.world_size,
        )
        try:
            yield attempt
            dist.barrier()
            if self.ranks.is_main:
                write_json(attempt.path("damage.json"), self.losses.splits)
                attempt.finish()
                log.info("%s: done", stage.label)
            dist.barrier()
        finally:
            log.removeHandler(handler)
            handler.close()

    def fresh_network(
        self, student: Student | None = None, seed: int | None = None, members: dict | None = None
    ) -> Classifier:
        """A network of [model] (with a student's own keys over it), its weights drawn from `seed`, by default the
        run's.  members: of networks with several, as model.json has it."""
        model = self.config.model
        if student is not None:
            model = type(model).model_validate({**model.model_dump(), **student.model})
        shards, data = self.shards("train"), self.config.data
        dtype = "uint8" if shards.input_dtype == np.uint8 else "float32"
        builders = user_builders(model.name)
        options = (
            {}
            if builders or model.name.startswith("timm:")
            else {
                "width": model.width,
                "depth": model.depth,
                "embedding": model.embedding,
                "dropout": model.dropout,
            }
        )
        torch.manual_seed(self.config.seed if seed is None else seed)
        try:
            spec = ModelSpec(
                builder=model.name,
                options={**options, **model.options},
                num_classes=shards.num_classes,
                class_names=list(shards.class_names),
                input={
                    "shape": shards.input_shape,
                    "dtype": dtype,
                    "mean": data.mean,
                    "std": data.std,
                },
                members=members,
            )
            return build_classifier(spec, builders)
        except ValueError as mistake:
            raise UserError(f"[model] {mistake}") from None

    def load(self, stage: Stage) -> Classifier:
        """A finished stage's network, in eval mode, on this rank's device."""
        directory = stage.path("model.safetensors").parent
        return load_classifier(directory, self.ranks.device, builders_of(self.config))

    def train(
        self,
        attempt: Attempt,
        network: nn.Module,
        objective: Objective,
        stream,
        schedule: Schedule,
        steps: int,
        validate=None,
    ) -> tuple[nn.Module, dict]:
        names = self.config.engine.track if self.ranks.is_main else []
        with (
            closing(build_engine(self.config.engine, self.ranks)) as engine,
            self.ranks.watchdog.watching(),
            trackers(names, attempt.directory, self.run.root, attempt.stage.place) as tracked,
        ):
            task = TrainingTask(
                network, objective, stream, schedule, steps, validate, self.config.data.workers
            )
            files = TrainingFiles(
                attempt.stage.checkpoints, attempt.path("metrics.jsonl"), tracked
            )
            network, summary = Trainer(task, engine, self.ranks, files).train()
        for source, sample, reason in summary.lost:
            self.losses.add(stream.sources[source].shards, {sample: reason})
        return network, summary.to_json()

    def measured(
        self, shards: ShardSet, measure: Callable[[Batch], dict[str, Tensor]], ids=None
    ) -> dict[str, np.ndarray]:
        """`measure` of every example once, over all ranks: arrays in the order of the shards (or of `ids`).

        Every rank returns the whole, "ids" among it: damaged examples are absent where data.damage = skip allows it.
        """
        stream = MeasuringStream(shards, measuring_batch(self.num_classes), ids=ids)
        parts, lost = [], {}
        with torch.inference_mode():
            for batch in stream.loader(
                self.ranks.rank, self.ranks.world_size, self.config.data.workers
            ):
                lost |= {sample: reason for _, sample, reason in batch.lost}
                self.ranks.progress()
                batch = batch.to(self.ranks.device)
                found = {key: value.cpu().numpy() for key, value in measure(batch).items()}
                parts.append({"ids": batch.ids.cpu().numpy(), **found})
        gathered = gather((parts, lost), self.ranks)
        every = [part for ranks_parts, _ in gathered for part in ranks_parts]
        if not every:
            raise UserError(f"{shards.split}: nothing to measure")
        for _, ranks_lost in gathered:
            self.losses.add(shards, ranks_lost)
        joined = {key: np.concatenate([part[key] for part in every]) for key in every[0]}
        order = np.argsort(joined["ids"], kind="stable")
        return {key: value[order] for key, value in joined.items()}

    def measuring_shards(self, enough: int = 10) -> ShardSet:
        """What groups are found on: val, or train where val has fewer than `enough` examples per class on average.

        A temperature or a weight is one number, and fitted on val however few: on training data that the networks know
        by heart it says nothing.
        """
        val = self.shards("val")
        if val.num_samples < enough * val.num_classes:
            self.say(
                "val has %d examples for %d classes: predictions are measured on train",
                val.num_samples,
                val.num_classes,
            )
            return self.shards("train")
        return val

    def groups(self) -> ClassGroups:
        return ClassGroups.load(self.run.cluster.path("groups.json"))

    def skipped(self) -> set[int]:
        """Groups that were forecast to gain too little for a specialist."""
        return set(read_json(self.run.cluster.path("summary.json"))["skipped"])

    def specialist_steps(self) -> list[int]:
        """Planned steps of each specialist that is trained here."""
        from .stages.story import specialist_steps

        counts, schedule = self.shards("train").class_counts, self.config.specialists
        skipped = self.skipped()
        return [
            specialist_steps(schedule, int(counts[members].sum()))
            for m, members in enumerate(self.groups().members)
            if m >= self.run.num_inherited and m not in skipped
        ]

    def ensemble(self, facts: dict | None = None) -> SpecialistEnsemble | DeepEnsemble:
        """Generalist and specialists of this run, joined as ensemble.json says; of a deep ensemble its members."""
        if self.config.is_deep:
            return DeepEnsemble(
                [self.load(stage) for stage in (self.run.generalist, *self.run.members)]
            )
        facts = facts or read_json(self.run.combine.path("ensemble.json"))
        without = {*facts["skipped"], *facts["missing"]}
        specialists = {
            m: self.load(each) for m, each in enumerate(self.run.specialists) if m not in without
        }
        return SpecialistEnsemble(
            self.load(self.run.generalist),
            specialists,
            self.groups(),
            gate=facts["gate"],
            max_specialists=facts["max_specialists"],
            combine=facts["combine"],
            temperatures=facts["temperatures"],
            weights=facts["weights"],
            skipped=facts["skipped"],
            allow_missing=bool(facts["missing"]),
        )

    def temperatures(self) -> list[float]:
        """[1 + M]: 1 for the generalist, and what was fitted for each specialist on val (1 where there is none)."""
        done = [read_summary(each) if each.is_done else {} for each in self.run.specialists]
        return [1.0, *(summary.get("temperature", 1.0) for summary in done)]

    def write_json(self, path: Path, value) -> None:
        if self.ranks.is_main:
            write_json(path, value)

    def student_network(self, name: str, student: Student) -> Classifier:
        """Fresh, a copy of the generalist (widened where the student's [model] is a wider one), or another student's
        network; then with as many members as asked.  Its seed is of its name: nobody starts where his teacher did."""
        seed, members = self.seed(f"student {name}", 0), self.student_members(student)
        if student.start == "scratch":  # every head, or factor, drawn by itself
            return self.fresh_network(student, seed, members)
        if student.start == "generalist":
            network = self._grown_generalist(self.fresh_network(student, seed).spec)
        else:
            network = self.load(self.run.students[student.start])
        if network.spec.members == members:
            return network
        try:
            if student.network == "hydra":
                return hydra(network, members["count"], student.head_blocks)
            return batch_ensemble(
                network, members["count"], generator=torch.Generator().manual_seed(seed)
            )
        except ValueError as mistake:
            raise UserError(f"students.{name}: {mistake}") from None

    def student_members(self, student: Student) -> dict | None:
        """As model.json has it; None for a single network."""
        count = student.members or self.config.ensemble.members
        return {
            "single": None,
            "hydra": {"kind": "heads", "count": count, "blocks": student.head_blocks},
            "batch_ensemble": {"kind": "batch", "count": count},
        }[student.network]

    def _grown_generalist(self, spec: ModelSpec) -> Classifier:
        generalist = self.load(self.run.generalist)
        if generalist.spec == spec:
            return generalist
        try:
            return widen(generalist, spec, torch.Generator().manual_seed(self.config.seed))
        except ValueError as mistake:
            raise UserError(
                f'{mistake}; a student of another shape needs start = "scratch"'
            ) from None

    def given_generalist(self) -> Classifier | None:
        """The network that [generalist] from names: a run's, one that save_classifier wrote, or a [model] with someone
        else's weights; where [extend] adds classes the old run's, with rows for them that are still to be learnt."""
        if self.run.old:
            return self._grown_old_generalist()
        given, head = self.config.generalist.init, self.config.generalist.head
        if not given:
            return None
        try:
            if head is not None:
                network = self.fresh_network()
                adopt_weights(network, given, head)
                return network.to(self.ranks.device)
            place = (
                Path(given) / "generalist" if (Path(given) / "generalist").is_dir() else Path(given)
            )
            if place.is_file():
                raise ValueError(
                    "is a file of weights; say what its last linear layer is called: generalist.head"
                )
            network = load_classifier(place, self.ranks.device, builders_of(self.config))
        except (OSError, ValueError) as mistake:
            raise UserError(f"generalist.from = {given}: {mistake}") from None
        if network.num_members > 1:
            raise UserError(
                f"generalist.from = {given} has {network.num_members} members; a generalist has one"
            )
        if network.spec.num_classes != self.num_classes:
            raise UserError(
                f"generalist.from = {given} knows {network.spec.num_classes} classes, the data has {self.num_classes}"
            )
        return network

    def _grown_old_generalist(self) -> Classifier:
        shape = tuple(self.shards("train").input_shape)
        try:
            network = load_classifier(
                self.run.old / "generalist", self.ranks.device, builders_of(self.config)
            )
            if network.spec.input.shape != shape:
                theirs = list(network.spec.input.shape)
                raise ValueError(
                    f"its generalist reads inputs of shape {theirs}, the data's are {list(shape)}"
                )
            return add_classes(network, self.class_names)
        except ValueError as mistake:
            raise UserError(f"extend.run = {self.run.old}: {mistake}") from None

    def old_classes(self) -> np.ndarray:
        """int64 [C_old]: the classes that the old run knows, in its order, by their numbers here."""
        spec = ModelSpec.load(self.run.old / "generalist" / "model.json")
        return np.array(match_classes(spec.class_names, self.class_names))

    def inherited_specialist(self, index: int) -> tuple[Classifier, dict]:
        """The old run's specialist among the classes of this one, and its summary: it costs nothing here."""
        place = self.run.old / "specialists" / f"{index:03d}"
        try:
            network = load_classifier(place, self.ranks.device, builders_of(self.config))
            network = remap_specialist(network, self.load(self.run.generalist))
            free = {
                "seconds": 0.0,
                "examples_seen": 0,
                "peak_memory_bytes": 0,
                "steps": 0,
                "taken_from": str(place),
            }
            return network, read_json(place / "summary.json") | free
        except (OSError, ValueError) as mistake:
            raise UserError(f"extend.run = {self.run.old}: {mistake}") from None

    def save(self, attempt: Attempt, network: Classifier, summary: dict) -> None:
        if self.ranks.is_main:
            save_classifier(network, attempt.directory)
            write_json(attempt.path("summary.json"), summary)

    def seed(self, purpose: str, index: int) -> int:
        """A seed of its own for each purpose, from the run's."""
        return int(digest([self.config.seed, purpose, index])[:8], 16) >> 1

    def barrier(self) -> None:
        dist.barrier()

    def publish_report(self, stage: Stage) -> None:
        for name in ("results.json", "report.html"):
            write_bytes(self.run.root / name, stage.path(name).read_bytes())

    def say(self, message: str, *values) -> None:
        """One line for whoever watches, from rank 0."""
        if self.ranks.is_main:
            log.info(message, *values)


def measuring_batch(num_classes: int) -> int:
    """Examples that are measured at a time: fewer of a huge label set, whose answers would fill the memory."""
    return max(1, min(MEASURING_BATCH, HELD // num_classes))


def user_builders(name: str) -> dict[str, Callable] | None:
    """A `module:function` of the config, imported; a loaded file never names code."""
    if ":" not in name or name.startswith("timm:"):
        return None
    from .data.decoding import import_function

    return {name: import_function(name, "model.name")}


def builders_of(config: Config) -> dict[str, Callable]:
    """The user's own builders that the config names, for the generalist and for students."""
    names = [
        config.model.name,
        *(student.model.get("name", "") for student in config.students.values()),
    ]
    return {
        key: function for name in names for key, function in (user_builders(name) or {}).items()
    }


def save_summary(attempt: Attempt, summary: dict) -> None:
    write_json(attempt.path("summary.json"), summary)


def read_summary(stage: Stage) -> dict:
    return read_json(stage.path("summary.json"))


def open_run(directory: str | Path, ranks: Ranks | None = None) -> RunDirectory:
    """The run that RUN/config.toml describes."""
    root = Path(directory)
    if not (root / "config.toml").exists():
        raise UserError(
            f"{root} is not a run: it has no config.toml; `referral prepare CONFIG --run {root}` makes one"
        )
    return RunDirectory(root, load_config(root / "config.toml"))


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
