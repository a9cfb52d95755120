"""Re-rankers: networks that learn which class of the generalist's shortlist is the label.

    N  samples of a split
    k  classes of a shortlist

The shortlists are found once, of every input as it is, and kept in SPLIT/classes.npy, int32 [N, k],
likeliest first.  A step of a re-ranker's then costs k rows of its head for each example, and some
drawn ones for the batch.  These make its loss the whole softmax's on average whatever is on the
lists (networks.candidates), so that lists need not be those of the augmented views that it sees,
nor of a generalist that has not memorised its training data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from networks import Classifier, lazy_logits, top_k
from networks.row_head import RowHead
from pipeline.config import ResolvedRerank, UserError
from pipeline.store import Stage

from ..core.loop import TrainingTask
from ..core.objectives import rerank
from ..data.augment import Views
from ..data.kept_arrays import kept_npy
from ..data.streams import Batch
from ..engines.sharded import DistributedComm
from ..session import Session
from .features import KeptWriter, keep
from .networks import fresh_network, load_network, save_network
from .stored_targets import to_device
from .training import count_steps, labelled_stream, log_prior_of, train_network

SPLITS = ("train", "val")
CLASSES = "classes"


def shortlists(session: Session, stage: Stage) -> None:
    """The generalist's k likeliest classes of every example of train and val."""
    with session.attempt(stage) as attempt:
        generalist = load_network(session, session.run.generalist)
        k = session.config.rerank.k
        writers = {split: ShortlistWriter(session, generalist, split, k) for split in SPLITS}
        check_size(session.config.rerank, sum(writer.bytes for writer in writers.values()))
        keep(session, attempt, writers, say_shortlists)


def say_shortlists(session: Session, notes: dict[str, dict]) -> None:
    session.say(
        "shortlists of %d classes of %d examples; the generalist is right on %.1f %% of train "
        "and %.1f %% of val",
        session.config.rerank.k,
        notes["train"]["samples"],
        *(100 * notes[split]["top1"] for split in SPLITS),
    )


class ShortlistWriter(KeptWriter):
    """The shortlists of one split."""

    def __init__(self, session: Session, generalist: Classifier, split: str, k: int):
        shapes = {CLASSES: ((k,), np.dtype(np.int32))}
        super().__init__(session, generalist, split, Views(1, 0), shapes)
        self.k = k

    def measure_view(self, view: int) -> Callable[[Batch], dict[str, Tensor]]:
        def measure(batch: Batch) -> dict[str, Tensor]:
            _, classes = top_k(self.generalist(batch.inputs), self.k)
            return {CLASSES: classes.int(), "correct": classes[:, 0] == batch.labels}

        return measure


def shortlist_bytes(k: int, examples: int) -> int:
    return 4 * k * examples


def check_size(section: ResolvedRerank, needed: int) -> None:
    """Raises UserError where all shortlists take more than they may."""
    if needed > section.shortlists_bytes:
        raise UserError(
            f"the shortlists that re-rankers learn from take {needed:,} bytes, "
            f"rerank.shortlists_bytes = {section.shortlists_bytes:,} allows less: raise it, or "
            "lower rerank.k"
        )


def kept_shortlists(session: Session, split: str) -> Callable[[Batch], Tensor]:
    """A function batch of a split -> int64 [b, k], as the finished stage kept them."""
    directory: Path = session.run.shortlists.path(split)
    classes = kept_npy(directory / f"{CLASSES}.npy", "iu", (None, None))

    def read(batch: Batch) -> Tensor:
        rows = classes[batch.ids.numpy()].astype(np.int64)
        return to_device(rows, batch.labels.device)

    return read


def reranker(session: Session, stage: Stage, index: int) -> None:
    """One network more, which learns each label against its example's shortlist."""
    with session.attempt(stage) as attempt:
        network = start_of_reranker(session, session.seed("member", index))
        task = reranker_task(session, network, session.seed("member", index))
        network, summary = train_network(session, attempt, task)
        save_network(session, attempt, network, summary)


def start_of_reranker(session: Session, seed: int) -> Classifier:
    """A fresh network, or the generalist's."""
    section = session.config.rerank
    if section.start == "generalist":
        return load_network(session, session.run.generalist)
    return fresh_network(session, section, seed)


def by_rows(network: Classifier) -> RowHead:
    """Replace a network's plain head by one that learns by rows. It shares its memory.

    UserError for a network that has nothing else to learn.
    """
    if not any(parameter.requires_grad for parameter in network.trunk.parameters()):
        raise UserError(
            "rerank: the network has no weights but its head's; give it some, say with "
            "rerank.model = { embedding = 64 }"
        )
    network.head = RowHead(network.linear_head)
    return network.head


def reranker_task(session: Session, network: Classifier, seed: int) -> TrainingTask:
    """Tell the classes of each shortlist apart.  seed: of the stream."""
    schedule = session.config.rerank
    stream = labelled_stream(session, schedule, seed)
    objective = rerank(
        kept_shortlists(session, "train"),
        schedule.random,
        session.num_classes,
        comm=lambda batch: DistributedComm(bounds=()).of(batch.labels, even=True),
        head=by_rows(network),
        log_prior=log_prior_of(session, schedule),
    )
    steps = count_steps(schedule, session.shards("train").num_samples)
    validate = validate_reranker(session)
    workers = session.workers
    return TrainingTask(network, objective, stream, schedule, steps, validate, workers)


def validate_reranker(session: Session) -> Callable[[nn.Module], dict[str, float]]:
    """A function network -> {"loss", "top1"} of val, asked about each example's shortlist alone.

    loss: nats, where the label is on the list. Log k where it never is.  top1: of all examples. A
    label that is not on the list cannot be found.
    """
    shards, read = session.shards("val"), kept_shortlists(session, "val")

    def validate(network: nn.Module) -> dict[str, float]:
        assert isinstance(network, Classifier)
        network.eval()

        def measure(batch: Batch) -> dict[str, Tensor]:
            classes = read(batch)
            z = lazy_logits(network, batch.inputs).logits_at(classes).float()
            hits = classes == batch.labels[:, None]
            of_label = (z.log_softmax(1) * hits).sum(1)
            found = hits.gather(1, z.argmax(1, keepdim=True))[:, 0]
            return {"loss": -of_label, "listed": hits.any(1), "found": found}

        values = session.measured(shards, measure)
        losses = values["loss"][values["listed"]]
        loss = math.log(session.config.rerank.k)
        if len(losses):
            loss = float(losses.mean(dtype=np.float64))
        return {"loss": loss, "top1": float(values["found"].mean())}

    return validate
