"""Two streams with different promises.

Training: endless and shuffled.  The global batch of a step, its augmentation included, is a pure
function of the sources, the seed and the step. Ranks and workers only divide it.  So the state of a
run is its step, and a run resumes at any step, on any number of ranks and workers.

Measuring: finite, each sample exactly once over all ranks and workers, no communication.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.config import UserError

from ..distributed.ranks import Ranks
from .augment import Augment, Views, find_augment
from .mixing import NUMBERS as MIXING_NUMBERS
from .mixing import Mixing, check_mixable, mix, partners
from .opening import check_share
from .orders import Order, balanced, generator, shuffled
from .shards import Ids, ShardSet
from .window import Need

__all__ = ["Batch", "MeasuringStream", "Source", "TrainingStream", "balanced", "shuffled"]

TRIES = 1000  # corrupt samples in a row before a stream gives up
MOST_WORKERS = 4  # of a rank, where data.workers does not say
IN_FLIGHT = 2  # batches that a worker of torch's DataLoader is given ahead
NUMBERS = ("labels", "ids", "source", "view")  # of each example of a batch
OF_MIXED = ("partner_labels", "own_share")  # of each example of a batch whose inputs are mixed
AUGMENTING, MIXING = 4, 5  # what a stream draws uniform numbers for
BLOCK = 256 * 1024  # bytes of inputs that are augmented at a time

Lost = tuple[int, int, str]  # (index of the source, id, reason) of a corrupt sample


@dataclass
class Batch:
    """Examples of one step and rank.

    Attributes
    ----------
    inputs : Tensor [b, ...]
        As decoded, or augmented.
    labels : int64 Tensor [b]
    ids : int64 Tensor [b]
        Indices into the ShardSet of the example's source.
    source : int64 Tensor [b]
        Index of the example's source in its stream.
    lost : list of (source, id, reason)
        Corrupt samples met on the way, under data.damage = skip.  In training the next sample of
        the source's order stands in for one. In measuring it is absent.
    view : int64 Tensor [b]
        Which of a sample's fixed views this is (trainer.data.augment.Views). 0 where there are
        none.
    partner_labels : int64 Tensor [b], optional
        The labels of the examples that the inputs are mixed with (trainer.data.mixing).
    own_share : float32 Tensor [b], optional
        The weight of `labels` where inputs are mixed. `partner_labels` have the rest.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    source: torch.Tensor
    lost: list[Lost] = field(default_factory=list)
    view: torch.Tensor = None  # pyright: ignore[reportAssignmentType] - zeros, from __post_init__
    partner_labels: torch.Tensor | None = None
    own_share: torch.Tensor | None = None

    def __post_init__(self):
        if self.view is None:
            self.view = torch.zeros_like(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of what there is for each example, beside its input."""
        return NUMBERS if self.own_share is None else (*NUMBERS, *OF_MIXED)

    @property
    def on_devices(self) -> tuple[str, ...]:
        """The names of what a device works with."""
        return ("inputs", "labels", *(() if self.own_share is None else OF_MIXED))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with its inputs and labels on `device`.

        The other numbers say which examples these are, which only the host asks.
        """
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in self.on_devices
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory: DataLoader calls this."""
        pinned = {name: getattr(self, name).pin_memory() for name in self.on_devices}
        return replace(self, **pinned)

    # Between processes only the inputs go through shared memory: for a few numbers a file
    # descriptor each costs more.
    def __getstate__(self) -> dict:
        return vars(self) | {name: getattr(self, name).numpy() for name in self.numbers}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for name in self.numbers:
            setattr(self, name, torch.from_numpy(state[name]))


@dataclass(frozen=True)
class Source:
    """per_batch examples of each global batch come from `shards`, in `order`."""

    shards: ShardSet
    order: Order
    per_batch: int

    def __post_init__(self):
        if self.per_batch < 1:
            raise UserError(
                f"a source with {self.per_batch} examples per batch: "
                "give it at least 1, or leave it out"
            )


class _Stream:
    """What both streams share: a DataLoader over batches by number, and the lost samples.

    shard_sets: of each source.
    """

    def __init__(self, shard_sets: Sequence[ShardSet]):
        self._shard_sets = list(shard_sets)
        self._lost: dict[tuple[int, int], str] = {}
        self._lost_of = [0] * len(self._shard_sets)  # how many, by source

    @property
    def lost(self) -> dict[str, str]:
        """{sample: reason} of the corrupt samples that this rank met so far.

        What opening found is in ShardSet.corruption.
        """
        return {self._shard_sets[s].where(i): reason for (s, i), reason in self._lost.items()}

    def _load(
        self,
        items: range,
        fetch: Callable[[int], Batch],
        workers: int,
        announce: Callable[[range, object], None],
    ) -> Iterator[Batch]:
        """The items in order.

        announce(items, reader) says which are being read, of shards that stream, where workers
        read: what one of them has read another one may still need.
        """
        most = IN_FLIGHT * workers + 1
        if workers:
            announce(items[:most], self)
        try:
            for done, batch in enumerate(self._loaded(items, fetch, workers), 1):
                if workers:
                    announce(items[done : done + most], self)
                yield batch
        finally:
            for shards in self._shard_sets:
                shards.leave(self if workers else None)

    def _loaded(self, items: range, fetch: Callable[[int], Batch], workers: int) -> Iterator[Batch]:
        # A generator of its own: the loader's base seed would otherwise come from, and advance,
        # torch's global state.
        loader = DataLoader(
            _Fetch(fetch),
            batch_size=None,
            sampler=items,
            num_workers=workers,
            prefetch_factor=IN_FLIGHT if workers else None,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(0),
            pin_memory=self._is_pinned(),
            worker_init_fn=_begin_worker,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            for source, sample, reason in batch.lost:
                self._add_lost(source, sample, reason)
            yield batch

    def _is_pinned(self) -> bool:
        """Only where this process computes on a GPU.

        Pinning begins CUDA: a run on the CPU would take memory of a GPU beside it.
        """
        pinned = self._shard_sets[0].data.pin_memory
        return torch.cuda.is_initialized() and pinned is not False

    def _add_lost(self, source: int, sample: int, reason: str) -> None:
        """UserError if this rank alone has lost more than data.damage_share."""
        self._lost_of[source] += (source, sample) not in self._lost
        self._lost[source, sample] = reason
        shards = self._shard_sets[source]
        lost = shards.lost + self._lost_of[source]
        total = shards.lost + len(shards)
        check_share(lost, total, shards.data, f"{shards.where(sample)}: {reason}")


def reading_processes(workers: int | None, ranks: Ranks) -> int:
    """data.workers, or, where it is absent, what the machine has to spare beside a GPU.

    On a CPU whoever reads takes the time of whoever trains.
    """
    if workers is not None:
        return workers
    if ranks.device.type == "cpu":
        return 0
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(MOST_WORKERS, (cores or 1) // beside - 1))


class _Fetch(Dataset):
    """Item i is fetch(i).

    A user's mistake comes back as a value: from a worker an exception is a traceback.
    """

    def __init__(self, fetch: Callable[[int], Batch]):
        self.fetch = fetch

    def __getitem__(self, item: int) -> Batch | UserError:
        try:
            return self.fetch(item)
        except UserError as error:
            return error


def _begin_worker(_: int) -> None:
    """Leave what was inherited alone: a full collection writes to every object, so copies pages."""
    gc.freeze()


def _same(batch):
    return batch


class TrainingStream(_Stream):
    """An endless shuffled stream of global batches, some examples from each source in every one.

    Parameters
    ----------
    sources : sequence of Source
        All of one input shape and dtype.
    seed : int
        Of the augmentation. Each order has its own.
    augment : str, Augment or None
        A value of data.augment, or an Augment.
    views : Views, optional
        Show each sample in these fixed views: one epoch of a source is of one view.
    mixing : Mixing, optional
        Mix each input, once it is augmented, with another one of its global batch.

    Attributes
    ----------
    batch_size : int
        Examples of a global batch.

    Raises
    ------
    UserError
        If the sources' input shapes differ, or the augmentation is unknown.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        augment: str | Augment | None = None,
        views: Views | None = None,
        mixing: Mixing | None = None,
    ):
        assert views is None or mixing is None, "fixed views are of single samples"
        super().__init__([source.shards for source in sources])
        self.sources = [_streaming(source) for source in sources]
        self.seed = seed
        self.views = views
        self.mixing = mixing
        self.augment = augment if isinstance(augment, Augment) else find_augment(augment)
        self.batch_size = sum(source.per_batch for source in self.sources)
        self._check_shapes()
        if mixing is not None:
            first = self.sources[0].shards
            check_mixable(mixing, tuple(first.input_shape), first.input_dtype)
        # A fixed random arrangement, so that each rank's share of a batch holds about as much of
        # each source.
        per_batch = [source.per_batch for source in self.sources]
        owners = np.repeat(np.arange(len(self.sources)), per_batch)
        self._owner = generator(3).permutation(owners)
        self._turn = np.empty(self.batch_size, np.int64)
        for index, source in enumerate(self.sources):
            self._turn[self._owner == index] = np.arange(source.per_batch)

    def _check_shapes(self) -> None:
        shapes = {
            (source.shards.input_shape, str(source.shards.input_dtype)) for source in self.sources
        }
        if len(shapes) != 1:
            raise UserError(
                f"sources of one batch need one input shape, these have {sorted(map(str, shapes))}"
            )

    def _check_room(self, batches: int) -> None:
        """UserError where shards that stream take too much room, so many batches at once."""
        sources = [source for source in self.sources if source.order.windows is not None]
        rooms = [each.shards.room(each.order.ids, batches * each.per_batch) for each in sources]
        if any(rooms):
            what = f"{batches} batches of {self.batch_size} that are read at once"
            sources[rooms.index(max(rooms))].shards.check_room(sum(rooms), what)

    def announce(
        self, steps: range, reader: object = None, end: int | None = None, fetch: bool = True
    ) -> None:
        """Say which shards these steps read, where shards stream. The reader stops before `end`."""
        if not steps:
            return
        needs: dict[int, Need] = {}
        sets: dict[int, ShardSet] = {}
        for source in self.sources:
            if source.order.windows is None:
                continue
            count = source.per_batch
            until = None if end is None else end * count
            need = source.order.need(steps.start * count, steps.stop * count, until)
            key = id(source.shards)
            sets[key], needs[key] = source.shards, needs.get(key, Need()) + need
        for key, shards in sets.items():
            shards.announce(needs[key], reader, fetch)

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1, last_step: int | None = None
    ) -> Batch:
        """The rank's examples of the global batch of `step`: rank, rank + world_size, ...

        last_step: no step from there on will be read, so nothing is fetched for it.
        """
        self.announce(range(step, step + 1), end=last_step)
        mine = np.arange(rank, self.batch_size, world_size)
        if self.mixing is None:
            return self._examples(step, mine)
        # Another rank's partners are read here, too. They stand behind the rank's own.
        partner = partners(mine, self.batch_size)
        others = np.setdiff1d(partner, mine)
        batch = self._examples(step, np.concatenate([mine, others]))
        place = np.empty(self.batch_size, np.int64)
        place[np.concatenate([mine, others])] = np.arange(len(batch))
        return _mixed(batch, place[partner], self._mixing_uniforms(step)[mine], self.mixing)

    def _examples(self, step: int, mine: np.ndarray) -> Batch:
        """The examples at positions `mine` of the global batch of `step`, augmented."""
        owners, turns = self._owner[mine], self._turn[mine]
        shards = self.sources[0].shards
        inputs = _new_tensor((len(mine), *shards.input_shape), shards.input_dtype)
        labels = np.empty(len(mine), np.int64)
        ids = np.empty(len(mine), np.int64)
        view = np.zeros(len(mine), np.int64)
        lost: list[Lost] = []
        for index, source in enumerate(self.sources):
            rows = np.flatnonzero(owners == index)
            positions = step * source.per_batch + turns[rows]
            ids[rows], corrupt = _read(source, positions, inputs.numpy(), rows)
            labels[rows] = source.shards.labels[ids[rows]]
            lost.extend((index, sample, reason) for sample, reason in corrupt.items())
            if self.views is not None:  # one epoch is of one view
                view[rows] = positions // len(source.order) % self.views.count
        if self.augment is not None:
            uniforms = self._batch_uniforms(self.augment, step, mine, ids, view)
            inputs = _augmented(inputs, uniforms, self.augment)
        return Batch(
            inputs=inputs,
            labels=torch.from_numpy(labels),
            ids=torch.from_numpy(ids),
            source=torch.from_numpy(owners),
            lost=lost,
            view=torch.from_numpy(view),
        )

    def _batch_uniforms(
        self, augment: Augment, step: int, mine: np.ndarray, ids: np.ndarray, view: np.ndarray
    ) -> np.ndarray:
        """float64 [b, K]: what the augmentation of each example is made with."""
        if self.views is None:
            return self.uniforms(step)[mine]
        owners = self._owner[mine]
        uniforms = np.empty((len(mine), augment.numbers))
        for index in range(len(self.sources)):
            here = owners == index
            uniforms[here] = self.views.uniforms(index, ids[here], view[here], augment.numbers)
        return uniforms

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """int64 [b]: where the rank's examples stand in the orders of their sources."""
        per_batch = np.array([source.per_batch for source in self.sources])
        return (step * per_batch[self._owner] + self._turn)[rank::world_size]

    def uniforms(self, step: int) -> np.ndarray:
        """float64 [batch_size, K]: the augmentation's numbers of the step's positions.

        They do not depend on what was drawn before.
        """
        assert self.augment is not None
        return self._uniforms(step, self.augment.numbers, AUGMENTING)

    def _mixing_uniforms(self, step: int) -> np.ndarray:
        """float64 [batch_size, K]: what inputs are mixed with."""
        return self._uniforms(step, MIXING_NUMBERS, MIXING)

    def _uniforms(self, step: int, numbers: int, purpose: int) -> np.ndarray:
        # One step of Philox's counter gives four numbers, so a position owns ceil(K / 4) counter
        # values.
        blocks = -(-numbers // 4)
        key = np.random.SeedSequence([self.seed, purpose]).generate_state(2, np.uint64)
        counter = step * self.batch_size * blocks
        philox = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return philox.random((self.batch_size, 4 * blocks))[:, :numbers]

    def loader(
        self, first_step: int, last_step: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """This rank's batches of steps first_step .. last_step - 1, in order.

        `workers` processes read ahead. 0 reads in this one.
        """
        self._check_room(IN_FLIGHT * workers + 2)

        def announce(steps: range, reader: object) -> None:
            self.announce(steps, reader, last_step, fetch=False)

        share = _Share(self, rank, world_size, last_step)
        return self._load(range(first_step, last_step), share, workers, announce)


def _streaming(source: Source) -> Source:
    """The source in an order in which its shards can stream, where they are to."""
    windows = source.shards.windows
    if windows is None:
        return source
    return replace(source, order=source.order.streaming(windows))


@dataclass(frozen=True)
class _Share:
    stream: TrainingStream
    rank: int
    world_size: int
    last_step: int

    def __call__(self, step: int) -> Batch:
        return self.stream.batch(step, self.rank, self.world_size, self.last_step)


def _new_tensor(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
    """An unfilled tensor. In a loader's worker its memory is shared with the main process.

    What is written into it gets there without a copy.  UserError where torch lacks the dtype.
    """
    try:
        tensor = torch.empty(0, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
    except (TypeError, ValueError):  # of text, of times. Of the other byte order
        raise UserError(
            f"inputs of dtype {dtype}: torch has none like it; name a function under "
            "data.decoders, or data.augment, that makes them uint8 or float32"
        ) from None
    needed = int(np.prod(shape)) * tensor.itemsize
    if needed and get_worker_info() is not None:
        # As torch.utils.data.default_collate does it. share_memory_() would first fill, then copy,
        # private memory.
        try:
            tensor.set_(torch.UntypedStorage._new_shared(needed))
        except RuntimeError as error:
            raise UserError(
                f"no shared memory for a batch of {needed} bytes ({str(error).splitlines()[0]}): "
                "give /dev/shm more (docker run --shm-size), or set data.workers = 0"
            ) from None
    return tensor.resize_(shape)


def _augmented(inputs: torch.Tensor, uniforms: np.ndarray, augment: Augment) -> torch.Tensor:
    """The views, in the place of the inputs unless they are of another shape or dtype.

    By BLOCK bytes of inputs: what an augmentation allocates stays small, and in the processor's
    cache.  Whole batches would leave gaps in a worker's heap, up to a hundred batches' worth.
    """
    array = inputs.numpy()
    views = None
    step = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        block = augment(array[first : first + step], uniforms[first : first + step])
        if views is None:
            views = inputs
            if block.shape[1:] != array.shape[1:] or block.dtype != array.dtype:
                views = _new_tensor((len(array), *block.shape[1:]), block.dtype)
        views.numpy()[first : first + step] = block
    return inputs if views is None else views


def _mixed(batch: Batch, partner: np.ndarray, uniforms: np.ndarray, mixing: Mixing) -> Batch:
    """The first examples of a batch, each mixed with the one whose row `partner` says."""
    count = len(partner)
    inputs = batch.inputs.numpy()
    mixed, own_share = mix(inputs[:count], inputs[partner], uniforms, mixing)
    out = _new_tensor(mixed.shape, mixed.dtype)
    out.numpy()[...] = mixed
    first = {name: getattr(batch, name)[:count] for name in NUMBERS}
    return replace(
        batch,
        inputs=out,
        **first,
        partner_labels=batch.labels[torch.from_numpy(partner)],
        own_share=torch.from_numpy(own_share),
    )


def _read(
    source: Source, positions: np.ndarray, inputs: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Read a source's samples at `positions` into `rows` of `inputs`.

    The order's next readable sample stands in for a corrupt one.
    Returns (ids int64 [n] of what is read, {id: reason} of the corrupt ones).
    """
    ids = source.order(positions)
    corrupt = source.shards.read_into(inputs, rows, ids)
    if not corrupt:
        return ids, corrupt
    for turn in np.flatnonzero(np.isin(ids, list(corrupt))):
        for further in range(1, TRIES):
            candidate = source.order(positions[turn : turn + 1] + further)
            unreadable = source.shards.read_into(inputs, rows[turn : turn + 1], candidate)
            if not unreadable:
                ids[turn] = candidate[0]
                break
            corrupt |= unreadable
        else:
            raise UserError(
                f"{TRIES} corrupt samples in a row, e.g. {source.shards.where(int(ids[turn]))}"
            )
    return ids, corrupt


class MeasuringStream(_Stream):
    """Each sample exactly once, over all ranks together.

    Parameters
    ----------
    shards : ShardSet
    batch_size : int
    ids : int64 [n], optional
        Which samples. All by default.
    """

    def __init__(self, shards: ShardSet, batch_size: int, ids: Ids | None = None):
        super().__init__([shards])
        self.shards = shards
        self.batch_size = batch_size
        self.ids = np.arange(len(shards)) if ids is None else np.asarray(ids, np.int64)
        self._passage = shards.passage(self.ids)

    def batch(self, number: int) -> Batch:
        """Batch `number` of ceil(n / batch_size).

        Its samples are neighbours in the shards, so that reading goes forward.
        """
        first = number * self.batch_size
        return self._stretch(first, min(first + self.batch_size, len(self.ids)), len(self.ids))

    def _stretch(self, first: int, last: int, end: int) -> Batch:
        """The samples at places first .. last - 1 of `ids`, of a reader that stops before `end`."""
        if self._passage is not None:
            self.shards.announce(self.shards.need_of(self._passage, first, last, end))
        ids = self.ids[first:last]
        inputs = _new_tensor((len(ids), *self.shards.input_shape), self.shards.input_dtype)
        corrupt = self.shards.read_into(inputs.numpy(), np.arange(len(ids)), ids)
        if corrupt:
            kept = ~np.isin(ids, list(corrupt))
            inputs, ids = inputs[torch.from_numpy(kept)], ids[kept]
        return Batch(
            inputs=inputs,
            labels=torch.from_numpy(self.shards.labels[ids].astype(np.int64)),
            ids=torch.from_numpy(ids.copy()),
            source=torch.from_numpy(np.zeros_like(ids)),
            lost=[(0, sample, reason) for sample, reason in corrupt.items()],
        )

    def missing_batches(self, rank: int, world_size: int) -> int:
        """How many batches less this rank has than the one that has most."""
        counts = [len(self._share(each, world_size).stretches) for each in range(world_size)]
        return max(counts) - counts[rank]

    def blank(self) -> Batch:
        """A batch of one input of zeros, which is no sample."""
        none = torch.zeros(1, dtype=torch.int64)
        inputs = _new_tensor((1, *self.shards.input_shape), self.shards.input_dtype)
        return Batch(inputs=inputs.zero_(), labels=none, ids=none, source=none)

    def loader(self, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        """This rank's batches: rank, rank + world_size, .... Of shards that stream a part in a row.

        UserError at the end if a sample is unaccounted for.
        """
        share = self._share(rank, world_size)

        def announce(numbers: range, reader: object) -> None:
            if self._passage is not None and numbers:
                (first, _), (_, last) = share.stretches[numbers[0]], share.stretches[numbers[-1]]
                need = self.shards.need_of(self._passage, first, last, share.end)
                self.shards.announce(need, reader, fetch=False)

        seen = lost = 0
        for batch in self._load(range(len(share.stretches)), share, workers, announce):
            seen += len(batch)
            lost += len(batch.lost)
            yield batch
        expected = sum(last - first for first, last in share.stretches)
        if seen + lost != expected:
            raise UserError(
                f"{self.shards.split}: {expected} samples expected, {seen} seen and {lost} corrupt"
            )

    def _share(self, rank: int, world_size: int) -> _MeasuringShare:
        first, end, stride = 0, len(self.ids), world_size
        if self._passage is not None:  # whole shards, so that no two ranks read one
            cuts = self._passage.divided(world_size, len(self.ids))
            first, end, stride = cuts[rank], cuts[rank + 1], 1
        begins = range(first, end, self.batch_size)
        if stride > 1:
            begins = begins[rank::stride]
        stretches = [(begin, min(begin + self.batch_size, end)) for begin in begins]
        return _MeasuringShare(self, stretches, end)


@dataclass(frozen=True)
class _MeasuringShare:
    """What one rank measures: stretches of the stream's ids, all before `end`."""

    stream: MeasuringStream
    stretches: list[tuple[int, int]]
    end: int

    def __call__(self, number: int) -> Batch:
        return self.stream._stretch(*self.stretches[number], self.end)
