"""The logits features @ weight.T + bias of so many classes that they are never held at once, read in blocks of classes.

N rows, D features, C classes of the whole label set, c of them in one shard; z logits, t a row's target.  Extra memory
is one block, N x block, whatever C is: the forward pass keeps each row's log-sum-exp, the backward pass computes the
block's logits again (online softmax, Milakov & Gimelshein 2018; the recomputation of Dao et al. 2022, section 3.1).

Where the rows of `weight` are split over ranks, an `comm` carries rows and sums between them.  Here it is a value,
and the mathematics is the same with one shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK_ENTRIES = {
    "cpu": 2**22,
    "cuda": 2**26,
}  # logits held at a time: 16 MiB stay near a CPU core, 256 MiB fill a GPU
LEAST_EXPONENT = -80.0


class LocalComm:
    """The comm of one shard that holds every class."""

    first = 0  # the class of the shard's first row
    share = 1.0  # of the weight's gradient: ranks that average gradients sum each its own loss's

    def of(self, features: Tensor) -> LocalComm:
        """The comm of a batch of which this rank has these rows."""
        return self

    def among(self, classes: Tensor) -> LocalComm:
        """The comm of these classes alone, ascending, numbered anew."""
        return self

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each rank -> [N, ...], in the order of the ranks."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [n, ...], this rank's rows."""
        return rows

    def own_columns(self, dense: Tensor) -> Tensor:
        """[n, C] of each rank -> [N, c], the columns of this rank's classes."""
        return dense

    def max(self, values: Tensor) -> Tensor:
        """The largest over the ranks, entry by entry."""
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, entry by entry."""
        return values


class Targets(NamedTuple):
    """Target t of each row: `values` at the classes `indices`, [N, k]; `uniform`, [N], at every class; `dense` [N, C].

    The parts add up; absent ones are None.  No two indices of a row need differ: their values add up too.
    """

    indices: Tensor | None = None
    values: Tensor | None = None
    uniform: Tensor | None = None
    dense: Tensor | None = None

    @classmethod
    def of_labels(
        cls, labels: Tensor, num_classes: int, smoothing: float = 0.0, weight=1.0
    ) -> Targets:
        """weight * ((1 - smoothing) onehot(label) + smoothing / C), and 0 for a label of -1; labels: int64 [N]."""
        known = (labels >= 0).float() * weight
        uniform = known * (smoothing / num_classes) if smoothing else None
        return cls(labels.clamp_min(0)[:, None], (known * (1 - smoothing))[:, None], uniform)

    @classmethod
    def of_top(
        cls, indices: Tensor, values: Tensor, num_classes: int, tail: Tensor | None = None
    ) -> Targets:
        """The k largest probabilities [N, k], and their tail [N] spread evenly over the other classes (None: no tail).

        indices: int64, distinct in a row.
        """
        others = num_classes - indices.shape[1]
        if tail is None or not others:
            return cls(indices, values)
        each = tail / others
        return cls(indices, values - each[:, None], each)

    def mass(self, num_classes: int) -> Tensor:
        """[N], the sum of t over the classes; 1 for a distribution."""
        parts = []
        if self.indices is not None:
            parts.append(self.values.sum(1))
        if self.uniform is not None:
            parts.append(self.uniform * num_classes)
        if self.dense is not None:
            parts.append(self.dense.sum(1))
        return sum(parts)


class Summary(NamedTuple):
    """What is asked of rows of predictions.  k: the classes `indices` [N, k] of the largest probabilities, and these.

    log_label: [N], log p of the label, or None.  squares: [N], sum of p^2.
    """

    indices: Tensor
    probabilities: Tensor
    log_label: Tensor | None
    squares: Tensor


@dataclass(frozen=True)
class LinearLogits:
    """features [n, D] @ weight [c, D].T + bias [c], of num_classes classes: what a head may give for [n, C] logits.

    Under autocast the products are of its type, as those of a linear layer are, and every sum is in float32.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    num_classes: int
    block: int | None = None  # classes at a time; None: BLOCK_ENTRIES of the device
    comm: LocalComm = field(default_factory=LocalComm)

    def add_bias(self, log_prior: Tensor | None) -> LinearLogits:
        """These logits + log_prior [C]."""
        if log_prior is None:
            return self
        own = log_prior[self.comm.first : self.comm.first + len(self.weight)].to(self.weight)
        return replace(self, bias=own if self.bias is None else self.bias + own)

    def scale_by_temperature(self, temperature: float) -> LinearLogits:
        """These logits / temperature."""
        if temperature == 1:
            return self
        bias = None if self.bias is None else self.bias / temperature
        return replace(self, features=self.features / temperature, bias=bias)

    def sampled(
        self, labels: Tensor, negatives: int, draw: torch.Generator
    ) -> tuple[LinearLogits, Tensor]:
        """Logits of the batch's own classes and of `negatives` others, and the labels as classes among them.

        The others are drawn uniformly, without replacement, and stand for all others: their logits are raised by
        log(number of others / negatives), the log Q correction of sampled softmax (Bengio & Senecal 2008; Jean et al.
        2015, section 3).  So sum exp z is unbiased over the draw; its logarithm, the loss, is biased downwards, by less
        the more are drawn, and exact with all.  labels: int64 [n], each a class; draw: alike on every rank.
        """
        own_classes = self.comm.gather(labels).unique()
        order = torch.randperm(self.num_classes, generator=draw).to(labels.device)
        others = order[~torch.isin(order, own_classes)]
        drawn = others[:negatives]
        classes = torch.cat([own_classes, drawn]).sort().values
        raised = torch.isin(classes, drawn) * math.log(max(1, len(others)) / max(1, len(drawn)))
        here = (classes >= self.comm.first) & (classes < self.comm.first + len(self.weight))
        rows = classes[here] - self.comm.first
        bias = raised[here].to(self.weight) + (0 if self.bias is None else self.bias[rows])
        some = replace(
            self,
            weight=self.weight[rows],
            bias=bias,
            num_classes=len(classes),
            comm=self.comm.among(classes),
        )
        return some, torch.searchsorted(classes, labels)

    def logsumexp_and_dot(self, targets: Targets | None = None) -> tuple[Tensor, Tensor]:
        """(log sum_c exp z_c, sum_c t_c z_c), both [n] in float32 (float64 of float64) and differentiable in features,
        weight and bias."""
        kind = self.features.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):
            return _Reduced.apply(
                self.features,
                self.weight,
                self.bias,
                targets or Targets(),
                low,
                self.block,
                self.comm,
            )

    def cross_entropy(self, targets: Targets) -> Tensor:
        """-sum_c t_c log softmax(z)_c, [n]."""
        log_sum, dot = self.logsumexp_and_dot(targets)
        return targets.mass(self.num_classes) * log_sum - dot

    def materialize(self) -> Tensor:
        """The logits themselves, float32 [n, C], of one shard."""
        return F.linear(self.features, self.weight, self.bias).float()

    def of_classes(self, classes: Tensor) -> Tensor:
        """The logits of some classes, [n, len(classes)], of one shard."""
        return F.linear(
            self.features, self.weight[classes], None if self.bias is None else self.bias[classes]
        )

    @torch.no_grad()
    def summary(self, k: int, labels: Tensor | None = None) -> Summary:
        """The k most probable classes of each row and its figures; labels: int64 [n].  Of one shard.

        Of classes that tie any may come first.
        """
        rows, k = len(self.features), min(k, self.num_classes)
        like = self.features.new_zeros(
            rows, dtype=torch.promote_types(self.features.dtype, torch.float32)
        )
        peak, total, squares, label_logit = (
            like - torch.inf,
            like.clone(),
            like.clone(),
            like.clone(),
        )
        top, classes = (
            like.new_full((rows, 0), 0),
            torch.zeros(rows, 0, dtype=torch.int64, device=like.device),
        )
        for start, z in _blocks(
            self.features.to(self.weight), self.weight, self.bias, None, self.block
        ):
            if labels is not None:
                label_logit += _gathered(z, labels[:, None] - start)[:, 0]
            there = z.topk(min(k, z.shape[1]), dim=1)
            top = torch.cat([top, there.values], 1)
            classes = torch.cat([classes, there.indices + start], 1)
            best = top.topk(min(k, top.shape[1]), dim=1)
            top, classes = best.values, classes.gather(1, best.indices)
            peak, correction = _raised(peak, there.values[:, 0])
            _exp_(z.sub_(peak[:, None]))
            total = total * correction + z.sum(1)
            squares = squares * correction**2 + z.square_().sum(1)
        log_sum = peak + total.log()
        log_label = None if labels is None else label_logit - log_sum
        return Summary(classes, (top - log_sum[:, None]).exp_(), log_label, squares / total**2)


