"""Branches: corrections of the generalist's logits for each group, all of a job trained at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble import fit_temperature
from networks import Branch, Classifier, branch_off
from networks.stacked_branches import StackedBranches
from pipeline.config import UserError
from pipeline.store import Attempt, Stage

from ..core.branch_training import BranchBatch, BranchTask, BranchTrainer, branch_logits
from ..core.losses import dustbin_shift
from ..core.progress import Progress, cpu_seconds, peak_memory
from ..data.orders import ComputedOrder
from ..data.streams import balanced
from ..session import Session
from .features import KeptFeatures, kept_features
from .grouping import groups_of, skipped_groups
from .networks import load_network, save_network
from .specialist import own_examples, save_skipped, say_if_dropped
from .training import balanced_log_prior, branch_steps, loss_of
from .validate import referred_examples

CHUNK_BYTES = 2**26  # of features that are measured at a time


def branch(session: Session, stage: Stage, index: int) -> None:
    """One group's branch by itself."""
    branches(session, [stage])


def branches(session: Session, stages: Sequence[Stage]) -> None:
    """The branches of several groups in one training. Each gets its own directory and DONE."""
    skipped = skipped_groups(session)
    with ExitStack() as stack:
        attempts: dict[int, Attempt] = {}
        for stage in stages:
            attempt = stack.enter_context(session.attempt(stage))
            index = int(stage.address or 0)
            if index in skipped:
                save_skipped(session, attempt, index)
            else:
                attempts[index] = attempt
        if attempts:
            train_branches(session, attempts)


def train_branches(session: Session, attempts: dict[int, Attempt]) -> None:
    """Train, measure and save the branch of each group, by its number."""
    began, cpu_began = time.monotonic(), time.process_time()
    if session.ranks.is_main:
        for attempt in attempts.values():
            attempt.publish_growing("metrics.jsonl")
    generalist = load_network(session, session.run.generalist)
    kept = BranchFeatures(session, *(kept_features(session, split) for split in ("train", "val")))
    work = [
        BranchWork(
            session,
            generalist,
            kept,
            m,
            session.seed("specialist", m),
            attempt.stage.checkpoints,
            attempt.path("metrics.jsonl"),
        )
        for m, attempt in attempts.items()
    ]
    made = [fresh_branch(session, generalist, each) for each in work]
    schedule = session.config.specialists
    steps = branch_steps(schedule, own_counts(session))
    trainer = branch_trainer(session, generalist, kept, work, made, steps)
    earlier, cpu_earlier = trainer.progress[0].seconds, trainer.progress[0].cpu_seconds
    with session.ranks.watching():
        trainer.train()
    seconds = (earlier + time.monotonic() - began) / len(work)
    together = Progress(cpu_seconds=cpu_earlier + time.process_time() - cpu_began)
    cpu_s = cpu_seconds(together, session.ranks)
    for m, each in enumerate(work):
        network = trainer.trained(m)
        progress = trainer.progress[m]
        summary = {
            "seconds": round(seconds, 3),  # an equal share of the job's
            "cpu_seconds": None if cpu_s is None else round(cpu_s / len(work), 3),
            "examples_seen": trainer.step * schedule.batch_size,
            "peak_memory_bytes": peak_memory(session.ranks),
            "steps": trainer.step,
            "best_step": progress.best_step,
            "stopped_early": progress.stopped,
            "val": progress.val,
            "kind": "branch",
            "together": len(work),
            **each.notes,
            "temperature": each.validator.temperature(network),
        }
        say_if_dropped(session, each.index, progress.best_step)
        save_network(session, attempts[each.index], network, summary)


def branch_trainer(
    session: Session,
    generalist: Classifier,
    kept: BranchFeatures,
    work: Sequence[BranchWork],
    branches: Sequence[Branch],
    steps: int,
) -> BranchTrainer:
    """What trains `branches`, one for each of `work`, from where an earlier attempt stopped."""
    stacked = StackedBranches(branches).to(session.ranks.device)
    schedule = session.config.specialists
    return BranchTrainer(
        stacked,
        generalist.linear_head,
        [each.task() for each in work],
        BranchReader(session, kept.train, work, stacked.width),
        schedule,
        loss_of(schedule),
        steps,
        session.ranks,
    )


