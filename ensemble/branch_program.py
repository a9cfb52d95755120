"""Generalist, branches and eq. 5 as one program, with shapes that do not depend on the data.

    B, C   rows of a batch, classes of the whole label set
    M, K   branches, classes of the largest
    A      slots: branches that one row may ask, at most
    U      entries of a row: the classes of its slots one after the other, A K
    P      patterns: which of a row's slots hold a class, 2^A

Only the branches that a row asks are computed for it.  A slot that a row does not need weighs 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from clustering.groups import ClassGroups
from networks import Branch
from networks.branches import LEAST_SHARE, GeneralOutput
from networks.cutting import cut_at
from networks.stacked_branches import StackedBranches

from .gating import holders_of
from .newton import Membership, solve
from .predictions import softmax
from .specialist_ensemble import SpecialistEnsemble

MOST_SLOTS = 8
TILE = 8
MOST_OWN_BLOCKS = 16  # branches whose own blocks run on every row


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index], as runtimes do it fast."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


class Tiles(NamedTuple):
    """Pairs of a row and a branch, TILE of one branch together: its layers are gathered once.

    N pairs; T tiles, as many as the data need.

    branches: int64 [T], whose tile it is.
    pairs: int64 [T, TILE], which pairs are in it; 0 where it is not full.
    places: int64 [N], where each pair is among the T x TILE; 0 for one that is not needed.
    """

    branches: Tensor
    pairs: Tensor
    places: Tensor

    @classmethod
    def of(cls, branch: Tensor, needed: Tensor, count: int) -> Tiles:
        """branch: int64 [N], below count.  needed: bool [N]."""
        number = torch.arange(branch.shape[0], device=branch.device)
        key = torch.where(needed, branch, count)
        ordered, order = key.sort()
        per_branch = torch.zeros(count + 1, dtype=torch.int64, device=branch.device)
        per_branch = per_branch.scatter_add(0, key, torch.ones_like(key))[:count]
        tiles = (per_branch + TILE - 1) // TILE
        ends = tiles.cumsum(0)
        # A pair's place: its branch's first tile, and how many of the branch stand before it.
        start = (ends - tiles) * TILE - (per_branch.cumsum(0) - per_branch)
        known = ordered < count
        place = start[ordered.clamp_max(count - 1)] + number
        # No more tiles than this: each branch's last may not be full.
        most = branch.shape[0] // TILE + count
        nowhere = most * TILE
        pairs = torch.zeros(nowhere + 1, dtype=torch.int64, device=branch.device)
        pairs = pairs.scatter(0, torch.where(known, place, nowhere), order)[:nowhere]
        tile = torch.arange(most, device=branch.device)
        live = (tile < ends[-1].clamp_min(1)).nonzero()[:, 0]
        owner = (ends <= live[:, None]).sum(1).clamp_max(count - 1)
        places = torch.zeros_like(key).scatter(0, order, torch.where(known, place, 0))
        return cls(owner, pairs.unflatten(0, (most, TILE))[live], places)


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
    holder_columns: Tensor
    special_weights: Tensor
    temperatures: Tensor
    outside: Tensor
    powers: Tensor
    covers_all: Tensor
    entry_slot: Tensor

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
        self.stack = StackedBranches(branches)
        self.own_blocks = nn.ModuleList()
        if branches[0].spec.head["blocks"]:
            if len(branches) > MOST_OWN_BLOCKS:
                raise ValueError(
                    f"{len(branches)} branches with blocks of their own are too many for one "
                    f"program ({MOST_OWN_BLOCKS}); export the bundle"
                )
            self.own_blocks.extend(branch.blocks for branch in branches)
        self._keep_tables(ensemble, numbers)

    def _keep_tables(self, ensemble: SpecialistEnsemble, numbers: list[int]) -> None:
        """What is looked up by class and by branch."""
        device, count = ensemble.device, len(numbers)
        of_number = torch.full((len(ensemble.groups.members) + 1,), count)
        of_number[numbers] = torch.arange(count)
        holders, columns = _holders_and_columns(ensemble.groups)
        most = holders.shape[1]
        self.slots = self.gate * most
        if ensemble.max_specialists is not None:
            self.slots = min(self.slots, ensemble.max_specialists)
        self.slots = min(self.slots, count)
        if self.slots > MOST_SLOTS:
            raise ValueError(
                f"{self.slots} branches for one row are too many for one program ({MOST_SLOTS}); "
                "set max_specialists, or export the bundle"
            )
        weights = ensemble.weights
        if weights is None:
            weights = [1.0] * (1 + len(ensemble.groups.members))
        self.general_weight = float(weights[0])
        special = torch.tensor([float(weights[1 + m]) for m in numbers], dtype=torch.float64)
        temperatures = torch.tensor([ensemble.temperatures[1 + m] for m in numbers])
        patterns = torch.arange(2**self.slots)[:, None] >> torch.arange(self.slots)[None]
        tables = {
            "holders": of_number[holders],
            "holder_columns": columns,
            "special_weights": special,
            "temperatures": temperatures,
            "outside": 1.0 - (patterns & 1).double(),
            "powers": 2 ** torch.arange(self.slots),
            "covers_all": torch.tensor(self.stack.sizes) == len(holders),
            "entry_slot": torch.arange(self.slots).repeat_interleave(self.stack.width),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        at_cut = self._cut.body(self.generalist.preprocess(raw))
        logits = self.generalist.head(self._cut.end(at_cut))
        p = softmax(logits, 1.0)
        top = p.topk(self.gate, dim=1).indices if self.gate > 1 else p.argmax(1, keepdim=True)
        # Every pass over [B, C] counts: sums are in float32, which is right to 1e-7.
        total = p.sum(1)
        first = top[:, :1]
        log_total = (logits.gather(1, first).double() - p.gather(1, first).double().log())[:, 0]
        slots, on = self._asked(p, top)
        p_special = self._ask(at_cut, GeneralOutput(logits, p, total, log_total), slots, on)
        if self.general_temperature == 1:
            return self._combine(p, total, p_special, slots, on)
        p_general = softmax(logits, self.general_temperature)
        return self._combine(p_general, p_general.sum(1), p_special, slots, on)

    def _asked(self, p: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """(the branches of each row int64 [B, A], whether it asks them bool [B, A])

        top: int64 [B, gate], the most probable classes.
        """
        count = len(self.stack.sizes)
        found = self.holders[top].flatten(1)
        if self.gate > 1:
            found = found.sort(dim=1).values
            repeated = found[:, 1:] == found[:, :-1]
            found = torch.cat([found[:, :1], found[:, 1:].masked_fill(repeated, count)], 1)
        on = found < count
        slots = found.clamp_max(count - 1)
        if self.slots == found.shape[1]:
            return slots, on
        valid = rows_of(self.stack.valid, slots)
        mass = p.gather(1, rows_of(self.stack.classes, slots).flatten(1)).view_as(valid) * valid
        kept = mass.sum(2).masked_fill(~on, -1).topk(self.slots, dim=1).indices
        return slots.gather(1, kept), on.gather(1, kept)

    def _ask(self, at_cut: Tensor, general: GeneralOutput, slots: Tensor, on: Tensor) -> Tensor:
        """The branches' distributions [B, A, K + 1], 0 in padding, dustbin last."""
        valid, classes = (
            rows_of(self.stack.valid, slots),
            rows_of(self.stack.classes, slots).flatten(1),
        )
        own = general.logits.gather(1, classes).view_as(valid).masked_fill(~valid, -torch.inf)
        p_own = general.p.gather(1, classes).view_as(valid) * valid
        share = general.total.double()[:, None] - p_own.sum(2, dtype=torch.float64)
        rest = general.log_total[:, None] + share.clamp_min(LEAST_SHARE).log()
        rest = rest.masked_fill(rows_of(self.covers_all, slots), -torch.inf)
        logits = torch.cat([own, rest.to(own.dtype)[..., None]], 2)
        logits = logits + self._corrections(at_cut, slots, on)
        return (logits / rows_of(self.temperatures.to(logits.dtype), slots)[..., None]).softmax(2)

    def _corrections(self, at_cut: Tensor, slots: Tensor, on: Tensor) -> Tensor:
        """r of each row's slots, [B, A, K + 1]; whatever where a slot is not needed."""
        if self.own_blocks:
            each = torch.stack([blocks(at_cut).flatten(1) for blocks in self.own_blocks], 1)
            h = each.gather(1, slots[..., None].expand(-1, -1, each.shape[2])).flatten(0, 1)
        else:
            h = at_cut.flatten(1).repeat_interleave(slots.shape[1], 0)
        tiles = Tiles.of(slots.flatten(), on.flatten(), len(self.stack.sizes))
        hidden, correction = self.stack.hidden, self.stack.correction
        x = rows_of(h, tiles.pairs)
        x = (
            x @ hidden.weight.index_select(0, tiles.branches).mT
            + hidden.bias.index_select(0, tiles.branches)[:, None]
        )
        r = x.relu() @ correction.weight.index_select(0, tiles.branches).mT
        r = r + correction.bias.index_select(0, tiles.branches)[:, None]
        return rows_of(r.flatten(0, 1), tiles.places.view_as(slots))

    def _combine(
        self, p_general: Tensor, total: Tensor, p_special: Tensor, slots: Tensor, on: Tensor
    ) -> Tensor:
        """Eq. 5 among the classes of each row's slots, and all others as one pattern.

        total: sum of p_general, [B].
        """
        valid = (rows_of(self.stack.valid, slots) & on[..., None]).flatten(1)
        classes = rows_of(self.stack.classes, slots).flatten(1)
        inside, column = self._where(classes, slots, on)
        earlier = inside & (torch.arange(self.slots, device=on.device) < self.entry_slot[:, None])
        first = valid & (earlier.sum(2) == 0)  # one entry stands for a class in several slots
        # Other entries repeat a class of the row, and what becomes of it.
        some = first.long().argmax(1, keepdim=True)
        repeated = torch.where(first, classes, classes.gather(1, some))
        g = p_general.gather(1, repeated)

        weights = rows_of(self.special_weights, slots) * on
        weighted = p_special[..., :-1] * weights.to(p_special.dtype)[..., None]
        joined = self.general_weight * g
        for slot in range(self.slots):
            predicted = weighted[:, slot].gather(1, column[..., slot])
            joined = joined + predicted * inside[..., slot]
        pattern = (inside * self.powers).sum(2)

        # The mass outside is the sum less the entries', rather than another pass.
        outside = total.double() - (g * first).sum(1, dtype=torch.float64)
        counted = first.double()
        zeros = counted.new_zeros(counted.shape[0], len(self.outside))
        masses = zeros.scatter_add(1, pattern, joined.double() * counted)[:, 1:]
        masses = torch.cat([self.general_weight * outside.clamp_min(0)[:, None], masses], 1)
        counts = zeros.scatter_add(1, pattern, counted)[:, 1:]
        others = p_general.shape[1] - counted.sum(1, keepdim=True)
        membership = Membership(self.outside, torch.cat([others, counts], 1))
        dustbins = p_special[..., -1].double() * weights
        factor, even = solve(masses, dustbins, membership, None, self.portable)

        factor, even = factor.to(g.dtype), even.to(g.dtype)
        q = p_general * (self.general_weight * factor[:, :1]) + even[:, :1]
        on_entries = joined * factor.gather(1, pattern) + even.gather(1, pattern)
        on_entries = torch.where(first, on_entries, on_entries.gather(1, some))
        return q.scatter(1, repeated, on_entries)

    def _where(self, classes: Tensor, slots: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [B, U, A] whether a slot holds an entry's class, int64 the column that has it)"""
        holders = [rows_of(self.holders[:, k], classes) for k in range(self.holders.shape[1])]
        columns = [
            rows_of(self.holder_columns[:, k], classes) for k in range(self.holders.shape[1])
        ]
        inside, places = [], []
        for slot in range(self.slots):
            # -1 is no branch: a slot that the row does not need holds nothing.
            asked = slots[:, slot, None].masked_fill(~on[:, slot, None], -1)
            held = holders[0] == asked
            place = torch.where(held, columns[0], 0)
            for holder, column in zip(holders[1:], columns[1:], strict=True):
                matches = holder == asked
                place = torch.where(matches, column, place)
                held = held | matches
            inside.append(held)
            places.append(place)
        return torch.stack(inside, 2), torch.stack(places, 2)


def _holders_and_columns(groups: ClassGroups) -> tuple[Tensor, Tensor]:
    """int64 [C, most groups of one class] both: the groups of a class, and its column in each.

    Filled up with the number of groups.
    """
    holders = holders_of(groups, torch.device("cpu"))
    columns = torch.zeros_like(holders)
    for m, members in enumerate(groups.members):
        classes = torch.tensor(members)
        place = (holders[classes] == m).long().argmax(1)
        columns[classes, place] = torch.arange(len(classes))
    return holders, columns
