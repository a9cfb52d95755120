"""Make a specialist of a finished generalist."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from .classifier import Classifier
from .heads import DustbinHead, make_head
from .residual_row import ResidualRow
from .spec import checked_classes


def specialise(
    generalist: Classifier,
    classes: Iterable[int],
    dustbin: str = "preserving",
    kept: Iterable[int] | None = None,
    rest: ResidualRow | None = None,
) -> Classifier:
    """A copy of `generalist` whose logits are [B, |classes| + 1].

    Parameters
    ----------
    generalist : Classifier
        A plain one: neither a specialist nor a network with members.
    classes : iterable of int
        The specialist's classes.  Their logits come in ascending order, and the dustbin last.
    dustbin : str
        "preserving" keeps every row: the specialist starts as the generalist, with the classes
        outside summed.  "fresh" keeps the rows of `classes` and draws one new row. The specialist
        then starts without the generalist's knowledge of the other classes and loses accuracy.
    kept : iterable of int, optional
        With "preserving": of the other classes only these keep their rows.
    rest : ResidualRow, optional
        With `kept`: the row for all classes without one, of fit_residual_row.

    Returns
    -------
    Classifier
        In the generalist's mode and dtype, on its device.

    Raises
    ------
    ValueError
        For classes that are not distinct or do not exist, for a generalist that is not plain, and
        for `kept` without `rest`.

    References
    ----------
    Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network, section 5.
    """
    if dustbin not in ("preserving", "fresh"):
        raise ValueError(f"dustbin = {dustbin!r}: must be preserving or fresh")
    spec, old = generalist.spec, generalist.head
    if spec.members is not None:
        raise ValueError("a network with members cannot be specialised; specialise a plain one")
    if not isinstance(old, nn.Linear) or spec.head["kind"] != "linear":
        raise ValueError(
            "only a classifier with a linear head can be specialised; "
            "this one is a specialist already"
        )
    if dustbin == "preserving" and kept is not None and rest is None:
        raise ValueError("kept needs rest, the row for the classes that are not kept")
    described = _described_head(checked_classes(classes, spec.num_classes), dustbin, kept)
    specialist = copy.deepcopy(generalist)
    for parameter in specialist.parameters():
        parameter.grad = None
    specialist.spec = replace(spec, head=described)
    head = make_head(specialist.spec, old.in_features).to(old.weight)
    if isinstance(head, DustbinHead):
        row_classes = head.row_classes
    else:
        row_classes = torch.tensor(described["members"])
    with torch.no_grad():
        row_classes = row_classes[row_classes >= 0].to(old.weight.device)
        head.weight[: len(row_classes)] = old.weight[row_classes]
        head.bias[: len(row_classes)] = old.bias[row_classes]
        if described["rows"] == "kept" and rest is not None:
            head.weight[-1] = rest.weight
            head.bias[-1] = rest.bias
    specialist.head = head.train(old.training)
    return specialist


def _described_head(classes: list[int], dustbin: str, kept: Iterable[int] | None) -> dict:
    """The head as in model.json."""
    described = {"kind": "dustbin", "members": classes, "rows": "all"}
    if dustbin == "fresh":
        described["rows"] = "fresh"
    elif kept is not None:
        described["rows"] = "kept"
        described["kept"] = [int(c) for c in kept]
    return described
