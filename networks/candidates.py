"""A softmax over a few classes of each row. Classes drawn at random stand for the rest.

    n   rows of the batch
    C   classes
    D   features
    k   classes of a row's shortlist
    R   classes that are drawn for all rows of the batch

A row's candidates are its label and its shortlist.  Its loss is - log (exp z_label / Z), where

    Z = sum of exp z over the candidates + C / R * sum of exp z over what is drawn
    besides.

Each class is drawn with probability R / C, so that Z, of which the candidates' part is exact, is
the whole softmax's on average over the draws, whatever the shortlist (Horvitz & Thompson 1952).
Its logarithm, the loss, is biased downwards, by less the more of the mass lies on the shortlist
and the more is drawn (Bengio & Senecal 2008).  With every class on the shortlist, or drawn, it is
the whole softmax's.  It costs k + R rows of the head's weight, not C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .linear_logits import LinearLogits


class Candidates(NamedTuple):
    """The classes that a batch is asked about.

    own      int64 [n, 1 + k]: the label, and the shortlist
    counted  bool [n, 1 + k]: whether an entry counts. The shortlist's is not the label again
    drawn    int64 [R], distinct: the same for every row
    apart    bool [n, R]: whether what is drawn is not the row's own
    """

    own: Tensor
    counted: Tensor
    drawn: Tensor
    apart: Tensor

    def numbered(self) -> tuple[Tensor, Candidates]:
        """The classes that are read (int64, ascending), and these candidates as places in them."""
        flat = torch.cat([self.own.flatten(), self.drawn])
        classes, places = flat.unique(return_inverse=True)
        own, drawn = places.split([self.own.numel(), len(self.drawn)])
        return classes, self._replace(own=own.view_as(self.own), drawn=drawn)


def candidates_of(labels: Tensor, shortlists: Tensor, drawn: Tensor | None = None) -> Candidates:
    """Join each row's label and shortlist with the classes drawn for all rows.

    Parameters
    ----------
    labels : Tensor int64 [n]
    shortlists : Tensor int64 [n, k]
        Distinct classes of each row. The label may be one of them.
    drawn : Tensor int64 [R], optional
        Distinct classes. None for none.

    Returns
    -------
    Candidates
    """
    own = torch.cat([labels[:, None], shortlists], 1)
    counted = own != labels[:, None]
    counted[:, 0] = True
    if drawn is None:
        drawn = labels.new_empty(0)
    drawn = drawn.sort().values
    apart = torch.ones(len(own), len(drawn), dtype=torch.bool, device=own.device)
    if len(drawn):
        places = torch.searchsorted(drawn, own).clamp_max(len(drawn) - 1)
        # Places that are no hits mark the column of a hit, or one that stays: so only hits write.
        row, column = (drawn[places] == own).nonzero(as_tuple=True)
        apart[row, places[row, column]] = False
    return Candidates(own, counted, drawn, apart)


def candidate_cross_entropy(
    own: Tensor, counted: Tensor, drawn: Tensor, apart: Tensor, num_classes: int
) -> Tensor:
    """- log (exp z_label / Z) of each row, [n], with Z as above.

    Parameters
    ----------
    own : Tensor [n, 1 + k]
        Logits of the candidates, the label's first.
    counted : Tensor bool [n, 1 + k]
    drawn : Tensor [n, R]
        Logits of what is drawn.
    apart : Tensor bool [n, R]
    num_classes : int
        C.
    """
    parts = [own.masked_fill(~counted, -torch.inf)]
    if drawn.shape[1]:
        raised = drawn + math.log(num_classes / drawn.shape[1])
        parts.append(raised.masked_fill(~apart, -torch.inf))
    return torch.cat(parts, 1).logsumexp(1) - own[:, 0]


def cross_entropy_among(
    logits: LinearLogits,
    asked: Candidates,
    num_classes: int,
    log_prior: Tensor | None = None,
) -> Tensor:
    """- log (exp z_label / Z) of each row, [n], from the candidates' rows of the weight alone.

    Differentiable in features, weight and bias.

    Parameters
    ----------
    logits : LinearLogits
        Of all classes, or of some among which the candidates are numbered.
    asked : Candidates
    num_classes : int
        C, of the whole label set.
    log_prior : Tensor [c], optional
        Added to the logits, of as many classes as these are of.
    """
    logits = logits.add_bias(log_prior)
    own = logits.logits_at(asked.own)
    drawn = logits.of_classes(asked.drawn)
    dtype = torch.promote_types(own.dtype, torch.float32)
    return candidate_cross_entropy(
        own.to(dtype), asked.counted, drawn.to(dtype), asked.apart, num_classes
    )
