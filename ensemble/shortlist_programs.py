"""Programs of ensembles whose specialists are asked about each row's shortlist alone.

    B, k   rows of a batch, classes of a row's shortlist
    M, A   specialists; slots: those that one row may ask

The shapes do not depend on the data.  As in the programs without a shortlist every copy runs on
every row, and of branches those that a row asks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from networks import Classifier, top_k

from .branch_program import BranchProgram, rows_of
from .export import EnsembleProgram
from .gating import static_gate
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
    """q [B, C]; weights: the generalist's, and the slots' [B, A], 0 where one is not active."""
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
        inside = torch.stack([rows_of(self.inside[m], indices) for m in range(len(special))], 1)
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
        places = Places(*(rows_of(table[m], indices) for table in tables))
        own = logits_on_shortlist(specialist.head, features, self.classes[m], indices, places, p)
        return softmax(own, self.temperatures[m])


class BranchesOnShortlist(BranchProgram):
    """raw [B, ...] -> q [B, C], as BranchProgram, of an ensemble with a shortlist."""

    def __init__(self, ensemble: SpecialistEnsemble, portable: bool = False):
        super().__init__(ensemble, portable)
        assert ensemble.shortlist is not None
        self.shortlist = ensemble.shortlist

    def forward(self, raw: Tensor) -> Tensor:
        at_cut = self._cut.body(self.generalist.preprocess(raw))
        logits = self.generalist.head(self._cut.end(at_cut))
        p = softmax(logits, 1.0)
        slots, on = self._asked(p, p.topk(self.gate, dim=1).indices)
        general, indices = top_k(logits, self.shortlist, ordered=False)
        inside, column = (each.mT for each in self._where(indices, slots, on))
        correction = self._corrections(at_cut, slots, on)
        own = corrected_on_shortlist(
            general[:, None].expand(inside.shape), correction, column, inside
        )
        temperatures = rows_of(self.temperatures.to(own.dtype), slots)[..., None]
        weights = rows_of(self.special_weights, slots) * on
        return put_on_shortlist(
            softmax(logits, self.general_temperature),
            indices,
            (own / temperatures).softmax(2),
            inside,
            (self.general_weight, weights),
            self.portable,
        )
