"""The last layer: one row per class, or a specialist's members and their dustbin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear_logits import LinearLogits, LocalComm
from .spec import ModelSpec, check_members


class DustbinHead(nn.Module):
    """A specialist's head that keeps the generalist's C rows: logits [B, |S| + 1], the others' log-sum-exp last.

    kept: of the other classes only these keep their rows, and the last row stands for all that have none.
    Their softmax is the generalist's with the classes outside S summed, so a specialist starts as the generalist.
    The rows are stored members first, each part in ascending order of class: the split is two slices of one product.
    With S = every class the dustbin is -inf, probability 0.  [B, C] logits are not held.
    """

    def __init__(self, in_features: int, num_classes: int, members, kept=None):
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        members = torch.tensor(check_members(members, num_classes))
        self.register_buffer("members", members, persistent=False)
        self.kept = kept
        linear = nn.Linear(
            in_features, num_classes if kept is None else len(members) + len(kept) + 1
        )
        self.weight, self.bias = linear.weight, linear.bias

    @property
    def row_classes(self) -> Tensor:
        """int64 [rows]: the class that each stored row stands for; -1 is the row for the rest."""
        if self.kept is not None:
            return torch.cat(
                [self.members, torch.tensor([*self.kept, -1], device=self.members.device)]
            )
        outside = torch.ones(self.num_classes, dtype=torch.bool, device=self.members.device)
        outside[self.members] = False
        return torch.cat([self.members, outside.nonzero()[:, 0]])

    def forward(self, features: Tensor) -> Tensor:
        parts = [len(self.members), len(self.weight) - len(self.members)]
        (weight, others), (bias, others_bias) = self.weight.split(parts), self.bias.split(parts)
        inside = F.linear(features, weight, bias)
        inside = inside.to(torch.promote_types(inside.dtype, torch.float32))
        if not len(others):
            return F.pad(inside, (0, 1), value=float("-inf"))
        if (
            torch.compiler.is_compiling()
        ):  # programs (torch.export, ONNX) are of torch's own operators
            dustbin = F.linear(features, others, others_bias).to(inside.dtype).logsumexp(dim=1)
        else:
            dustbin, _ = LinearLogits(
                features, others, others_bias, len(others)
            ).logsumexp_and_dot()
        return torch.cat([inside, dustbin[:, None]], dim=1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.members)} of {self.num_classes} classes + dustbin"


class ShardedLinear(nn.Module):
    """Some rows of a linear head, as the comm splits them: [n, D] -> LinearLogits of all num_classes classes."""

    def __init__(
        self, rows: nn.Linear, num_classes: int, comm: LocalComm, block: int | None = None
    ):
        super().__init__()
        self.in_features, self.num_classes, self.comm, self.block = (
            rows.in_features,
            num_classes,
            comm,
            block,
        )
        self.weight, self.bias = rows.weight, rows.bias

    def forward(self, features: Tensor) -> LinearLogits:
        comm = self.comm.of(features)
        return LinearLogits(features, self.weight, self.bias, self.num_classes, self.block, comm)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.weight)} of {self.num_classes} classes"


class GrownHead(nn.Module):
    """A linear head of which only some rows learn: [n, D] -> logits [n, C].

    linear: all C rows.  classes: int64 [K], those whose rows learn; they start as they are in `linear`.
    The other rows are buffers: neither weight decay nor an average of weights reaches them.
    """

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
        return self.fixed_weight.index_copy(0, self.classes, self.new.weight)

    @property
    def bias(self) -> Tensor:
        return self.fixed_bias.index_copy(0, self.classes, self.new.bias)

    def forward(self, features: Tensor) -> Tensor:
        fixed = F.linear(features, self.fixed_weight, self.fixed_bias)
        return fixed.index_copy(1, self.classes, self.new(features))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.classes)} of {len(self.fixed_weight)} rows learn"


def lazy_logits(classifier, raw: Tensor) -> LinearLogits:
    """What a classifier with a plain linear head answers, without holding [B, C] logits.

    ValueError for one with members: their logits are held.
    """
    if classifier.num_members > 1:
        raise ValueError(
            "the logits of a network with members are held; take member_log_probabilities"
        )
    head = classifier.head
    return LinearLogits(
        classifier.trunk(classifier.preprocess(raw)), head.weight, head.bias, len(head.weight)
    )


def make_head(spec: ModelSpec, in_features: int) -> nn.Module:
    """The head that `spec.head` describes, with fresh weights."""
    if spec.head["kind"] == "dustbin" and spec.head["rows"] != "fresh":
        return DustbinHead(
            in_features, spec.num_classes, spec.head["members"], spec.head.get("kept")
        )
    return nn.Linear(in_features, spec.num_outputs)
