"""Programs of ensembles whose specialists are asked about each row's shortlist alone.

    B, k   rows of a batch, classes of a row's shortlist
    M, A   specialists; slots: those that one row may ask

The shapes do not depend on the data.  As in the programs without a shortlist every copy runs on
every row, and of branches those that a row asks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from clustering.groups import ClassGroups
from networks import Branch, Classifier, top_k
from networks.cutting import cut_at
from networks.stacked_branches import StackedBranches

from .branch_program import own_blocks
from .export import EnsembleProgram
from .gating import holders_of, static_gate
from .predictions import softmax
from .rows_on_shortlist import Places, corrected_on_shortlist, logits_on_shortlist, places_on
from .shortlist_kl import join_on_atoms
from .specialist_ensemble import SpecialistEnsemble


def put_on_shortlist(
    p_general: Tensor,
    indices: Tensor,
    special: Tensor,
    inside: Tensor,
    weights: tuple[float, Tensor],
    portable: bool,
) -> Tensor:
    """q [B, C]. weights: the generalist's, and the slots' [B, A], 0 where one is not active."""
    own = p_general.gather(1, indices)
    mass = own.sum(1, keepdim=True)
    q = join_on_atoms(own / mass, special, inside, *weights, tolerance=None, portable=portable)
    return p_general.scatter(1, indices, q * mass)


class CopiesOnShortlist(EnsembleProgram):
    """raw [B, ...] -> q [B, C], as EnsembleProgram, of an ensemble with a shortlist."""

    head_rows: Tensor
    known: Tensor
    inside: Tensor

    def __init__(self, ensemble: SpecialistEnsemble, portable: bool = False):
        super().__init__(ensemble, portable)
        assert ensemble.shortlist is not None
        self.shortlist = ensemble.shortlist
        every = torch.arange(ensemble.groups.num_classes, device=ensemble.device)[None]
        self.classes = []
        places = []
        for m in ensemble.specialists:
            classes = torch.tensor(ensemble.groups.members[m], device=ensemble.device)
            self.classes.append(classes)
            specialist = cast(Classifier, ensemble.specialists[m])
            places.append(places_on(specialist.head, classes, every))
        if places:
            self.register_buffer("head_rows", torch.cat([each.rows for each in places]), False)
            self.register_buffer("known", torch.cat([each.known for each in places]), False)
            self.register_buffer("inside", torch.cat([each.inside for each in places]), False)

    def forward(self, raw: Tensor) -> Tensor:
        logits = self.generalist(raw)
        p_general = softmax(logits, self.general_temperature)
        if not len(self.specialists):
            return p_general
        p = softmax(logits, 1.0)
        _, indices = top_k(logits, self.shortlist, ordered=False)
        special = [self._ask(m, raw, indices, p) for m in range(len(self.specialists))]
        inside = torch.stack([self.inside[m][indices] for m in range(len(special))], 1)
        active = static_gate(p, self.membership, self.gate, self.max_specialists)
        weights = active.double() * self.special_weights
        return put_on_shortlist(
            p_general,
            indices,
            torch.stack(special, 1),
            inside,
            (self.general_weight, weights),
            self.portable,
        )

    def _ask(self, m: int, raw: Tensor, indices: Tensor, p: Tensor) -> Tensor:
        """The distribution of the m-th copy on the shortlists, [B, k + 1]."""
        specialist = cast(Classifier, self.specialists[m])
        features = specialist.trunk(specialist.preprocess(raw))
        tables = (self.head_rows, self.known, self.inside)
        places = Places(*(table[m][indices] for table in tables))
        own = logits_on_shortlist(specialist.head, features, self.classes[m], indices, places, p)
        return softmax(own, self.temperatures[m])


class BranchesOnShortlist(nn.Module):
    """raw [B, ...] -> q [B, C], of an ensemble of branches with a shortlist.

    Of a branch that a row asks the embedding is computed, and the rows of the classes on the row's
    shortlist.  Own blocks of branches run on every row.

    Parameters
    ----------
    ensemble : SpecialistEnsemble
        Its specialists are branches.  The program stays on its device.
    portable : bool
        Solve eq. 5 by products and sums alone, as ONNX needs it.

    Raises
    ------
    ValueError
        For another combiner than eq. 5, and for more branches with blocks of their own than one
        program should hold.
    """

    membership: Tensor
    holders: Tensor
    holder_columns: Tensor
    special_weights: Tensor
    temperatures: Tensor

    def __init__(self, ensemble: SpecialistEnsemble, portable: bool = False):
        super().__init__()
        assert ensemble.shortlist is not None
        numbers = list(ensemble.specialists)
        branches = [cast(Branch, ensemble.specialists[m]) for m in numbers]
        self.portable = portable
        self.shortlist = ensemble.shortlist
        self.generalist = ensemble.generalist
        self.gate = ensemble.gate
        self.max_specialists = ensemble.max_specialists
        self.general_temperature = ensemble.temperatures[0]
        self._cut = cut_at(self.generalist.trunk, branches[0].spec.head["blocks"])
        self.stack = StackedBranches(branches)
        self.own_blocks = own_blocks(branches)
        weights = ensemble.all_weights
        self.general_weight = float(weights[0])
        holders, columns = holders_and_columns(ensemble.groups, numbers)
        self.slots = min(self.gate * holders.shape[1], len(numbers))
        if self.max_specialists is not None:
            self.slots = min(self.slots, self.max_specialists)
        membership = torch.zeros(len(holders), len(numbers) + 1).scatter(1, holders, 1.0)
        tables = {
            "membership": membership[:, :-1],
            "holders": holders,
            "holder_columns": columns,
            "special_weights": torch.tensor([float(weights[1 + m]) for m in numbers]).double(),
            "temperatures": torch.tensor([ensemble.temperatures[1 + m] for m in numbers]),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(ensemble.device), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        at_cut = self._cut.body(self.generalist.preprocess(raw))
        logits = self.generalist.head(self._cut.end(at_cut))
        p = softmax(logits, 1.0)
        active = static_gate(p, self.membership, self.gate, self.max_specialists)
        on, slots = active.topk(self.slots, dim=1)
        general, indices = top_k(logits, self.shortlist, ordered=False)
        inside, column = self._where(indices, slots)
        correction = self._correct(at_cut, slots, column)
        own = corrected_on_shortlist(general[:, None].expand(inside.shape), correction, inside)
        temperatures = self.temperatures.to(own.dtype)[slots][..., None]
        return put_on_shortlist(
            softmax(logits, self.general_temperature),
            indices,
            (own / temperatures).softmax(2),
            inside,
            (self.general_weight, self.special_weights[slots] * on),
            self.portable,
        )

    def _where(self, indices: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [B, A, k] whether a slot holds a class, int64 its column there, else 0)"""
        holders, columns = self.holders[indices][:, None], self.holder_columns[indices][:, None]
        match = holders == slots[:, :, None, None]
        return match.any(3), (columns * match).sum(3)

    def _correct(self, at_cut: Tensor, slots: Tensor, column: Tensor) -> Tensor:
        """r at some columns of each slot's branch, then its dustbin's, [B, A, k + 1].

        column: int64 [B, A, k].
        """
        h = at_cut.flatten(1)[:, None].expand(-1, slots.shape[1], -1)
        if self.own_blocks:
            each = torch.stack([blocks(at_cut).flatten(1) for blocks in self.own_blocks], 1)
            h = each.gather(1, slots[..., None].expand(-1, -1, each.shape[2]))
        hidden, correction = self.stack.hidden, self.stack.correction
        x = (hidden.weight[slots] @ h[..., None])[..., 0] + hidden.bias[slots]
        last = torch.full_like(column[..., :1], self.stack.width)
        row = slots[..., None] * (self.stack.width + 1) + torch.cat([column, last], 2)
        weight, bias = correction.weight.flatten(0, 1), correction.bias.flatten()
        return (weight[row] @ x.relu()[..., None])[..., 0] + bias[row]


def holders_and_columns(groups: ClassGroups, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """int64 [C, most groups of one class] both: who holds a class, and its column there.

    numbers: the groups that have a specialist, which count from 0 here.  Filled up with their
    number, and 0.
    """
    holders = holders_of(groups, torch.device("cpu"))
    columns = torch.zeros_like(holders)
    for m, members in enumerate(groups.members):
        classes = torch.tensor(members)
        place = (holders[classes] == m).long().argmax(1)
        columns[classes, place] = torch.arange(len(classes))
    of_number = torch.full((len(groups.members) + 1,), len(numbers))
    of_number[numbers] = torch.arange(len(numbers))
    return of_number[holders], columns
