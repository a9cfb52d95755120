"""Generalist, branches and eq. 5 as one program, with shapes that do not depend on the data.

    B, C   rows of a batch, classes of the whole label set
    M, K   branches, classes of the largest
    A      slots: branches that one row may ask, at most
    P      patterns: which of a row's slots hold a class, 2^A

Only the branches that a row asks are computed for it.  A slot that a row does not need weighs 0.
A row's entries are the classes of its slots, [B, A, K].  All that is done for them is done on
[B, A, K].  [B, C] is passed over by the softmax, by two maxima and by one product. Entries are read
from it once and written to it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clustering.groups import ClassGroups
from networks import Branch
from networks.branches import LEAST_SHARE
from networks.cutting import cut_at
from networks.gathered_rows import head_logits, most_probable
from networks.stacked_branches import StackedBranches

from .gating import holders_of
from .newton import Membership, solve
from .specialist_ensemble import SpecialistEnsemble

MOST_SLOTS = 8
TILE = 8
MOST_OWN_BLOCKS = 16  # branches whose own blocks run on every row
FEW_PAIRS = 4
# Patterns up to which their sums are as many masked sums, rather than one scatter.
FEW_PATTERNS = 4
# What a row's share of the classes outside is divided by, where there are none.
LEAST_MASS = 0.25
# By so little the classes outside may be multiplied: a probability that is nothing in float32 sums.
LEAST_SCALE = 1e-30


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index], as runtimes do it fast."""
    if table.dim() == 2:
        return F.embedding(index, table)
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


# ---- the classes outside


class Outside(NamedTuple):
    """A row's classes that are no entries.

    share: [B, C], a softmax over them, and of no meaning at the entries.
    mass: what `share` sums to over them, [B, 1]: 1/2 to 1, or 0 where there are none.
    log_sum: the log of the sum of exp z over them, [B, 1].
    """

    share: Tensor
    mass: Tensor
    log_sum: Tensor


def outside_softmax(
    logits: Tensor, entries: Tensor, one: Tensor, may_be_none: bool = True
) -> Outside:
    """The softmax of the classes that are no entries, and the log of what they sum to.

    The sum is as exact as the logits are, however small it is beside the entries': it is no
    difference from 1.  One entry gets the largest logit outside, m.  Its part s of the softmax is
    1 / (S + 1) with S the sum of exp(z - m), which is at least 1.

    logits: float32 [B, C].  entries: int64 [B, U], of which some may repeat.  one: int64 [B, 1], an
    entry of each row.  may_be_none: whether a row's entries may be all classes.
    """
    # Added to what is read there, as runtimes need a tensor of that shape.
    lowest = logits.gather(1, entries) - torch.inf
    masked = logits.scatter(1, entries, lowest)
    largest = masked.amax(1, keepdim=True)
    if may_be_none:
        largest = largest.clamp_min(torch.finfo(logits.dtype).min)
    share = masked.scatter(1, one, largest).softmax(1)
    part = share.gather(1, one)
    mass = 1 - part
    return Outside(share, mass, largest + (mass / part).log())


# ---- pairs of a row and a branch


