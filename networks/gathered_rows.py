"""A few classes of each row: the k likeliest, and the logits of chosen ones.

    B   rows of the batch
    C   classes, or those of one rank where ranks split them
    D   features
    k   chosen classes of a row

To ask a network about k classes of a row costs k D multiplications, not C D.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .full_precision import exact_answer, features_to

if TYPE_CHECKING:
    from .linear_logits import Comm

# Gathered weights in memory at a time: 1 MiB of float32 stays near a CPU core, 256 MiB fill a GPU.
GATHERED_ENTRIES = {"cpu": 2**18, "cuda": 2**26}
# From C / 16 chosen classes on, all C logits of a row are cheaper than gathered ones.
DENSE_FROM = 16
DENSE_ENTRIES = {"cpu": 2**22, "cuda": 2**26}
# Classes of which top_k compares one maximum, where there are at least so many classes, and two
# blocks for each that is wanted.
TOP_BLOCK = 16
FEWEST_CLASSES = 4096
FEWEST_ENTRIES = 2**17
# Relative to a number, what can be told from it.
LITTLE = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 2**-20, torch.float64: 2**-50}
# How long runs of classes may be of which ONNX takes maxima. One that divides C needs no padding.
RUNS = (64, *range(65, 257), *range(63, 31, -1))


def top_k(logits: Tensor, k: int, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns. Exact.

    On a CPU numpy partitions vectors faster than torch.topk, and of many classes only k blocks are
    searched: of 256 rows and 26,386 classes that takes 0.3 to 0.4 of its time, of a million 0.2. A
    single row of 26,386 takes as long.  In ONNX runs of classes are searched likewise.  Elsewhere
    and in half precision torch.topk is called.  Of entries that tie any may be taken.

    Parameters
    ----------
    logits : Tensor [B, C]
    k : int
        At most C.
    ordered : bool
        Largest first. Otherwise in any order, which is quicker.

    Returns
    -------
    values : Tensor [B, k]
    indices : Tensor int64 [B, k]
    """
    known = logits.dtype in (torch.float32, torch.float64)
    if torch.onnx.is_in_onnx_export() and logits.shape[1] >= max(FEWEST_CLASSES, 2 * RUNS[0] * k):
        return _in_runs(logits, k, ordered)
    if not known or logits.device.type != "cpu" or torch.onnx.is_in_onnx_export():
        values, indices = logits.topk(k, dim=1, sorted=ordered)
        return values, indices
    few = logits.shape[1] < max(FEWEST_CLASSES, 2 * TOP_BLOCK * k)
    if few or _are_few_entries(logits):
        columns = _largest(logits, k)
    else:
        columns = _in_blocks(logits, k)
    values = logits.gather(1, columns)
    if not ordered:
        return values, columns
    values, order = values.sort(dim=1, descending=True)
    return values, columns.gather(1, order)


@exact_answer
def head_logits(head: nn.Linear, features: Tensor) -> Tensor:
    """The head's logits, as in Classifier.logits_of.

    In ONNX a wide one's bias is the weight of a further feature, 1.

    onnxruntime's Gemm writes the bias to the whole result before it multiplies, which is a fifth of
    its time at 256 rows, 64 features and 26,386 classes.
    """
    features = features_to(head.weight.dtype, features)
    wide = len(head.weight) >= FEWEST_CLASSES
    if head.bias is None or not wide or not torch.onnx.is_in_onnx_export():
        return head(features)
    weight = torch.cat([head.weight, head.bias[:, None]], 1)
    return F.pad(features, (0, 1), value=1.0) @ weight.T


def most_probable(logits: Tensor, count: int = 1) -> Tensor:
    """Columns of the `count` largest of each row, largest first: int64 [B, count].

    In ONNX the largest is sought in the block with the largest maximum: onnxruntime's ArgMax takes
    four times as long as a maximum.  Of entries that tie any may be taken.
    """
    if count > 1:
        return top_k(logits, count)[1]
    if not torch.onnx.is_in_onnx_export() or logits.shape[1] < FEWEST_CLASSES:
        return logits.argmax(1, keepdim=True)
    maxima, size = block_maxima(logits)
    start = maxima.argmax(1, keepdim=True) * size
    columns = start + torch.arange(size, device=logits.device)
    if logits.shape[1] % size:
        columns = columns.clamp_max(logits.shape[1] - 1)
    return start + logits.gather(1, columns).argmax(1, keepdim=True)


def block_maxima(logits: Tensor) -> tuple[Tensor, int]:
    """The maxima of runs of classes, and how long a run is. The last may be shorter."""
    num_classes = logits.shape[1]
    for size in RUNS:
        if num_classes % size == 0:
            return logits.unflatten(1, (-1, size)).amax(2), size
    size = RUNS[0]
    return F.max_pool1d(logits[:, None], size, size, ceil_mode=True)[:, 0], size


def _are_few_entries(logits: Tensor) -> bool:
    """Whether one call for all of them is quicker than several for a part."""
    if torch.compiler.is_compiling():  # a program has any number of rows
        return False
    return logits.numel() < FEWEST_ENTRIES


def _in_blocks(logits: Tensor, k: int) -> Tensor:
    """Columns of the k largest: they lie in the k blocks with the largest maxima."""
    num_classes = logits.shape[1]
    # Block j holds the columns j, j + count, ...: maxima over the outer axis are vectorised.
    count = num_classes // TOP_BLOCK
    body = logits[:, : count * TOP_BLOCK].unflatten(1, (TOP_BLOCK, count))
    blocks = _largest(body.amax(1), k)
    starts = torch.arange(0, count * TOP_BLOCK, count, device=logits.device)
    columns = (blocks[:, None, :] + starts[:, None]).flatten(1)
    rest = torch.arange(count * TOP_BLOCK, num_classes, device=logits.device)
    columns = torch.cat([columns, rest.expand(logits.shape[0], -1)], 1)
    return columns.gather(1, _largest(logits.gather(1, columns), k))


