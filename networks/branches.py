"""Specialists that correct the generalist's logits instead of copying it.

    B            rows of a batch
    C            classes of the whole label set
    S            the branch's classes, |S| of them. The dustbin stands for all others
    z            the generalist's logits, [B, C]
    L            log sum_c exp z_c over all classes, [B]
    cut          where branch and generalist part. What the
                 generalist has there is [B, ...]
    h            what the branch's embedding reads, [B, D]
    r            its correction, [B, |S| + 1], dustbin last

    r = W2 relu(W1 h + b1) + b2
    logits = z_i + r_i for i in S, and log sum of exp z over the others + r_dustbin

W2 and b2 start at zero, so that a fresh branch answers as the generalist does.  It has |S| + 1 rows
where the generalist has C: its embedding may be wider.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .builders import Builders, build_trunk
from .classifier import Classifier
from .cutting import Cut, cut_at
from .files import SPEC, load_built
from .full_precision import exact_answer, features_to
from .spec import ModelSpec, checked_classes

# Of what is left outside S, as a fraction of all: float64 tells no smaller one from rounding.
LEAST_SHARE = 1e-12


class Branch(nn.Module):
    """One branch's own layers. The generalist is not among them.

    spec: its head is {"kind": "branch", ...}.
    blocks: its own blocks, from the cut to h. Empty where the generalist shares all of them.
    hidden: W1 and b1.  correction: W2 and b2.  layers: these two. None draws fresh ones.
    """

    classes: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        blocks: nn.Sequential,
        layers: tuple[nn.Linear, nn.Linear] | None = None,
    ):
        super().__init__()
        head = spec.head
        self.spec = spec
        self.blocks = blocks
        if layers is None:
            hidden = nn.Linear(head["features"], head["embedding"])
            correction = nn.Linear(head["embedding"], spec.num_outputs)
            nn.init.zeros_(correction.weight)
            nn.init.zeros_(correction.bias)
            layers = hidden, correction
        self.hidden, self.correction = layers
        self.register_buffer("classes", torch.tensor(head["members"]), persistent=False)

    def correct(self, at_cut: Tensor) -> Tensor:
        """r [B, |S| + 1], of what the generalist has at the cut."""
        return self._correct(self.blocks(at_cut).flatten(1))

    @exact_answer
    def _correct(self, h: Tensor) -> Tensor:
        h = features_to(self.hidden.weight.dtype, h)
        return self.correction(F.relu(self.hidden(h)))

    def forward(self, at_cut: Tensor, own_logits: Tensor, rest: Tensor) -> Tensor:
        """[B, |S| + 1], dustbin last, in float32 at least.

        own_logits: z of S, [B, |S|].  rest: log sum of exp z over the other classes, [B].
        """
        return add_correction(self.correct(at_cut), own_logits, rest)

    def extra_repr(self) -> str:
        return f"{len(self.classes)} of {self.spec.num_classes} classes + dustbin"


class BranchedClassifier(nn.Module):
    """Generalist and branch as one network: raw [B, ...] -> [B, |S| + 1], dustbin last."""

    def __init__(self, generalist: Classifier, branch: Branch):
        super().__init__()
        self.generalist = generalist
        self.branch = branch
        self._cut = cut_at(generalist.trunk, branch.spec.head["blocks"])

    def train(self, mode: bool = True) -> BranchedClassifier:
        """The generalist stays in eval mode, and so do the branch's own blocks."""
        super().train(mode)
        self.generalist.eval()
        self.branch.blocks.eval()
        return self

    @property
    def spec(self) -> ModelSpec:
        return self.branch.spec

    @property
    def num_members(self) -> int:
        return 1

    def forward(self, raw: Tensor) -> Tensor:
        at_cut = self._cut.body(self.generalist.preprocess(raw))
        general = GeneralOutput.of(self.generalist.logits_of(self._cut.end(at_cut)))
        return self.branch(at_cut, *general.own_and_rest(self.branch.classes))


