"""Eq. 5 over a row's shortlist: the mathematics, against combine_kl on K's classes alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustering.groups import ClassGroups
from ensemble import combine_kl, combine_kl_on_shortlist
from ensemble.shortlist_kl import join_on_atoms


def problem(seed, rows=12, classes=14, specialists=4, scale=2.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def random_probabilities(width):
        return torch.softmax(scale * torch.randn(rows, width, generator=rng, dtype=dtype), 1)

    sizes = torch.randint(1, classes // 2, (specialists,), generator=rng).tolist()
    orders = [torch.randperm(classes, generator=rng) for _ in sizes]
    groups = ClassGroups(
        [order[:size].tolist() for order, size in zip(orders, sizes, strict=True)], classes
    )
    g = random_probabilities(classes)
    p = [random_probabilities(len(members) + 1) for members in groups.members]
    active = torch.rand(rows, specialists, generator=rng) < 0.6
    weights = [1.0, *(0.2 + 3 * torch.rand(specialists, generator=rng)).tolist()]
    return groups, g, p, active, weights


def on_its_own_classes(groups, g, p, active, weights, k):
    """Row by row: combine_kl among the k classes of K, of distributions that know no others."""
    rows = []
    for row in range(len(g)):
        listed = g[row].topk(k).indices.sort().values
        place = {int(c): at for at, c in enumerate(listed)}
        mass = g[row, listed].sum()
        members, special, w = [], [], [weights[0]]
        for m in active[row].nonzero()[:, 0].tolist():
            classes = groups.members[m].tolist()
            own = [c for c in classes if c in place]
            others = [c for c in range(groups.num_classes) if c not in classes]
            if not own:  # its dustbin is all that is listed: it says nothing about K
                continue
            share = g[row, [c for c in others if c in place]].sum() / g[row, others].sum()
            columns = [classes.index(c) for c in own]
            said = torch.cat([p[m][row, columns], (p[m][row, -1] * share)[None]])
            members.append([place[c] for c in own])
            special.append((said / said.sum())[None])
            w.append(weights[1 + m])
        q = g[row].clone()
        inside = g[row, listed][None] / mass
        if members:
            inside = combine_kl(inside, special, ClassGroups(members, k), weights=w)
        q[listed] = inside[0] * mass
        rows.append(q)
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 14),
    specialists=st.integers(1, 7),
    scale=st.sampled_from([0.5, 2.0, 5.0]),
)
def test_it_is_combine_kl_among_the_classes_of_the_shortlist(seed, k, specialists, scale):
    groups, g, p, active, weights = problem(seed, 6, specialists=specialists, scale=scale)
    q = combine_kl_on_shortlist(g, p, groups, k, active, weights)
    expected = on_its_own_classes(groups, g, p, active, weights, k)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("specialists", [1, 3, 9])
def test_with_every_class_on_the_shortlist_it_is_combine_kl(dtype, within, specialists):
    groups, g, p, active, weights = problem(3, 40, 30, specialists, dtype=dtype)
    for shortlist in (30, 1000):
        q = combine_kl_on_shortlist(g, p, groups, shortlist, active, weights)
        expected = combine_kl(g, p, groups, active, weights)
        torch.testing.assert_close(q, expected, rtol=0, atol=within)


def test_by_hand():
    groups = ClassGroups([[0, 3], [1, 2]], 5)
    g = torch.tensor([[0.4, 0.05, 0.3, 0.05, 0.2]]).double()
    first = torch.tensor([[0.3, 0.1, 0.6]]).double()
    # K = {0, 2, 4}: the generalist has 4/9, 3/9, 2/9.  Of the others' .55 the shortlist has .5: the
    # first specialist says .3 of class 0 and .6 x .5/.55 = 6/11 of 2 and 4.
    inside = 0.3 / (0.3 + 6 / 11)
    q_0 = (4 / 9 + inside) / 2
    others = [(1 - q_0) * 3 / 5, (1 - q_0) * 2 / 5]
    q = combine_kl_on_shortlist(g, [first, None], groups, 3, torch.tensor([[True, False]]))
    expected = torch.tensor([[0.9 * q_0, 0.05, 0.9 * others[0], 0.05, 0.9 * others[1]]])
    torch.testing.assert_close(q, expected.double())


def test_without_an_active_specialist_it_is_the_generalist_to_the_last_bit():
    groups, g, p, active, weights = problem(5, dtype=torch.float32)
    active[::2] = False
    q = combine_kl_on_shortlist(g, p, groups, 5, active, weights)
    assert torch.equal(q[::2], g[::2])
    assert torch.equal(combine_kl_on_shortlist(g, p, groups, 5, active & False), g)
    weightless = [1.0, *[0.0] * 4]
    assert torch.equal(combine_kl_on_shortlist(g, p, groups, 5, active, weightless), g)


def test_outside_and_the_shortlists_mass_stay_the_generalists():
    groups, g, p, active, weights = problem(7)
    q = combine_kl_on_shortlist(g, p, groups, 4, active, weights)
    listed = torch.zeros_like(g, dtype=torch.bool).scatter(1, g.topk(4).indices, True)
    assert torch.equal(q[~listed], g[~listed])
    mass = (q * listed).sum(1)
    torch.testing.assert_close(mass, (g * listed).sum(1))
    assert not torch.allclose(q, g)


def test_a_specialist_that_says_what_the_generalist_says_changes_nothing():
    groups, g, _, _, _ = problem(11)
    p = []
    for classes in groups.members:
        own = g[:, torch.tensor(classes)]
        p.append(torch.cat([own, 1 - own.sum(1, keepdim=True)], 1))
    one = torch.zeros(len(g), len(p), dtype=torch.bool)
    one[:, 1] = True
    torch.testing.assert_close(combine_kl_on_shortlist(g, p, groups, 6, one), g)


def test_one_that_gives_the_shortlist_nothing_is_not_heard():
    groups = ClassGroups([[0, 3]], 4)
    g = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    only_3 = torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(combine_kl_on_shortlist(g, [only_3], groups, 2), g)


def test_a_shortlist_of_its_own_classes_alone_has_no_dustbin():
    groups = ClassGroups([[0, 1, 2]], 4)
    g = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    special = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    q = combine_kl_on_shortlist(g, [special], groups, 2)
    expected = torch.tensor([[(0.5 / 0.8 + 0.25) / 2, (0.3 / 0.8 + 0.75) / 2]]) * 0.8
    torch.testing.assert_close(q[:, :2], expected)
    # And where the generalist gives the others nothing at all.
    sure = torch.tensor([[0.6, 0.4, 0.0, 0.0]])
    q = combine_kl_on_shortlist(sure, [special], groups, 2)
    torch.testing.assert_close(q, torch.tensor([[0.425, 0.575, 0.0, 0.0]]))


def test_a_dustbin_that_nobody_shares_goes_evenly_to_the_listed_classes_alone():
    groups = ClassGroups([[0]], 6)
    g = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    q = combine_kl_on_shortlist(g, [torch.tensor([[0.2, 0.8]])], groups, 3)
    assert float(q[0, 0]) == pytest.approx(0.6)
    assert sorted(q[0].tolist()) == pytest.approx([0, 0, 0, 0.2, 0.2, 0.6])


def test_gradcheck():
    groups, g, p, active, _ = problem(2, 4, 9, 3)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)

    def combined(g, weights, *p):
        # The shortlist itself does not move: its classes stand apart.
        return combine_kl_on_shortlist(g, list(p), groups, 5, active, weights)

    arguments = [x.detach().requires_grad_() for x in (g, *p)]
    assert torch.autograd.gradcheck(combined, (arguments[0], weights, *arguments[1:]))


@pytest.mark.parametrize("portable", [False, True])
def test_a_fixed_number_of_steps_has_the_same_answer(portable):
    rng = torch.Generator().manual_seed(0)
    for slots, k in ((1, 6), (3, 20), (5, 6)):
        inside = torch.rand(50, slots, k, generator=rng) < 0.4
        special = torch.randn(50, slots, k + 1, generator=rng).double()
        hidden = torch.cat([~inside, inside.all(2, keepdim=True)], 2)
        special = special.masked_fill(hidden, -torch.inf).softmax(2)
        general = torch.randn(50, k, generator=rng).double().softmax(1)
        weights = 2 * torch.rand(50, slots, generator=rng).double()
        weights = weights * (weights > 0.7)
        exact = join_on_atoms(general, special, inside, 1.0, weights, 1e-12)
        fixed = join_on_atoms(general, special, inside, 1.0, weights, None, portable)
        torch.testing.assert_close(fixed, exact, rtol=0, atol=1e-9)
        torch.testing.assert_close(exact.sum(1), torch.ones(50).double())


def test_mistakes_are_named():
    groups, g, p, active, _ = problem(1)
    with pytest.raises(ValueError, match="shortlist = 0; at least 1 class"):
        combine_kl_on_shortlist(g, p, groups, 0)
    with pytest.raises(ValueError, match="row 2 of p_general sums to"):
        combine_kl_on_shortlist(g.index_fill(0, torch.tensor([2]), 0.5), p, groups, 3)
    wrong = [2 * p[0], *p[1:]]
    first = int(active[:, 0].nonzero()[0])
    with pytest.raises(ValueError, match=rf"row {first} of p_special\[0\] sums to 2"):
        combine_kl_on_shortlist(g, wrong, groups, 3, active)
    with pytest.raises(ValueError, match="have weight 0; give one of them some"):
        combine_kl_on_shortlist(g, p, groups, 3, active, [0.0] * 5)
