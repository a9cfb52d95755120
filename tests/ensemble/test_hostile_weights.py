"""combine_kl with weights at the ends of float64, with very many specialists, and at random."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_problems import campaign

from clustering.groups import ClassGroups
from ensemble import combine_kl
from ensemble.choices import COMBINERS, combiner

GROUPS = ClassGroups([[0, 1], [1, 2]], 4)
G = torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=torch.float64)
P = [
    torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64),
    torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64),
]


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e-30, 1e30, 8e307])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_ratios_of_weights_matter_down_to_the_smallest_number(scale, dtype):
    p = [each.to(dtype) for each in P]
    plain = combine_kl(G.to(dtype), p, GROUPS, weights=[1.0, 2.0, 1.0])
    scaled = combine_kl(G.to(dtype), p, GROUPS, weights=[scale, 2 * scale, scale])
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)


def test_a_row_is_joined_by_the_weights_that_are_active_in_it():
    # alone with the generalist, a specialist of 1e-12 and a generalist of 1e-12 are equals
    active = torch.tensor([[True, False]])
    q = combine_kl(G, P, GROUPS, active=active, weights=[1e-12, 1e-12, 1.0])
    torch.testing.assert_close(q, combine_kl(G, P, GROUPS, active=active), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "weights, reason",
    [
        ([1.0, 1e-13, 1.0], "must be 0 or at least 1e-12 of the largest"),
        ([1e308, 1.0, 1.0], "must be 0 or at least 1e-12 of the largest"),
        ([float("nan"), 1.0, 1.0], "each must be a number, zero or more"),
        ([float("inf"), 1.0, 1.0], "each must be a number, zero or more"),
        ([1.0, -5e-324, 1.0], "each must be a number, zero or more"),
        ([0.0, 0.0, 0.0], "have weight 0; give one of them some"),
    ],
)
def test_a_weight_that_no_answer_can_be_exact_for_is_refused(weights, reason):
    with pytest.raises(ValueError, match=reason):
        combine_kl(G, P, GROUPS, weights=weights)


@pytest.mark.parametrize("name", sorted(COMBINERS))
@pytest.mark.parametrize("scale", [5e-324, 1e30, 1e308])
def test_no_combiner_answers_nan(name, scale):
    try:
        q = combiner(name)(G, P, GROUPS, weights=[scale, scale, scale])
    except ValueError as error:
        assert name == "log_ratio" and "a weight is" in str(error)
    else:
        assert bool(torch.isfinite(q).all()) and abs(float(q.sum()) - 1) < 1e-6


def test_the_gradient_of_scaled_weights_is_that_of_the_given_ones():
    weights = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: combine_kl(G, P, GROUPS, weights=w), weights)


MANY = """
import resource, sys, torch
torch.set_num_threads(1)
from clustering.groups import ClassGroups
from ensemble import combine_kl
specialists, classes, rows = 1000, 3000, 6
rng = torch.Generator().manual_seed(0)
members = [torch.randperm(classes, generator=rng)[:3].tolist() for _ in range(specialists)]
groups = ClassGroups(members, classes)
g = torch.softmax(torch.randn(rows, classes, generator=rng), 1)
p = [torch.softmax(torch.randn(rows, 4, generator=rng) + torch.tensor([0, 0, 0, 7.0]), 1)
     for _ in members]
active = torch.ones(rows, specialists, dtype=torch.bool)
if sys.argv[1] == "different":
    active[torch.arange(rows), torch.arange(rows)] = False
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q = combine_kl(g, p, groups, active=active)
assert torch.isfinite(q).all() and (q.sum(1) - 1).abs().max() < 1e-5
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sets", ["same", "different"])
def test_a_thousand_active_specialists_take_less_than_two_gigabytes(sets):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MANY, sets]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert int(done.stdout) < 2048


def test_rows_are_solved_in_parts_with_the_same_answer(monkeypatch):
    from ensemble import combine

    rng = torch.Generator().manual_seed(1)
    groups = ClassGroups([torch.randperm(20, generator=rng)[:6].tolist() for _ in range(9)], 20)
    g = torch.softmax(torch.randn(40, 20, generator=rng, dtype=torch.float64), 1)
    p = [torch.softmax(torch.randn(40, 7, generator=rng, dtype=torch.float64), 1) for _ in range(9)]
    for active in (torch.ones(40, 9) > 0, torch.rand(40, 9, generator=rng) < 0.5):
        whole = combine_kl(g, p, groups, active=active)
        monkeypatch.setattr(combine, "FLOATS_AT_ONCE", 5000)
        parts = combine_kl(g, p, groups, active=active)
        monkeypatch.undo()
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_a_hundred_hostile_problems_are_exact_or_refused():
    counts = campaign(100, seed=1)
    assert counts["exact"] > 50 and counts["refused"] > 5 and counts.total() == 100
