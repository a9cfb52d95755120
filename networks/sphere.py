"""A classifier whose spec says cosine, while its rows learn and when they have learnt."""

from __future__ import annotations

from typing import Any

from torch import nn

from .classifier import Classifier
from .cosine import UnitRows
from .heads import ShardedHead
from .members import MemberHeads


def open_rows(classifier: Classifier, in_blocks: bool = False) -> None:
    """Train the rows with norm 1 from here on, in place. close_rows ends it.

    Does nothing to a network that is no cosine one, to a specialist, whose rows are free, and to a
    head of another kind than a linear layer or several of them.

    in_blocks: as in UnitRows. Of a plain network.
    """
    spec = classifier.spec
    if spec.cosine is None or spec.is_specialist:
        return
    if isinstance(classifier.head, ShardedHead):
        if isinstance(classifier.head.rows, nn.Linear):
            classifier.head.rows = UnitRows(classifier.head.rows)
        return
    if type(classifier.head) is nn.Linear:
        classifier.head = UnitRows(classifier.head, in_blocks)
    elif isinstance(classifier.head, MemberHeads):
        for _, end in classifier.head.heads.named_children():
            linear: Any = end.get_submodule("linear")
            if type(linear) is nn.Linear:
                end.add_module("linear", UnitRows(linear))


def has_open_rows(classifier: Classifier) -> bool:
    """Whether a head with a row for each class learns on the sphere."""
    head = classifier.head.rows if isinstance(classifier.head, ShardedHead) else classifier.head
    return isinstance(head, UnitRows)


def close_rows(classifier: Classifier) -> None:
    """Make plain linear layers of the rows that have learnt, in place."""
    if isinstance(classifier.head, ShardedHead):
        if isinstance(classifier.head.rows, UnitRows):
            classifier.head.rows = classifier.head.rows.plain()
    elif isinstance(classifier.head, UnitRows):
        classifier.head = classifier.head.plain()
    elif isinstance(classifier.head, MemberHeads):
        for _, end in classifier.head.heads.named_children():
            rows = end.get_submodule("linear")
            if isinstance(rows, UnitRows):
                end.add_module("linear", rows.plain())
