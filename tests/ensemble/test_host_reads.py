"""Eq. 5 and its relatives as a device with a queue computes them: the same, and seldom read.

The device is a CPU that is taken for one with a queue.  Whatever makes a host wait on a GPU is
counted as torch calls it.
"""

import re

import pytest
import torch
from hostile_problems import judge
from torch.utils._python_dispatch import TorchDispatchMode

from clustering.groups import ClassGroups
from ensemble import (
    COMBINERS,
    combine_kl,
    combine_kl_on_shortlist,
    combiner,
    host_reads,
    newton,
)

C, B, M = 1000, 4096, 16
# Operations whose result, or whose size, the host has to know.
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"}


class Waits(TorchDispatchMode):
    """Counts what would wait."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_mask = name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in WAITING or is_mask:
            self.note(name)
        return function(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        self.count += 1
        self.names.append(name)


@pytest.fixture
def queued(monkeypatch):
    monkeypatch.setattr(host_reads, "WITHOUT_QUEUE", set())


@pytest.fixture
def counted(queued, monkeypatch):
    """Waits, among them those of `read`, which is tolist of a tensor that is on the CPU here."""
    waits, read = Waits(), host_reads.read

    def counting(flags):
        waits.note("read")
        return read(flags)

    monkeypatch.setattr(host_reads, "read", counting)
    return waits


def distributions(scale: float = 3.0, groups: int = M, size: int = 80, rows: int = B):
    draw = torch.Generator().manual_seed(0)
    members = [torch.randperm(C, generator=draw)[:size].tolist() for _ in range(groups)]
    g = (scale * torch.randn(rows, C, generator=draw)).softmax(1)
    special = [(scale * torch.randn(rows, size + 1, generator=draw)).softmax(1) for _ in members]
    active = torch.rand(rows, groups, generator=draw) < 0.3
    return g, special, ClassGroups(members, C), active


def test_4096_rows_and_16_specialists_wait_at_most_10_times(counted):
    g, special, groups, _ = distributions()
    with counted:
        q = combine_kl(g, special, groups)
    assert counted.count <= 10, counted.names
    assert float((q.double().sum(1) - 1).abs().max()) < 1e-6


def test_rows_with_any_of_thousands_of_active_sets_wait_at_most_10_times(counted):
    g, special, groups, active = distributions()
    rows = [active[:, m].nonzero()[:, 0] for m in range(M)]
    pairs = [(own, each[own]) for own, each in zip(rows, special, strict=True)]
    weights = torch.linspace(0.5, 2, 1 + M)
    with counted:
        combine_kl(g, pairs, groups, active, weights)
    assert counted.count <= 10, counted.names


@pytest.mark.parametrize("scale", [1.0, 6.0, 30.0])
def test_a_device_finds_what_a_cpu_finds(scale, monkeypatch):
    g, special, groups, active = distributions(scale, groups=7, rows=300)
    expected = combine_kl(g.double(), [each.double() for each in special], groups, active)
    monkeypatch.setattr(host_reads, "WITHOUT_QUEUE", set())
    q = combine_kl(g.double(), [each.double() for each in special], groups, active)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-11)


def test_a_device_gives_the_gradient_of_a_cpu(monkeypatch):
    g, special, groups, active = distributions(groups=5, rows=40)

    def gradients():
        given = [g.double().requires_grad_(), *(each.double().requires_grad_() for each in special)]
        q = combine_kl(given[0], given[1:], groups, active)
        return torch.autograd.grad(q[:, 0].log().sum(), given)

    expected = gradients()
    monkeypatch.setattr(host_reads, "WITHOUT_QUEUE", set())
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_hostile_problems_are_answered_or_refused_on_a_device(queued, monkeypatch):
    """Some of them by the central path, whose steps are not looked at one by one either."""
    lengths, central_path = [], newton._central_path

    def noting(A, *args):
        lengths.append(len(A))
        return central_path(A, *args)

    monkeypatch.setattr(newton, "_central_path", noting)
    assert {judge(seed) for seed in range(150)} == {"exact", "refused"}
    assert lengths


@pytest.mark.parametrize("name", [name for name in COMBINERS if name != "kl"])
def test_other_combiners_find_the_same_on_a_device(name, monkeypatch):
    g, special, groups, active = distributions(groups=4, rows=60)
    g, special = g.double(), [each.double() for each in special]
    expected = combiner(name)(g, special, groups, active, [1.0, 0.5, 2.0, 1.0, 3.0])
    monkeypatch.setattr(host_reads, "WITHOUT_QUEUE", set())
    q = combiner(name)(g, special, groups, active, [1.0, 0.5, 2.0, 1.0, 3.0])
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-9)


def test_a_shortlist_is_joined_alike_on_a_device(monkeypatch):
    g, special, groups, active = distributions(groups=4, rows=60)
    expected = combine_kl_on_shortlist(g, special, groups, 30, active)
    monkeypatch.setattr(host_reads, "WITHOUT_QUEUE", set())
    q = combine_kl_on_shortlist(g, special, groups, 30, active)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)


def test_a_row_that_is_no_distribution_is_named_although_it_is_looked_at_late(queued):
    g, special, groups, active = distributions(groups=3, rows=50)
    g[17] *= 1.5
    active[17] = True
    with pytest.raises(ValueError, match=re.escape("row 17 of p_general sums to 1.5")):
        combine_kl(g, special, groups, active)


def test_rows_out_of_range_are_refused_before_anything_is_read_there(queued):
    g, special, groups, _ = distributions(groups=2, rows=4)
    rows = torch.tensor([0, 1, 2, 9])
    with pytest.raises(ValueError, match="names row 9; rows go from 0 to 3"):
        combine_kl(g, [(rows, special[0]), special[1]], groups)