def fresh_branch(session: Session, generalist: Classifier, work: BranchWork) -> Branch:
    section = session.config.specialists
    torch.manual_seed(work.seed)
    try:
        return branch_off(generalist, work.classes, section.embedding, section.blocks)
    except ValueError as error:
        raise UserError(f"specialists: {error}") from None


def own_counts(session: Session) -> list[int]:
    """Training examples of each group that gets a branch."""
    counts, skipped = session.shards("train").class_counts, skipped_groups(session)
    return [
        int(counts[classes].sum())
        for m, classes in enumerate(groups_of(session).members)
        if m not in skipped
    ]


class BranchFeatures:
    """The features of both splits, opened once for all branches of a job.

    val_rows reads those of val: on a GPU they lie there once, not once for each branch.
    """

    def __init__(self, session: Session, train: KeptFeatures, val: KeptFeatures):
        self.train = train
        self.val = val
        self.val_rows = FeatureSource(self.val, session.ranks.device)


class BranchWork:
    """One group: what its batches are made of, how it is measured, where its training is kept.

    own, others: orders over the ids of train. Others is None where the group has every class.
    per_batch: of a batch's examples those of the group.
    """

    def __init__(
        self,
        session: Session,
        generalist: Classifier,
        kept: BranchFeatures,
        index: int,
        seed: int,
        checkpoints: Path,
        metrics: Path,
    ):
        schedule, train = session.config.specialists, session.shards("train")
        self.index = index
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.classes = groups_of(session).members[index]
        self.seed = seed
        in_group = np.isin(train.labels, self.classes)
        inside_ids = np.flatnonzero(in_group & kept.train.readable)
        excluded = np.flatnonzero(in_group | ~kept.train.for_others)
        has_others = len(excluded) < len(in_group)
        self.per_batch = own_examples(schedule, has_others)
        self.own = balanced(train.labels, self.seed, schedule.balance, inside_ids)
        self.others: ComputedOrder | None = None
        natural, shift = in_group.sum() / train.num_samples, 0.0
        if has_others:
            self.others = ComputedOrder(len(in_group), excluded, self.seed + 1)
            shift = dustbin_shift(natural, self.per_batch / schedule.batch_size)
        self.shift = shift
        self.log_prior = balanced_log_prior(train.class_counts[self.classes], schedule.balance)
        self.validator = BranchValidator(session, generalist.linear_head, kept, self.classes)
        self.notes = {
            "classes": len(self.classes),
            "natural_share": float(natural),
            "shift": shift,
        }

    def task(self) -> BranchTask:
        return BranchTask(
            self.seed,
            self.shift,
            self.log_prior.to(self.validator.device),
            self.validator,
            len(self.validator.ids),
            self.checkpoints,
            self.metrics,
        )

    def rows(
        self, first: int, steps: int, batch: int, labels: np.ndarray, views: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the kept arrays, columns of S or -1) of some steps, int64 [steps, B] both."""
        rows = np.empty((steps, batch), np.int64)
        columns = np.full_like(rows, -1)
        parts = [(self.own, slice(0, self.per_batch)), (self.others, slice(self.per_batch, batch))]
        for order, part in parts:
            if order is None:
                continue
            count = part.stop - part.start
            positions = np.arange(first * count, (first + steps) * count)
            ids = order(positions)
            # One epoch of an order is of one view, as a stream of fixed views has it.
            seen = ids * views + positions // len(order) % views
            rows[:, part] = seen.reshape(steps, count)
            if order is self.own:
                own = columns_of(labels[ids], self.classes, -1)
                columns[:, part] = own.reshape(steps, count)
        return rows, columns


class BranchReader:
    """step -> BranchBatch of every branch, a pure function.

    What is read is looked up for AHEAD steps at once.
    """

    AHEAD = 8

    def __init__(
        self, session: Session, kept: KeptFeatures, work: Sequence[BranchWork], width: int
    ):
        self.work = work
        self.width = width
        self.device = session.ranks.device
        self.batch = session.config.specialists.batch_size
        self.labels = session.shards("train").labels
        self.kept = kept
        self.source = FeatureSource(self.kept, self.device)
        self._block = -1
        self._rows = self._targets = np.zeros((0, 0, 0), np.int64)

    def __call__(self, step: int) -> BranchBatch:
        block, turn = divmod(step, self.AHEAD)
        if block != self._block:
            self._look_up(block)
        at_cut, general, total = self.source.rows(self._rows[:, turn])
        targets = torch.from_numpy(self._targets[:, turn].copy()).to(self.device)
        return BranchBatch(at_cut, general, total, targets)

    def _look_up(self, block: int) -> None:
        """The rows and targets of a block of steps, [M, AHEAD, B] both."""
        first, views = block * self.AHEAD, self.kept.views
        found = [each.rows(first, self.AHEAD, self.batch, self.labels, views) for each in self.work]
        self._rows = np.stack([rows for rows, _ in found])
        columns = np.stack([columns for _, columns in found])
        self._targets = np.where(columns < 0, self.width, columns)
        self._block = block


def columns_of(labels: np.ndarray, classes: np.ndarray, dustbin: int) -> np.ndarray:
    """The column of each label among sorted `classes`. `dustbin` for one that is not there."""
    places = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    return np.where(classes[places] == labels, places, dustbin)


class FeatureSource:
    """Rows of kept features as tensors. On a GPU that has room for them all they stay there."""

    def __init__(self, kept: KeptFeatures, device: torch.device):
        self.device = device
        size = sum(array.nbytes for array in (kept.at_cut, kept.general, kept.total))
        resident = device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]

        def source(array: np.ndarray) -> np.ndarray | Tensor:
            return torch.from_numpy(np.array(array)).to(device) if resident else array

        self.same = kept.general is kept.at_cut
        self.rows_of = kept.rows_of
        self.at_cut = source(kept.at_cut)
        self.general = self.at_cut if self.same else source(kept.general)
        self.total = source(kept.total)

    def rows(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(at_cut, general, total), each with the leading axes of `rows`, id * V + view."""
        rows = self.rows_of(rows)
        at_cut = self._take(self.at_cut, rows)
        general = at_cut if self.same else self._take(self.general, rows)
        return at_cut, general, self._take(self.total, rows)

    def _take(self, source: np.ndarray | Tensor, rows: np.ndarray) -> Tensor:
        if isinstance(source, Tensor):
            return source[torch.from_numpy(rows).to(self.device)]
        return torch.from_numpy(source[rows]).to(self.device)


