"""Ask an ensemble of specialists about many rows, without a row of C numbers for each.

The generalist runs on a few rows at a time, and of its answer remain the classes of the row's
active groups, its likeliest others and sums over the rest (ensemble/listed.py).  Then each
specialist that somebody needs runs once on all of its rows.  Eq. 5 joins them exactly: the rest is
one pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from networks import Branch, Classifier, top_k
from networks.branches import GeneralOutput

from .gating import most_active, rows_of_specialists
from .host_reads import to_device
from .listed import Listed
from .patterns import set_patterns
from .predictions import (
    SpecialistPredictions,
    TabledPredictions,
    Weights,
    active_sets,
    checked_weights,
    softmax,
    without_dustbin,
)
from .sparse import join_listed

if TYPE_CHECKING:
    from .specialist_ensemble import SpecialistEnsemble

# From so many classes on the stages ask an ensemble in this way.
SPARSE_FROM = 2**14
# Numbers [rows, C] of the generalist at a time: as many as a cache holds. Of many classes, whose
# rows of the head are read once for all of them, so many rows, unless these are more numbers.
CACHED_NUMBERS, FEWEST_ROWS = 2**21, 32
GENERAL_NUMBERS, GENERAL_ROWS = 2**23, 2**8
NONE = np.zeros(0, np.int64)
# Rows that one specialist is asked about at a time.
SPECIAL_ROWS = 512
# What is held of the rows between generalist and specialists.
BLOCK_BYTES = 2**28
BLOCK_ROWS = 2**14


@dataclass(frozen=True)
class Wanted:
    """What is to be known of each row.

    top: so many of the likeliest classes are listed, whatever weights join them.
    powers, moments: of the sums over the rest, as in Listed.of.
    """

    top: int
    powers: tuple[float, ...] = ()
    moments: bool = False


@dataclass
class ListedAnswers:
    """What generalist and specialists say about some rows, before they are joined.

    general: the generalist's distribution.  special: of the specialists.  active: bool [b, M].
    """

    general: Listed
    special: SpecialistPredictions
    groups: ClassGroups
    active: Tensor

    def join(self, weights: Weights | None) -> Listed:
        """q by eq. 5. weights: [1 + M], the generalist's first."""
        general = self.general
        w = checked_weights(weights, len(self.groups.members), self.active.device)
        values, tail = join_listed(
            general.indices,
            general.values,
            general.tail,
            self.special,
            self.groups,
            self.active,
            w,
        )
        return general.with_values(values, tail)


@dataclass
class _Part:
    """Rows that the generalist ran on together.

    listed: of its answer.  reached, at_cut: as in SpecialistEnsemble.run_trunk.  branch: of
    each specialist of these rows what a branch reads of the logits.
    """

    start: int
    listed: Listed
    active: Tensor
    reached: dict[int, Tensor]
    at_cut: Tensor
    branch: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.active)


@torch.no_grad()
def ask_in_blocks(
    ensemble: SpecialistEnsemble, inputs: Tensor, wanted: Wanted, also: Tensor | None = None
) -> Iterator[ListedAnswers]:
    """Everybody's answers about some rows after the other, in order.

    Parameters
    ----------
    ensemble : SpecialistEnsemble
        Joined by eq. 5, without a shortlist.
    inputs : Tensor [B, ...]
        As decoded.
    wanted : Wanted
    also : int64 Tensor [B], optional
        A class of each row that is listed too, its label say.

    Yields
    ------
    ListedAnswers
    """
    block = rows_of_block(ensemble, wanted.top)
    for start in range(0, len(inputs), block):
        rows = slice(start, start + block)
        own = None if also is None else also[rows]
        yield from _ask_block(ensemble, inputs[rows], wanted, own)


