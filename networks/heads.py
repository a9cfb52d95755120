"""The last layer: one row per class, or a specialist's classes and their dustbin."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cosine import UnitRows, to_unit_rows
from .linear_logits import Comm, LinearLogits
from .spec import ModelSpec, checked_classes


class DustbinHead(nn.Module):
    """A specialist's head that keeps the generalist's rows: features [B, D] -> logits [B, |S| + 1].

    S: the specialist's classes.  The last logit, the dustbin, is the log-sum-exp of the other
    rows' logits.  The softmax is the generalist's with the classes outside S summed, so a
    specialist starts as the generalist.  With S = every class the dustbin is -inf, probability 0.
    The [B, C] logits never exist.

    The rows of S are stored first, then the others, each part in ascending order of class: the
    split is two slices of one tensor.

    kept: of the other classes only these keep their rows, and the last row stands for all that have
    none.  None keeps the rows of all.  linear: its rows. None draws fresh ones.
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        classes: Iterable[int],
        kept: list[int] | None = None,
        linear: nn.Linear | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.num_classes = num_classes
        own = torch.tensor(checked_classes(classes, num_classes))
        self.register_buffer("classes", own, persistent=False)
        self.kept = kept
        if linear is None:
            rows = num_classes if kept is None else len(own) + len(kept) + 1
            linear = nn.Linear(in_features, rows)
        self.weight, self.bias = linear.weight, linear.bias

    @property
    def row_classes(self) -> Tensor:
        """int64 [rows]: the class that each stored row stands for. -1 is the row for the rest."""
        device = self.classes.device
        if self.kept is not None:
            return torch.cat([self.classes, torch.tensor([*self.kept, -1], device=device)])
        outside = torch.ones(self.num_classes, dtype=torch.bool, device=device)
        outside[self.classes] = False
        return torch.cat([self.classes, outside.nonzero()[:, 0]])

    def forward(self, features: Tensor) -> Tensor:
        parts = [len(self.classes), len(self.weight) - len(self.classes)]
        weight, others = self.weight.split(parts)
        bias, others_bias = self.bias.split(parts)
        inside = F.linear(features, weight, bias)
        inside = inside.to(torch.promote_types(inside.dtype, torch.float32))
        if not len(others):
            return F.pad(inside, (0, 1), value=float("-inf"))
        if torch.compiler.is_compiling():
            # Programs (torch.export, ONNX) are made of torch's own operators.
            dustbin = F.linear(features, others, others_bias).to(inside.dtype).logsumexp(dim=1)
        else:
            logits = LinearLogits(features, others, others_bias, len(others))
            dustbin, _ = logits.logsumexp_and_dot()
        return torch.cat([inside, dustbin[:, None]], dim=1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.classes)} of {self.num_classes} classes + dustbin"


class ShardedHead(nn.Module):
    """One rank's rows of a head over all classes: [n, D] -> LinearLogits of all num_classes.

    rows: a head of the same kind as the whole one, with this rank's classes alone.  comm: how the
    ranks share the other rows.  block: classes at a time, as in LinearLogits.

    even: whether every rank is known to have as many examples. Its engine says so while it trains.
    """

    even = False

    def __init__(self, rows: RowsHead, num_classes: int, comm: Comm, block: int | None = None):
        super().__init__()
        self.in_features = rows.in_features
        self.num_classes = num_classes
        self.comm = comm
        self.block = block
        self.rows = rows

    def forward(self, features: Tensor) -> LinearLogits:
        comm = self.comm.of(features, self.even)
        weight, bias = self.rows.weight, self.rows.bias
        return LinearLogits(features, weight, bias, self.num_classes, self.block, comm)

    def extra_repr(self) -> str:
        return f"{self.in_features}, some of {self.num_classes} classes"


class GrownHead(nn.Module):
    """A linear head of which only some rows learn: [n, D] -> logits [n, C].

    linear: all C rows.  classes: int64 [K], those whose rows learn. They start as they are in
    `linear`.  The others are buffers: neither weight decay nor an average of weights reaches them.
    """

    classes: Tensor
    fixed_weight: Tensor
    fixed_bias: Tensor

    def __init__(self, linear: nn.Linear, classes: Tensor):
        super().__init__()
        self.in_features = linear.in_features
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("fixed_weight", linear.weight.detach().clone())
        self.register_buffer("fixed_bias", linear.bias.detach().clone())
        self.new = nn.Linear(linear.in_features, len(classes)).to(linear.weight)
        with torch.no_grad():
            self.new.weight.copy_(linear.weight[classes])
            self.new.bias.copy_(linear.bias[classes])

    @property
    def weight(self) -> Tensor:
        """[C, D], fixed and learning rows together."""
        return self.fixed_weight.index_copy(0, self.classes, self.new.weight)

    @property
    def bias(self) -> Tensor:
        """[C], fixed and learning rows together."""
        return self.fixed_bias.index_copy(0, self.classes, self.new.bias)

    def forward(self, features: Tensor) -> Tensor:
        fixed = F.linear(features, self.fixed_weight, self.fixed_bias)
        return fixed.index_copy(1, self.classes, self.new(features))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.classes)} of {len(self.fixed_weight)} rows learn"


RowsHead = nn.Linear | GrownHead | UnitRows  # heads with a row for each class


def make_head(
    spec: ModelSpec, in_features: int, linear: nn.Linear | None = None
) -> nn.Linear | DustbinHead:
    """The head that `spec.head` describes, with fresh weights, or with the rows of `linear`.

    Raises ValueError for a branch, which has none of its own.
    """
    if spec.head["kind"] == "branch":
        raise ValueError(
            "a branch corrects its generalist's logits and is no network by itself; "
            "load the run or the bundle that it is part of"
        )
    if spec.head["kind"] == "dustbin" and spec.head["rows"] != "fresh":
        kept = spec.head.get("kept")
        return DustbinHead(in_features, spec.num_classes, spec.head["members"], kept, linear)
    if linear is not None:
        return linear
    linear = nn.Linear(in_features, spec.num_outputs)
    if spec.cosine is not None and not spec.is_specialist:
        to_unit_rows(linear)
    return linear


def head_rows(spec: ModelSpec) -> int:
    """Rows of the head that `spec` describes."""
    if spec.is_specialist and spec.head.get("rows") == "all":
        return spec.num_classes
    if spec.is_specialist and spec.head.get("rows") == "kept":
        return spec.num_outputs + len(spec.head["kept"])
    return spec.num_outputs


def make_linear(spec: ModelSpec, in_features: int) -> nn.Linear:
    """The plain head of a spec that describes no dustbin, with fresh weights."""
    head = make_head(spec, in_features)
    assert isinstance(head, nn.Linear)
    return head
