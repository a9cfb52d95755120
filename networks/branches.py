"""Specialists that correct the generalist's logits instead of copying it.

    B            rows of a batch
    C            classes of the whole label set
    S            the branch's classes, |S| of them; the dustbin stands for all others
    z            the generalist's logits, [B, C]
    L            log sum_c exp z_c over all classes, [B]
    cut          where branch and generalist part; what the generalist has there is [B, ...]
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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .builders import Builders, build_trunk
from .checkpoints import read_safetensors
from .classifier import Classifier
from .cutting import Cut, cut_at
from .files import SPEC, WEIGHTS, check_tensors
from .spec import ModelSpec, checked_classes

# Of what is left outside S, as a fraction of all: float64 tells no smaller one from rounding.
LEAST_SHARE = 1e-12
# A fraction so small is right to six digits.
TRUSTED_SHARE = 1e-6


class Branch(nn.Module):
    """One branch's own layers; the generalist is not among them.

    spec: its head is {"kind": "branch", ...}.
    blocks: its own blocks, from the cut to h; empty where the generalist shares all of them.
    hidden: W1 and b1.  correction: W2 and b2.
    """

    classes: Tensor

    def __init__(self, spec: ModelSpec, blocks: nn.Sequential):
        super().__init__()
        head = spec.head
        self.spec = spec
        self.blocks = blocks
        self.hidden = nn.Linear(head["features"], head["embedding"])
        self.correction = nn.Linear(head["embedding"], spec.num_outputs)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        self.register_buffer("classes", torch.tensor(head["members"]), persistent=False)

    def correct(self, at_cut: Tensor) -> Tensor:
        """r [B, |S| + 1], of what the generalist has at the cut."""
        h = self.blocks(at_cut).flatten(1)
        return self.correction(F.relu(self.hidden(h)))

    def forward(self, at_cut: Tensor, logits: Tensor, log_total: Tensor | None = None) -> Tensor:
        """[B, |S| + 1], dustbin last, in float32 at least.

        logits: the generalist's, [B, C].  log_total: L, [B]; None computes it.
        """
        if log_total is None:
            log_total = log_sum(logits)
        own = logits[:, self.classes].to(torch.promote_types(logits.dtype, torch.float32))
        rest = log_rest(logits, self.classes, log_total)
        return add_correction(self.correct(at_cut), own, rest)

    def extra_repr(self) -> str:
        return f"{len(self.classes)} of {self.spec.num_classes} classes + dustbin"


class BranchedClassifier(nn.Module):
    """Generalist and branch as one network: raw [B, ...] -> [B, |S| + 1], dustbin last."""

    def __init__(self, generalist: Classifier, branch: Branch):
        super().__init__()
        self.generalist = generalist
        self.branch = branch
        self._cut = cut_at(generalist.trunk, branch.spec.head["blocks"])

    @property
    def spec(self) -> ModelSpec:
        return self.branch.spec

    @property
    def num_members(self) -> int:
        return 1

    def forward(self, raw: Tensor) -> Tensor:
        at_cut = self._cut.body(self.generalist.preprocess(raw))
        return self.branch(at_cut, self.generalist.head(self._cut.end(at_cut)))


def add_correction(correction: Tensor, own_logits: Tensor, rest: Tensor) -> Tensor:
    """r + (z of S, the rest's logsumexp): [..., |S| + 1] of [..., |S|] and [...]."""
    general = torch.cat([own_logits, rest.to(own_logits.dtype)[..., None]], dim=-1)
    return general + correction.to(general.dtype)


def log_sum(logits: Tensor) -> Tensor:
    """L [B], in float64."""
    return logits.double().logsumexp(-1)


def rest_share(own_logits: Tensor, log_total: Tensor) -> Tensor:
    """The fraction of sum exp z that lies outside S, in float64: [...] of [..., |S|] and [...].

    It is right within LEAST_SHARE, and never below it.
    """
    # The share is 1 - sum over S of exp(z_i - L), a difference of numbers near 1 where S holds
    # nearly all.  The error of z_i - L is that of L, |L| 2^-53, and so the share's is about
    # |L| 1e-16: for logits up to a few hundred some 1e-14, where float32 would have 1e-5.  What is
    # less than LEAST_SHARE is noise.  Raised to it, no probability is off by more than that.
    inside = (own_logits.double() - log_total.double()[..., None]).exp().sum(-1)
    return (1 - inside).clamp_min(LEAST_SHARE)


def log_rest(logits: Tensor, classes: Tensor, log_total: Tensor) -> Tensor:
    """log sum of exp z outside `classes`, float64 [B]; -inf where nothing is outside.

    logits: [B, C].  classes: int64 [|S|].  log_total: L [B].
    """
    if len(classes) == logits.shape[1]:
        return torch.full_like(log_total.double(), -math.inf)
    share = rest_share(logits[:, classes], log_total)
    rest = log_total.double() + share.log()
    if torch.compiler.is_compiling():
        return rest  # a program has no rows of its own for what it could not tell from 0
    unsure = (share < TRUSTED_SHARE).nonzero()[:, 0]
    if not len(unsure):
        return rest
    return rest.index_put((unsure,), log_rest_directly(logits[unsure], classes))


def log_rest_directly(logits: Tensor, classes: Tensor) -> Tensor:
    """As log_rest, by summing over all other classes: C terms a row instead of |S|."""
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[classes] = False
    return logits[:, others].double().logsumexp(1)


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
        A plain one, with a linear head; it stays as it is.
    classes : iterable of int
        S.
    embedding : int, optional
        The numbers between W1 and W2; by default as many as the generalist's head reads.
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
    raw = torch.zeros(1, *generalist.spec.input.shape, device=generalist.linear_head.weight.device)
    h = cut.own(cut.body(generalist.preprocess(raw))).flatten(1)
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
    with torch.random.fork_rng(devices=[]):
        try:
            branch = build_branch(spec, builders)
        except ValueError as error:
            raise ValueError(f"{directory / SPEC}: {error}") from None
    tensors = read_safetensors(directory / WEIGHTS)
    check_tensors(tensors, branch.state_dict(), directory / WEIGHTS)
    branch.load_state_dict(tensors)
    return branch.to(device).eval()
