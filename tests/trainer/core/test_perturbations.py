"""Perturbed inputs: Gaussian noise, and directions that raise a teacher's weighted output (ODS)."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.core.perturbations import KINDS, mix_bags, ods, perturb


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_teacher(classes, size, seed=0, gain=1.0):
    weight = torch.randn(classes, size, generator=seeded(seed)) * gain
    return lambda x: x.flatten(1) @ weight.to(x).T


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 5),
    )


def weighted_sum(logits_of, inputs, weights, temperature):
    """What a direction raises, [B]: w . softmax(logits / T)."""
    return (weights * (logits_of(inputs) / temperature).softmax(1)).sum(1)


def test_direction_of_a_linear_teacher_by_hand():
    # Two classes, logits = x = (1/2, 1/2), w = (1, 0), tau = 1: p = (1/2, 1/2), the slope of w . p
    # (1/4, -1/4), D = 2: the direction is sqrt(2) (1, -1) / sqrt(2).
    x, weights = torch.full((1, 2), 0.5), torch.tensor([[1.0, 0.0]])
    direction, confidence = ods(lambda x: x, x, weights, 1.0)
    torch.testing.assert_close(direction, torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(confidence, torch.tensor([0.5]))


def test_confidence_is_the_largest_probability_at_the_temperature():
    logits = torch.tensor([[2 * math.log(8), 0.0, 0.0]])
    confidence = ods(lambda x: logits + 0 * x, torch.rand(1, 3), torch.rand(1, 3), 2.0)[1]
    torch.testing.assert_close(confidence, torch.tensor([0.8]))  # 8 of 8 + 1 + 1


@given(
    seed=st.integers(0, 500),
    temperature=st.sampled_from((0.5, 1.0, 4.0)),
    gain=st.sampled_from((1e-20, 1e-3, 1.0)),
)
def test_a_direction_has_norm_sqrt_d_and_raises_the_weighted_sum(seed, temperature, gain):
    """However flat the teacher is: the squares of slopes of 1e-20 would underflow in float32."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    for index, parameter in enumerate(network.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=seeded(seed + index)).double()
    x = torch.rand(4, 3, 2, 2, generator=seeded(seed))
    weights = torch.rand(4, 5, generator=seeded(seed)) * 2 - 1
    direction, _ = ods(lambda x: network.float()(x) * gain, x, weights, temperature)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.full((4,), math.sqrt(12)))
    network.double()
    before = weighted_sum(network, x.double(), weights, temperature / gain)
    after = weighted_sum(network, x.double() + 1e-5 * direction, weights, temperature / gain)
    if gain > 1e-10:  # in float64 the rise at 1e-20 is below the rounding
        assert (after > before).all()


GAPS = [(0, torch.float32), (20, torch.float32), (80, torch.float32), (20, torch.half)]


@pytest.mark.parametrize("gap, dtype", GAPS)
def test_direction_is_right_for_teachers_that_are_certain_beyond_rounding(gap, dtype):
    """At a gap of 20 the top class's 1 - p is 1e-9.

    In float32 the plain gradient leaves that class out, in half precision it is 0 altogether. At a
    gap of 80, through a layer that scales it down, in float32 too.
    """
    x = torch.rand(6, 10, generator=seeded(1))
    weights = torch.rand(6, 4, generator=seeded(2)) * 2 - 1
    bias = -torch.tensor([0.0, gap, gap + 1, gap + 2])
    body = linear_teacher(4, 10, gain=1e12)

    def teacher(x):
        return body(x) * 1e-12 + bias.to(x)

    wide = x.double().requires_grad_()
    p = teacher(wide).softmax(1)
    # Lowering all weights by the top class's changes no gradient and takes the cancellation out of
    # the oracle.
    (gradient,) = torch.autograd.grad(((weights - weights[:, :1]).double() * p).sum(), wide)
    expected = gradient / gradient.norm(dim=1, keepdim=True) * math.sqrt(10)
    tolerance = {torch.float32: 1e-3, torch.half: 3e-2}[dtype]
    direction, _ = ods(lambda x: teacher(x).to(dtype), x, weights, 1.0)
    torch.testing.assert_close(direction, expected.float(), rtol=tolerance, atol=tolerance)


