"""Which shards are held: pure functions, and readers with a store and a clock on paper."""

import heapq
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.orders import Order, Windows, balanced, generator
from trainer.data.window import Copy, Need, Passage, Window, evictions, most_at_once, reserved

sizes_of_shards = st.lists(st.integers(1, 6), min_size=1, max_size=9)


def start_of(sizes) -> np.ndarray:
    return np.cumsum([0, *sizes])


def shards_of(start, ids) -> set[int]:
    return set((np.searchsorted(start, ids, side="right") - 1).tolist())


# The order


@settings(max_examples=60, deadline=None)
@given(sizes_of_shards, st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_an_epoch_has_every_id_as_often_and_a_window_its_shards_alone(sizes, mixed, seed, rare):
    start = start_of(sizes)
    ids = np.arange(start[-1])
    if rare:  # some ids repeatedly, some shards without any
        ids = generator(seed).choice(ids, len(ids))
    epoch = Windows(start, mixed).epoch(ids, generator(seed))
    assert np.sort(epoch.ids).tolist() == np.sort(ids).tolist()
    assert epoch.ends[-1] == len(ids)
    seen: list[int] = []
    for first, last, shards in zip([0, *epoch.ends], epoch.ends, epoch.shards, strict=False):
        assert 1 <= len(shards) <= mixed
        assert shards_of(start, epoch.ids[first:last]) == set(shards)
        seen += shards
    assert len(set(seen)) == len(seen)


@settings(max_examples=60, deadline=None)
@given(sizes_of_shards, st.integers(1, 3), st.integers(0, 40), st.integers(1, 30))
def test_the_shards_of_a_batch_are_said_before_it_is_read(sizes, mixed, first, batch):
    start = start_of(sizes)
    order = Order(np.arange(start[-1]), 5).streaming(Windows(start, mixed))
    need = order.need(first, first + batch)
    assert shards_of(start, order(np.arange(first, first + batch))) <= set(need.now)
    assert not set(need.now) & set(need.ahead) and len(need.ahead) <= mixed
    assert order.need(first, first + batch, end=first + batch).ahead == ()


def test_nothing_is_said_of_what_the_reader_will_not_reach():
    order = Order(np.arange(40), 0).streaming(Windows(np.arange(0, 41, 4), 2))
    assert len(order.need(0, 8).ahead) == len(order.need(0, 8, end=9).ahead) == 2
    assert order.need(0, 8, end=8).ahead == () and order.need(0, 7, end=8).ahead == ()


def test_shards_come_in_another_order_each_epoch_and_rare_classes_stay_repeated():
    labels = np.array([0] * 50 + [1] * 10)
    plain = balanced(labels, 3, 1.0)
    streaming = plain.streaming(Windows(np.arange(0, 61, 6), 2))
    for epoch in range(3):
        assert np.sort(streaming.epoch(epoch)).tolist() == np.sort(plain.epoch(epoch)).tolist()
        span = epoch * 60, epoch * 60 + 60
        assert streaming.expected(*span).tolist() == plain.expected(*span).tolist()
    firsts = {streaming.need(60 * epoch, 60 * epoch + 1).now for epoch in range(20)}
    assert len(firsts) > 10


def test_a_passage_says_runs_of_shards_and_stops_where_its_reader_does():
    passage = Passage(np.array([0, 0, 1, 1, 1, 4, 5, 0]), 2)
    assert passage.need(0, 3) == Need((0, 1), (4, 5))
    assert passage.need(3, 6) == Need((1, 4), (5, 0))
    assert passage.need(3, 6, end=7) == Need((1, 4), (5,))
    assert passage.need(7, 8) == Need((0,), ())
    assert passage.divided(2, 8) == [0, 5, 8] and passage.divided(1, 8) == [0, 8]


@settings(max_examples=60, deadline=None)
@given(sizes_of_shards, st.integers(1, 7))
def test_parts_of_a_passage_share_no_shard_and_miss_none(sizes, parts):
    shards = np.repeat(np.arange(len(sizes)), sizes)
    cuts = Passage(shards, 1).divided(parts, len(shards))
    assert (cuts[0], cuts[-1]) == (0, len(shards)) and cuts == sorted(cuts)
    owned = [set(shards[a:b].tolist()) for a, b in itertools.pairwise(cuts)]
    assert sum(map(len, owned)) == len(sizes)


# What is held


def test_the_least_recently_used_copies_go_and_no_more_than_needed():
    idle = {"a": Copy(10, 3.0), "b": Copy(10, 1.0), "c": Copy(10, 2.0)}
    assert evictions(idle, 0) == [] == evictions(idle, -5)
    assert evictions(idle, 10) == ["b"] and evictions(idle, 11) == ["b", "c"]
    assert evictions(idle, 31) is None


def test_what_is_read_now_and_has_not_come_keeps_its_room():
    assert reserved({"a": 10, "b": 20, "c": 0, "d": 40}, iter(["a", "d", "x"])) == 20


def test_a_window_holds_what_any_reader_needs_and_what_was_read_last():
    window = Window(most=2)
    window.announce("main", Need((1, 2), (3,)))
    window.announce(None, Need((3,), (4,)))
    assert window.held() == {1: True, 2: True, 3: True, 4: False}
    window.leave("main")
    assert window.held() == {3: True, 4: False}
    for number in (7, 8, 9):
        window.read(number)
    assert window.held() == {3: True, 8: True, 9: True, 4: False}
    window.kept.add(5)
    window.announce(None, Need())
    assert window.held() == {5: True}


def test_the_room_that_an_order_takes_at_once_is_worked_by_hand():
    # Windows of 2 of 6 shards have 10 positions or more: 11 neighbours lie in 3 of them at most.
    assert most_at_once([9, 1, 1, 1, 1, 1], [5] * 6, 2, 11) == 14
    assert most_at_once([9, 1, 1, 1, 1, 1], [5] * 6, 2, 10) == 12
    assert most_at_once([9, 1, 1], [5, 5, 5], 8, 1) == 11


# Readers simulated: a store that takes its time, and ranks that wait for each other


class Simulation:
    """Ranks that read an order through one directory of `limit` bytes. `clock` ticks as they do.

    Each fetch takes a time drawn at random.  As the real directory: what leases name is not
    evicted, what is read now waits for room, what comes next takes only what that leaves.
    """

    def __init__(self, order, sizes, limit, batch, steps, ranks, seed):
        self.order, self.sizes, self.limit = order, sizes, limit
        self.batch, self.steps = batch, steps
        self.random = np.random.default_rng(seed)
        self.clock, self.events = 0.0, []  # (time, tie, shard)
        self.used: dict[int, float] = {}  # of whole copies
        self.parts: set[int] = set()
        self.windows = [Window(1) for _ in range(ranks)]
        self.at = [0] * ranks
        self.fetched: list[tuple[int, int]] = []  # (slowest rank's step, shard)
        self.delivered: list[list[int]] = [[] for _ in range(ranks)]

    def run(self):
        while min(self.at) < self.steps:
            moved = [self.advance(rank) for rank in self.random.permutation(len(self.at))]
            if not any(moved):
                assert self.events, "nobody can go on"
                self.clock, _, shard = heapq.heappop(self.events)
                self.parts.remove(shard)
                self.used[shard] = self.clock

    def advance(self, rank: int) -> bool:
        """Read a batch if it is there, else ask for it.  Ranks are one step apart at most."""
        step = self.at[rank]
        if step == self.steps or step > min(self.at):
            return False
        first, last = step * self.batch, (step + 1) * self.batch
        need = self.order.need(first, last, self.steps * self.batch)
        self.windows[rank].announce(None, need)
        for shard in need.now:
            self.begin(shard, ahead=False)
        for shard in need.ahead:
            self.begin(shard, ahead=True)
        ids = self.order(np.arange(first, last))
        if not shards_of(self.order.windows.start, ids) <= self.used.keys():
            return False
        for shard in need.now:
            if shard in self.used:
                self.used[shard] = self.clock
        self.delivered[rank] += ids.tolist()
        self.at[rank] += 1
        return True

    def begin(self, shard: int, ahead: bool) -> None:
        if shard in self.used or shard in self.parts:
            return
        leased: dict[int, int] = {}
        for window in self.windows:
            for number, now in window.held().items():
                leased[number] = max(leased.get(number, 0), self.sizes[number] * now)
        held = sum(self.sizes[number] for number in (*self.used, *self.parts))
        limit = self.limit
        if ahead:
            limit -= reserved(leased, [*self.used, *self.parts])
        idle = {
            number: Copy(self.sizes[number], used)
            for number, used in self.used.items()
            if number not in leased
        }
        gone = evictions(idle, held + self.sizes[shard] - limit)
        if gone is None:
            return
        for number in gone:
            del self.used[number]
        self.parts.add(shard)
        self.fetched.append((min(self.at), shard))
        held = sum(self.sizes[number] for number in (*self.used, *self.parts))
        assert held <= self.limit
        tie = len(self.fetched)
        heapq.heappush(self.events, (self.clock + self.random.exponential(), tie, shard))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_readers_get_every_batch_within_the_limit_and_each_shard_once_an_epoch(data):
    counts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=12), "samples of shards")
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(counts), max_size=len(counts)))
    mixed, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    ranks, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    start = start_of(counts)
    order = Order(np.arange(start[-1]), seed).streaming(Windows(start, mixed))
    least = most_at_once(sizes, counts, mixed, 2 * batch)
    limit = least + data.draw(st.integers(0, 20), "more than the least")
    steps = 2 * int(start[-1]) // batch
    simulation = Simulation(order, sizes, limit, batch, steps, ranks, seed)
    simulation.run()
    expected = order(np.arange(steps * batch)).tolist()
    assert simulation.delivered == [expected] * ranks
    fetches = [shard for _, shard in simulation.fetched]
    assert all(fetches.count(shard) <= 2 for shard in set(fetches)), "once in each of two epochs"