class BranchValidator:
    """A branch on the val examples that the generalist refers to it, at natural frequencies."""

    def __init__(
        self, session: Session, head: nn.Linear, kept: BranchFeatures, classes: np.ndarray
    ):
        self.head = head
        self.device = session.ranks.device
        ids = referred_examples(session, classes)
        self.ids = ids[kept.val.readable[ids]]
        labels = session.shards("val").labels[self.ids]
        self.targets = torch.from_numpy(columns_of(labels, classes, len(classes)))
        self.source = kept.val_rows
        row_bytes = max(1, kept.val.at_cut[:1].nbytes)
        self.chunk = max(1, CHUNK_BYTES // row_bytes)

    def logits(self, branch: Branch) -> Tensor:
        """[n, |S| + 1], on the CPU."""
        parts = []
        for start in range(0, len(self.ids), self.chunk):
            rows = self.source.rows(self.ids[start : start + self.chunk])
            parts.append(branch_logits(branch, self.head, *rows).cpu())
        return torch.cat(parts)

    def __call__(self, branch: Branch) -> dict[str, float]:
        """{"loss": nats, "top1"}"""
        logits = self.logits(branch)
        return {
            "loss": float(F.cross_entropy(logits, self.targets)),
            "top1": float((logits.argmax(1) == self.targets).float().mean()),
        }

    def temperature(self, branch: Branch) -> float:
        """The temperature that fits these examples best."""
        return fit_temperature(self.logits(branch), self.targets)