def rows_of_block(ensemble: SpecialistEnsemble, top: int) -> int:
    """How many rows are asked about together, so that a specialist is woken once for all of them.

    What is held of a row: its input, what the trunk has where copies part from it, and the listed
    classes.
    """
    raw = ensemble.generalist.zero_input()
    _, reached, at_cut = ensemble.run_trunk(raw)
    kept = [raw, at_cut, *(x for depth, x in reached.items() if depth)]
    of_input = sum(x.nbytes for x in kept)
    largest = max(map(len, ensemble.groups.members))
    listed = top + largest * most_active(ensemble.groups, ensemble.gate, ensemble.max_specialists)
    entries = 16 * min(listed, ensemble.groups.num_classes)
    return min(BLOCK_ROWS, max(GENERAL_ROWS, BLOCK_BYTES // (of_input + entries)))


def general_rows(classes: int) -> int:
    """Rows that the generalist runs on at a time."""
    return max(1, min(GENERAL_ROWS, cached_rows(classes), GENERAL_NUMBERS // classes))


def cached_rows(classes: int) -> int:
    """Rows [rows, C] that a CPU's cache holds, but no handful, for which a network hardly pays."""
    return max(FEWEST_ROWS, CACHED_NUMBERS // classes)


def _ask_block(
    ensemble: SpecialistEnsemble, raw: Tensor, wanted: Wanted, also: Tensor | None
) -> Iterator[ListedAnswers]:
    raw = torch.as_tensor(raw).to(ensemble.device)
    size = general_rows(ensemble.groups.num_classes)
    parts = [
        _ask_generalist(ensemble, raw[start : start + size], start, wanted, also)
        for start in range(0, len(raw), size)
    ]
    table, specialist, row = _ask_specialists(ensemble, raw, parts)
    sizes = ensemble.groups.sizes
    for part in parts:
        here = (row >= part.start) & (row < part.end)
        rows = torch.zeros(part.active.shape, dtype=torch.int64, device=table.device)
        rows[row[here] - part.start, specialist[here]] = here.nonzero()[:, 0]
        special = TabledPredictions(table, rows, sizes)
        yield ListedAnswers(part.listed, special, ensemble.groups, part.active)


def _ask_generalist(
    ensemble: SpecialistEnsemble, raw: Tensor, start: int, wanted: Wanted, also: Tensor | None
) -> _Part:
    features, reached, at_cut = ensemble.run_trunk(raw)
    logits = ensemble.generalist.logits_of(features)
    ensemble.count("trunk")
    branch = {}
    if ensemble.has_branches:
        general = GeneralOutput.of(logits)
        p, active = general.p, ensemble.open_gate(general.p)
        branch = _read_by_branches(general, ensemble.groups, active)
    else:
        p = softmax(logits, 1.0)
        active = ensemble.open_gate(p)
    if ensemble.temperatures[0] != 1:
        p = softmax(logits, ensemble.temperatures[0])
    own = None if also is None else also[start : start + len(raw)].to(p.device)
    indices = listed_classes(p, ensemble.groups, active, wanted.top, own)
    listed = Listed.of(p, indices, wanted.powers, wanted.moments)
    reached = {depth: x for depth, x in reached.items() if depth}
    return _Part(start, listed, active, reached, at_cut, branch)


def listed_classes(
    p: Tensor, groups: ClassGroups, active: Tensor, top: int, also: Tensor | None
) -> Tensor:
    """Every class of each row's active groups, `also` [b], and the likeliest: int64 [b, k].

    k is the same in all rows.  At least `top` of those outside the groups are listed.
    """
    own, counts = own_classes(groups, active, also)
    is_own = torch.arange(own.shape[1], device=p.device) < counts[:, None]
    most, least = int(counts.max()), int(counts.min())
    # They are lowered below every probability for as long as it takes to find the largest others.
    values = p.gather(1, own)
    padding_of_none = ~is_own & (counts == 0)[:, None]
    p.scatter_(1, own, torch.where(padding_of_none, values, -1.0))
    k = min(most + top, groups.num_classes)
    _, others = top_k(p, k - least)
    p.scatter_(1, own, values)
    # A row with fewer classes of its own than another has more of these.
    indices = torch.empty(len(p), k, dtype=torch.int64, device=p.device)
    first = torch.arange(k, device=p.device) < counts[:, None]
    indices[first] = own[is_own]
    indices[~first] = others[torch.arange(k - least, device=p.device) < k - counts[:, None]]
    return indices


def own_classes(groups: ClassGroups, active: Tensor, also: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distinct classes of each row's active groups, and `also` [b]: (int64 [b, U], counts [b]).

    Behind a row's own classes stands its first one again. Where it has none, class 0.
    """
    sets, set_of_row = active_sets(active.cpu().numpy())
    unions = [set_patterns(groups, each).union[0] if each else NONE for each in sets]
    lengths = np.array([len(union) for union in unions])
    is_real = np.arange(lengths.max() + 1) < lengths[:, None]
    width = is_real.shape[1]
    table = np.zeros(is_real.shape, dtype=np.int64)
    table[is_real] = np.concatenate(unions)
    table = np.where(is_real, table, table[:, :1])
    of_row = to_device(set_of_row, active.device)
    own = to_device(table, active.device).index_select(0, of_row)
    counts = to_device(lengths, active.device).index_select(0, of_row)
    if also is None:
        return own, counts
    is_real = torch.arange(width, device=own.device) < counts[:, None]
    new = ~((own == also[:, None]) & is_real).any(1)
    own[new, counts[new]] = also[new]
    none = new & (counts == 0)
    own[none] = also[none, None]
    return own, counts + new


def _read_by_branches(
    general: GeneralOutput, groups: ClassGroups, active: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    read = {}
    for m, rows in rows_of_specialists(active.cpu().numpy(), active.device):
        classes = to_device(groups.members[m], active.device)
        read[m] = general.own_and_rest(classes, rows)
    return read


def _ask_specialists(
    ensemble: SpecialistEnsemble, raw: Tensor, parts: list[_Part]
) -> tuple[Tensor, Tensor, Tensor]:
    """(what they say [T, width], padded with zeros, the specialist and the row of each, int64 [T])

    Specialist by specialist, and of each the rows of the block that need it.
    """
    active = torch.cat([part.active for part in parts])
    row, specialist = active.nonzero(as_tuple=True)
    order = specialist.argsort(stable=True)
    row, specialist = row[order], specialist[order]
    numbers, counts = specialist.unique_consecutive(return_counts=True)
    depths = sorted(set.intersection(*(set(part.reached) for part in parts)))
    reached = {depth: torch.cat([part.reached[depth] for part in parts]) for depth in depths}
    at_cut = torch.cat([part.at_cut for part in parts]) if ensemble.has_branches else None
    for part in parts:
        part.reached = {}
    sizes = ensemble.groups.sizes
    width = max((int(sizes[m]) for m in numbers.tolist()), default=0) + 1
    table = parts[0].listed.values.new_zeros(len(row), width)
    end = 0
    for m, rows in zip(numbers.tolist(), row.split(counts.tolist()), strict=True):
        network = ensemble.specialists[m]
        if isinstance(network, Branch):
            assert at_cut is not None
            ensemble.check_group(m, network)
            read = [part.branch[m] for part in parts if m in part.branch]
            own, rest = (torch.cat(each) for each in zip(*read, strict=True))
            logits = network(at_cut[rows], own, rest)
            ensemble.count(m)
        else:
            logits = _of_copy(ensemble, m, network, raw, rows, reached)
        p = softmax(logits, ensemble.temperatures[1 + m])
        if sizes[m] == ensemble.groups.num_classes:
            p = without_dustbin(p)
        table[end : end + len(rows), : p.shape[1]] = p
        end += len(rows)
    return table, specialist, row


def _of_copy(
    ensemble: SpecialistEnsemble,
    m: int,
    network: Classifier,
    raw: Tensor,
    rows: Tensor,
    reached: dict[int, Tensor],
) -> Tensor:
    pieces = [
        network.logits_of(ensemble.features_of(m, network, raw, some, reached))
        for some in rows.split(SPECIAL_ROWS)
    ]
    return torch.cat(pieces)
