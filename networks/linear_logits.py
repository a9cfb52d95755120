"""The logits features @ weight.T + bias of so many classes that they are read in blocks of classes.

    N, n   rows of the batch, and of one rank
    C, c   classes of the whole label set, and of one rank
    D      features
    z, t   a row's logits, and its target

The [N, C] logits never exist at once.  Extra memory is one block, N x block, whatever C is: the
forward pass keeps each row's log-sum-exp, and the backward pass computes the block's logits again
(online softmax, Milakov & Gimelshein 2018, recomputation, Dao et al. 2022, section 3.1).

Where the rows of `weight` are split over ranks, a `Comm` carries rows and sums between them.  It is
a value here, and the mathematics is the same with one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .drawing import draw_classes
from .full_precision import exact_answer, full_precision
from .gathered_rows import LogitsAt, rows_at

# Logits in memory at a time: 16 MiB stay near a CPU core, 256 MiB fill a GPU.
BLOCK_ENTRIES = {"cpu": 2**22, "cuda": 2**26}
LEAST_EXPONENT = -80.0


class Comm(Protocol):
    """How ranks that hold different classes of one linear layer exchange rows and sums.

    Each rank has n rows of a batch of N, and c of C classes. N and C are sums over the ranks.
    of, gather, stack, own_columns, max, sum and sum_own are collective.
    """

    @property
    def first(self) -> int:
        """The class of this rank's first row of the weight."""
        ...

    @property
    def share(self) -> float:
        """Factor of the gradients of weight and bias: 1 / number of ranks.

        Summed over all N rows these gradients are those of the sum of the ranks' losses.  The
        trunk's, which ranks average, are those of the mean.
        """
        ...

    def of(self, features: Tensor, even: bool = False) -> Comm:
        """The comm for a batch of which this rank has these rows. features: [n, D].

        even: every rank is known to have n rows, so nothing is exchanged, and the host does not
        wait.
        """
        ...

    def among(self, classes: Tensor) -> Comm:
        """The comm for some classes only, numbered anew. classes: int64 [C'], ascending."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each rank -> [N, ...], in the order of the ranks."""
        ...

    def stack(self, values: Tensor) -> Tensor:
        """Gather tensors of one shape from all ranks: [ranks, ...]."""
        ...

    def own(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [n, ...], this rank's rows."""
        ...

    def own_columns(self, dense: Tensor) -> Tensor:
        """[n, C] of each rank -> [N, c], the columns of this rank's classes."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """The largest over the ranks, entry by entry. values: the same shape on each, say [N]."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, entry by entry. values: the same shape on each, say [N, D]."""
        ...

    def sum_own(self, values: Tensor) -> Tensor:
        """own(sum(values)), [N, ...] -> [n, ...], of which no rank gets the other ranks' rows."""
        ...


class LocalComm:
    """The Comm of one rank, which has every row and every class: n = N and c = C."""

    @property
    def first(self) -> int:
        return 0

    @property
    def share(self) -> float:
        return 1.0

    def of(self, features: Tensor, even: bool = False) -> LocalComm:
        return self

    def among(self, classes: Tensor) -> LocalComm:
        return self

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def stack(self, values: Tensor) -> Tensor:
        return values[None]

    def own(self, rows: Tensor) -> Tensor:
        return rows

    def own_columns(self, dense: Tensor) -> Tensor:
        return dense

    def max(self, values: Tensor) -> Tensor:
        return values

    def sum(self, values: Tensor) -> Tensor:
        return values

    def sum_own(self, values: Tensor) -> Tensor:
        return values


class Targets(NamedTuple):
    """Target t of each row: the sum of the parts that are not None.

    indices  int64 [N, k], classes of `values`. Repeated indices of a row add up
    values   [N, k]
    uniform  [N], at every class
    dense    [N, C]
    """

    indices: Tensor | None = None
    values: Tensor | None = None
    uniform: Tensor | None = None
    dense: Tensor | None = None

    @classmethod
    def of_labels(
        cls,
        labels: Tensor,
        num_classes: int,
        smoothing: float = 0.0,
        weight: float | Tensor = 1.0,
    ) -> Targets:
        """weight * ((1 - smoothing) onehot(label) + smoothing / C), and 0 for a label of -1.

        labels: int64 [N].  weight: one number, or [N].
        """
        known = (labels >= 0).float() * weight
        uniform = known * (smoothing / num_classes) if smoothing else None
        return cls(labels.clamp_min(0)[:, None], (known * (1 - smoothing))[:, None], uniform)

    @classmethod
    def of_top(
        cls, indices: Tensor, values: Tensor, num_classes: int, tail: Tensor | None = None
    ) -> Targets:
        """The k largest probabilities [N, k], and their tail [N] spread over the other classes.

        indices: int64, distinct in a row.  tail: None for none.
        """
        others = num_classes - indices.shape[1]
        if tail is None or not others:
            return cls(indices, values)
        uniform = tail / others
        return cls(indices, values - uniform[:, None], uniform)

    def mass(self, num_classes: int) -> Tensor:
        """[N], the sum of t over the classes. 1 for a distribution."""
        parts = []
        if self.values is not None:
            parts.append(self.values.sum(1))
        if self.uniform is not None:
            parts.append(self.uniform * num_classes)
        if self.dense is not None:
            parts.append(self.dense.sum(1))
        assert parts, "targets without a part"
        return sum(parts[1:], start=parts[0])


class Moved(NamedTuple):
    """What is added to a few logits of each row.

    indices  int64 [N, k], classes, distinct in a row
    values   [N, k]
    """

    indices: Tensor
    values: Tensor


class Summary(NamedTuple):
    """What metrics need to know of N rows of predictions.

    indices        int64 [N, k], the classes of the largest probabilities
    probabilities  [N, k], these probabilities
    log_label      [N], log p of the label, or None
    squares        [N], sum of p^2 over all classes
    """

    indices: Tensor
    probabilities: Tensor
    log_label: Tensor | None
    squares: Tensor


@dataclass(frozen=True)
class LinearLogits:
    """features @ weight.T + bias: what a head may give in place of [n, C] logits.

    Under autocast the products are of its type, as those of a linear layer are, and every sum is in
    float32.

    Parameters
    ----------
    features : Tensor [n, D]
    weight : Tensor [c, D]
    bias : Tensor [c], optional
    num_classes : int
        C, over all ranks.
    block : int, optional
        Classes at a time. By default BLOCK_ENTRIES of the device over the number of rows.
    comm : Comm
        Carries rows and sums between the ranks that split the classes.
    moved : Moved, optional
        Added in losses alone.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    num_classes: int
    block: int | None = None
    comm: Comm = field(default_factory=LocalComm)
    moved: Moved | None = None

    def add_bias(self, log_prior: Tensor | None) -> LinearLogits:
        """These logits + log_prior [C]."""
        if log_prior is None:
            return self
        own = log_prior[self.comm.first : self.comm.first + len(self.weight)].to(self.weight)
        return replace(self, bias=own if self.bias is None else self.bias + own)

    def without_bias(self) -> LinearLogits:
        """features @ weight.T alone."""
        return replace(self, bias=None)

    def move(self, indices: Tensor, values: Tensor) -> LinearLogits:
        """These logits, to which a loss adds `values` [n, k] at each row's `indices` [n, k]."""
        assert self.moved is None, "logits are moved once"
        return replace(self, moved=Moved(indices, values))

    def scale_by_temperature(self, temperature: float) -> LinearLogits:
        """These logits / temperature."""
        if temperature == 1:
            return self
        assert self.moved is None, "a temperature comes before what moves logits"
        bias = None if self.bias is None else self.bias / temperature
        return replace(self, features=self.features / temperature, bias=bias)

    def sampled(
        self, labels: Tensor, negatives: int, draw: torch.Generator
    ) -> tuple[LinearLogits, Tensor]:
        """Logits of the batch's own classes and of some others, for sampled softmax.

        The others are drawn uniformly, without replacement, and stand for all others: their logits
        are raised by log(number of others / negatives), the log Q correction (Bengio & Senecal
        2008, Jean et al. 2015, section 3).  So sum exp z is unbiased over the draw.  Its logarithm,
        the loss, is biased downwards: by less the more are drawn, and not at all with all of them.

        Parameters
        ----------
        labels : Tensor int64 [n]
            Each is a class.
        negatives : int
            How many others to draw. All, if there are no more.
        draw : torch.Generator
            In the same state on every rank.  What is drawn costs their number, not C.

        Returns
        -------
        logits : LinearLogits
            Of these classes only, in ascending order.
        labels : Tensor int64 [n]
            The labels as indices into them.
        """
        own_classes = self.comm.gather(labels).unique()
        others = self.num_classes - len(own_classes)
        seed = int(torch.randint(2**62, (), generator=draw))
        places = draw_classes(others, negatives, seed).to(labels.device, non_blocking=True)
        # The j-th of the others has so many of the batch's own before it.
        before = own_classes - torch.arange(len(own_classes), device=labels.device)
        drawn = places + torch.searchsorted(before, places, right=True)
        classes = torch.cat([own_classes, drawn]).sort().values
        raised = torch.isin(classes, drawn) * math.log(max(1, others) / max(1, len(drawn)))
        here = (classes >= self.comm.first) & (classes < self.comm.first + len(self.weight))
        rows = classes[here] - self.comm.first
        bias = raised[here].to(self.weight)
        if self.bias is not None:
            bias = bias + self.bias[rows]
        logits = replace(
            self,
            weight=self.weight[rows],
            bias=bias,
            num_classes=len(classes),
            comm=self.comm.among(classes),
        )
        return logits, torch.searchsorted(classes, labels)

    def logsumexp_and_dot(self, targets: Targets | None = None) -> tuple[Tensor, Tensor]:
        """(log sum_c exp z_c, sum_c t_c z_c), both [n] in float32, or float64 of float64.

        Differentiable in features, weight, bias and what moves the logits.
        """
        kind = self.features.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        targets = targets or Targets()
        indices, values = self.moved or (None, None)
        with torch.autocast(kind, enabled=False):
            return _LogSumExpAndDot.apply(
                self.features,
                self.weight,
                self.bias,
                values,
                indices,
                targets,
                low,
                self.block,
                self.comm,
            )

    def cross_entropy(self, targets: Targets) -> Tensor:
        """-sum_c t_c log softmax(z)_c, [n]."""
        log_sum, dot = self.logsumexp_and_dot(targets)
        return targets.mass(self.num_classes) * log_sum - dot

    @exact_answer
    def materialize(self) -> Tensor:
        """The logits themselves, float32 [n, C].  One rank only."""
        return F.linear(self.features, self.weight, self.bias).float()

    @exact_answer
    def of_classes(self, classes: Tensor) -> Tensor:
        """The logits of some classes, [n, len(classes)].  One rank only."""
        bias = None if self.bias is None else self.bias[classes]
        return F.linear(self.features, self.weight[classes], bias)

    def logits_at(self, indices: Tensor) -> Tensor:
        """The logits of k classes of each row's own, [n, k], from these rows of the weight alone.

        Differentiable in features, weight and bias.  indices: int64 [n, k], numbered over all
        ranks. Collective where ranks split the classes.
        """
        if torch.compiler.is_compiling():
            # A program has any number of rows, and so no blocks of rows.
            rows = self.weight[indices]
            z = (rows @ self.features[:, :, None])[:, :, 0]
            return z if self.bias is None else z + self.bias[indices]
        with torch.autocast(self.features.device.type, enabled=False):
            if not torch.is_grad_enabled() and isinstance(self.comm, LocalComm):
                return rows_at(self.features, self.weight, self.bias, indices)
            return LogitsAt.apply(self.features, self.weight, self.bias, indices, self.comm)

    @torch.no_grad()
    @full_precision
    def summary(self, k: int, labels: Tensor | None = None) -> Summary:
        """The k most probable classes of each row and what metrics need. labels: int64 [n].

        Of classes that tie any may come first.  Collective where ranks split the classes.
        """
        comm, k = self.comm, min(k, self.num_classes)
        gathered = comm.gather(self.features)
        if labels is not None:
            labels = comm.gather(labels) - comm.first
        dtype = torch.promote_types(gathered.dtype, torch.float32)
        zeros = gathered.new_zeros(len(gathered), dtype=dtype)
        peak = zeros - torch.inf
        total = zeros.clone()
        squares = zeros.clone()
        label_logit = zeros.clone()
        top = zeros.new_zeros(len(zeros), 0)
        classes = torch.zeros(len(zeros), 0, dtype=torch.int64, device=zeros.device)
        x = gathered.to(self.weight)
        for start, z in _blocks(x, self.weight, self.bias, None, self.block):
            if labels is not None:
                label_logit += _gather_columns(z, labels[:, None] - start)[:, 0]
            of_block = z.topk(min(k, z.shape[1]), dim=1)
            top = torch.cat([top, of_block.values], 1)
            classes = torch.cat([classes, of_block.indices + start], 1)
            best = top.topk(min(k, top.shape[1]), dim=1)
            top = best.values
            classes = classes.gather(1, best.indices)
            peak, correction = _raise_peak(peak, of_block.values[:, 0])
            _exp_(z.sub_(peak[:, None]))
            total = total * correction + z.sum(1)
            squares = squares * correction**2 + z.square_().sum(1)
        highest = comm.max(peak)
        correction = (peak - highest).exp_()
        total = comm.sum_own(total * correction)
        squares = comm.sum_own(squares * correction**2)
        log_sum = comm.own(highest) + total.log()
        log_label = None if labels is None else comm.sum_own(label_logit) - log_sum
        top, classes = _largest_of_ranks(top, classes + comm.first, k, comm)
        return Summary(classes, (top - log_sum[:, None]).exp_(), log_label, squares / total**2)


class _LogSumExpAndDot(torch.autograd.Function):
    """LinearLogits.logsumexp_and_dot.  low: autocast's type or None."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        indices: Tensor | None,
        targets: Targets,
        low: torch.dtype | None,
        block: int | None,
        comm: Comm,
    ) -> tuple[Tensor, Tensor]:
        x = comm.gather(features).to(low or torch.promote_types(features.dtype, weight.dtype))
        t = _gather_targets(targets, comm)
        moved = None
        if values is not None and indices is not None:
            moved = Moved(comm.gather(indices) - comm.first, comm.gather(values))
        dtype = torch.promote_types(x.dtype, torch.float32)
        peak = x.new_full((len(x),), -torch.inf, dtype=dtype)
        total = x.new_zeros(len(x), dtype=dtype)
        dot = torch.zeros_like(total)
        for start, z in _blocks(x, weight, bias, low, block, moved):
            if t.indices is not None and t.values is not None:
                dot += _gather_columns(z, t.indices - start).mul_(t.values).sum(1)
            if t.dense is not None:
                dot += torch.einsum("nc,nc->n", z, t.dense[:, start : start + z.shape[1]].to(z))
            peak, correction = _raise_peak(peak, z.amax(1))
            total = total.mul_(correction).add_(_exp_(z.sub_(peak[:, None])).sum(1))
        if t.uniform is not None:
            # sum_c z_c is linear in the sum of the weight's rows.
            sum_of_logits = x.to(dtype) @ weight.sum(0, dtype=dtype)
            if bias is not None:
                sum_of_logits = sum_of_logits + bias.sum()
            if moved is not None:
                sum_of_logits = sum_of_logits + _sum_inside(moved, len(weight))
            dot += t.uniform * sum_of_logits
        highest = comm.max(peak)
        total = comm.sum(total * (peak - highest).exp())
        log_sum = highest + total.log()
        ctx.save_for_backward(x, weight, bias, log_sum, *(moved or (None, None)), *t)
        ctx.settings = features.dtype, low, block, comm
        return comm.own(log_sum), comm.sum_own(dot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        x, weight, bias, log_sum, indices, shift, *t = ctx.saved_tensors
        features_dtype, low, block, comm = ctx.settings
        t = Targets(*t)
        moved = None if indices is None else Moved(indices, shift)
        d_log_sum, d_dot = (comm.gather(gradient) for gradient in gradients)
        to_x, to_weight, to_bias, to_moved = ctx.needs_input_grad[:4]
        d_x = torch.zeros_like(x, dtype=log_sum.dtype) if to_x else None
        d_weight = torch.empty_like(weight) if to_weight else None
        d_bias = torch.empty_like(bias) if to_bias else None
        d_moved = torch.zeros_like(shift, dtype=log_sum.dtype) if to_moved else None
        # What is the same at every class, u_n d_dot_n, reaches weight as one row and x as the sum
        # of the weight's rows.
        even = t.uniform * d_dot if t.uniform is not None else torch.zeros_like(d_dot)
        even_x, even_bias = even.to(x) @ x, even.sum()
        values = t.values * d_dot[:, None] if t.values is not None else None
        for start, z in _blocks(x, weight, bias, low, block, moved):
            d_z = _exp_(z.sub_(log_sum[:, None])).mul_(d_log_sum[:, None])
            here = slice(start, start + z.shape[1])
            if t.indices is not None and values is not None:
                _scatter_columns_(d_z, t.indices - start, values)
            if t.dense is not None:
                d_z.addcmul_(t.dense[:, here].to(z), d_dot[:, None])
            if d_moved is not None and moved is not None:
                d_moved += _gather_columns(d_z, moved.indices - start)
            if d_bias is not None:
                d_bias[here] = (d_z.sum(0) + even_bias) * comm.share
            d_z = d_z.to(low) if low else d_z
            if d_x is not None:
                _add_product_(d_x, d_z, weight[here], low)
            if d_weight is not None:
                _product(d_z, x, even_x, low, comm.share, out=d_weight[here])
        if d_x is not None:
            if t.uniform is not None:
                d_x += torch.outer(even, weight.sum(0, dtype=d_x.dtype))
            d_x = comm.sum_own(d_x).to(features_dtype)
        if d_moved is not None and moved is not None:
            inside = (moved.indices >= 0) & (moved.indices < len(weight))
            d_moved += even[:, None] * inside
            d_moved = comm.sum_own(d_moved).to(moved.values.dtype)
        return d_x, d_weight, d_bias, d_moved, None, None, None, None, None


def _largest_of_ranks(top: Tensor, classes: Tensor, k: int, comm: Comm) -> tuple[Tensor, Tensor]:
    """(values, classes) [n, k] of this rank's rows, of each rank's [N, at most k] of all rows."""
    lacking = k - top.shape[1]
    values = comm.stack(F.pad(top, (0, lacking), value=-torch.inf))
    columns = comm.stack(F.pad(classes, (0, lacking)))
    if len(values) == 1:
        return values[0], columns[0]
    values, columns = (comm.own(each.transpose(0, 1).flatten(1)) for each in (values, columns))
    best = values.topk(k, dim=1)
    return best.values, columns.gather(1, best.indices)


def _gather_targets(targets: Targets, comm: Comm) -> Targets:
    """Targets of the N rows at this rank's classes, with indices from its first class on."""
    indices, values, uniform = (None if part is None else comm.gather(part) for part in targets[:3])
    dense = None if targets.dense is None else comm.own_columns(targets.dense)
    if indices is not None:
        indices = indices - comm.first
    return Targets(indices, values, uniform, dense)


def _blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: torch.dtype | None,
    block: int | None,
    moved: Moved | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(first class, z [N, at most block]) in turn. Each z has the memory of the previous one."""
    block = block or max(64, BLOCK_ENTRIES[x.device.type] // max(1, len(x)))
    block = min(block, max(1, len(weight)))
    dtype = torch.promote_types(x.dtype, torch.float32)
    memory = torch.empty(len(x) * block, dtype=dtype, device=x.device)
    for start in range(0, len(weight), block):
        rows = weight[start : start + block]
        z = memory[: len(x) * len(rows)].view(len(x), len(rows))
        if low:
            z.copy_(x @ rows.to(low).T)
            if bias is not None:
                z += bias[start : start + block]
        elif bias is None:
            torch.mm(x, rows.T, out=z)
        else:
            torch.addmm(bias[start : start + block], x, rows.T, out=z)
        if moved is not None:
            _scatter_columns_(z, moved.indices - start, moved.values)
        yield start, z


def _exp_(z: Tensor) -> Tensor:
    """exp(z) in place, for z <= 0. Below LEAST_EXPONENT as if z were that.

    No sum of floats near 1 can tell the difference.
    """
    # Where exp(z) is below the smallest normal number, MKL's takes 60 to 130 times as long, and so
    # may its multiples.
    return z.clamp_min_(LEAST_EXPONENT).exp_()


def _raise_peak(peak: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two maxima [N], and the factor for sums of exp(z - peak)."""
    higher = torch.maximum(peak, candidate)
    return higher, (peak - higher).exp_()


def _gather_columns(z: Tensor, columns: Tensor) -> Tensor:
    """z [N, c] at `columns` [N, k], 0 where a column is outside."""
    inside = (columns >= 0) & (columns < z.shape[1])
    return z.gather(1, columns.clamp(0, z.shape[1] - 1)) * inside


def _sum_inside(moved: Moved, count: int) -> Tensor:
    """[N], the sum of what is added to the logits of `count` classes."""
    inside = (moved.indices >= 0) & (moved.indices < count)
    return (moved.values * inside).sum(1)


def _scatter_columns_(d_z: Tensor, columns: Tensor, values: Tensor) -> None:
    """Add values [N, k] to d_z [N, c] at `columns` [N, k], none where a column is outside."""
    inside = (columns >= 0) & (columns < d_z.shape[1])
    d_z.scatter_add_(1, columns.clamp(0, d_z.shape[1] - 1), values.to(d_z) * inside)


def _add_product_(d_x: Tensor, d_z: Tensor, rows: Tensor, low: torch.dtype | None) -> None:
    """d_x += d_z @ rows."""
    if low:
        d_x += d_z @ rows.to(low)
    else:
        d_x.addmm_(d_z, rows)


def _product(
    d_z: Tensor, x: Tensor, even_x: Tensor, low: torch.dtype | None, share: float, out: Tensor
) -> None:
    """out = share * (d_z.T @ x + even_x)."""
    if low:
        out.copy_((d_z.T @ x).float().add_(even_x).mul_(share))
    else:
        torch.addmm(even_x, d_z.T, x, beta=share, alpha=share, out=out)