def _in_runs(logits: Tensor, k: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """top_k as onnxruntime does it fast: of runs that lie in memory as such.

    The k largest lie in the k runs with the largest maxima, and are no smaller than the least of
    these maxima.  What is smaller is alike in the last search, which then has little to sort.
    """
    maxima, size = block_maxima(logits)
    at_least, runs = maxima.topk(k, dim=1, sorted=False)
    rest = logits.shape[1] % size
    if rest:
        logits = F.pad(logits, (0, size - rest), value=-torch.inf)
    rows = torch.arange(logits.shape[0], device=logits.device)[:, None] * maxima.shape[1]
    of_runs = logits.reshape(-1, size).index_select(0, (rows + runs).flatten())
    candidates = of_runs.unflatten(0, runs.shape).flatten(1)
    at_least = at_least.amin(1, keepdim=True)
    less = at_least - (at_least.abs() * LITTLE[logits.dtype] + torch.finfo(logits.dtype).tiny)
    candidates = candidates.maximum(less)
    values, places = candidates.topk(k, dim=1, sorted=ordered)
    run = places // size
    return values, runs.gather(1, run) * size + (places - run * size)


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, in no order."""
    if torch.compiler.is_compiling():
        return values.topk(k, dim=1, sorted=False).indices
    first = values.shape[1] - k
    if first == 0:
        return torch.arange(k, device=values.device).repeat(values.shape[0], 1)
    return torch.from_numpy(np.argpartition(values.detach().numpy(), first, axis=1)[:, first:])


class LogitsAt(torch.autograd.Function):
    """features @ weight.T + bias at `indices`, each row's own k classes: [n, k].

    Every rank adds what its own rows of the weight give.  The gathered rows are never held for the
    whole batch, neither forward nor backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        comm: Comm,
    ) -> Tensor:
        x = comm.gather(features).to(weight.dtype)  # as the gradients need it, too
        columns = comm.gather(indices) - comm.first
        inside = (columns >= 0) & (columns < len(weight))
        columns = columns.clamp(0, len(weight) - 1)
        z = rows_at(x, weight, bias, columns) * inside
        ctx.save_for_backward(x, weight, columns, inside)
        ctx.settings = features.dtype, comm
        return comm.sum_own(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        x, weight, columns, inside = ctx.saved_tensors
        dtype, comm = ctx.settings
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_z = comm.gather(gradients[0]) * inside
        d_x = torch.zeros_like(x) if to_x else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        d_bias = None
        for rows in _gathered_blocks(columns, x.shape[1]):
            flat = columns[rows].flatten()
            if d_x is not None:
                gathered = weight[flat].unflatten(0, columns[rows].shape)
                d_x[rows] = torch.bmm(d_z[rows, None, :], gathered)[:, 0]
            if d_weight is not None:
                outer = d_z[rows, :, None] * x[rows, None, :]
                d_weight.index_add_(0, flat, outer.flatten(0, 1) * comm.share)
        if to_bias:
            d_bias = weight.new_zeros(len(weight))
            d_bias.index_add_(0, columns.flatten(), d_z.flatten() * comm.share)
        if d_x is not None:
            d_x = comm.sum_own(d_x).to(dtype)
        return d_x, d_weight, d_bias, None, None


def rows_at(x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """x @ weight.T + bias at `columns` [B, k]: [B, k], not differentiable.

    Many columns are read from the whole product, which is then the cheaper way.
    """
    x = x.to(weight.dtype)
    if columns.shape[1] * DENSE_FROM >= len(weight):
        return torch.cat(
            [
                F.linear(x[rows], weight, bias).gather(1, columns[rows])
                for rows in _blocks(len(x), len(weight), DENSE_ENTRIES[x.device.type])
            ]
        )
    bias = None if bias is None else bias[columns]
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        z = _sampled_product(x, weight, columns)
        return z if bias is None else z + bias
    z = x.new_empty(columns.shape)
    for rows in _gathered_blocks(columns, x.shape[1]):
        gathered = weight.index_select(0, columns[rows].flatten())
        gathered = gathered.unflatten(0, columns[rows].shape)
        torch.bmm(gathered, x[rows, :, None], out=z[rows, :, None])
    return z if bias is None else z + bias


def _sampled_product(x: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """x @ weight.T at `columns`, from the weight where it lies: a third of the time of a copy."""
    count, k = columns.shape
    starts = torch.arange(0, count * k + 1, max(1, k), device=x.device)
    pattern = torch.sparse_csr_tensor(
        starts,
        columns.flatten(),
        x.new_zeros(count * k),
        (count, len(weight)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0.0).values().view(count, k)


def _gathered_blocks(columns: Tensor, features: int) -> Iterator[slice]:
    """Slices of as many rows as fit, where each of a row's columns takes `features` numbers."""
    per_row = columns.shape[1] * features
    return _blocks(len(columns), per_row, GATHERED_ENTRIES[columns.device.type])


def _blocks(count: int, per_row: int, entries: int) -> Iterator[slice]:
    """Slices of `count` rows of `per_row` numbers, so that one holds at most `entries`."""
    step = max(1, entries // max(1, per_row))
    for start in range(0, max(1, count), step):
        yield slice(start, start + step)


def _say_nothing_of_beta() -> None:
    """Have torch's one warning about sparse tensors behind us.

    Only one product of them is used, and tests hold it against the dense one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(none, none[:0], torch.zeros(0), (0, 0), check_invariants=False)


_say_nothing_of_beta()
