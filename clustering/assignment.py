"""Classes into groups of bounded size, and the local search that brings confused classes together.

C classes, G groups, r memberships per class.
member_of: int32 [C, r], the groups of each class, -1 where it has fewer.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from .sparse import entries

_BLOCK_SCORES = 2**25  # entries of a dense [classes, G] block of scores
_BLOCK_ENTRIES = 2**22
_BATCHES = 8  # parts of the classes that one sweep takes out and puts back, one after the other

Similarity = Callable[[np.ndarray], np.ndarray]  # classes [B] -> [B, G]


def assign(scores: np.ndarray, room: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """A group for each row within the groups' room, at a high total score.

    A full group keeps the rows that would lose most elsewhere. Heavy rows choose before those of
    less than half their weight, which fit into what is left.
    scores: [B, G], -inf where a row may not go.  room: int [G].  weights: int [B], the room that
    each row takes. None: 1 each.
    Returns int32 [B], -1 where no room is left.
    """
    room = room.copy()
    assigned = np.full(len(scores), -1, dtype=np.int32)
    if weights is None:
        weights = np.ones(len(scores), np.int64)
    powers_of_two = np.frexp(weights)[1]
    for power in np.unique(powers_of_two)[::-1]:
        _let_choose(np.flatnonzero(powers_of_two == power), scores, room, weights, assigned)
    return assigned


def _let_choose(
    waiting: np.ndarray,
    scores: np.ndarray,
    room: np.ndarray,
    weights: np.ndarray,
    assigned: np.ndarray,
) -> None:
    """Give the rows `waiting` their groups in `assigned`, and take their weights from `room`."""
    while len(waiting):
        bids, weight = scores[waiting], weights[waiting]
        tight = np.flatnonzero(room < weight.max())
        bids[:, tight] = np.where(weight[:, None] > room[tight], -np.inf, bids[:, tight])
        best = bids.argmax(axis=1)
        value = bids[np.arange(len(waiting)), best]
        possible = value > -np.inf
        waiting, bids, weight = waiting[possible], bids[possible], weight[possible]
        best, value = best[possible], value[possible]
        if not len(waiting):
            break
        if bids.shape[1] > 1:
            bids[np.arange(len(waiting)), best] = -np.inf
            loss = value - bids.max(axis=1)
            value = np.nan_to_num(loss, posinf=float(np.finfo(np.float32).max))
        order = np.lexsort((-value, best))
        taken = _running_sums(weight[order], best[order])
        kept = order[taken <= room[best[order]]]
        assigned[waiting[kept]] = best[kept]
        room -= _sums(best[kept], weight[kept], len(room))
        waiting = np.delete(waiting, kept)


def place(scores: np.ndarray, room: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Like `assign`, but every row gets a group: if none has room, the one with most room.

    A row that fits nowhere chooses first, so that a class above the bound is alone in its group.
    scores [B, G] is overwritten.  Returns int32 [B].
    """
    room = room.copy()
    assigned = np.full(len(scores), -1, dtype=np.int32)
    too_heavy = np.flatnonzero(weights > room.max())
    _take_the_widest(too_heavy, room, weights, assigned)
    scores[too_heavy] = -np.inf
    fitting = assign(scores, room, weights)
    fits = fitting >= 0
    assigned[fits] = fitting[fits]
    room -= _sums(fitting[fits], weights[fits], len(room))
    _take_the_widest(np.flatnonzero(assigned < 0), room, weights, assigned)
    return assigned


def _take_the_widest(
    rows: np.ndarray, room: np.ndarray, weights: np.ndarray, assigned: np.ndarray
) -> None:
    """Give each row, the heaviest first, the group with most room, in `assigned` and `room`."""
    for row in rows[np.argsort(-weights[rows], kind="stable")]:
        assigned[row] = room.argmax()
        room[assigned[row]] -= weights[row]


def _sums(groups: np.ndarray, weights: np.ndarray, num_groups: int) -> np.ndarray:
    """Weight in each group, int64 [G]."""
    return np.bincount(groups, weights, minlength=num_groups).astype(np.int64)