class _Reduced(torch.autograd.Function):
    """LinearLogits.reduced."""

    @staticmethod
    def forward(ctx, features, weight, bias, targets: Targets, low, block, comm):
        x = comm.gather(features).to(low or torch.promote_types(features.dtype, weight.dtype))
        given = [comm.gather(part) if part is not None else None for part in targets[:3]]
        dense = comm.own_columns(targets.dense) if targets.dense is not None else None
        t = Targets(*given, dense)
        if t.indices is not None:
            t = t._replace(indices=t.indices - comm.first)
        dtype = torch.promote_types(x.dtype, torch.float32)
        peak, total = (
            x.new_full((len(x),), -torch.inf, dtype=dtype),
            x.new_zeros(len(x), dtype=dtype),
        )
        dot = torch.zeros_like(total)
        for start, z in _blocks(x, weight, bias, low, block):
            if t.indices is not None:
                dot += _gathered(z, t.indices - start).mul_(t.values).sum(1)
            if t.dense is not None:
                dot += torch.einsum("nc,nc->n", z, t.dense[:, start : start + z.shape[1]].to(z))
            peak, correction = _raised(peak, z.amax(1))
            total = total.mul_(correction).add_(_exp_(z.sub_(peak[:, None])).sum(1))
        if t.uniform is not None:  # sum_c z_c is linear in the sum of the weight's rows
            every = x.to(dtype) @ weight.sum(0, dtype=dtype)
            dot += t.uniform * (every if bias is None else every + bias.sum())
        highest = comm.max(peak)
        total = comm.sum(total * (peak - highest).exp())
        log_sum = highest + total.log()
        ctx.save_for_backward(x, weight, bias, log_sum, *t)
        ctx.facts = features.dtype, low, block, comm
        return comm.own(log_sum), comm.own(comm.sum(dot))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_sum, d_dot):
        x, weight, bias, log_sum, *t = ctx.saved_tensors
        given_dtype, low, block, comm = ctx.facts
        t, share = Targets(*t), comm.share
        d_log_sum, d_dot = comm.gather(d_log_sum), comm.gather(d_dot)
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_x = torch.zeros_like(x, dtype=log_sum.dtype) if to_x else None
        d_weight = torch.empty_like(weight) if to_weight else None
        d_bias = torch.empty_like(bias) if to_bias else None
        # What is the same at every class, u_n d_dot_n, reaches weight as one row and x as the sum of the weight's rows.
        even = t.uniform * d_dot if t.uniform is not None else torch.zeros_like(d_dot)
        even_x, even_bias = even.to(x) @ x, even.sum()
        values = t.values * d_dot[:, None] if t.indices is not None else None
        for start, z in _blocks(x, weight, bias, low, block):
            d_z = _exp_(z.sub_(log_sum[:, None])).mul_(d_log_sum[:, None])
            here = slice(start, start + z.shape[1])
            if t.indices is not None:
                _scattered_(d_z, t.indices - start, values)
            if t.dense is not None:
                d_z.addcmul_(t.dense[:, here].to(z), d_dot[:, None])
            if to_bias:
                d_bias[here] = (d_z.sum(0) + even_bias) * share
            d_z = d_z.to(low) if low else d_z
            if to_x:
                _add_product_(d_x, d_z, weight[here], low)
            if to_weight:
                _product(d_z, x, even_x, low, share, out=d_weight[here])
        if to_x and t.uniform is not None:
            d_x += torch.outer(even, weight.sum(0, dtype=d_x.dtype))
        d_x = comm.own(comm.sum(d_x)).to(given_dtype) if to_x else None
        return d_x, d_weight, d_bias, None, None, None, None


