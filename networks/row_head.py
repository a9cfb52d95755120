"""A linear head of which a training step reads and changes a few rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .linear_logits import LinearLogits


class RowGradients(NamedTuple):
    """Gradients of some rows of a linear layer.

    classes  int64 [m], distinct, ascending
    weight   [m, D]
    bias     [m]
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor


class RowHead(nn.Module):
    """nn.Linear while it learns by rows: features [n, D] -> these features.

    Only the loss knows which rows a batch needs, so it calls `read`. Weight and bias are not
    parameters: nothing of the size of all classes is exchanged, zeroed or stepped.

    weight: [C, D].  bias: [C].  They are the linear layer's own memory.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.weight = linear.weight.detach()
        self.bias = linear.bias.detach()
        self._read: list[RowGradients] = []  # rows instead of gradients: leaves, whose .grad counts

    def forward(self, features: Tensor) -> Tensor:
        return features

    def read(self, features: Tensor, classes: Tensor) -> LinearLogits:
        """The logits of some classes, which are numbered by their places in `classes`.

        Parameters
        ----------
        features : Tensor [n, D]
        classes : Tensor int64 [m]
            Distinct, ascending.
        """
        weight = self.weight.index_select(0, classes)
        bias = self.bias.index_select(0, classes)
        if torch.is_grad_enabled():
            weight.requires_grad_()
            bias.requires_grad_()
            self._read.append(RowGradients(classes, weight, bias))
        return LinearLogits(features, weight, bias, len(classes))

    def take_gradients(self) -> RowGradients:
        """The gradients of the rows that were read since the last call, each row once."""
        read, self._read = self._read, []
        return sum_rows(
            [RowGradients(rows.classes, _grad(rows.weight), _grad(rows.bias)) for rows in read]
        )

    def whole(self) -> nn.Linear:
        """The plain layer. It shares this one's memory."""
        num_classes, features = self.weight.shape
        linear = nn.Linear(features, num_classes, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.bias = nn.Parameter(self.bias)
        return linear

    def _apply(self, fn, recurse: bool = True):
        """Move the tensors with the network, as parameters would."""
        self.weight, self.bias = fn(self.weight), fn(self.bias)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.weight)} classes, by rows"


def sum_rows(parts: Sequence[RowGradients]) -> RowGradients:
    """Gradients of the same layer, added up: each class once, in ascending order."""
    if len(parts) == 1:
        return parts[0]
    classes, places = torch.cat([part.classes for part in parts]).unique(return_inverse=True)
    weight = torch.cat([part.weight for part in parts])
    bias = torch.cat([part.bias for part in parts])
    return RowGradients(
        classes,
        weight.new_zeros(len(classes), weight.shape[1]).index_add_(0, places, weight),
        bias.new_zeros(len(classes)).index_add_(0, places, bias),
    )


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "rows that no loss was taken of"
    return leaf.grad
