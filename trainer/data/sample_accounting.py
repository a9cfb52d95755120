"""The account of what was seen and what was lost: at the end of every pass each sample is one or the other.

data.damage = strict stops at the first damaged sample; under skip the losses of all ranks and stages are put together
here, reported, and bounded by data.damage_share.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from pipeline.config import UserError
from pipeline.corruption import count, example

from .shards import ShardSet, check_share
from .streams import Batch, TrainingStream

Lost = dict[int, str]  # id -> reason

log = logging.getLogger("referral")


class LostSamples:
    """What one process knows to be lost.  splits: see trainer.data.damage."""

    def __init__(self):
        self.splits: dict[str, dict] = {}

    def add(self, shards: ShardSet, lost: Lost) -> None:
        """Opening's losses and those of a pass.  UserError if all together exceed data.damage_share."""
        split = self.splits.setdefault(
            shards.split, {"samples": len(shards) + shards.lost, "where": {}}
        )
        for damage in shards.damage:
            split["where"][f"{damage.shard}: {damage.member}"] = [damage.reason, damage.samples]
        for sample, reason in lost.items():
            split["where"][shards.where(sample)] = [reason, 1]
        if split["where"]:
            check_share(count(split), split["samples"], shards.data, example(split))


class EpochAccounting:
    """One rank's account of a training stream, closed with the other ranks' at the end of each source's every pass.

    lost: [(source, id, reason)] met by earlier attempts, from a checkpoint.
    """

    def __init__(
        self, stream: TrainingStream, first_step: int, rank: int = 0, world_size: int = 1, lost=()
    ):
        self.stream, self.step, self.share = stream, first_step, (rank, world_size)
        self.lost: list[Lost] = [{} for _ in stream.sources]
        for source, sample, reason in lost:
            self.lost[source][sample] = reason
        self._begun = [
            first_step * source.per_batch for source in stream.sources
        ]  # positions: the pass's, or later
        self._seen = [np.zeros(len(source.shards), bool) for source in stream.sources]
        self._ahead = [
            np.zeros(0, np.int64) for _ in stream.sources
        ]  # seen by the same step, of the next pass

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, from the first step on, each entered."""
        for batch in batches:
            self.enter(batch)
            yield batch

    def enter(self, batch: Batch) -> None:
        ids, owners, positions = (
            batch.ids.numpy(),
            batch.source.numpy(),
            self.stream.positions(self.step, *self.share),
        )
        for number in range(len(self.lost)):
            mine = owners == number
            inside = positions[mine] < self.end(number)
            self._seen[number][ids[mine][inside]] = True
            self._ahead[number] = ids[mine][~inside]
        for source, sample, reason in batch.lost:
            self.lost[source][sample] = reason
        self.step += 1

    def end(self, number: int) -> int:
        """The position in source `number` at which the current pass ends."""
        length = len(self.stream.sources[number].order)
        return (self._begun[number] // length + 1) * length

    def close_ended(self, gather) -> None:
        """Close the passes that the last batch has ended, and say so on rank 0 where losses are allowed."""
        for number, source in enumerate(self.stream.sources):
            while self.step * source.per_batch >= self.end(number):  # alike on every rank
                line = self.close(number, gather)
                if self.share[0] == 0 and source.shards.data.damage == "skip":
                    log.info(line)

    def close(self, number: int, gather) -> str:
        """End the pass of a source.  gather(value) -> every rank's value.  Returns its line of the report.

        Raises UserError if a sample was neither seen nor found damaged, or if more than data.damage_share are lost.
        """
        source = self.stream.sources[number]
        parts = gather((np.packbits(self._seen[number]), self.lost[number]))
        seen = np.zeros(len(source.shards), bool)
        for bits, lost in parts:
            seen |= np.unpackbits(bits, count=len(seen)).astype(bool)
            self.lost[number] |= lost
        lost = np.fromiter(self.lost[number], np.int64, len(self.lost[number]))
        begun, end = self._begun[number], self.end(number)
        expected = source.order.expected(begun, end)
        missing = np.setdiff1d(expected[~seen[expected]], lost)
        if len(missing):
            raise UserError(
                f"{source.shards.split}: {len(missing)} of {len(expected)} samples were neither seen nor found damaged "
                f"in the pass that ended with step {self.step}, e.g. {source.shards.where(int(missing[0]))}"
            )
        self._begun[number], self._seen[number][:] = end, False
        self._seen[number][self._ahead[number]] = True
        total, opening = len(source.shards) + source.shards.lost, source.shards.lost
        gone = opening + len(lost)
        if gone:
            check_share(gone, total, source.shards.data, self.example(number))
        epoch, such = end // len(source.order), f", e.g. {self.example(number)}" if gone else ""
        return f"epoch {epoch} of {source.shards.split}: {gone} of {total} samples damaged ({gone / total:.2%}){such}"

    def example(self, number: int) -> str:
        shards = self.stream.sources[number].shards
        for sample, reason in self.lost[number].items():
            return f"{shards.where(sample)}: {reason}"
        return str(shards.damage[0])

    def all_lost(self, gather) -> list[tuple[int, int, str]]:
        """[(source, id, reason)] of every rank, for a checkpoint."""
        parts = gather(self.lost)
        joined = [
            {key: reason for part in parts for key, reason in part[n].items()}
            for n in range(len(self.lost))
        ]
        return [
            (number, sample, reason)
            for number, lost in enumerate(joined)
            for sample, reason in lost.items()
        ]
