"""Whatever sums probabilities gives under autocast what it gives without: every public name."""

import threading
from contextlib import nullcontext

import pytest
import torch

import ensemble
from clustering.groups import ClassGroups
from ensemble import (
    COMBINERS,
    DeepEnsemble,
    EnsembleProgram,
    ShortlistEnsemble,
    SpecialistEnsemble,
    combine_kl,
    combine_kl_on_shortlist,
    combine_kl_sparse,
    combiner,
    fit_shift,
    fit_temperature,
    fit_temperatures,
    fit_weights,
    gate,
    generalised_mean,
    join_on_shortlist,
)
from ensemble.listed import logits_slopes
from ensemble.listed_ensemble import Wanted
from networks import InputSpec, ModelSpec, build_classifier, specialise
from networks.full_precision import full_precision, in_full_precision, is_lowered
from trainer.core.metrics import dirichlet_uncertainty, model_uncertainty, pairwise_kl

C, B = 400, 64
GROUPS = ClassGroups([list(range(0, 150)), list(range(100, 250)), list(range(240, 390))], C)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def problem():
    draw = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(B, C, generator=draw)
    special = [(3 * torch.randn(B, len(classes) + 1, generator=draw)) for classes in GROUPS.members]
    labels = torch.randint(C, (B,), generator=draw)
    return logits, special, labels


def probabilities(problem):
    logits, special, labels = problem
    return logits.softmax(1), [each.softmax(1) for each in special], labels


def sparse(problem):
    p, special, _ = probabilities(problem)
    listed = torch.arange(395).repeat(B, 1)
    values = p.gather(1, listed)
    tail = p.sum(1) - values.sum(1)
    _, values, tail = combine_kl_sparse(listed, values, tail, special, GROUPS)
    return torch.cat([values, tail[:, None]], 1)


def pooled(problem, name):
    p, special, _ = probabilities(problem)
    return combiner(name)(p, special, GROUPS, weights=[1.0, 0.5, 2.0, 1.5])


def on_shortlist(problem):
    p, special, _ = probabilities(problem)
    return combine_kl_on_shortlist(p, special, GROUPS, 20)


def opinions(problem):
    logits, _, _ = problem
    log_p = logits.log_softmax(1)
    indices = logits.topk(20, dim=1).indices
    others = torch.stack([(0.5 * log_p).gather(1, indices), (2 * log_p).gather(1, indices)])
    return join_on_shortlist(log_p, indices, others, 0.5, [1.0, 2.0, 3.0]).exp()


def mean(problem):
    log_p = torch.stack([problem[0].log_softmax(1), problem[0].flip(1).log_softmax(1)])
    return generalised_mean(log_p, 0.3).exp()


# What gives distributions, and what gives numbers that are fitted to them.
DISTRIBUTIONS = {
    **{name: lambda problem, name=name: pooled(problem, name) for name in COMBINERS},
    "combine_kl_sparse": sparse,
    "combine_kl_on_shortlist": on_shortlist,
    "join_on_shortlist": opinions,
    "generalised_mean": mean,
}
NUMBERS = {
    "gate": lambda problem: gate(probabilities(problem)[0], GROUPS, 5, 2).float(),
    "fit_temperature": lambda problem: fit_temperature(problem[0], problem[2]),
    "fit_shift": lambda problem: fit_shift(problem[0], problem[2], range(50)),
    "fit_temperatures": lambda problem: fit_temperatures(
        problem[0], problem[1], GROUPS, problem[2]
    ),
    "fit_weights": lambda problem: fit_weights(*probabilities(problem)[:2], GROUPS, problem[2]),
    "logits_slopes": lambda problem: torch.stack(logits_slopes(problem[0], problem[2], 0.7)),
    "model_uncertainty": lambda problem: model_uncertainty(probabilities(problem)[0][None] * 1),
    "dirichlet_uncertainty": lambda problem: dirichlet_uncertainty(problem[0]),
    "pairwise_kl": lambda problem: pairwise_kl(
        torch.stack([problem[0].log_softmax(1), problem[0].flip(1).log_softmax(1)])
    ),
}
# Public names that are held below, or sum nothing.
OTHERS = {
    "COMBINERS", "Combiner", "combiner", "combine_kl", "DeepEnsemble", "EnsembleOutput",
    "EnsembleProgram", "EnsembleSettings", "MeanLogits", "ShortlistEnsemble",
    "SpecialistEnsemble", "ensemble_program", "export_bundle", "export_onnx", "export_program",
    "load_ensemble", "prediction_columns",
}  # fmt: skip


