"""Stored soft targets: per sample (and view) the teacher's most probable classes.

A teacher that always sees an input alike predicts it once.  Kept are as many classes as hold
`students.NAME.answers_mass` of its prediction at the student's temperature, their
log-probabilities, and the mass of the rest.  That is taken to be even over the other classes, at
any temperature.  What that loses is measured: the KL from the whole prediction to what is kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble.listed import Listed
from ensemble.listed_ensemble import Wanted
from pipeline.config import ResolvedStudent, UserError
from pipeline.identity import digest
from pipeline.store import Attempt, Stage, read_json, write_json

from ..core.distillation import TopKTargets
from ..core.perturbations import mix_bags
from ..core.probabilities import safe_log, soften
from ..data.augment import Augment, Views
from ..data.ragged import PROGRESS, RaggedWriter, flattened, starts_of, write_entries
from ..data.shards import ShardSet
from ..data.streams import Batch
from ..distributed.ranks import broadcast
from ..session import Session, measuring_batch
from .stored_targets import SCHEMA, VALUE, Stored, entry_dtypes, open_targets, restored
from .teachers import Teacher, find_teacher

LEAST = 32  # classes per stored prediction, where there are as many
MEASURED = 4096  # rows of a split whose KL is measured
FAR = 0.1  # nats: what is kept is no longer what the teacher predicts
ASKED = 1024  # inputs of a split about which a teacher's entropy is measured
KNOWN = 0.5  # of val's entropy: with less on what the student sees a teacher has memorised it
UNSURE = 0.1  # nats of entropy that are worth a word
NUMBERS_COMPARED = 2**24  # of predictions that are compared with what is kept of them
BLOCK_BYTES = 2**26  # of answers on their way to the disk
ENTRIES = ("indices", "log_values")  # what is stored of each class


@dataclass(frozen=True)
class Keeping:
    """How much of each prediction is kept.

    mass: of the prediction at `temperature`.  most: classes of a row.
    """

    mass: float
    temperature: float
    most: int

    def of(self, probabilities: Tensor) -> TopKTargets:
        """[K, B, C] -> what is kept of it, [B, K, ...]."""
        log_p = safe_log(probabilities).transpose(0, 1)
        return TopKTargets.holding(log_p, self.mass, self.temperature, LEAST, self.most)

    @property
    def wanted(self) -> Wanted:
        """What is read of a prediction that lists some classes."""
        powers = {1.0, *([] if math.isinf(self.temperature) else [1 / self.temperature])}
        return Wanted(self.most, tuple(sorted(powers)), moments=True)

    def of_listed(self, q: Listed) -> TopKTargets:
        """What is kept of one prediction, [B, 1, ...]."""
        kept = TopKTargets.holding_listed(q, self.mass, self.temperature, LEAST, self.most)
        counts = None if kept.counts is None else kept.counts[:, None]
        return TopKTargets(
            kept.indices[:, None],
            kept.log_values[:, None],
            kept.log_tail[:, None],
            kept.num_classes,
            counts,
        )


def targets(session: Session, stage: Stage, name: str) -> None:
    """A teacher's predictions of what is always seen alike, once for all its students."""
    readers = [
        student
        for key, student in session.config.students.items()
        if (of_student := session.run.targets_for(key)) and of_student.place == stage.place
    ]
    student = readers[0]
    with session.attempt(stage) as attempt:
        store_targets(
            session,
            find_teacher(session, student),
            attempt,
            student,
            [reader.temperature for reader in readers],
        )


def views_of(session: Session, count: int | None) -> Views | None:
    return None if count is None else Views(count, session.seed("views", 0))