def _blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: torch.dtype | None, block: int | None
):
    """(first class, z [N, at most block]) in turn; each z lives in the memory of the one before."""
    block = block or max(64, BLOCK_ENTRIES[x.device.type] // max(1, len(x)))
    block = min(block, max(1, len(weight)))
    held = torch.empty(
        len(x) * block, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    for start in range(0, len(weight), block):
        rows = weight[start : start + block]
        z = held[: len(x) * len(rows)].view(len(x), len(rows))
        if low:
            z.copy_(x @ rows.to(low).T)
            if bias is not None:
                z += bias[start : start + block]
        elif bias is None:
            torch.mm(x, rows.T, out=z)
        else:
            torch.addmm(bias[start : start + block], x, rows.T, out=z)
        yield start, z


def _exp_(z: Tensor) -> Tensor:
    """exp(z) in place, for z <= 0; below LEAST_EXPONENT as if z were that, which no sum of floats near 1 can tell."""
    # Where exp(z) is below the smallest normal number, MKL's takes 60 to 130 times as long, and so may its multiples.
    return z.clamp_min_(LEAST_EXPONENT).exp_()


def _raised(peak: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two maxima [N], and what a sum of exponentials relative to the first is to be multiplied by."""
    higher = torch.maximum(peak, candidate)
    return higher, (peak - higher).exp_()


def _gathered(z: Tensor, columns: Tensor) -> Tensor:
    """z [N, c] at `columns` [N, k], 0 where a column is outside."""
    there = (columns >= 0) & (columns < z.shape[1])
    return z.gather(1, columns.clamp(0, z.shape[1] - 1)) * there


def _scattered_(d_z: Tensor, columns: Tensor, values: Tensor) -> None:
    """Add values [N, k] to d_z [N, c] at `columns` [N, k], none where a column is outside."""
    there = (columns >= 0) & (columns < d_z.shape[1])
    d_z.scatter_add_(1, columns.clamp(0, d_z.shape[1] - 1), values.to(d_z) * there)


def _add_product_(d_x: Tensor, d_z: Tensor, rows: Tensor, low) -> None:
    if low:
        d_x += d_z @ rows.to(low)
    else:
        d_x.addmm_(d_z, rows)


def _product(d_z: Tensor, x: Tensor, even_x: Tensor, low, share: float, out: Tensor) -> None:
    """out = share * (d_z.T @ x + even_x)."""
    if low:
        out.copy_((d_z.T @ x).float().add_(even_x).mul_(share))
    else:
        torch.addmm(even_x, d_z.T, x, beta=share, alpha=share, out=out)