def test_every_public_name_is_tried():
    tried = {*DISTRIBUTIONS, *NUMBERS, *OTHERS}
    assert set(ensemble.__all__) <= tried


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_under_autocast_distributions_are_those_of_float32_and_sum_to_one(problem, name):
    expected = DISTRIBUTIONS[name](problem)
    with autocast():
        q = DISTRIBUTIONS[name](problem)
    assert q.dtype == torch.float32
    assert float((q.double().sum(1) - 1).abs().max()) < 1e-6
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NUMBERS)
def test_under_autocast_what_is_fitted_is_the_same(problem, name):
    expected = NUMBERS[name](problem)
    with autocast():
        found = NUMBERS[name](problem)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_of_eq_5_are_those_without_autocast(problem):
    def gradient(context):
        p, special, labels = probabilities(problem)
        p = p.detach().requires_grad_()
        with context:
            q = combine_kl(p, special, GROUPS)
        (slope,) = torch.autograd.grad(q.gather(1, labels[:, None]).log().sum(), p)
        return slope

    assert torch.equal(gradient(autocast()), gradient(nullcontext()))


@pytest.fixture(scope="module")
def networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = ModelSpec("convnet", C, InputSpec((1, 8, 8)), {"width": 2, "embedding": 16})
        generalist = build_classifier(spec).eval()
        with torch.no_grad():
            generalist.linear_head.weight.mul_(20)
        specialists = {
            m: specialise(generalist, classes.tolist()).eval()
            for m, classes in enumerate(GROUPS.members)
        }
    raw = torch.rand(B, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 255
    return generalist, specialists, raw.to(torch.uint8)


def sums_to_one(q):
    assert q.dtype == torch.float32
    assert float((q.double().sum(1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("shortlist", [None, 20])
@torch.no_grad()
def test_an_ensemble_of_specialists_sums_to_one_under_autocast(networks, shortlist):
    generalist, specialists, raw = networks
    join = SpecialistEnsemble(generalist, specialists, GROUPS, gate=3, shortlist=shortlist)
    with autocast():
        output = join.forward_with_details(raw)
        asked = join.ask(raw)(None)
    sums_to_one(output.q)
    sums_to_one(output.p_general)
    torch.testing.assert_close(asked, output.q, rtol=0, atol=0)
    # The trunk alone is bfloat16's: what is joined is joined in float32.
    apart = (output.q - join.forward_with_details(raw).q).abs().max()
    assert 1e-6 < float(apart) < 0.05


@torch.no_grad()
def test_specialists_asked_in_blocks_sum_to_one_under_autocast(networks):
    generalist, specialists, raw = networks
    join = SpecialistEnsemble(generalist, specialists, GROUPS, gate=3, sparse=True)
    with autocast():
        (part,) = join.ask_in_blocks(raw, Wanted(5))
        q = part.join(None)
    assert float((q.values.double().sum(1) + q.tail - 1).abs().max()) < 1e-6


@torch.no_grad()
def test_other_ensembles_and_programs_sum_to_one_under_autocast(networks):
    generalist, specialists, raw = networks
    join = SpecialistEnsemble(generalist, specialists, GROUPS, gate=3)
    with autocast():
        sums_to_one(EnsembleProgram(join)(raw))
        sums_to_one(DeepEnsemble([generalist, generalist], 0.5).probabilities(raw))
        sums_to_one(ShortlistEnsemble([generalist, generalist], 20).probabilities(raw))


@torch.no_grad()
def test_a_network_that_answers_has_float32_logits_of_its_low_features(networks):
    generalist, _, raw = networks
    with autocast():
        features = generalist.trunk(generalist.preprocess(raw))
        logits = generalist(raw)
    assert features.dtype == torch.bfloat16
    assert torch.equal(logits, generalist.head(features.float()))


def test_a_network_that_learns_has_autocasts_products(networks):
    generalist, _, raw = networks
    with autocast():
        assert generalist(raw).dtype == torch.bfloat16


def test_inside_products_are_exact_and_afterwards_as_they_were():
    @full_precision
    def inside():
        assert not is_lowered()
        return torch.get_float32_matmul_precision()

    torch.set_float32_matmul_precision("high")
    try:
        with autocast():
            assert inside() == "highest"
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_last_thread_out_restores_the_setting():
    """Two threads are inside. The first to leave must not take precision from the second."""
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with in_full_precision():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    try:
        with in_full_precision():
            thread.start()
            assert entered.wait(10)
        assert torch.get_float32_matmul_precision() == "highest"
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        leave.set()
        torch.set_float32_matmul_precision("highest")
