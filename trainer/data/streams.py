"""Two streams with different promises.

Training: endless and shuffled.  The global batch of a step, its augmentation included, is a pure function of the
sources, the seed and the step; ranks and workers only divide it.  So the state of a run is its step, and a run resumes
at any step, on any number of ranks and workers.
Measuring: finite, each sample exactly once over all ranks and workers, no communication.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipeline.config import UserError

from .augment import Augment, Views, find_augment
from .orders import Order, balanced, generator, shuffled
from .shards import ShardSet, check_share

__all__ = ["Batch", "MeasuringStream", "Source", "TrainingStream", "balanced", "shuffled"]

TRIES = 1000  # damaged samples in a row before a stream gives up
NUMBERS = ("labels", "ids", "source", "view")  # of each example of a batch
BLOCK = 256 * 1024  # bytes of inputs that are augmented at a time


@dataclass
class Batch:
    """inputs: tensor [b, ...] as decoded; labels, ids, source: int64 [b], ids counting within the source's ShardSet.
    view: int64 [b], which of a sample's fixed views this is (trainer.data.augment.Views); 0 where there are none.

    lost: [(source, id, reason)] of the damaged samples met on the way (data.damage = skip): in training the next sample
    of the source's order stands in for them, in measuring they are absent.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    source: torch.Tensor
    lost: list[tuple[int, int, str]] = field(default_factory=list)
    view: torch.Tensor | None = None

    def __post_init__(self):
        if self.view is None:
            self.view = torch.zeros_like(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device, non_blocking: bool = True) -> Batch:
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("inputs", *NUMBERS)
        }
        return replace(self, **moved)

    # Between processes only the inputs go through shared memory: for a few numbers a file descriptor each costs more.
    def __getstate__(self) -> dict:
        return vars(self) | {name: getattr(self, name).numpy() for name in NUMBERS}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for name in NUMBERS:
            setattr(self, name, torch.from_numpy(state[name]))

    def pin_memory(self) -> Batch:
        pinned = {name: getattr(self, name).pin_memory() for name in ("inputs", *NUMBERS)}
        return replace(self, **pinned)


@dataclass(frozen=True)
class Source:
    """per_batch examples of each global batch come from `shards`, in `order`."""

    shards: ShardSet
    order: Order
    per_batch: int

    def __post_init__(self):
        if self.per_batch < 1:
            raise UserError(
                f"a source with {self.per_batch} examples per batch: give it at least 1, or leave it out"
            )


