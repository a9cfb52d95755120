"""combine_kl against hand-worked numbers, independent oracles and its invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustering.groups import ClassGroups
from ensemble import combine_kl

F64 = torch.float64


def predictions(
    seed, rows=6, classes=12, specialists=3, size=4, scale=2.0, conflicting=False, dtype=F64
):
    """(groups, p_general, p_special): overlapping random groups, softmax of random logits.

    conflicting: dustbins of .999 and 1e-6 at random.
    """
    rng = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(classes, generator=rng) for _ in range(specialists)]
    groups = ClassGroups([order[: max(1, size)].tolist() for order in shuffled], classes)
    p_general = torch.softmax(scale * torch.randn(rows, classes, generator=rng, dtype=dtype), 1)
    p_special = []
    for chosen in groups.members:
        p = torch.softmax(scale * torch.randn(rows, len(chosen) + 1, generator=rng, dtype=dtype), 1)
        if conflicting:
            dustbin = torch.where(torch.rand(rows, 1, generator=rng) < 0.5, 0.999, 1e-6).to(dtype)
            p = torch.cat([p[:, :-1] / p[:, :-1].sum(1, keepdim=True) * (1 - dustbin), dustbin], 1)
        p_special.append(p)
    return groups, p_general, p_special


def objective(q, p_general, p_special, groups, active=None, weights=None):
    """sum_m w_m KL(p_m, q) per row, up to a constant in q. -0 log 0 is 0."""
    count = len(groups.members)
    weights = [float(w) for w in weights or [1.0] * (1 + count)]
    if active is None:
        active = torch.ones(len(q), count, dtype=torch.bool)
    total = -weights[0] * torch.special.xlogy(p_general, q).sum(1)
    for m, classes in enumerate(groups.members):
        inside = torch.tensor(classes)
        outside = torch.ones(q.shape[1], dtype=torch.bool)
        outside[inside] = False
        loss = -torch.special.xlogy(p_special[m][:, :-1], q[:, inside]).sum(1)
        loss = loss - torch.special.xlogy(p_special[m][:, -1], q[:, outside].sum(1))
        total = total + weights[1 + m] * torch.where(active[:, m], loss, 0.0)
    return total


def em(p_general, p_special, groups, iterations):
    """EM: q_i <- [a_i + q_i sum over m with i outside of d_m / Q_m] / (1 + M)."""
    a = p_general.clone()
    outside = torch.ones(len(groups.members), p_general.shape[1], dtype=p_general.dtype)
    for m, classes in enumerate(groups.members):
        a[:, torch.tensor(classes)] += p_special[m][:, :-1]
        outside[m, torch.tensor(classes)] = 0
    d = torch.stack([p[:, -1] for p in p_special], 1)
    q = p_general.clone()
    for _ in range(iterations):
        q = (a + q * ((d / (q @ outside.T)) @ outside)) / (1 + len(p_special))
    return q


def lbfgs(p_general, p_special, groups, iterations=300):
    """Minimise over the logits of q, as the paper does, with L-BFGS."""
    logits = p_general.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss = objective(torch.softmax(logits, 1), p_general, p_special, groups).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.softmax(logits.detach(), 1)


def kkt_residual(q, p_general, p_special, groups, active=None):
    """max |q_i (1 + M - sum over m with i outside of d_m / Q_m) - a_i| and |sum q - 1|.

    In float64.
    """
    q = q.double()
    if active is None:
        active = torch.ones(len(q), len(groups.members), dtype=torch.bool)
    a = p_general.double().clone()
    load = torch.zeros_like(q)
    for m, classes in enumerate(groups.members):
        on = active[:, m, None].double()
        outside = torch.ones(q.shape[1], dtype=torch.bool)
        outside[torch.tensor(classes)] = False
        a[:, torch.tensor(classes)] += on * p_special[m][:, :-1].double()
        left = q[:, outside].sum(1, keepdim=True).clamp(min=1e-300)
        load += outside * on * p_special[m][:, -1:].double() / left
    stationarity = q * (1 + active.double().sum(1, keepdim=True) - load) - a
    return max(float(stationarity.abs().max()), float((q.sum(1) - 1).abs().max()))


# ---- by hand


def test_one_active_specialist_has_closed_form():
    groups = ClassGroups([[0, 1]], 4)
    g = torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=F64)
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64)
    # inside (g + p) / 2. Outside g (G + d) / (2 G) with G = .4, d = .2: a factor of .75
    expected = torch.tensor([[0.45, 0.25, 0.225, 0.075]], dtype=F64)
    torch.testing.assert_close(combine_kl(g, [p], groups), expected, rtol=0, atol=1e-15)


def test_two_disjoint_specialists_by_hand():
    # Symmetric: S_0 = {0}, S_1 = {1}, one class outside both.
    # g = (1/3, 1/3, 1/3), both specialists predict (1/2, 1/2).
    # q = (x, x, 1 - 2x). Minimise -(1/3 + 1/2) 2 log x - 1/3 log(1 - 2x) - 2 (1/2) log(1 - x).
    # Its derivative is zero: -(5/3)/x + (2/3)/(1 - 2x) + 1/(1 - x) = 0. Solved for x below 1/2.
    groups = ClassGroups([[0], [1]], 3)
    g, p = torch.full((1, 3), 1 / 3, dtype=F64), torch.full((1, 2), 0.5, dtype=F64)
    # -(5/3)(1 - 2x)(1 - x) + (2/3) x (1 - x) + x (1 - 2x) = -(5/3) + (20/3) x - 6 x^2 = 0
    x = (20 / 3 - math.sqrt((20 / 3) ** 2 - 40)) / 12
    expected = torch.tensor([[x, x, 1 - 2 * x]], dtype=F64)
    torch.testing.assert_close(combine_kl(g, [p, p], groups), expected)


def test_weights_scale_the_terms_of_the_objective():
    groups = ClassGroups([[0, 1]], 4)
    g = torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=F64)
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64)
    # inside (1 g + 3 p) / 4. Outside g (G + 3 d) / (4 G), a factor of 1 / 1.6
    expected = torch.tensor([[(0.4 + 1.5) / 4, (0.2 + 0.9) / 4, 0.3 / 1.6, 0.1 / 1.6]], dtype=F64)
    torch.testing.assert_close(combine_kl(g, [p], groups, weights=[1, 3]), expected)
    torch.testing.assert_close(combine_kl(g, [p], groups, weights=[1, 0]), g)


def test_weights_reach_the_minimum_of_their_objective():
    groups, g, p = predictions(3)
    weights = [0.7, 2.0, 0.1, 1.3]
    q = combine_kl(g, p, groups, weights=weights)
    best = objective(q, g, p, groups, weights=weights)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        other = q * (0.05 * torch.randn(q.shape, generator=rng, dtype=F64)).exp()
        other = other / other.sum(1, keepdim=True)
        assert (objective(other, g, p, groups, weights=weights) >= best).all()


def test_specialist_of_every_class_loses_its_dustbin():
    groups = ClassGroups([[0, 1, 2]], 3)
    g = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64)
    p = torch.tensor([[0.1, 0.1, 0.2, 0.6]], dtype=F64)
    expected = torch.tensor([[0.375, 0.275, 0.35]], dtype=F64)
    torch.testing.assert_close(combine_kl(g, [p], groups), expected)


def test_dustbin_mass_for_classes_without_mass_is_spread_evenly():
    groups = ClassGroups([[0, 1]], 4)
    g = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    p = torch.tensor([[0.2, 0.2, 0.6]])
    torch.testing.assert_close(combine_kl(g, [p], groups), torch.tensor([[0.35, 0.35, 0.15, 0.15]]))
    # Also where the pattern without mass lies inside another group.
    groups = ClassGroups([[0, 1], [2, 3], [0, 1]], 4)
    zero = torch.tensor([[0.0, 0.0, 1.0]])
    q = combine_kl(g, [p, zero, p], groups)
    assert torch.isfinite(q).all()
    assert float(q[0, 2]) == pytest.approx(float(q[0, 3]))
    assert float(q[0, 2]) > 0.1
    assert float(q.sum()) == pytest.approx(1, abs=1e-6)


def test_weightless_generalist_still_gives_a_distribution():
    groups, g, p = predictions(0)
    q = combine_kl(g, p, groups, weights=[0, 1, 1, 1])
    assert torch.isfinite(q).all() and (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(len(q), dtype=F64))


# ---- oracles


@pytest.mark.parametrize("specialists", [1, 2, 5])
def test_newton_equals_em_on_benign_input(specialists):
    groups, g, p = predictions(specialists, specialists=specialists, scale=1.0)
    torch.testing.assert_close(combine_kl(g, p, groups), em(g, p, groups, 3000), rtol=0, atol=1e-10)


@pytest.mark.parametrize("conflicting", [False, True])
@pytest.mark.parametrize("scale", [3, 8, 20])
@pytest.mark.parametrize(
    "classes, specialists, size",
    [(100, 1, 20), (100, 2, 30), (100, 5, 40), (60, 10, 20), (200, 30, 40)],
)
def test_objective_is_never_above_that_of_lbfgs(conflicting, scale, classes, specialists, size):
    groups, g, p = predictions(1, 4, classes, specialists, size, scale, conflicting)
    q = combine_kl(g, p, groups)
    assert torch.isfinite(q).all()
    assert kkt_residual(q, g, p, groups) < 1e-8
    other = lbfgs(g, p, groups, 100)
    assert (objective(q, g, p, groups) <= objective(other, g, p, groups) + 1e-9).all()


@pytest.mark.parametrize("scale", [3, 8, 20])
@pytest.mark.parametrize("conflicting", [False, True])
def test_float32_satisfies_the_optimality_conditions(scale, conflicting):
    groups, g, p = predictions(2, 32, 1000, 10, 100, scale, conflicting, torch.float32)
    q = combine_kl(g, p, groups)
    assert q.dtype == torch.float32
    assert kkt_residual(q, g, p, groups) < 1e-4


def test_fixed_steps_reach_the_optimum():
    groups, g, p = predictions(4, 16, 100, 5, 30, 3)
    q = combine_kl(g, p, groups, method="newton-fixed")
    torch.testing.assert_close(q, combine_kl(g, p, groups), rtol=0, atol=1e-10)


@pytest.mark.parametrize("specialists", [11, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fixed_steps_are_near_and_never_nan_where_predictions_underflow(specialists, dtype):
    groups, g, p = predictions(3, 256, 160, specialists, 40, 80, True)
    g, p = g.to(dtype), [x.to(dtype) for x in p]
    q = combine_kl(g, p, groups, method="newton-fixed")
    assert bool(torch.isfinite(q).all())
    torch.testing.assert_close(q.sum(1), torch.ones(256, dtype=dtype), rtol=0, atol=1e-4)
    off = (q - combine_kl(g, p, groups)).abs().amax(1)
    assert off.max() < 0.05 and (off > 1e-5).double().mean() < 0.1


@pytest.mark.parametrize("tiny", [0.0, 1e-300, 1e-40, 1e-33, 1e-29, 1e-22, 1e-12])
def test_the_mass_outside_reaches_the_dustbin_however_little_the_generalist_left_there(tiny):
    groups = ClassGroups([[0, 1]], 4)
    g = torch.tensor([[0.5, 0.5, tiny, 3 * tiny]], dtype=F64)
    q = combine_kl(g, [torch.tensor([[0.2, 0.2, 0.6]], dtype=F64)], groups)
    torch.testing.assert_close(q.sum(1), torch.ones(1, dtype=F64), rtol=0, atol=1e-9)
    assert float(q[0, 2:].sum()) == pytest.approx(0.3)
    assert float(q[0, 3] / q[0, 2]) == pytest.approx(3 if tiny >= 1e-29 else 1)


def test_certain_predictions_that_contradict_each_other_give_finite_ones():
    # Identical groups, dustbins at both extremes, a generalist without a float's mass outside.
    groups = ClassGroups([[0, 1], [0, 1], [2, 3]], 6)
    g = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    yes, no = torch.tensor([[1.0, 0, 0]]).expand(2, 3), torch.tensor([[0, 0, 1.0]]).expand(2, 3)
    for p in ([yes, no, yes], [no, no, no], [yes, yes, yes], [no, yes, no]):
        q = combine_kl(g, p, groups)
        assert torch.isfinite(q).all() and (q >= 0).all()
        torch.testing.assert_close(q.sum(1), torch.ones(2))


# ---- invariants

problems = {
    "seed": st.integers(0, 10_000),
    "rows": st.integers(1, 5),
    "classes": st.integers(3, 30),
    "specialists": st.integers(1, 6),
    "size": st.integers(1, 12),
    "scale": st.sampled_from([0.5, 3.0, 8.0, 20.0, 60.0]),
    "conflicting": st.booleans(),
}
some = settings(max_examples=25, deadline=None)


def assert_same(one, other, scale, g, p, groups, active=None):
    """Equally good, to 1e-9 of the objective, and the same to 1e-9 where that determines q.

    With logits of scale 20 and more the objective is so flat in some directions that changes of q
    by 1e-6 change it by less than its rounding: there float64 knows the optimum, but not which q it
    is any better.
    """
    values = [objective(q, g, p, groups, active) for q in (one, other)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9 if scale < 20 else 1e-5)


def random_active(seed, rows, specialists):
    return torch.rand(rows, specialists, generator=torch.Generator().manual_seed(seed)) < 0.6


@some
@given(**problems)
def test_rows_sum_to_one_and_satisfy_the_optimality_conditions(**problem):
    groups, g, p = predictions(**problem)
    active = random_active(problem["seed"], len(g), len(p))
    # At an S_m of every class the dustbin has no meaning, and the residual no dustbin.
    p_meant = []
    for x, classes in zip(p, groups.members, strict=True):
        if len(classes) == groups.num_classes:
            rest = x[:, :-1] / x[:, :-1].sum(1, keepdim=True)
            x = torch.cat([rest, torch.zeros(len(x), 1, dtype=F64)], 1)
        p_meant.append(x)
    assert kkt_residual(combine_kl(g, p, groups, active), g, p_meant, groups, active) < 1e-8


@some
@given(**problems)
def test_each_row_is_combined_as_if_alone(**problem):
    groups, g, p = predictions(**problem)
    active = random_active(problem["seed"], len(g), len(p))
    together = combine_kl(g, p, groups, active)
    rows = [slice(row, row + 1) for row in range(len(g))]
    alone = [combine_kl(g[one], [x[one] for x in p], groups, active[one]) for one in rows]
    alone = torch.cat(alone)
    assert_same(alone, together, problem["scale"], g, p, groups, active)


@some
@given(**problems)
def test_relabelling_classes_permutes_the_prediction(**problem):
    groups, g, p = predictions(**problem)
    rng = torch.Generator().manual_seed(problem["seed"])
    new_name = torch.randperm(groups.num_classes, generator=rng)
    renamed_classes = [new_name[torch.tensor(S)] for S in groups.members]
    orders = [S.argsort() for S in renamed_classes]
    renamed = ClassGroups([S.numpy() for S in renamed_classes], groups.num_classes)
    p_renamed = [torch.cat([x[:, :-1][:, o], x[:, -1:]], 1) for x, o in zip(p, orders, strict=True)]
    g_renamed = torch.empty_like(g)
    g_renamed[:, new_name] = g
    q_renamed = combine_kl(g_renamed, p_renamed, renamed)[:, new_name]
    assert_same(q_renamed, combine_kl(g, p, groups), problem["scale"], g, p, groups)


@some
@given(**problems)
def test_order_of_specialists_does_not_matter(**problem):
    groups, g, p = predictions(**problem)
    order = np.random.default_rng(problem["seed"]).permutation(len(p))
    shuffled = ClassGroups([groups.members[m] for m in order], groups.num_classes)
    reordered = combine_kl(g, [p[m] for m in order], shuffled)
    assert_same(reordered, combine_kl(g, p, groups), problem["scale"], g, p, groups)


def agreeing(q, classes):
    inside = q[:, torch.tensor(classes)]
    return torch.cat([inside, (1 - inside.sum(1, keepdim=True)).clamp(min=0)], 1)


@some
@given(**{**problems, "conflicting": st.just(False), "scale": st.sampled_from([0.5, 3.0])})
def test_specialist_that_agrees_with_the_prediction_changes_nothing(**problem):
    groups, g, p = predictions(**problem)
    q = combine_kl(g, p, groups)
    order = np.random.default_rng(problem["seed"]).permutation(groups.num_classes)
    extra = np.sort(order[: groups.num_classes // 2])
    more = ClassGroups([*groups.members, extra], groups.num_classes)
    torch.testing.assert_close(combine_kl(g, [*p, agreeing(q, extra)], more), q, rtol=0, atol=1e-8)


@some
@given(**{**problems, "conflicting": st.just(False)})
def test_if_all_agree_with_the_generalist_its_prediction_is_the_result(**problem):
    groups, g, _ = predictions(**problem)
    p = [agreeing(g, S) for S in groups.members]
    torch.testing.assert_close(combine_kl(g, p, groups), g, rtol=0, atol=1e-8)


def test_nothing_active_gives_the_generalist_back():
    groups, g, p = predictions(0)
    none = torch.zeros(len(g), 3, dtype=torch.bool)
    q = combine_kl(g, [None, None, None], groups, none)
    assert torch.equal(q, g) and q.data_ptr() != g.data_ptr()
    assert combine_kl(g[:0], [x[:0] for x in p], groups).shape == (0, 12)


def test_inputs_are_left_as_they_were():
    groups, g, p = predictions(0, rows=80)
    active = random_active(0, 80, 3)
    before = [x.clone() for x in (g, *p)]
    combine_kl(g, p, groups, active)
    combine_kl(g, p, groups)
    assert all(torch.equal(x, y) for x, y in zip((g, *p), before, strict=True))


def test_rows_form_equals_dense_form_and_unread_rows_may_be_anything():
    groups, g, p = predictions(5, rows=100)
    active = random_active(1, 100, 3)
    dense = combine_kl(g, p, groups, active)
    rows = [active[:, m].nonzero()[:, 0].flip(0) for m in range(3)]
    sparse_form = [(r, p[m][r]) for m, r in enumerate(rows)]
    q = combine_kl(g, sparse_form, groups, active)
    torch.testing.assert_close(q, dense, rtol=0, atol=1e-12)
    with_nan = [torch.where(active[:, m, None], x, float("nan")) for m, x in enumerate(p)]
    torch.testing.assert_close(combine_kl(g, with_nan, groups, active), dense, rtol=0, atol=1e-12)


def test_frequent_and_rare_active_sets_are_combined_alike():
    groups, g, p = predictions(6, rows=300, specialists=6)
    active = random_active(2, 300, 6)
    active[:100] = active[0]  # shared by many rows. The others are rare
    q = combine_kl(g, p, groups, active)
    assert kkt_residual(q, g, p, groups, active) < 1e-10
    some_rows = combine_kl(g[50:60], [x[50:60] for x in p], groups, active[50:60])
    torch.testing.assert_close(some_rows, q[50:60], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_half_precision(dtype):
    groups, g, p = predictions(7, classes=20)
    q = combine_kl(g.to(dtype), [x.to(dtype) for x in p], groups)
    assert q.dtype == dtype
    torch.testing.assert_close(q.double(), combine_kl(g, p, groups), rtol=0, atol=2e-2)


# ---- derivatives


@pytest.mark.parametrize("method", ["newton", "newton-fixed"])
@pytest.mark.parametrize("specialists", [1, 3])
def test_gradcheck(specialists, method):
    groups, g, p = predictions(8, rows=3, classes=8, specialists=specialists, size=3, scale=1)
    patterns = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    active = {1: None, 3: patterns}[specialists]

    def of_probabilities(g, *p):
        return combine_kl(g, list(p), groups, active, method=method)

    def of_logits(*logits):
        return of_probabilities(*(torch.softmax(x, 1) for x in logits))

    logits = [x.log().detach().requires_grad_() for x in (g, *p)]
    assert torch.autograd.gradcheck(of_logits, logits)
    probabilities = [x.detach().requires_grad_() for x in (g, *p)]
    assert torch.autograd.gradcheck(of_probabilities, probabilities)


def test_gradients_do_not_change_the_prediction():
    groups, g, p = predictions(9, rows=100, dtype=torch.float32)
    active = random_active(3, 100, 3)
    q = combine_kl(g, p, groups, active)
    g_grad, *p_grad = (x.clone().requires_grad_() for x in (g, *p))
    q_grad = combine_kl(g_grad, p_grad, groups, active)
    torch.testing.assert_close(q_grad, q, rtol=0, atol=1e-6)


# ---- errors


def changed(x, row, column, value):
    x = x.clone()
    x[row, column] = value
    return x


class Broken:
    """Groups as somebody else might bring them, with an empty one."""

    members, num_classes = [np.array([0, 1]), np.array([], dtype=np.int64)], 12


def with_negative(p):
    """Row 1 has -0.5 for class 0 and still sums to 1."""
    class_1 = 0.5 + float(p[0][1, :2].sum())
    return [changed(changed(p[0], 1, 0, -0.5), 1, 1, class_1), p[1], p[2]]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda g, p, G: dict(p_general=g[:, :-1]), ["p_general", "[6, 11]", "[B, 12]"]),
        (
            lambda g, p, G: dict(p_general=g * 2),
            ["row 0 of p_general", "sums to 2", "within 0.001", "softmax"],
        ),
        (lambda g, p, G: dict(p_general=changed(g, 2, 3, math.nan)), ["row 2 of p_general", "NaN"]),
        (lambda g, p, G: dict(p_general=g.round().long()), ["dtype torch.int64", "floating point"]),
        (lambda g, p, G: dict(p_special=p[:2]), ["2 entries for 3 groups", "None"]),
        (
            lambda g, p, G: dict(p_special=[p[0], p[1][:, :-1], p[2]]),
            ["p_special[1]", "[6, 4]", "[6, 5]", "dustbin last"],
        ),
        (
            lambda g, p, G: dict(p_special=[p[0], changed(p[1], 4, 0, math.inf), p[2]]),
            ["row 4 of p_special[1]", "infinity"],
        ),
        (
            lambda g, p, G: dict(p_special=[p[0], p[1], p[2].log()]),
            ["row 0 of p_special[2]", "sums to"],
        ),
        (
            lambda g, p, G: dict(p_special=with_negative(p)),
            ["row 1 of p_special", "-0.5", "not negative"],
        ),
        (lambda g, p, G: dict(p_special=[None, p[1], p[2]]), ["p_special[0] is None", "row 0"]),
        (
            lambda g, p, G: dict(p_special=[([0, 1], p[0][:2]), p[1], p[2]]),
            ["row 2 is active", "p_special[0]"],
        ),
        (
            lambda g, p, G: dict(p_special=[([0, 1, 1, 2, 3, 4], p[0]), p[1], p[2]]),
            ["more than once"],
        ),
        (
            lambda g, p, G: dict(p_special=[([0, 1, 2, 3, 4, 9], p[0]), p[1], p[2]]),
            ["row 9", "0 to 5"],
        ),
        (lambda g, p, G: dict(active=torch.ones(6, 2).bool()), ["active", "[6, 2]", "[6, 3]"]),
        (lambda g, p, G: dict(active=torch.ones(6, 3)), ["active", "float32", "bool"]),
        (lambda g, p, G: dict(weights=[1, 1]), ["weights", "[2]", "[4]"]),
        (lambda g, p, G: dict(weights=[1, 1, -1, 1]), ["-1", "zero or more"]),
        (lambda g, p, G: dict(weights=[0, 0, 0, 0]), ["weight 0"]),
        (lambda g, p, G: dict(method="adam"), ["'adam' is unknown", "newton, newton-fixed"]),
        (
            lambda g, p, G: dict(groups=Broken, p_special=p[:2]),
            ["group 1 is empty", "leave it out"],
        ),
    ],
)
def test_an_error_names_the_value_the_rule_and_the_remedy(change, words):
    groups, g, p = predictions(0)
    arguments = dict(p_general=g, p_special=p, groups=groups) | change(g, p, groups)
    with pytest.raises(ValueError) as error:
        combine_kl(**arguments)
    for word in words:
        assert word in str(error.value)


def test_rare_sets_name_the_callers_row():
    groups, g, p = predictions(1, rows=40)
    active = random_active(4, 40, 3)
    row, m = 31, 1
    active[row, m] = True
    with pytest.raises(ValueError, match=r"row 31 of p_special\[1\] has a NaN"):
        combine_kl(g, [p[0], changed(p[1], row, 2, math.nan), p[2]], groups, active)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    groups, g, p = predictions(10, 200, 100, 6, 20, scale=3, dtype=torch.float32)
    active = random_active(5, 200, 6)
    q = combine_kl(g.cuda(), [x.cuda() for x in p], groups, active.cuda())
    torch.testing.assert_close(q.cpu(), combine_kl(g, p, groups, active), rtol=0, atol=1e-6)


# Two specialists in closed form


def masses_of_two(seed, scale):
    """(A [n, 4], d [n, 2], membership) of the patterns none, first, second, both."""
    from ensemble.newton import Membership

    draw = torch.Generator().manual_seed(seed)
    mass = (scale * torch.randn(200, 6, generator=draw, dtype=F64)).softmax(1)
    outside = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]], dtype=F64)
    return mass[:, :4], mass[:, 4:], Membership(outside, torch.tensor([90.0, 4, 5, 1]).double())


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0, 12.0])
def test_two_specialists_in_closed_form_meet_the_optimums_conditions(scale):
    from ensemble.newton import pattern_masses

    A, d, membership = masses_of_two(0, scale)
    Y = pattern_masses(A, d, membership, None)
    Q = membership.to_specialists(Y)
    s = 1 - membership.to_patterns(d / Q)
    torch.testing.assert_close(Y * s, A, atol=1e-7, rtol=0)
    torch.testing.assert_close(Y.sum(1), torch.ones_like(Y[:, 0]), atol=1e-7, rtol=0)
    assert (Y >= A * (1 - 1e-12)).all()


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_two_specialists_in_closed_form_are_where_newtons_method_ends(scale):
    from ensemble.newton import pattern_masses

    A, d, membership = masses_of_two(1, scale)
    closed = pattern_masses(A, d, membership, None)
    torch.testing.assert_close(closed, pattern_masses(A, d, membership, 1e-12), atol=1e-9, rtol=0)


def test_two_specialists_of_all_classes_between_them_leave_no_mass_elsewhere():
    groups = ClassGroups([[0, 1, 2, 3], [3, 4, 5]], 6)
    draw = torch.Generator().manual_seed(0)
    g, first, second = [torch.randn(50, n, generator=draw, dtype=F64).softmax(1) for n in (6, 5, 4)]
    fixed = combine_kl(g, [first, second], groups, method="newton-fixed")
    torch.testing.assert_close(fixed, combine_kl(g, [first, second], groups), atol=1e-9, rtol=0)
