"""Rows of a head over all classes: cut out, and put together again.

A head is cut by classes.  Its tensors have a row for each class, or, of a GrownHead, for each class
that learns. `row_bounds` says where each tensor is cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .heads import GrownHead, RowsHead

DRAWN = 2**22  # fresh weights in memory at a time


def row_tensors(head: nn.Module) -> dict[str, Tensor]:
    """What a head has of its classes by name: parameters and buffers, also what is not saved."""
    return {**dict(head.named_parameters()), **dict(head.named_buffers())}


def row_bounds(head: RowsHead, bounds: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """For each tensor of a whole head, the first row of each part and the number of rows.

    bounds: the first class of each part, and C.
    """
    of_classes = tuple(bounds)
    if not isinstance(head, GrownHead):
        return dict.fromkeys(row_tensors(head), of_classes)
    learning = torch.searchsorted(head.classes.cpu(), torch.tensor(of_classes))
    of_learning = tuple(learning.tolist())
    return {
        name: of_classes if name.startswith("fixed_") else of_learning for name in row_tensors(head)
    }


def fresh_rows(classes: int, in_features: int, own: slice) -> nn.Linear:
    """nn.Linear(in_features, classes)'s rows `own`, of the same draws, without the other rows.

    torch's generator is left as if all had been drawn, a block at a time.
    """
    rows = nn.utils.skip_init(nn.Linear, in_features, own.stop - own.start)
    assert isinstance(rows, nn.Linear)
    # What nn.Linear.reset_parameters draws from, of the weight and then of the bias.
    gain = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    bound = math.sqrt(3.0) * (gain / math.sqrt(in_features))
    of_bias = 1 / math.sqrt(in_features)
    with torch.no_grad():
        for target, limit, size in ((rows.weight, bound, (in_features,)), (rows.bias, of_bias, ())):
            step = max(1, DRAWN // max(1, math.prod(size)))
            for first in range(0, classes, step):
                end = min(classes, first + step)
                drawn = torch.empty(end - first, *size).uniform_(-limit, limit)
                start, stop = max(first, own.start), min(end, own.stop)
                if start < stop:
                    target[start - own.start : stop - own.start] = drawn[
                        start - first : stop - first
                    ]
    return rows


def cut_head(head: RowsHead, bounds: Sequence[int], part: int) -> RowsHead:
    """A copy of one part of a head, of its kind."""
    cut = {
        name: row_tensors(head)[name][own[part] : own[part + 1]]
        for name, own in row_bounds(head, bounds).items()
    }
    if "classes" in cut:
        cut["classes"] = cut["classes"] - bounds[part]
    return with_tensors(head, cut)


def with_tensors(head: RowsHead, tensors: Mapping[str, Tensor]) -> RowsHead:
    """A head of the same kind with copies of these tensors. Parameters learn as the head's do."""
    # Only the shell is copied: the memory may hold one head, and not two.
    shared = {id(tensor): tensor for tensor in row_tensors(head).values()}
    made = copy.deepcopy(head, shared)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module, own = made.get_submodule(path), row_tensors(head)[name]
        tensor = tensor.detach().clone()
        if isinstance(own, nn.Parameter):
            tensor = nn.Parameter(tensor, own.requires_grad)
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            layer.out_features = len(layer.weight)
    return made
