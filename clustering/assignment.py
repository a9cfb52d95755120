"""Classes into groups of bounded size, and the local search that brings confused classes together.

C classes, G groups, r memberships per class.  member_of: int32 [C, r], the groups of each class, -1 where it has fewer.
"""

import numpy as np
from scipy.sparse import csr_array

_BLOCK_SCORES = 2**25  # entries of a dense [classes, G] block of scores


def assign(scores: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A group for each row within the groups' room, at a high total score: a full group keeps who would lose most.

    scores: [B, G], -inf where a row may not go (is overwritten).  room: int [G].
    Returns int32 [B], -1 where no room is left.
    """
    room = room.copy()
    assigned = np.full(len(scores), -1, dtype=np.int32)
    waiting = np.arange(len(scores))
    while len(waiting):
        scores[:, room <= 0] = -np.inf
        asked = scores[waiting]
        best = asked.argmax(axis=1)
        value = asked[np.arange(len(waiting)), best]
        possible = value > -np.inf
        waiting, asked, best, value = (
            waiting[possible],
            asked[possible],
            best[possible],
            value[possible],
        )
        if not len(waiting):
            break
        if asked.shape[1] > 1:
            asked[np.arange(len(waiting)), best] = -np.inf
            value = np.nan_to_num(value - asked.max(axis=1), posinf=np.finfo(np.float32).max)
        order = np.lexsort((-value, best))
        rank_in_group = np.arange(len(order)) - np.searchsorted(best[order], best[order])
        kept = order[rank_in_group < room[best[order]]]
        assigned[waiting[kept]] = best[kept]
        room -= np.bincount(best[kept], minlength=len(room))
        waiting = np.delete(waiting, kept)
    return assigned


def local_search(
    affinity: csr_array,
    member_of: np.ndarray,
    num_groups: int,
    max_size: int,
    similarity=None,
    sweeps: int = 20,
    batches: int = 8,
    seed: int = 0,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """Memberships that catch more affinity inside groups of at most max_size: member_of [C, r], start and result.

    A pair of classes counts once, however many groups they share.  Each step takes a random part of the classes out and
    puts them back where they meet the most affinity not yet met; the best state seen is returned.
    similarity(classes) -> [B, G], or None: breaks ties, at a weight below any affinity that matters; then comes room.
    wanted: int [C], how many of its r memberships each class is to have; None: all.
    """
    wanted = np.full(len(member_of), member_of.shape[1]) if wanted is None else wanted
    rng = np.random.default_rng(seed)
    member_of = member_of.astype(np.int32).copy()
    best, best_mass = member_of.copy(), captured_mass(affinity, member_of)
    stale = 0
    for _ in range(sweeps):
        for batch in np.array_split(rng.permutation(len(member_of)), min(batches, len(member_of))):
            _reassign(affinity, member_of, batch, num_groups, max_size, similarity, wanted)
        mass = captured_mass(affinity, member_of)
        stale = 0 if mass > best_mass * 1.0005 else stale + 1
        if mass > best_mass:
            best, best_mass = member_of.copy(), mass
        if stale >= 3:
            break
    return best


def join_where_it_pays(
    mutual: csr_array,
    affinity: csr_array,
    member_of: np.ndarray,
    num_groups: int,
    coverage: float,
    size_of,
    similarity=None,
    seed: int = 0,
) -> np.ndarray:
    """Further memberships, best first, until the groups catch `coverage` of `mutual`: member_of [C, r] -> [C, r].

    The -1 of member_of are what may be filled; a class that would meet nothing new joins nothing.  Each round lets the
    classes that gain most join one group more, an eighth of all at most, and searches anew, by affinity, where
    everybody belongs.
    size_of(memberships) -> the largest size that a group may have when there are so many memberships in all.
    """
    target = coverage * float(mutual.sum())
    wanted = (member_of >= 0).sum(axis=1)
    while (missing := target - captured_mass(mutual, member_of)) > 0:
        gains = np.where(wanted < member_of.shape[1], _best_gains(mutual, member_of, num_groups), 0)
        order = np.argsort(-gains, kind="stable")[
            : max(1, min(len(gains) // 8, np.count_nonzero(gains)))
        ]
        if gains[order[0]] <= 0:
            break
        # The masses are symmetric: who meets a gain is met as well.
        enough = 1 + np.searchsorted(np.cumsum(2 * gains[order]), missing)
        wanted[order[:enough]] += 1
        size = size_of(int(wanted.sum()))
        member_of = local_search(
            affinity, member_of, num_groups, size, similarity, sweeps=4, seed=seed, wanted=wanted
        )
        seed += 1
    return member_of


def _best_gains(mutual: csr_array, member_of: np.ndarray, num_groups: int) -> np.ndarray:
    """The most of `mutual` not yet met that each class would meet in one group more, [C]."""
    unmet = mutual.copy()
    row_of = np.repeat(np.arange(len(member_of)), np.diff(unmet.indptr))
    unmet.data[_share(member_of, member_of, row_of, unmet.indices)] = 0
    memberships = _one_hot(member_of, num_groups)
    return (unmet @ memberships).max(axis=1).toarray().ravel()


def captured_mass(affinity: csr_array, member_of: np.ndarray) -> float:
    """Sum of the affinities between classes that share a group."""
    total = 0.0
    rows = np.repeat(np.arange(affinity.shape[0]), np.diff(affinity.indptr))
    for start in range(0, affinity.nnz, 2**22):
        block = slice(start, start + 2**22)
        total += float(
            affinity.data[block][
                _share(member_of, member_of, rows[block], affinity.indices[block])
            ].sum()
        )
    return total


def sizes_of(member_of: np.ndarray, num_groups: int) -> np.ndarray:
    return np.bincount(member_of[member_of >= 0], minlength=num_groups)


def fill_empty(member_of: np.ndarray, num_groups: int) -> np.ndarray:
    """Each empty group is given one class, from the largest group then."""
    member_of = member_of.copy()
    sizes = sizes_of(member_of, num_groups)
    for group in np.flatnonzero(sizes == 0):
        giver = sizes.argmax()
        row, column = np.argwhere(member_of == giver)[-1]
        member_of[row, column] = group
        sizes[giver] -= 1
        sizes[group] += 1
    return member_of


def _reassign(affinity, member_of, batch, num_groups, max_size, similarity, wanted) -> None:
    """Take the batch's memberships back and give them anew, in place."""
    total = np.float32(affinity.sum())
    all_sizes = sizes_of(member_of, num_groups)
    sizes = all_sizes - sizes_of(member_of[batch], num_groups)
    # A group that would fall below half the mean keeps its members: a specialist for three classes is a job wasted.
    small = 2 * sizes < all_sizes.mean()
    memberships = _one_hot(member_of, num_groups)
    per_block = max(1, _BLOCK_SCORES // num_groups)
    for start in range(0, len(batch), per_block):
        block = batch[start : start + per_block]
        rows = affinity[block]
        row_of = np.repeat(np.arange(len(block)), np.diff(rows.indptr))
        ties = (
            np.float32(1e-6 * total / len(member_of))
            * (max_size - sizes).astype(np.float32)
            / max_size
        )
        if similarity is not None:
            ties = ties + similarity(block)
        if small.any():
            kept = _one_hot(member_of[block], num_groups).toarray()
            ties = ties + (kept * small) * (1 + total)
        new = np.full((len(block), member_of.shape[1]), -1, dtype=np.int32)
        for turn in range(member_of.shape[1]):
            scores = (rows @ memberships).toarray() + ties
            for previous in range(turn):
                taken = np.flatnonzero(new[:, previous] >= 0)
                scores[taken, new[taken, previous]] = -np.inf
            scores[wanted[block] <= turn] = -np.inf
            new[:, turn] = assign(scores, max_size - sizes)
            sizes = sizes + sizes_of(new[:, turn], num_groups)
            if turn + 1 < member_of.shape[1]:
                # What is met already counts no more.
                rows.data[_share(new[:, [turn]], member_of, row_of, rows.indices)] = 0
        member_of[block] = new


def _one_hot(member_of: np.ndarray, num_groups: int) -> csr_array:
    """Membership as numbers, float32 csr [len(member_of), G]."""
    present = member_of >= 0
    pointers = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    groups = member_of[present]
    return csr_array(
        (np.ones(len(groups), np.float32), groups, pointers), shape=(len(member_of), num_groups)
    )


def _share(mine: np.ndarray, others: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Whether classes i, by the memberships `mine`, and j, by `others`, have a group in common, bool [len(i)]."""
    share = np.zeros(len(i), dtype=bool)
    for column in mine.T:
        group = column[i]
        for other in others.T:
            share |= (group == other[j]) & (group >= 0)
    return share