class _Stream:
    """What both streams share: batches by number through a DataLoader, and the account of lost samples."""

    sources: list[Source]

    def __init__(self):
        self._lost: dict[tuple[int, int], str] = {}

    @property
    def lost(self) -> dict[str, str]:
        """{sample: reason} of the damaged samples that this rank met so far; opening's own are in ShardSet.damage."""
        return {self.sources[s].shards.where(i): reason for (s, i), reason in self._lost.items()}

    def _load(self, items: range, fetch, workers: int) -> Iterator[Batch]:
        # A generator of its own: the loader's base seed would otherwise come from, and advance, torch's global state.
        loader = torch.utils.data.DataLoader(
            _Fetch(fetch),
            batch_size=None,
            sampler=items,
            num_workers=workers,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_begin_worker,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            for source, sample, reason in batch.lost:
                self._lost[source, sample] = reason
                shards = self.sources[source].shards
                lost = shards.lost + sum(s == source for s, _ in self._lost)
                check_share(
                    lost,
                    shards.lost + len(shards),
                    shards.data,
                    f"{shards.where(sample)}: {reason}",
                )
            yield batch


class _Fetch(torch.utils.data.Dataset):
    """Item i is fetch(i).  A user's mistake comes back as a value: from a worker an exception is a traceback."""

    def __init__(self, fetch):
        self.fetch = fetch

    def __getitem__(self, item: int):
        try:
            return self.fetch(item)
        except UserError as mistake:
            return mistake


def _begin_worker(_: int) -> None:
    """Leave what was inherited alone: a full collection writes to every object, and so copies its shared page."""
    gc.freeze()


def _same(batch):
    return batch


class TrainingStream(_Stream):
    """An endless shuffled stream of global batches, per_batch examples from each source in every one.

    seed: of the augmentation (each order has its own).  augment: a value of data.augment, or an Augment.
    """

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        augment: str | Augment | None = None,
        views: Views | None = None,
    ):
        super().__init__()
        self.sources, self.seed, self.views = list(sources), seed, views
        self.augment = augment if isinstance(augment, Augment) else find_augment(augment)
        self.batch_size = sum(source.per_batch for source in self.sources)
        shapes = {
            (source.shards.input_shape, str(source.shards.input_dtype)) for source in self.sources
        }
        if len(shapes) != 1:
            raise UserError(
                f"sources of one batch need one input shape, these have {sorted(map(str, shapes))}"
            )
        # A fixed random arrangement, so that each rank's share of a batch holds about as much of each source.
        owners = np.repeat(
            np.arange(len(self.sources)), [source.per_batch for source in self.sources]
        )
        self._owner = generator(3).permutation(owners)
        self._turn = np.empty(self.batch_size, np.int64)
        for number, source in enumerate(self.sources):
            self._turn[self._owner == number] = np.arange(source.per_batch)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rank's share of the global batch of `step`: its examples rank, rank + world_size, ..."""
        mine = np.arange(rank, self.batch_size, world_size)
        owners, turns = self._owner[mine], self._turn[mine]
        shards = self.sources[0].shards
        inputs = _room((len(mine), *shards.input_shape), shards.input_dtype)
        labels, ids = np.empty(len(mine), np.int64), np.empty(len(mine), np.int64)
        view, lost = np.zeros(len(mine), np.int64), []
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(owners == number)
            ids[places], damaged = _read(
                source, step * source.per_batch + turns[places], inputs.numpy(), places
            )
            labels[places] = source.shards.labels[ids[places]]
            lost.extend((number, sample, reason) for sample, reason in damaged.items())
            if self.views is not None:  # one pass is of one view
                view[places] = (
                    (step * source.per_batch + turns[places])
                    // len(source.order)
                    % self.views.count
                )
        if self.augment is not None:
            inputs = _augmented(inputs, self._numbers(step, mine, owners, ids, view), self.augment)
        return Batch(
            inputs, *map(torch.from_numpy, (labels, ids, owners)), lost, torch.from_numpy(view)
        )

    def _numbers(self, step: int, mine, owners, ids, view) -> np.ndarray:
        """float64 [b, K]: what the augmentation of each example is made with."""
        if self.views is None:
            return self.uniforms(step)[mine]
        found = np.empty((len(mine), self.augment.numbers))
        for number in range(len(self.sources)):
            here = owners == number
            found[here] = self.views.uniforms(number, ids[here], view[here], self.augment.numbers)
        return found

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """int64[b]: where the examples of rank's share stand in the orders of their sources."""
        per_batch = np.array([source.per_batch for source in self.sources])
        return (step * per_batch[self._owner] + self._turn)[rank::world_size]

    def uniforms(self, step: int) -> np.ndarray:
        """float64 [batch_size, K]: the numbers that belong to the step's positions, whatever was asked before."""
        # One step of Philox's counter gives four numbers, so a position owns ceil(K / 4) counter values.
        blocks = -(-self.augment.numbers // 4)
        key = np.random.SeedSequence([self.seed, 4]).generate_state(2, np.uint64)
        counter = step * self.batch_size * blocks
        numbers = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(
            (self.batch_size, 4 * blocks)
        )
        return numbers[:, : self.augment.numbers]

    def loader(
        self, first_step: int, last_step: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ):
        """Iterator of this rank's batches of steps first_step .. last_step - 1, read ahead by `workers` processes."""
        return self._load(range(first_step, last_step), _Share(self, rank, world_size), workers)


@dataclass(frozen=True)
class _Share:
    stream: TrainingStream
    rank: int
    world_size: int

    def __call__(self, step: int) -> Batch:
        return self.stream.batch(step, self.rank, self.world_size)


def _room(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
    """An unfilled tensor; in a loader's worker it lies in memory that the worker shares with the main process.

    What is written into it gets there without a copy.  UserError where torch lacks the dtype.
    """
    try:
        room = torch.empty(0, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
    except (TypeError, ValueError):  # of text, of times; of the other byte order
        raise UserError(
            f"inputs of dtype {dtype}: torch has none like it; name a function under data.decoders, or data.augment, "
            "that makes them uint8 or float32"
        ) from None
    needed = int(np.prod(shape)) * room.itemsize
    if needed and torch.utils.data.get_worker_info() is not None:
        # As torch.utils.data.default_collate does it; share_memory_() would first fill, then copy, private memory.
        try:
            room.set_(torch.UntypedStorage._new_shared(needed))
        except RuntimeError as mistake:
            raise UserError(
                f"no shared memory for a batch of {needed} bytes ({str(mistake).splitlines()[0]}): give /dev/shm more "
                "(docker run --shm-size), or set data.workers = 0"
            ) from None
    return room.resize_(shape)


def _augmented(inputs: torch.Tensor, uniforms: np.ndarray, augment: Augment) -> torch.Tensor:
    """The views, in the place of the inputs unless they are of another shape or dtype.

    By BLOCK bytes of inputs: what an augmentation allocates stays small, and in the processor's cache.  Whole batches
    would leave gaps in a worker's heap, up to a hundred batches' worth.
    """
    array, views = inputs.numpy(), None
    step = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        block = augment(array[first : first + step], uniforms[first : first + step])
        if views is None:
            same = block.shape[1:] == array.shape[1:] and block.dtype == array.dtype
            views = inputs if same else _room((len(array), *block.shape[1:]), block.dtype)
        views.numpy()[first : first + step] = block
    return inputs if views is None else views


def _read(source: Source, positions: np.ndarray, inputs: np.ndarray, places: np.ndarray):
    """(ids, {id: reason} of the damaged) of what now lies in rows `places` of `inputs`.

    The order's next readable sample stands in for a damaged one.
    """
    ids = source.order(positions)
    damaged = source.shards.read_into(inputs, places, ids)
    waiting = np.flatnonzero(np.isin(ids, list(damaged))) if damaged else ()
    for turn in waiting:
        for further in range(1, TRIES):
            candidate = source.order(positions[turn : turn + 1] + further)
            again = source.shards.read_into(inputs, places[turn : turn + 1], candidate)
            if not again:
                ids[turn] = candidate[0]
                break
            damaged |= again
        else:
            raise UserError(
                f"{TRIES} damaged samples in a row, e.g. {source.shards.where(int(ids[turn]))}"
            )
    return ids, damaged


class MeasuringStream(_Stream):
    """Each sample exactly once, over all ranks together.  ids: which samples, all by default."""

    def __init__(self, shards: ShardSet, batch_size: int, ids=None):
        super().__init__()
        self.shards, self.batch_size = shards, batch_size
        self.ids = np.arange(len(shards)) if ids is None else np.asarray(ids, np.int64)
        self.sources = [Source(shards, None, batch_size)]

    def batch(self, number: int) -> Batch:
        """Batch `number` of ceil(n / batch_size): neighbours in the shards, so that reading goes forward."""
        ids = self.ids[number * self.batch_size : (number + 1) * self.batch_size]
        inputs = _room((len(ids), *self.shards.input_shape), self.shards.input_dtype)
        damaged = self.shards.read_into(inputs.numpy(), np.arange(len(ids)), ids)
        if damaged:
            kept = ~np.isin(ids, list(damaged))
            inputs, ids = inputs[torch.from_numpy(kept)], ids[kept]
        labels = self.shards.labels[ids]
        lost = [(0, sample, reason) for sample, reason in damaged.items()]
        return Batch(inputs, *map(torch.from_numpy, (labels, ids.copy(), np.zeros_like(ids))), lost)

    def loader(self, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        """Iterator of this rank's batches: rank, rank + world_size, ...  UserError if a sample is unaccounted for."""
        numbers = range(rank, -(-len(self.ids) // self.batch_size), world_size)
        seen = lost = 0
        for batch in self._load(numbers, self.batch, workers):
            seen, lost = seen + len(batch), lost + len(batch.lost)
            yield batch
        expected = sum(
            min(self.batch_size, len(self.ids) - number * self.batch_size) for number in numbers
        )
        if seen + lost != expected:
            raise UserError(
                f"{self.shards.split}: {expected} samples expected, {seen} seen and {lost} damaged"
            )