def most_classes(num_classes: int, rows: int, allowed: int, name: str) -> int:
    """How many classes a row may keep for all rows to take at most `allowed` bytes.

    rows: samples x views x members.  Raises UserError where that is not LEAST.
    """
    of_class = sum(dtype.itemsize for dtype in entry_dtypes(num_classes).values())
    most = min(num_classes, allowed // max(1, rows) // of_class)
    if most < min(LEAST, num_classes):
        needed = rows * of_class * min(LEAST, num_classes)
        raise UserError(
            f"targets/{name}: {LEAST} classes of {rows:,} predictions take {needed:,} bytes, "
            f'answers_bytes = {allowed:,} allows less: raise it, or set answers = "live"'
        )
    return most


# Writing


def store_targets(
    session: Session,
    teacher: Teacher,
    attempt: Attempt,
    student: ResolvedStudent,
    temperatures: Sequence[float],
) -> None:
    """What the teacher predicts for train and transfer: SPLIT/ of a RaggedWriter, and of its rows

        log_tail    float16, log of the mass that is not kept

    Row (id * views + view) * members + member.  answers.json says of what: the shards'
    fingerprint, the views' seed, and what was lost by keeping some classes: the mean
    KL(prediction || what is kept of it), nats, at each of `temperatures`.
    """
    splits = ["train"]
    if session.config.data.transfer:
        splits.append("transfer")
    unfinished = attempt.unfinished("targets")
    if session.ranks.is_main:
        attempt.take_over("targets")
    written = []
    for source, split in enumerate(splits):
        storing = Storing(session, teacher, attempt.stage, student, temperatures, source, split)
        directory = unfinished / f"{split}-{storing.identity[:8]}"
        written.append((split, directory, storing.write(directory)))
    certainty = {"seen": written[0][2].pop("entropy"), "val": val_entropy(session, teacher)}
    for split, directory, notes in written:
        if session.ranks.is_main:
            publish(directory, attempt.path(f"{split}/answers.json").parent)
            write_json(attempt.path(f"{split}/answers.json"), notes | {"entropy": certainty})
            say_targets(session, split, notes)
    if session.ranks.is_main:
        attempt.drop_unfinished("targets")


class OwnEntries:
    """The classes that this rank keeps of a block, until it is known where they belong."""

    def __init__(self, members: int):
        self.members = members
        self._parts: list[dict[str, np.ndarray]] = []

    def take(self, ids: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch. kept: as in Storing._padded.  Returns what every rank is to know of it."""
        arrays = {name: value.cpu().numpy() for name, value in kept.items()}
        counts = arrays["counts"].reshape(-1)
        part = {name: flattened(arrays[name].reshape(len(counts), -1), counts) for name in ENTRIES}
        self._parts.append(part | {"ids": ids.cpu().numpy()})
        return {"log_tail": kept["log_tail"], "counts": kept["counts"]}

    def write(
        self,
        directory: Path,
        dtypes: Mapping[str, np.dtype],
        first: int,
        values: dict[str, np.ndarray],
    ) -> None:
        """Write them.  first: the block's first entry.  values: "ids" and "counts" of all ranks."""
        if not self._parts:
            return
        own = {name: np.concatenate([p[name] for p in self._parts]) for name in self._parts[0]}
        here = np.searchsorted(values["ids"], own.pop("ids"))
        starts = starts_of(first, values["counts"].reshape(-1)).reshape(-1, self.members)[here]
        counts = values["counts"][here]
        write_entries(directory, dtypes, starts.reshape(-1), counts.reshape(-1), own)


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several answers one after the other, padded to the longest row."""
    width = max(part["indices"].shape[-1] for part in parts)
    rows = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in ENTRIES:
            padding = -math.inf if name == "log_values" else 0
            pieces = [F.pad(each, (0, width - each.shape[-1]), value=padding) for each in pieces]
        rows[name] = torch.cat(pieces)
    return rows


class Storing:
    """The predictions of one split, block by block."""

    def __init__(
        self,
        session: Session,
        teacher: Teacher,
        stage: Stage,
        student: ResolvedStudent,
        temperatures: Sequence[float],
        source: int,
        split: str,
    ):
        self.session = session
        self.teacher = teacher
        self.source = source
        self.shards: ShardSet = session.shards(split)
        self.augment = session.run.augment_of(student)
        self.augmentation = session.augmentation(student)
        self.views = views_of(session, student.views)
        self.count = self.views.count if self.views else 1
        self.members = teacher.num_members
        self.rows = len(self.shards) * self.count * self.members
        classes = session.num_classes
        most = most_classes(classes, self.rows, student.answers_bytes, str(stage.address))
        self.keeping = Keeping(student.answers_mass, max(temperatures), most)
        self.temperatures = sorted({1.0, *temperatures} - {math.inf})
        self.every = max(1, len(self.shards) * self.count // MEASURED)
        self.entries = entry_dtypes(classes)

    @property
    def identity(self) -> str:
        """What another attempt must agree in to go on with what this one has written."""
        return digest([asdict(self.keeping), self.temperatures, self.rows])

    def write(self, directory: Path) -> dict:
        """Write DIRECTORY from where an earlier attempt stopped. Returns what answers.json says."""
        session, main = self.session, self.session.ranks.is_main
        numbers = {"log_tail": VALUE}
        writer = RaggedWriter(directory, self.rows, self.entries, numbers) if main else None
        progress = self._begun(writer)
        for view, ids in self._blocks(progress["blocks"]):
            own = OwnEntries(self.members)
            measure = self._measure(view, own)
            values = session.measured(self.shards, measure, ids=ids, rows=self.teacher.rows)
            own.write(directory, self.entries, progress["entries"], values)
            session.barrier()
            progress = self._with_block(progress, values)
            if writer is not None:
                self._append(writer, values["ids"] * self.count + view, values, progress)
        if writer is not None:
            writer.finish()
        return self._notes(progress)

    def _blocks(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(view, ids) of each block that is not written yet."""
        of_sample = self.members * self.keeping.most * 6
        batch = measuring_batch(self.session.num_classes)
        size = max(1, BLOCK_BYTES // of_sample // batch) * batch
        starts = range(0, len(self.shards), size)
        blocks = [(view, start) for view in range(self.count) for start in starts]
        for view, start in blocks[first:]:
            yield view, np.arange(start, min(start + size, len(self.shards)))

    def _begun(self, writer: RaggedWriter | None) -> dict:
        """What an earlier attempt has written, as rank 0 found it: the sums of `_with_block`."""
        started = {"blocks": 0, "entries": 0, "samples": 0, "measured": 0}
        started |= {"tail": 0.0, "max_tail": 0.0}
        started |= {"kept": 0, "entropy": 0.0, "lost": [0.0] * len(self.temperatures)}
        found = writer.progress if writer is not None else None
        found = broadcast(found, self.session.ranks)
        assert found is not None, "rank 0 has a writer"
        return started | found

    def _measure(self, view: int, own: OwnEntries) -> Callable[[Batch], dict[str, Tensor]]:
        """A function batch -> what is kept of the teacher's predictions, and what that loses.

        The classes and their probabilities stay here, in `own`.
        """
        see = view_of(self.augmentation, self.views, self.source, view)
        if self.teacher.listed is not None:
            return partial(self._measure_listed, self.teacher.listed, see, view, own)

        def measure(batch: Batch) -> dict[str, Tensor]:
            predicted = self.teacher.predict(see(batch))
            kept = self.keeping.of(predicted)
            at_host = (batch.ids * self.count + view) % self.every == 0
            sampled = at_host.to(batch.labels.device)
            lost = torch.full((len(batch), len(self.temperatures)), math.nan)
            lost[at_host] = self._lost(predicted, kept, sampled).cpu()
            values = own.take(batch.ids, self._padded(kept))
            return values | {"lost": lost, "entropy": entropies(predicted)}

        return measure

    def _measure_listed(
        self,
        ask: Callable[[Tensor, Wanted], Iterator[Listed]],
        see: Callable[[Batch], Tensor],
        view: int,
        own: OwnEntries,
        batch: Batch,
    ) -> dict[str, Tensor]:
        """Like _measure, for a teacher whose predictions list some classes."""
        raw = see(batch)
        parts = [
            self._padded(self.keeping.of_listed(q)) | {"entropy": q.entropy().float()}
            for q in ask(raw, self.keeping.wanted)
        ]
        values = joined(parts)
        entropy = values.pop("entropy")
        lost = torch.full((len(batch), len(self.temperatures)), math.nan)
        sampled = ((batch.ids * self.count + view) % self.every == 0).nonzero()[:, 0]
        for at_host in sampled.split(rows_at_once(self.session.num_classes)):
            rows = at_host.to(raw.device)
            stored = {name: values[name][rows] for name in Stored._fields}
            lost[at_host] = self._lost_of(self.teacher.predict(raw[rows]), stored).cpu()
        return own.take(batch.ids, values) | {"lost": lost, "entropy": entropy}

    def _padded(self, kept: TopKTargets) -> dict[str, Tensor]:
        """[b, K, k] and [b, K], in the types in which they are stored."""
        counts = kept.counts
        if counts is None:
            counts = torch.full_like(kept.indices[..., 0], kept.indices.shape[-1])
        return {
            "indices": kept.indices.int(),
            "log_values": kept.log_values.half(),
            "log_tail": kept.log_tail.half(),
            "counts": counts.int(),
        }

    def _lost(self, predicted: Tensor, kept: TopKTargets, sampled: Tensor) -> Tensor:
        """Mean KL over the members of the sampled rows at each temperature, [rows, T]."""
        padded = self._padded(kept)
        stored = {name: padded[name][sampled] for name in Stored._fields}
        return self._lost_of(predicted[:, sampled], stored)

    def _lost_of(self, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """p: [K, rows, C].  kept: as in Stored."""
        stored = Stored(*(kept[name].cpu().numpy() for name in Stored._fields))
        q = restored(stored, self.session.num_classes, p.device).spread()
        return torch.stack([mean_kl(soften(p, T), soften(q, T)) for T in self.temperatures], 1)

    def _append(
        self, writer: RaggedWriter, rows: np.ndarray, values: dict[str, np.ndarray], notes: dict
    ) -> None:
        """Samples of a block whose entries are written, [n, K], as rows of their members."""
        of_members = rows[:, None] * self.members + np.arange(self.members)
        tail = {"log_tail": values["log_tail"].reshape(-1)}
        own = {key: value for key, value in notes.items() if key not in ("blocks", "entries")}
        writer.append(of_members.reshape(-1), values["counts"].reshape(-1), tail, **own)

    def _with_block(self, progress: dict, values: dict[str, np.ndarray]) -> dict:
        """The sums of what answers.json says, with one block more."""
        tails = np.exp(values["log_tail"].astype(np.float64))
        measured = values["lost"][~np.isnan(values["lost"][:, 0])]
        lost = measured.sum(0, dtype=np.float64) + progress["lost"]
        kept = int(values["counts"].sum(dtype=np.int64))
        return progress | {
            "entries": progress["entries"] + kept,
            "samples": progress["samples"] + len(values["ids"]),
            "kept": progress["kept"] + kept,
            "tail": progress["tail"] + float(tails.sum()),
            "max_tail": max(progress["max_tail"], float(tails.max())),
            "measured": progress["measured"] + len(measured),
            "lost": lost.tolist(),
            "entropy": progress["entropy"] + float(values["entropy"].sum(dtype=np.float64)),
        }

    def _notes(self, progress: dict) -> dict:
        """What answers.json says."""
        stored = progress["samples"] * self.members
        of_entries = progress["kept"] * sum(dtype.itemsize for dtype in self.entries.values())
        of_rows = self.rows * (8 + 4 + VALUE.itemsize)
        lost = np.array(progress["lost"]) / max(1, progress["measured"])
        return {
            "schema": SCHEMA,
            "num_classes": self.session.num_classes,
            "members": self.members,
            "mass": self.keeping.mass,
            "temperature": finite(self.keeping.temperature),
            "most": self.keeping.most,
            "mean_classes": progress["kept"] / stored,
            "samples": progress["samples"] // self.count,
            "fingerprint": self.shards.fingerprint,
            "mean_tail": progress["tail"] / stored,
            "max_tail": progress["max_tail"],
            "bytes_per_sample": (of_entries + of_rows) / len(self.shards),
            "truncation_kl": {
                f"{T:g}": float(value) for T, value in zip(self.temperatures, lost, strict=True)
            },
            "measured": progress["measured"],
            "entropy": progress["entropy"] / max(1, progress["samples"]),
            "augment": self.augment,
            "views": self.views.count if self.views else None,
            "views_seed": self.views.seed if self.views else None,
        }


def publish(source: Path, target: Path) -> None:
    """Move a split's finished files into the attempt's directory."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name != PROGRESS:
            os.replace(path, target / path.name)


def view_of(
    augmentation: Augment | None, views: Views | None, source: int, view: int
) -> Callable[[Batch], Tensor]:
    """A function batch -> its inputs as the teacher sees them in this view."""
    if augmentation is None or views is None:
        return lambda batch: batch.inputs

    def see(batch: Batch) -> Tensor:
        ids = batch.ids.numpy()
        same = np.full_like(ids, view)
        uniforms = views.uniforms(source, ids, same, augmentation.numbers)
        seen = augmentation(batch.inputs.cpu().numpy(), uniforms)
        return torch.from_numpy(seen).to(batch.inputs.device, non_blocking=True)

    return see


def mean_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of [K, B, C] twice, mean over K: [B], nats."""
    tiny = torch.finfo(q.dtype).tiny
    return (torch.special.xlogy(p, p) - p * q.clamp_min(tiny).log()).sum(-1).mean(0)


def entropies(p: Tensor) -> Tensor:
    """Entropies of [K, B, C], mean over K: [B], nats."""
    return -torch.special.xlogy(p, p).sum(-1).mean(0)


def entropy_of(teacher: Teacher, raw: Tensor) -> Tensor:
    """The entropy of a teacher's predictions, mean over its members: [B], nats."""
    if teacher.listed is None:
        return entropies(teacher.predict(raw))
    parts = teacher.listed(raw, Wanted(1, (1.0,), moments=True))
    return torch.cat([q.entropy().float() for q in parts])


def rows_at_once(num_classes: int) -> int:
    """Predictions [rows, C] that are held together with what is compared with them."""
    return max(1, NUMBERS_COMPARED // num_classes)


def finite(temperature: float) -> float | str:
    """As in JSON."""
    return "inf" if math.isinf(temperature) else temperature


def say_targets(session: Session, split: str, notes: dict) -> None:
    kl = ", ".join(f"{value:.2g} at T = {T}" for T, value in notes["truncation_kl"].items())
    session.say(
        "stored targets on %s: %.4g of %d classes a row, %.0f bytes a sample, mean mass left out "
        "%.2g; KL from the whole prediction %s",
        split,
        notes["mean_classes"],
        notes["num_classes"],
        notes["bytes_per_sample"],
        notes["mean_tail"],
        kl,
    )
    for T, lost in notes["truncation_kl"].items():
        session.say_each(warnings(notes["num_classes"], float(T), lost))


def warnings(num_classes: int, temperature: float, lost: float) -> list[str]:
    """A line where what is kept is FAR from the whole prediction at a temperature.

    lost: the KL between them, nats.  A temperature raises what is rare: an even tail of 1e-3 over
    3,000 classes holds .63 of all at T = 2.
    """
    if lost <= FAR:
        return []
    return [
        f"warning: at T = {temperature:g} what is kept of the {num_classes:,} classes is "
        f"{lost:.2g} nats from what the teacher predicts, and students learn what is kept: set "
        'students.NAME.answers = "live", or store more (answers_mass, answers_bytes)'
    ]


# What a student is told


def answers_summary(session: Session, name: str) -> dict | None:
    """How a student's teacher answers, for its summary.json. A word where that teaches little.

    kind: live or stored.  entropy: the mean one of its answers, nats, about what the student sees
    ("seen") and about val.  Of stored ones kl, nats: from the teacher's whole prediction to what is
    kept, at the student's temperature. None at inf.  None for a student without a teacher.
    """
    student = session.config.students[name]
    if not student.learns_from_teacher:
        return None
    stage = session.run.targets_for(name)
    # Networks are drawn before they are read. The random state of the training is left alone.
    with torch.random.fork_rng():
        if stage is None:
            summary = live_summary(session, name)
        else:
            summary = stored_summary(session, name, stage)
    session.say_each(known_by_heart(summary.get("entropy")))
    return summary


def stored_summary(session: Session, name: str, stage: Stage) -> dict:
    notes = read_json(stage.path("train/answers.json"))
    temperature = session.config.students[name].temperature
    lost = None
    if not math.isinf(temperature):
        lost = notes["truncation_kl"].get(f"{temperature:g}")
        if lost is None:  # stored before this student was thought of
            lost = measured_kl(session, name, stage)
        session.say_each(warnings(session.num_classes, temperature, lost))
    summary = {
        "kind": "stored",
        "temperature": finite(temperature),
        "kl": lost,
        "bytes_per_sample": notes["bytes_per_sample"],
    }
    if "entropy" in notes:
        summary["entropy"] = notes["entropy"]
    return summary


def live_summary(session: Session, name: str) -> dict:
    student = session.config.students[name]
    if student.perturb not in ("none", "mix_bags"):  # the others need a gradient
        return {"kind": "live"}
    teacher = find_teacher(session, student)
    see = view_of(session.augmentation(student), views_of(session, 1), 0, 0)
    mix = student.perturb == "mix_bags"
    draw = torch.Generator().manual_seed(session.seed("mixed", 0))

    def seen(batch: Batch) -> Tensor:
        bags = see(batch)
        return mix_bags(bags, student.perturb_share, draw) if mix else bags

    entropy = {
        "seen": mean_entropy(session, teacher, "train", seen),
        "val": val_entropy(session, teacher),
    }
    return {"kind": "live", "entropy": entropy}


def mean_entropy(
    session: Session, teacher: Teacher, split: str, see: Callable[[Batch], Tensor]
) -> float:
    """Mean entropy of a teacher's predictions for about ASKED inputs of a split, nats."""
    shards = session.shards(split)
    ids = np.arange(0, len(shards), max(1, len(shards) // ASKED))
    values = session.measured(
        shards,
        lambda batch: {"entropy": entropy_of(teacher, see(batch))},
        ids=ids,
        rows=teacher.rows,
    )
    return float(values["entropy"].mean(dtype=np.float64))


def val_entropy(session: Session, teacher: Teacher) -> float:
    return mean_entropy(session, teacher, "val", lambda batch: batch.inputs)


def known_by_heart(entropy: dict[str, float] | None) -> list[str]:
    """A line where a teacher is far surer of what the student sees than of val.

    entropy: of `answers_summary`.
    """
    if entropy is None:
        return []
    seen, val = entropy["seen"], entropy["val"]
    if seen > KNOWN * val or val - seen < UNSURE:
        return []
    return [
        f"warning: the teacher has memorised train: its predictions have an entropy of {seen:.2g} "
        f"nats about what the student sees and {val:.2g} about val, so they say little more than "
        "labels; ask it about other inputs (students.NAME.augment, for bags augment_share and "
        'perturb = "mix_bags"; data.transfer)'
    ]


def measured_kl(session: Session, name: str, stage: Stage) -> float:
    """The mean KL, nats, from a teacher's predictions to what a stage keeps of them.

    At the temperature of the student `name`, on about MEASURED inputs of train, in their first
    view.
    """
    student = session.config.students[name]
    teacher, shards = find_teacher(session, student), session.shards("train")
    views = views_of(session, student.views)
    see = view_of(session.augmentation(student), views, 0, 0)
    read = open_targets(stage.path("train"), session, shards, views)
    count, T = views.count if views else 1, student.temperature

    def measure(batch: Batch) -> dict[str, Tensor]:
        rows = batch.ids.numpy() * count
        kept = restored(read(rows), session.num_classes, batch.labels.device)
        p, q = teacher.predict(see(batch)), kept.spread()
        return {"lost": mean_kl(soften(p, T), soften(q, T))}

    ids = np.arange(0, len(shards), max(1, len(shards) // MEASURED))
    rows = min(measuring_batch(session.num_classes), rows_at_once(session.num_classes))
    values = session.measured(shards, measure, ids=ids, rows=rows)
    return float(values["lost"].mean(dtype=np.float64))