def test_where_the_teacher_is_flat_the_direction_is_zero():
    x = torch.rand(2, 3)
    direction, _ = ods(lambda x: x * 0, x, torch.rand(2, 3), 1.0)
    assert (direction == 0).all()
    same = perturb("ods", x, 0.1, 1.0, [lambda x: x * 0])
    assert torch.equal(same, x)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 99), size=st.floats(0, 2))
def test_perturbed_inputs_stay_between_0_and_1(kind, seed, size):
    x = torch.rand(5, 2, 3, generator=seeded(seed))
    moved = perturb(kind, x, size, 2.0, [linear_teacher(4, 6)], seeded(seed))
    assert moved.shape == x.shape and moved.dtype == x.dtype and not moved.requires_grad
    assert moved.min() >= 0 and moved.max() <= 1


def test_gaussian_has_the_size_as_standard_deviation():
    x = torch.full((4, 50_000), 0.5)
    moved = perturb("gaussian", x, 0.03, 1.0, [], seeded()) - 0.5
    # Of 200,000 draws the deviation of the deviation is 0.03 / sqrt(400,000): 5 of them.
    assert float(moved.std()) == pytest.approx(0.03, abs=5 * 0.03 / math.sqrt(400_000))
    assert float(moved.mean()) == pytest.approx(0, abs=5 * 0.03 / math.sqrt(200_000))


def test_ods_moves_by_size_times_sqrt_d_and_conf_ods_by_its_product_with_the_confidence():
    x, size = torch.full((8, 6), 0.5), 1e-3
    teacher = linear_teacher(4, 6)
    plain = perturb("ods", x, size, 3.0, [teacher], seeded(1)) - x
    weighted = perturb("conf_ods", x, size, 3.0, [teacher], seeded(1)) - x
    norm = torch.full((8,), size * math.sqrt(6))
    torch.testing.assert_close(plain.norm(dim=1), norm, rtol=1e-3, atol=0)
    confidence = (teacher(x) / 3.0).softmax(1).amax(1, keepdim=True)
    torch.testing.assert_close(weighted, plain * confidence, rtol=1e-3, atol=1e-7)


def test_one_teacher_is_drawn_for_a_whole_batch_and_each_gets_its_turn():
    """Teacher k's gradient is along the k-th pair of inputs, so the move says which was drawn."""
    teachers = [lambda x, k=k: x[:, 2 * k : 2 * k + 2] for k in range(3)]
    turns = torch.zeros(3, dtype=torch.long)
    generator = seeded()
    for _ in range(60):
        moved = perturb("ods", torch.full((4, 6), 0.5), 0.01, 1.0, teachers, generator) != 0.5
        drawn = {row.nonzero()[:, 0].tolist()[0] // 2 for row in moved}
        assert len(drawn) == 1
        turns[drawn.pop()] += 1
    assert turns.min() >= 5  # of 60 at 1/3: below 5 with a chance of 1e-5


def test_weights_are_drawn_for_each_example():
    """Of two classes half of the draws aim at the first."""
    moved = perturb("ods", torch.full((400, 2), 0.5), 0.01, 1.0, [lambda x: x], seeded())
    upwards = (moved[:, 0] > 0.5).float().mean()
    assert 0.4 < float(upwards) < 0.6  # 4 deviations of 1/40


def test_without_a_generator_the_global_one_of_the_cpu_draws():
    x, teachers = torch.rand(3, 6), [linear_teacher(4, 6, seed) for seed in range(5)]
    for kind in ("gaussian", "ods", "conf_ods"):
        state = torch.get_rng_state()
        first = perturb(kind, x, 0.1, 1.0, teachers)
        assert not torch.equal(first, perturb(kind, x, 0.1, 1.0, teachers))
        torch.set_rng_state(state)
        assert torch.equal(first, perturb(kind, x, 0.1, 1.0, teachers))


@pytest.mark.parametrize("kind", ("ods", "conf_ods"))
def test_teachers_are_left_as_they_were_also_under_no_grad_and_autocast(kind):
    network = small_network()
    network.eval()
    network[4].train()  # flags of any mixture
    flags = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        moved = perturb(kind, x, 0.05, 2.0, [network])
        assert not torch.is_grad_enabled()
    assert moved.dtype == torch.float32 and not torch.equal(moved, x)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not x.requires_grad


def test_under_autocast_the_direction_is_that_of_float32_to_its_precision():
    network = small_network().eval()
    x, weights = torch.rand(8, 3, 4, 4), torch.rand(8, 5) * 2 - 1
    exact, _ = ods(network, x, weights, 2.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = ods(network, x, weights, 2.0)
    assert F.cosine_similarity(exact.flatten(1), rough.flatten(1)).min() > 0.98


def test_a_student_still_learns_after_inputs_were_moved_under_autocast():
    """The cast copies of weights that autocast keeps must not be the ones whose graph is gone."""
    network = small_network().eval()
    x = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = perturb("ods", x, 0.05, 2.0, [network])
        network(moved).float().square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network[0].parameters())


def test_errors_name_the_value_and_the_rule():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match="'pgd' must be one of none, gaussian, ods, conf_ods"):
        perturb("pgd", x, 0.1, 1.0, [])
    with pytest.raises(ValueError, match="'conf_ods' follows a teacher's gradient"):
        perturb("conf_ods", x, 0.1, 1.0, [])
    with pytest.raises(ValueError, match=r"torch.uint8 cannot be perturbed; scale them to 0..1"):
        perturb("gaussian", torch.zeros(2, 3, dtype=torch.uint8), 0.1, 1.0, [])
    with pytest.raises(ValueError, match="answer under torch.no_grad"):
        perturb("ods", x, 0.1, 1.0, [torch.no_grad()(lambda x: 2 * x)])