class GeneralOutput(NamedTuple):
    """The generalist's logits [B, C] as branches read them.

    p: their softmax, [B, C].  total: sum of p, float64 [B], which is 1 but for rounding.
    log_total: L, float64 [B].
    """

    logits: Tensor
    p: Tensor
    total: Tensor
    log_total: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> GeneralOutput:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = logits.softmax(1)
        top, p_top = logits.amax(1), p.amax(1)
        return cls(logits, p, p.sum(1, dtype=torch.float64), top.double() - p_top.double().log())

    def own_and_rest(self, classes: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z of S [n, |S|], the rest's logsumexp float64 [n]), of some rows or of all.

        The rest is -inf where S has every class.
        """
        every = slice(None)
        which = (every if rows is None else rows[:, None], classes)
        kept = every if rows is None else rows
        own, log_total = self.logits[which], self.log_total[kept]
        if len(classes) == self.logits.shape[1]:
            return own, torch.full_like(log_total, -math.inf)
        # Both sums are of the same rounded numbers p_i, so that their difference is off by what
        # float64 rounds, 1e-16, and by the relative error of the p_i outside.
        share = self.total[kept] - self.p[which].sum(1, dtype=torch.float64)
        return own, log_total + share.clamp_min(LEAST_SHARE).log()


def add_correction(correction: Tensor, own_logits: Tensor, rest: Tensor) -> Tensor:
    """r + (z of S, the rest's logsumexp): [..., |S| + 1] of [..., |S|] and [...]."""
    general = torch.cat([own_logits, rest.to(own_logits.dtype)[..., None]], dim=-1)
    return general + correction.to(general.dtype)


def log_sum(logits: Tensor) -> Tensor:
    """L [B] in float64. With z of S it is all that a branch needs of the C logits."""
    return logits.double().logsumexp(-1)


def log_rest(own_logits: Tensor, log_total: Tensor) -> Tensor:
    """log sum of exp z over the classes outside S, float64: [...] of [..., |S|] and L [...].

    S must leave a class out.  The share of these classes is right within 1e-13 or so. One below
    LEAST_SHARE is raised to it, which changes no probability by more.
    """
    # e^L is the sum over all classes, so the share of those outside is 1 - sum over S of
    # e^(z_i - L), a difference of numbers near 1 where S holds nearly all.  The error of z_i - L is
    # that of L, |L| 2^-53, and the share's is about the same: some 1e-14 for logits up to a few
    # hundred, where float32 would have 1e-5.  What is less than LEAST_SHARE is noise.
    log_total = log_total.double()
    inside = (own_logits - log_total[..., None]).exp().sum(-1)  # in float64, as L is
    return log_total + (1 - inside).clamp_min(LEAST_SHARE).log()


def branch_off(
    generalist: Classifier,
    classes: Iterable[int],
    embedding: int | None = None,
    blocks: int = 0,
) -> Branch:
    """A fresh branch of `generalist`, which answers as the generalist does.

    Parameters
    ----------
    generalist : Classifier
        A plain one, with a linear head. It stays as it is.
    classes : iterable of int
        S.
    embedding : int, optional
        Width between W1 and W2. By default the generalist's number of features.
    blocks : int
        How many of the trunk's last blocks are copied for the branch to train.  0 copies none: the
        branch reads what the generalist's embedding reads, or its head where it has no embedding.

    Returns
    -------
    Branch
        On the generalist's device, W1 from torch's global generator.

    Raises
    ------
    ValueError
        For classes that are not distinct or do not exist, for a generalist that is not plain, and
        for a trunk that cannot be cut there.
    """
    spec = generalist.spec
    if spec.members is not None or spec.head["kind"] != "linear":
        raise ValueError(
            "a branch needs a plain generalist with a row for each class; "
            "this one is a specialist or has members"
        )
    cut = cut_at(generalist.trunk, blocks)
    own = copy.deepcopy(cut.own).requires_grad_(True)
    head = {
        "kind": "branch",
        "members": checked_classes(classes, spec.num_classes),
        "embedding": embedding or generalist.linear_head.in_features,
        "blocks": blocks,
        "features": _feature_count(generalist, cut),
    }
    branch = Branch(replace(spec, head=head), own)
    return branch.to(generalist.linear_head.weight).train(generalist.training)


@torch.no_grad()
def _feature_count(generalist: Classifier, cut: Cut) -> int:
    """D, from one input of zeros."""
    was_training = generalist.training
    generalist.eval()
    h = cut.own(cut.body(generalist.preprocess(generalist.zero_input()))).flatten(1)
    generalist.train(was_training)
    return h.shape[1]


def build_branch(spec: ModelSpec, builders: Builders | None = None) -> Branch:
    """The branch that `spec` describes, with fresh weights from torch's global generator."""
    blocks = spec.head["blocks"]
    own = nn.Sequential()
    if blocks:
        trunk = build_trunk(spec.builder, spec.input.shape, spec.options, builders)
        own = cut_at(trunk, blocks).own
    return Branch(spec, own)


def load_branch(
    directory: str | Path,
    device: str | torch.device = "cpu",
    builders: Builders | None = None,
) -> Branch:
    """The branch that save_classifier wrote, in eval mode.

    Raises ValueError as load_classifier does, and for a directory that holds no branch.
    """
    directory = Path(directory)
    spec = ModelSpec.load(directory / SPEC)
    if spec.head["kind"] != "branch":
        raise ValueError(f"{directory / SPEC}: a {spec.head['kind']} head is no branch")
    return load_built(spec, directory, device, build_branch, builders)