def _running_sums(weights: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Running weight within each group, over rows ordered by group, each row included."""
    sums = np.cumsum(weights)
    first = np.searchsorted(groups, groups)
    return sums - sums[first] + weights[first]


def local_search(
    affinity: csr_array,
    member_of: np.ndarray,
    num_groups: int,
    max_size: int,
    similarity: Similarity | None = None,
    sweeps: int = 20,
    seed: int = 0,
    wanted: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Memberships that catch more affinity inside groups of at most max_size.

    member_of [C, r] is the start, and the result has its shape. A pair of classes counts once,
    however many groups they share. Each step takes a random part of the classes out and puts them
    back where they meet the most affinity not yet met. The best state seen is returned: the one
    that catches most, of those least above max_size.
    similarity: breaks ties, at a weight below any affinity that matters. After it, room does.
    wanted: int [C], how many of its r memberships each class is to have. None: all.
    weights: int [C], what each class counts for in a group's size. None: 1 each.
    """
    if wanted is None:
        wanted = np.full(len(member_of), member_of.shape[1])
    if weights is None:
        weights = np.ones(len(member_of), np.int64)
    num_batches = min(_BATCHES, len(member_of))
    rng = np.random.default_rng(seed)
    member_of = member_of.astype(np.int32).copy()
    best = member_of.copy()
    best_mass = captured_mass(affinity, member_of)
    best_excess = _excess(member_of, num_groups, weights, max_size)
    stale = 0
    for _ in range(sweeps):
        for batch in np.array_split(rng.permutation(len(member_of)), num_batches):
            _reassign(affinity, member_of, batch, num_groups, max_size, similarity, wanted, weights)
        mass = captured_mass(affinity, member_of)
        excess = _excess(member_of, num_groups, weights, max_size)
        if excess < best_excess or (excess == best_excess and mass > best_mass * 1.0005):
            stale = 0
        else:
            stale += 1
        if excess < best_excess or (excess == best_excess and mass > best_mass):
            best, best_mass, best_excess = member_of.copy(), mass, excess
        if stale >= 3:
            break
    return best


def join_where_it_pays(
    mutual: csr_array,
    affinity: csr_array,
    member_of: np.ndarray,
    num_groups: int,
    coverage: float,
    max_size: Callable[[np.ndarray], int],
    similarity: Similarity | None = None,
    seed: int = 0,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Further memberships, best first, until the groups catch `coverage` of `mutual`.

    member_of [C, r]: its -1 are what may be filled. The result has its shape. A class that would
    meet nothing new joins nothing. Each round lets the classes that gain most join one group more,
    an eighth of all at most. Then it searches anew, by affinity, where everybody belongs.
    max_size(wanted): the largest size of a group when each class has so many memberships.
    weights: as in `local_search`.
    """
    target = coverage * float(mutual.sum())
    wanted = (member_of >= 0).sum(axis=1)
    while (missing := target - captured_mass(mutual, member_of)) > 0:
        has_room = wanted < member_of.shape[1]
        gains = np.where(has_room, _best_gains(mutual, member_of, num_groups), 0)
        most = max(1, min(len(gains) // 8, np.count_nonzero(gains)))
        order = np.argsort(-gains, kind="stable")[:most]
        if gains[order[0]] <= 0:
            break
        # The masses are symmetric: who meets a gain is met as well.
        enough = 1 + np.searchsorted(np.cumsum(2 * gains[order]), missing)
        wanted[order[:enough]] += 1
        member_of = local_search(
            affinity,
            member_of,
            num_groups,
            max_size(wanted),
            similarity,
            sweeps=4,
            seed=seed,
            wanted=wanted,
            weights=weights,
        )
        seed += 1
    return member_of


def captured_mass(affinity: csr_array, member_of: np.ndarray) -> float:
    """Sum of the affinities between classes that share a group."""
    rows, columns, masses = entries(affinity)
    total = 0.0
    for start in range(0, len(masses), _BLOCK_ENTRIES):
        block = slice(start, start + _BLOCK_ENTRIES)
        met = _share_a_group(member_of, member_of, rows[block], columns[block])
        total += float(masses[block][met].sum())
    return total


def sizes_of(
    member_of: np.ndarray, num_groups: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Classes per group, or the sum of their weights int [len(member_of)]. int [G]."""
    present = member_of >= 0
    if weights is None:
        return np.bincount(member_of[present], minlength=num_groups)
    each = np.broadcast_to(weights.reshape(-1, *[1] * (member_of.ndim - 1)), member_of.shape)
    return _sums(member_of[present], each[present], num_groups)


def _excess(member_of: np.ndarray, num_groups: int, weights: np.ndarray, max_size: int) -> int:
    """How far all groups together are above max_size."""
    return int(np.maximum(sizes_of(member_of, num_groups, weights) - max_size, 0).sum())


def fill_empty(member_of: np.ndarray, num_groups: int) -> np.ndarray:
    """Each empty group is given one class, from the group that is then the largest."""
    member_of = member_of.copy()
    sizes = sizes_of(member_of, num_groups)
    for group in np.flatnonzero(sizes == 0):
        giver = sizes.argmax()
        row, column = np.argwhere(member_of == giver)[-1]
        member_of[row, column] = group
        sizes[giver] -= 1
        sizes[group] += 1
    return member_of


def random_blocks(num_classes: int, num_groups: int, seed: int) -> list[np.ndarray]:
    """All classes in random order, in blocks whose dense scores [B, G] fit the memory."""
    order = np.random.default_rng(seed).permutation(num_classes)
    return np.array_split(order, max(1, math.ceil(num_classes * num_groups / _BLOCK_SCORES)))


def _best_gains(mutual: csr_array, member_of: np.ndarray, num_groups: int) -> np.ndarray:
    """The most of `mutual` not yet met that each class would meet in one group more, [C]."""
    unmet = mutual.copy()
    rows, columns, masses = entries(unmet)
    masses[_share_a_group(member_of, member_of, rows, columns)] = 0
    gains = csr_array(unmet @ _one_hot(member_of, num_groups))
    return gains.max(axis=1).toarray().ravel()


def _reassign(
    affinity: csr_array,
    member_of: np.ndarray,
    batch: np.ndarray,
    num_groups: int,
    max_size: int,
    similarity: Similarity | None,
    wanted: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Take the batch's memberships back and give them anew, in place."""
    total = np.float32(affinity.sum())
    all_sizes = sizes_of(member_of, num_groups, weights)
    sizes = all_sizes - sizes_of(member_of[batch], num_groups, weights[batch])
    # A group that would fall below half the mean keeps its classes: a specialist for three classes
    # is a job wasted.
    small = 2 * sizes < all_sizes.mean()
    memberships = _one_hot(member_of, num_groups)
    room_weight = np.float32(1e-6 * total / len(member_of))
    per_block = max(1, _BLOCK_SCORES // num_groups)
    for start in range(0, len(batch), per_block):
        block = batch[start : start + per_block]
        ties = room_weight * (max_size - sizes).astype(np.float32) / max_size
        if similarity is not None:
            ties = ties + similarity(block)
        if small.any():
            kept = _one_hot(member_of[block], num_groups).toarray()
            ties = ties + (kept * small) * (1 + total)
        member_of[block], sizes = _placed(
            affinity[block],
            memberships,
            member_of,
            ties,
            wanted[block],
            weights[block],
            sizes,
            max_size,
        )


def _placed(
    unmet: csr_array,
    memberships: csr_array,
    member_of: np.ndarray,
    ties: np.ndarray,
    wanted: np.ndarray,
    weights: np.ndarray,
    sizes: np.ndarray,
    max_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """New memberships [B, r] of a block of classes, and the groups' sizes [G] with them.

    unmet: the block's affinities to all classes, csr [B, C]. What is met is set to 0 in place.
    memberships: csr [C, G], those of all classes before.  ties: [G] or [B, G].  wanted, weights:
    int [B].
    """
    rows, columns, masses = entries(unmet)
    turns = member_of.shape[1]
    placed = np.full((len(wanted), turns), -1, dtype=np.int32)
    for turn in range(turns):
        scores = csr_array(unmet @ memberships).toarray() + ties
        for previous in range(turn):
            taken = np.flatnonzero(placed[:, previous] >= 0)
            scores[taken, placed[taken, previous]] = -np.inf
        scores[wanted <= turn] = -np.inf
        # Every class is in a group. A further membership is given up where no room is left.
        give = assign if turn else place
        placed[:, turn] = give(scores, max_size - sizes, weights)
        sizes = sizes + sizes_of(placed[:, turn], len(sizes), weights)
        if turn + 1 < turns:
            # What is met already counts no more.
            masses[_share_a_group(placed[:, [turn]], member_of, rows, columns)] = 0
    return placed, sizes


def _one_hot(member_of: np.ndarray, num_groups: int) -> csr_array:
    """Membership as numbers, float32 csr [len(member_of), G]."""
    present = member_of >= 0
    pointers = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    groups = member_of[present]
    ones = np.ones(len(groups), np.float32)
    return csr_array((ones, groups, pointers), shape=(len(member_of), num_groups))


def _share_a_group(
    member_of: np.ndarray, others: np.ndarray, i: np.ndarray, j: np.ndarray
) -> np.ndarray:
    """Whether classes i, by `member_of`, and j, by `others`, have a group in common, bool."""
    share = np.zeros(len(i), dtype=bool)
    for column in member_of.T:
        group = column[i]
        for other in others.T:
            share |= (group == other[j]) & (group >= 0)
    return share
