"""Heads that are cut by classes, part by part, are the whole ones."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from networks import head_rows
from networks.cosine import UnitRows
from networks.head_rows import cut_head, fresh_rows, row_bounds, row_tensors
from networks.heads import GrownHead

CLASSES, SIZE, BOUNDS = 9, 4, (0, 2, 2, 9)


def heads():
    torch.manual_seed(0)
    grown = GrownHead(nn.Linear(SIZE, CLASSES), torch.tensor([0, 3, 8]))
    return {
        "linear": nn.Linear(SIZE, CLASSES),
        "cosine": UnitRows(nn.Linear(SIZE, CLASSES)),
        "grown": grown,
    }


@pytest.mark.parametrize("kind", ("linear", "cosine", "grown"))
def test_parts_give_the_logits_of_their_classes_and_of_what_learns_in_them(kind):
    head, x = heads()[kind], torch.randn(5, SIZE)
    parts = [cut_head(head, BOUNDS, part) for part in range(3)]
    logits = [nn.functional.linear(x, part.weight, part.bias) for part in parts]
    torch.testing.assert_close(torch.cat(logits, 1), head(x))
    for name, own in row_bounds(head, BOUNDS).items():
        whole, pieces = row_tensors(head)[name], [row_tensors(part)[name] for part in parts]
        assert [len(piece) for piece in pieces] == [b - a for a, b in pairwise(own)]
        if name != "classes":
            assert torch.equal(torch.cat(pieces), whole)
            learns = isinstance(whole, nn.Parameter)
            assert all(isinstance(piece, nn.Parameter) == learns for piece in pieces)


@pytest.mark.parametrize("drawn", (5, 2**22))
def test_fresh_rows_are_those_that_a_whole_layer_draws(drawn, monkeypatch):
    monkeypatch.setattr(head_rows, "DRAWN", drawn)
    torch.manual_seed(3)
    whole, after = nn.Linear(SIZE, 37), torch.rand(2)
    for own in (slice(0, 11), slice(11, 12), slice(12, 37)):
        torch.manual_seed(3)
        rows = fresh_rows(37, SIZE, own)
        assert torch.equal(rows.weight, whole.weight[own])
        assert torch.equal(rows.bias, whole.bias[own])
        assert torch.equal(torch.rand(2), after)


def test_a_part_shares_no_memory_with_the_whole():
    head = nn.Linear(SIZE, CLASSES)
    part = cut_head(head, BOUNDS, 2)
    with torch.no_grad():
        part.weight.zero_()
    assert head.weight.abs().min() > 0
