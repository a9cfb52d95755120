"""Account for every sample: at the end of each epoch it was either seen or found corrupt.

data.damage = strict stops at the first corrupt sample.  Under skip, the lost samples of all ranks
and stages are put together here, reported, and bounded by data.damage_share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.config import UserError
from pipeline.corruption import count, example

from .opening import check_share
from .shards import ShardSet
from .streams import Batch, Lost, TrainingStream

Gather = Callable[[Any], list]  # a rank's value -> every rank's, collective

log = logging.getLogger("referral")


class LostSamples:
    """The lost samples that one process knows of, by split.

    splits: a record as in trainer.data.corruption.
    """

    def __init__(self):
        self.splits: dict[str, dict] = {}

    def add(self, shards: ShardSet, lost: dict[int, str]) -> None:
        """Add what opening `shards` left out, and `lost` ({id: reason}).

        Raises UserError if all together exceed data.damage_share.
        """
        total = len(shards) + shards.lost
        split = self.splits.setdefault(shards.split, {"samples": total, "where": {}})
        for item in shards.corruption:
            split["where"][f"{item.shard}: {item.member}"] = [item.reason, item.samples]
        for sample, reason in lost.items():
            split["where"][shards.where(sample)] = [reason, 1]
        if split["where"]:
            check_share(count(split), split["samples"], shards.data, example(split))


class EpochAccounting:
    """One rank's account of a training stream.

    An epoch of a source is a pass over its order.  At its end the account is closed together with
    the other ranks'.

    Parameters
    ----------
    stream : TrainingStream
    first_step : int
        The first step to be entered. It may lie in the middle of an epoch.
    rank, world_size : int
    lost : iterable of (source, id, reason)
        What earlier attempts met, from a checkpoint.
    """

    def __init__(
        self,
        stream: TrainingStream,
        first_step: int,
        rank: int = 0,
        world_size: int = 1,
        lost: Iterable[Lost] = (),
    ):
        self.stream = stream
        self.step = first_step
        self.rank, self.world_size = rank, world_size
        self.lost: list[dict[int, str]] = [{} for _ in stream.sources]  # {id: reason} by source
        for source, sample, reason in lost:
            self.lost[source][sample] = reason
        # The position in each source's order at which the epoch began, or first_step if later.
        self._begun = [first_step * source.per_batch for source in stream.sources]
        self._seen = [np.zeros(len(source.shards), bool) for source in stream.sources]
        # Ids that the step which ends an epoch has already seen of the next one.
        self._ahead = [np.zeros(0, np.int64) for _ in stream.sources]

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, from the first step, and enter each into the account."""
        for batch in batches:
            self.enter(batch)
            yield batch

    def enter(self, batch: Batch) -> None:
        """Note what this rank's batch of the next step has seen and lost."""
        ids, owners = batch.ids.numpy(), batch.source.numpy()
        positions = self.stream.positions(self.step, self.rank, self.world_size)
        for source in range(len(self.lost)):
            mine = owners == source
            inside = positions[mine] < self.end(source)
            self._seen[source][ids[mine][inside]] = True
            self._ahead[source] = ids[mine][~inside]
        for source, sample, reason in batch.lost:
            self.lost[source][sample] = reason
        self.step += 1

    def end(self, index: int) -> int:
        """The position in source `index` at which the current epoch ends."""
        length = len(self.stream.sources[index].order)
        return (self._begun[index] // length + 1) * length

    def close_ended(self, gather: Gather) -> None:
        """Close the epochs that the last batch has ended.

        Where losses are allowed, rank 0 logs what each has lost.
        """
        for index, source in enumerate(self.stream.sources):
            while self.step * source.per_batch >= self.end(index):  # alike on every rank
                line = self.close(index, gather)
                if self.rank == 0 and source.shards.data.damage == "skip":
                    log.info(line)

    def close(self, index: int, gather: Gather) -> str:
        """End the current epoch of a source, on all ranks together.

        Parameters
        ----------
        index : int
            Of the source.
        gather : callable
            gather(value) -> every rank's value.

        Returns
        -------
        str
            The epoch's line of the log.

        Raises
        ------
        UserError
            If a sample was neither seen nor found corrupt, or if more than data.damage_share are
            lost.
        """
        source = self.stream.sources[index]
        seen = self._gather_seen(index, gather)
        lost = np.fromiter(self.lost[index], np.int64, len(self.lost[index]))
        begun, end = self._begun[index], self.end(index)
        expected = source.order.expected(begun, end)
        missing = np.setdiff1d(expected[~seen[expected]], lost)
        if len(missing):
            raise UserError(
                f"{source.shards.split}: {len(missing)} of {len(expected)} samples were neither "
                f"seen nor found corrupt in the epoch that ended with step {self.step}, "
                f"e.g. {source.shards.where(int(missing[0]))}"
            )
        self._begun[index] = end
        self._seen[index][:] = False
        self._seen[index][self._ahead[index]] = True
        return self._report(index, epoch=end // len(source.order))

    def _gather_seen(self, index: int, gather: Gather) -> np.ndarray:
        """bool [N]: what any rank saw of a source.  Adds the other ranks' lost samples."""
        parts = gather((np.packbits(self._seen[index]), self.lost[index]))
        seen = np.zeros(len(self._seen[index]), bool)
        for bits, lost in parts:
            seen |= np.unpackbits(bits, count=len(seen)).astype(bool)
            self.lost[index] |= lost
        return seen

    def _report(self, index: int, epoch: int) -> str:
        """A line about what is lost of a source.  UserError if it exceeds data.damage_share."""
        shards = self.stream.sources[index].shards
        total = len(shards) + shards.lost
        lost = len(self.lost[index]) + shards.lost
        line = f"epoch {epoch} of {shards.split}: {lost} of {total} samples corrupt "
        line += f"({lost / total:.2%})"
        if lost:
            check_share(lost, total, shards.data, self.example(index))
            line += f", e.g. {self.example(index)}"
        return line

    def example(self, index: int) -> str:
        """One lost sample of a source that has any."""
        shards = self.stream.sources[index].shards
        for sample, reason in self.lost[index].items():
            return f"{shards.where(sample)}: {reason}"
        return str(shards.corruption[0])

    def all_lost(self, gather: Gather) -> list[Lost]:
        """(source, id, reason) of every rank's lost samples, for a checkpoint."""
        lost: dict[tuple[int, int], str] = {}
        for source, sample, reason in _by_source(gather(self.lost)):
            lost[source, sample] = reason
        return [(source, sample, reason) for (source, sample), reason in lost.items()]


def _by_source(parts: list[list[dict[int, str]]]) -> Iterator[Lost]:
    """The ranks' lost samples, ordered by source and then by rank.  parts[rank][source]."""
    for source, by_rank in enumerate(zip(*parts, strict=True)):
        for lost in by_rank:
            for sample, reason in lost.items():
                yield source, sample, reason