class Tiles(NamedTuple):
    """Pairs of a row and a branch, TILE of one branch together: one product is for all of them.

    N pairs. M branches, each of which has one tile. T further tiles, as many as the data need.

    pairs: int64 [M + T, TILE], which pairs are in a tile. 0 where it is not full.
    further: int64 [T], the branches of the further tiles.
    places: int64 [N], where each pair is among the (M + T) TILE. 0 for one that is not needed.
    """

    pairs: Tensor
    further: Tensor
    places: Tensor

    @classmethod
    def of(cls, branch: Tensor, count: int) -> Tiles:
        """branch: int64 [N]. `count` is a pair that is not needed."""
        ordered, order = branch.sort()
        per_branch = torch.zeros(count + 1, dtype=torch.int64, device=branch.device)
        per_branch = per_branch.scatter_add(0, branch, torch.ones_like(branch))
        more = ((per_branch[:count] - 1) // TILE).clamp_min(0)
        ends = more.cumsum(0)
        # A pair's rank in its branch is its place in order less the pairs of branches before.
        before = (per_branch.cumsum(0) - per_branch)[ordered]
        rank = torch.arange(branch.shape[0], device=branch.device) - before
        own = ordered.clamp_max(count - 1)
        tile = torch.where(rank < TILE, own, count - 1 + (ends - more)[own] + rank // TILE)
        # No more tiles than this.  Two that nobody needs are there because an exporter would take
        # lengths of 0 and 1 for constants.
        most = count + branch.shape[0] // TILE + 2
        place = torch.where(ordered < count, tile * TILE + rank % TILE, most * TILE)
        pairs = torch.zeros(most * TILE + 1, dtype=torch.int64, device=branch.device)
        pairs = pairs.scatter(0, place, order)[:-1].unflatten(0, (most, TILE))
        number = torch.arange(most - count, device=branch.device)
        live = (number < ends[-1].clamp_min(1)).nonzero()[:, 0]
        further = (ends <= live[:, None]).sum(1).clamp_max(count - 1)
        known = torch.where(ordered < count, place, 0)
        places = torch.zeros_like(branch).scatter(0, order, known)
        pairs = torch.cat([pairs[:count], pairs[count:].index_select(0, live)])
        return cls(pairs, further, places)


class Corrections(nn.Module):
    """r / T of the branches that rows ask.  Biases are a further input that is 1.

    hidden: W1 and b1, [M, D + 1, E + 1], whose last column passes the 1 on.
    correction: W2 and b2 over T, [M, E + 1, K + 1], padded by the first class's column.
    """

    hidden: Tensor
    correction: Tensor

    def __init__(
        self,
        stack: StackedBranches,
        columns: Tensor,
        temperatures: Tensor,
        shift: Tensor,
        may_be_none: bool,
    ):
        """columns: int64 [M, K + 1], which of the stack's.  temperatures: [M].

        shift: [M, K + 1], is added to r / T.  may_be_none: whether a slot may be M, no branch.
        """
        super().__init__()
        hidden = torch.cat([stack.hidden.weight.mT, stack.hidden.bias[:, None]], 1).detach()
        one = torch.zeros_like(hidden[:, :, :1])
        one[:, -1] = 1
        rows = torch.cat([stack.correction.weight, stack.correction.bias[..., None]], 2).detach()
        rows = rows.gather(1, columns[..., None].expand(-1, -1, rows.shape[2]))
        rows = rows.float() / temperatures[:, None, None]
        rows[..., -1] += shift
        tables = {"hidden": torch.cat([hidden, one], 2), "correction": rows.mT.contiguous()}
        tables = {name: table.float() for name, table in tables.items()}
        self.may_be_none = may_be_none
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def of_few(self, h: Tensor, slots: Tensor) -> Tensor:
        """Layers gathered for each pair: h [N, D + 1], slots [N] -> [N, K + 1]."""
        if self.may_be_none:
            slots = slots.clamp_max(len(self.hidden) - 1)
        x = h[:, None] @ self.hidden.index_select(0, slots)
        return (x.relu() @ self.correction.index_select(0, slots))[:, 0]

    def of_many(self, h: Tensor, slots: Tensor) -> Tensor:
        """A product for each branch, and layers gathered where many rows ask one."""
        count = len(self.hidden)
        tiles = Tiles.of(slots, count)
        x = rows_of(h, tiles.pairs)
        first = self._of_tiles(x[:count], self.hidden, self.correction)
        layers = [table.index_select(0, tiles.further) for table in (self.hidden, self.correction)]
        further = self._of_tiles(x[count:], *layers)
        return torch.cat([first, further]).flatten(0, 1).index_select(0, tiles.places)

    @staticmethod
    def _of_tiles(x: Tensor, hidden: Tensor, correction: Tensor) -> Tensor:
        return (x @ hidden).relu() @ correction


# ---- the program


def own_blocks(branches: Sequence[Branch]) -> nn.ModuleList:
    """The blocks that branches have of their own, which a program runs on every row.

    Raises ValueError for more branches than one program should hold with them.
    """
    if not branches[0].spec.head["blocks"]:
        return nn.ModuleList()
    if len(branches) > MOST_OWN_BLOCKS:
        raise ValueError(
            f"{len(branches)} branches with blocks of their own are too many for one "
            f"program ({MOST_OWN_BLOCKS}); export the bundle"
        )
    return nn.ModuleList(branch.blocks for branch in branches)


class Entries(NamedTuple):
    """The classes of each row's slots.  Padding repeats a class of the row.

    slots: int64 [B, A], the branches.  on: bool [B, A], whether the row asks them.
    classes: int64 [B, A, K].
    counted: float32 [B, A, K], 1 where an entry stands for its class, 0 where it repeats it.
    inside: of each slot a, bool [B, A, K] whether it holds an entry's class.
    column: of each slot a, int64 [B, A, K], which column of it.
    pattern: int64 [B, A, K], the sum of 2^a over the slots that hold an entry's class.
    """

    slots: Tensor
    on: Tensor
    classes: Tensor
    counted: Tensor
    inside: list[Tensor]
    column: list[Tensor]
    pattern: Tensor


class BranchProgram(nn.Module):
    """The ensemble of branches: raw [B, ...] -> q [B, C].

    Parameters
    ----------
    ensemble : SpecialistEnsemble
        Its specialists are branches.  The program stays on its device.
    portable : bool
        Solve eq. 5 by products and sums alone, as ONNX needs it.

    Raises
    ------
    ValueError
        For another combiner than eq. 5, and for more branches a row, or with blocks of their own,
        than one program should hold.
    """

    holders: Tensor
    classes: Tensor
    valid: Tensor
    covers_all: Tensor
    times: Tensor
    log_times: Tensor
    special_weights: Tensor
    shares: Tensor
    inverse_temperatures: Tensor
    floor: Tensor
    outside: Tensor
    other_branch: Tensor
    other_column: Tensor

    def __init__(self, ensemble: SpecialistEnsemble, portable: bool = False):
        super().__init__()
        if ensemble.combine != "kl":
            raise ValueError(f"combine = {ensemble.combine!r} has no program; only kl has")
        numbers = list(ensemble.specialists)
        specialists = [ensemble.specialists[m] for m in numbers]
        branches = [each for each in specialists if isinstance(each, Branch)]
        assert len(branches) == len(specialists), "copies have a program of their own"
        self.portable = portable
        self.generalist = ensemble.generalist
        self.gate = ensemble.gate
        self.general_temperature = ensemble.temperatures[0]
        self._cut = cut_at(self.generalist.trunk, branches[0].spec.head["blocks"])
        self.own_blocks = own_blocks(branches)
        self.count = len(branches)
        self._keep_tables(ensemble, numbers, StackedBranches(branches))

    def _keep_tables(
        self, ensemble: SpecialistEnsemble, numbers: list[int], stack: StackedBranches
    ) -> None:
        """What is looked up by class and by branch.  The last row is of no branch."""
        groups = ensemble.groups
        holders = _available_first(holders_of(groups, torch.device("cpu")), numbers)
        self.slots = _slots(ensemble, holders.shape[1], self.count)
        self.is_always_asked = bool((holders[:, 0] < self.count).all())
        # Then no row has padding.
        self.is_full = self.is_always_asked and min(stack.sizes) == stack.width
        self.has_whole_group = max(stack.sizes) == groups.num_classes
        self.may_have_all = sum(sorted(stack.sizes)[-self.slots :]) >= groups.num_classes
        weights = ensemble.all_weights
        self.general_weight = float(weights[0])
        special = torch.tensor([*(float(weights[1 + m]) for m in numbers), 0.0]).double()
        temperatures = torch.tensor([*(ensemble.temperatures[1 + m] for m in numbers), 1.0])
        self.is_tempered = bool((temperatures != 1).any())

        columns = torch.arange(stack.width + 1).repeat(self.count, 1)
        valid = stack.valid.cpu()
        columns[:, :-1].masked_fill_(~valid, 0)
        classes = stack.classes.cpu().gather(1, columns[:, :-1])
        times = 1.0 + (columns[:, :-1] == 0) * (stack.width - valid.sum(1, keepdim=True))
        shift = torch.zeros(columns.shape)
        if self.slots == 1:
            shift = -F.pad(times.log(), (0, 1)) * (1 - 1 / temperatures[:-1, None])
        times = torch.cat([times, torch.full_like(times[:1], stack.width)])
        device = ensemble.device
        self.corrections = Corrections(
            stack,
            columns.to(device),
            temperatures[:-1].to(device),
            shift.to(device),
            may_be_none=self.slots > 1 or not self.is_always_asked,
        )
        of_none = torch.arange(stack.width)[None] == 0
        other_branch, other_column = _others(groups, numbers, stack.width)
        patterns = torch.arange(2**self.slots)[:, None] >> torch.arange(self.slots)[None]
        everybody = self.general_weight + special
        self.share: float | None = None  # of the branch, where it is the same for all rows
        if self.is_always_asked and len(special[:-1].unique()) == 1:
            self.share = float(special[0] / everybody[0])
        tables = {
            "holders": holders,
            "classes": torch.cat([classes, torch.zeros_like(classes[:1])]),
            "valid": torch.cat([valid, of_none]).float(),
            "times": times,
            "log_times": times.log(),
            "covers_all": torch.tensor([size == len(holders) for size in stack.sizes] + [False]),
            "special_weights": special,
            "shares": torch.stack(
                [self.general_weight / everybody, special / everybody]
            ).mT.float(),
            "inverse_temperatures": 1 / temperatures[:, None],
            "outside": 1.0 - (patterns & 1).double(),
            "other_branch": other_branch,
            "other_column": other_column,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)
        floor = torch.full((stack.width + 1,), torch.finfo(torch.float32).tiny, device=device)
        floor[-1] = LEAST_SHARE
        self.register_buffer("floor", floor, persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        at_cut = self._cut.body(self.generalist.preprocess(raw))
        logits = head_logits(self.generalist.linear_head, self._cut.end(at_cut))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        favourites = most_probable(logits, self.gate)
        slots = self._asked(logits, favourites)
        answer = self._answer_one if self.slots == 1 else self._answer
        outside, classes, on_entries, q_outside = answer(at_cut, logits, favourites, slots)
        # The product is last, since a runtime has to write its result anyway. A scatter would copy.
        mass = outside.mass.clamp_min(LEAST_MASS) if self.may_have_all else outside.mass
        scale = (q_outside / mass).clamp_min(LEAST_SCALE)
        return outside.share.scatter(1, classes, on_entries / scale) * scale

    def _answer_one(
        self, at_cut: Tensor, logits: Tensor, favourites: Tensor, slots: Tensor
    ) -> tuple[Outside, Tensor, Tensor, Tensor]:
        """Eq. 5 of one branch, in closed form: (1 - b) g + b p on its classes and on all others.

        Returns (the classes outside, entries int64 [B, K], their q, q of all others [B, 1]).
        Padding repeats a branch's first class.  It takes its mass together with the padding.
        """
        slots = slots[:, 0]
        classes = F.embedding(slots, self.classes)
        if not self.is_always_asked:
            nobody = (slots == self.count)[:, None]
            classes = torch.where(nobody, favourites[:, :1], classes)
        one = favourites[:, :1]
        if self.gate > 1:  # the favourite need not be an entry
            one = classes[:, :1]
        own = logits.gather(1, classes)
        times = log_times = None
        if not self.is_full:
            times, log_times = F.embedding(slots, self.times), F.embedding(slots, self.log_times)
        outside = self._outside(logits, classes, one)
        g = p = self._general(own, outside, log_times)
        if self.general_temperature != 1:
            outside = self._outside(logits / self.general_temperature, classes, one)
            g = self._general(own / self.general_temperature, outside, log_times)
        log_p = p.maximum(self.floor).log()
        if self.has_whole_group:
            whole = self.covers_all[slots][:, None]
            dustbin = torch.arange(log_p.shape[1], device=log_p.device) == log_p.shape[1] - 1
            log_p = log_p.masked_fill(whole & dustbin, -torch.inf)
        if self.is_tempered:
            log_p = log_p * F.embedding(slots, self.inverse_temperatures)
        if self.own_blocks:
            r = self._correct(at_cut, slots[:, None])[:, 0]
        else:
            r = self._corrections_of(at_cut.flatten(1), slots)
        special = (log_p + r).softmax(1)
        if self.share is None:
            of_general, of_special = F.embedding(slots, self.shares).split(1, 1)
        else:
            of_general, of_special = 1 - self.share, self.share
        q = g * of_general + special * of_special
        on_entries, q_outside = q.split([classes.shape[1], 1], 1)
        if times is not None:
            on_entries = on_entries * times
        return outside, classes, on_entries, q_outside

    def _outside(self, logits: Tensor, entries: Tensor, one: Tensor) -> Outside:
        return outside_softmax(logits, entries, one, self.may_have_all)

    @staticmethod
    def _general(own: Tensor, outside: Outside, log_times: Tensor | None) -> Tensor:
        """The generalist's distribution over entries and all others, [B, K + 1].

        log_times: [B, K], the log of how often an entry's class is there. The masses of these
        entries sum to the class's.
        """
        if log_times is not None:
            own = own - log_times
        return torch.cat([own, outside.log_sum], 1).softmax(1)

    def _answer(
        self, at_cut: Tensor, logits: Tensor, favourites: Tensor, slots: Tensor
    ) -> tuple[Outside, Tensor, Tensor, Tensor]:
        """Like _answer_one, for several branches. Entries are [B, A K]."""
        entries = self._entries(slots, favourites[:, :1])
        r = self._correct(at_cut, slots)
        z_top = logits.gather(1, favourites[:, :1])
        classes = entries.classes.flatten(1)
        one = classes[:, :1]
        own = logits.gather(1, classes).view_as(entries.classes) - z_top[..., None]
        outside = self._outside(logits, classes, one)
        special = self._special(own, outside.log_sum - z_top, entries, r)
        if self.general_temperature != 1:
            logits = logits / self.general_temperature
            z_top = z_top / self.general_temperature
            own = own / self.general_temperature
            outside = self._outside(logits, classes, one)
        g_outside = (outside.log_sum - z_top).double().exp()
        q_outside, on_entries = self._join(own.exp(), g_outside, special, entries)
        return outside, classes, on_entries.flatten(1), q_outside

    # ---- who is asked

    def _asked(self, logits: Tensor, favourites: Tensor) -> Tensor:
        """The branches of each row, int64 [B, A]. `count` is none.  Slot 0 is none if all are."""
        if self.gate == 1:
            found = F.embedding(favourites[:, 0], self.holders)
        else:
            found = self.holders[favourites].flatten(1).sort(dim=1).values
            repeated = found[:, 1:] == found[:, :-1]
            found = torch.cat([found[:, :1], found[:, 1:].masked_fill(repeated, self.count)], 1)
            found = found.sort(dim=1).values
        if self.slots == found.shape[1]:
            return found
        classes, valid = rows_of(self.classes, found), rows_of(self.valid, found)
        z_top = logits.gather(1, favourites[:, :1])[..., None]
        mass = logits.gather(1, classes.flatten(1)).view_as(classes).sub(z_top).exp() * valid
        mass = mass.sum(2).masked_fill(found == self.count, -1)
        # Of those that tie the first, as `gate` has it.
        order = mass.sort(dim=1, descending=True, stable=True).indices
        return found.gather(1, order[:, : self.slots])

    def _entries(self, slots: Tensor, favourite: Tensor) -> Entries:
        """favourite: int64 [B, 1], the class that a row has as its only entry if it asks nobody."""
        on = slots < self.count
        classes = rows_of(self.classes, slots)
        if not self.is_always_asked:
            first = torch.where(on[:, :1, None], classes[:, :1], favourite[..., None])
            classes = torch.cat([first, classes[:, 1:]], 1)
        # A slot that is not needed repeats the first entry of slot 0, and what becomes of it.
        classes = torch.where(on[..., None], classes, classes[:, :1, :1])
        inside, column = self._where(slots, on)
        counted = rows_of(self.valid, slots)
        counted = torch.cat([counted[:, :1], counted[:, 1:] * on[:, 1:, None]], 1)
        earlier = torch.zeros_like(inside[0])
        number = torch.arange(self.slots, device=slots.device)[:, None]
        for b in range(self.slots - 1):
            earlier = earlier | (inside[b] & (number > b))
        pattern = torch.zeros_like(classes)
        for b, held in enumerate(inside):
            pattern = pattern + held * 2**b
        return Entries(slots, on, classes, counted * ~earlier, inside, column, pattern)

    def _where(self, slots: Tensor, on: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each slot b, whether it holds an entry's class, and in which column: [B, A, K]."""
        other_branch = rows_of(self.other_branch, slots)
        other_column = rows_of(self.other_column, slots)
        number = torch.arange(self.slots, device=slots.device)
        columns = torch.arange(self.classes.shape[1], device=slots.device)
        shape = (*slots.shape, len(columns))
        inside, column = [], []
        for b in range(self.slots):
            own = (number == b)[:, None]
            # Slot 0 has its entry even where it asks nobody, and then weighs 0.
            held = own & on[..., None] if b else own & torch.ones_like(on)[..., None]
            place = torch.where(own, columns, 0)
            for h in range(other_branch.shape[3]):
                match = (other_branch[..., h] == slots[:, b, None, None]) & on[..., None]
                place = torch.where(match, other_column[..., h], place)
                held = held | match
            inside.append(held.expand(shape))
            column.append(place.expand(shape))
        return inside, column

    # ---- what branches say

    def _correct(self, at_cut: Tensor, slots: Tensor) -> Tensor:
        """r / T of each row's slots, [B, A, K + 1]. Whatever where a slot is not needed."""
        if self.own_blocks:
            each = torch.stack([blocks(at_cut).flatten(1) for blocks in self.own_blocks], 1)
            known = slots.clamp_max(self.count - 1)[..., None]
            h = each.gather(1, known.expand(-1, -1, each.shape[2])).flatten(0, 1)
        else:
            h = at_cut.flatten(1).repeat_interleave(self.slots, 0)
        return self._corrections_of(h, slots.flatten()).unflatten(0, slots.shape)

    def _corrections_of(self, h: Tensor, slots: Tensor) -> Tensor:
        """h: [N, D].  slots: int64 [N].  Returns r / T [N, K + 1]."""
        h = F.pad(h.float(), (0, 1), value=1.0)
        of_few, of_many = self.corrections.of_few, self.corrections.of_many
        most = max(FEW_PAIRS, self.count // 2)
        if torch.onnx.is_in_onnx_export():
            return torch.cond(h.shape[0] <= most, of_few, of_many, (h, slots))
        if torch.compiler.is_compiling():
            return of_many(h, slots)
        return of_few(h, slots) if h.shape[0] <= most else of_many(h, slots)

    def _special(self, own: Tensor, log_sum: Tensor, entries: Entries, r: Tensor) -> Tensor:
        """The branches' distributions [B, A, K + 1], dustbin last. Padding as the first class.

        own: z - z_top of the entries.  log_sum: of the classes outside, as far from z_top.
        """
        inside = self._pattern_sums(own.exp(), entries)
        by_pattern = torch.cat([log_sum.double().exp(), inside], 1)
        total = by_pattern.sum(1, keepdim=True)
        rest = torch.maximum(by_pattern @ self.outside, total * LEAST_SHARE).log()
        if self.has_whole_group:
            rest = rest.masked_fill(rows_of(self.covers_all, entries.slots), -torch.inf)
        logits = torch.cat([own, rest.to(own.dtype)[..., None]], 2)
        if self.is_tempered:
            logits = logits * F.embedding(entries.slots, self.inverse_temperatures)
        logits = logits + r
        if self.is_full:
            return logits.softmax(2)
        relative = (logits - logits.amax(2, keepdim=True)).exp()
        real = rows_of(self.valid, entries.slots)
        total = (relative[..., :-1] * real).sum(2, keepdim=True) + relative[..., -1:]
        return relative / total

    # ---- eq. 5

    def _join(
        self, g: Tensor, g_outside: Tensor, special: Tensor, entries: Entries
    ) -> tuple[Tensor, Tensor]:
        """(q of all classes outside [B, 1], q of the entries [B, A, K])

        g: [B, A, K], the generalist's, up to a factor.  g_outside: float64 [B, 1], all others'.
        """
        total = g_outside + (g * entries.counted).sum((1, 2), dtype=torch.float64)[:, None]
        of_general = self.general_weight / total
        weights = rows_of(self.special_weights, entries.slots)
        weighted = special * weights.to(g.dtype)[..., None]
        joined = g * of_general.to(g.dtype)[..., None]
        for b in range(self.slots):
            columns = entries.column[b].flatten(1)
            predicted = weighted[:, b].gather(1, columns).view_as(g)
            joined = joined + predicted * entries.inside[b]
        masses = torch.cat([g_outside * of_general, self._pattern_sums(joined, entries)], 1)
        counts = self._pattern_sums(torch.ones_like(g), entries)
        others = len(self.holders) - counts.sum(1, keepdim=True)
        counts = torch.cat([others, counts], 1)
        outside = self.outside
        if self.may_have_all:  # where a pattern has no class, none takes a dustbin's mass
            outside = outside * (counts > 0)[..., None]
        membership = Membership(outside, counts)
        dustbins = weighted[..., -1].double()
        factor, even = solve(masses, dustbins, membership, None, self.portable)
        pattern = entries.pattern.flatten(1)
        on_entries = joined * factor.to(g.dtype).gather(1, pattern).view_as(g)
        on_entries = on_entries + even.to(g.dtype).gather(1, pattern).view_as(g)
        on_entries = torch.where(entries.on[..., None], on_entries, on_entries[:, :1, :1])
        # Where hardly anything is left outside, its proportions are still the generalist's.
        q_outside = factor[:, :1] * masses[:, :1] + even[:, :1] * others
        return q_outside.to(g.dtype), on_entries

    def _pattern_sums(self, values: Tensor, entries: Entries) -> Tensor:
        """What `values` sum to over the classes of each pattern but 0, float64 [B, P - 1]."""
        values = values * entries.counted
        pattern = entries.pattern
        count = len(self.outside)
        if count <= FEW_PATTERNS:
            sums = [(values * (pattern == k)).sum((1, 2)) for k in range(1, count)]
            return torch.stack(sums, 1).double()
        zeros = values.new_zeros(values.shape[0], count)
        return zeros.scatter_add(1, pattern.flatten(1), values.flatten(1))[:, 1:].double()


def _slots(ensemble: SpecialistEnsemble, most_holders: int, count: int) -> int:
    """A. ValueError where it is too large for a program."""
    slots = min(ensemble.gate * most_holders, count)
    if ensemble.max_specialists is not None:
        slots = min(slots, ensemble.max_specialists)
    if slots > MOST_SLOTS:
        raise ValueError(
            f"{slots} branches for one row are too many for one program ({MOST_SLOTS}); "
            "set max_specialists, or export the bundle"
        )
    return slots


def _available_first(holders: Tensor, numbers: list[int]) -> Tensor:
    """[C, most] of [C, .]: a class's branches as numbers among `numbers`, then their count."""
    count = len(numbers)
    of_number = torch.full((int(holders.max()) + 1,), count)
    of_number[numbers] = torch.arange(count)
    holders = of_number[holders].sort(dim=1).values
    most = int((holders < count).sum(1).max())
    return holders[:, : max(1, most)].contiguous()


def _others(groups: ClassGroups, numbers: list[int], width: int) -> tuple[Tensor, Tensor]:
    """int64 [M + 1, K, H] both: other branches of a class, and its column in each. -1 is none.

    Padding is as the first class.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for branch, m in enumerate(numbers):
        for column, c in enumerate(groups.members[m].tolist()):
            places.setdefault(c, []).append((branch, column))
    most = max(map(len, places.values())) - 1
    shape = (len(numbers) + 1, width, most)
    other_branch, other_column = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    for branch, m in enumerate(numbers):
        members = groups.members[m].tolist()
        for column, c in enumerate(members):
            others = [place for place in places[c] if place[0] != branch]
            for h, (other, place) in enumerate(others):
                other_branch[branch, column, h] = other
                other_column[branch, column, h] = place
        other_branch[branch, len(members) :] = other_branch[branch, 0]
        other_column[branch, len(members) :] = other_column[branch, 0]
    # Copies: torch cannot save an empty tensor whose storage is an array's (no class has another).
    return torch.tensor(other_branch), torch.tensor(other_column)