def bags_of(*lengths, width=64):
    """Row i has lengths[i] indices 100 i, 100 i + 1, ..., so that each says whose it is."""
    columns = torch.arange(width)
    rows = torch.arange(len(lengths))[:, None] * 100 + columns
    return torch.where(columns < torch.tensor(lengths)[:, None], rows, -1).int()


def owners(mixed):
    """{row: indices} of each bag."""
    return [
        {int(who): (row[(row >= 0) & (row // 100 == who)]).tolist() for who in row[row >= 0] // 100}
        for row in mixed
    ]


def test_a_mixed_bag_holds_some_of_its_own_and_some_of_one_others():
    bags = bags_of(*[20] * 50)
    before = bags.clone()
    mixed = mix_bags(bags, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(bags, before) and mixed.dtype == bags.dtype and mixed.shape == bags.shape
    partners = set()
    for row, parts in enumerate(owners(mixed)):
        others = set(parts) - {row}
        assert len(others) <= 1
        partners |= others
        for indices in parts.values():
            assert indices == sorted(set(indices))  # each once, in its order
        real = mixed[row] >= 0
        assert not real[int(real.sum()) :].any()  # padding stands last
    assert len(partners) > 40


def test_the_share_of_anothers_is_even_and_of_its_own_drawn_for_each_bag():
    bags = bags_of(*[60] * 400, width=128)
    mixed = mix_bags(bags, 0.3, torch.Generator().manual_seed(1))
    own = torch.tensor([len(parts.get(row, [])) for row, parts in enumerate(owners(mixed))]) / 60
    sizes = (mixed >= 0).sum(1) / 60
    # Own: uniform in [.4, 1], mean .7, deviation .173 and sqrt(.7 x .3 / 60) = .059 within a bag.
    assert float(own.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(own.std()) == pytest.approx(math.hypot(0.6 / math.sqrt(12), 0.056), abs=0.02)
    assert float((sizes - own).mean()) == pytest.approx(0.3, abs=0.01)


def test_a_mixed_bag_that_would_be_empty_or_too_long_is_neither():
    short = mix_bags(bags_of(*[1] * 300, width=4), 0.5, torch.Generator().manual_seed(0))
    assert bool((short >= 0).any(1).all())
    full = mix_bags(bags_of(*[64] * 300), 0.5, torch.Generator().manual_seed(0))
    assert full.shape == (300, 64)
    counts = (full >= 0).sum(1)
    assert int(counts.max()) == 64 and int(counts.min()) > 5
    assert torch.equal(mix_bags(bags_of(0, 0), 0.5), bags_of(0, 0))


def test_bags_are_mixed_alike_from_one_state_of_the_generator():
    bags = bags_of(30, 10, 20)
    torch.manual_seed(3)
    first = mix_bags(bags, 0.5)
    second = mix_bags(bags, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, mix_bags(bags, 0.5)) and not torch.equal(first, second)
