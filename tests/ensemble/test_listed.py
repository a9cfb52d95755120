"""Rows of an ensemble that list some classes say what rows of all classes say."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustering.groups import ClassGroups
from ensemble import SpecialistEnsemble, combine_kl
from ensemble import listed_ensemble as module
from ensemble.gating import asked_specialists, most_active
from ensemble.listed import Listed, logits_slopes
from ensemble.listed_ensemble import Wanted, own_classes
from ensemble.predictions import TabledPredictions
from networks import InputSpec, ModelSpec, branch_off, build_classifier, specialise
from trainer.core.dense_logits import DenseLogits, dense_log_probabilities

CLASSES, ROWS = 40, 70
GROUPS = ClassGroups([[0, 1, 2, 3], [3, 4, 5, 20, 21], [6, 7, 8], range(9, 20)], CLASSES)


def network(seed=0):
    torch.manual_seed(seed)
    spec = ModelSpec("mlp", CLASSES, InputSpec((6,), "float32"), {"width": 8, "depth": 1})
    made = build_classifier(spec).eval()
    with torch.no_grad():
        made.linear_head.weight.mul_(6)
    return made


def copies(generalist):
    made = {m: specialise(generalist, GROUPS.members[m]) for m in range(4)}
    torch.manual_seed(1)
    with torch.no_grad():
        for m, specialist in made.items():
            specialist.head.weight.add_(0.3 * torch.randn_like(specialist.head.weight))
            if m == 2:  # its trunk is its own, too
                for parameter in specialist.trunk.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def branches(generalist):
    made = {m: branch_off(generalist, GROUPS.members[m], 5) for m in range(4)}
    torch.manual_seed(2)
    with torch.no_grad():
        for branch in made.values():
            branch.correction.weight.copy_(torch.randn_like(branch.correction.weight))
    return {m: branch.eval() for m, branch in made.items()}


KINDS = {"copies": copies, "branches": branches}


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    generalist = network()
    return generalist, KINDS[request.param](generalist)


@pytest.fixture
def raw():
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(5))


def ensemble_of(made, **more):
    temperatures = [1.5, 1, 2, 0.7, 1]
    return SpecialistEnsemble(*made, GROUPS, temperatures=temperatures, sparse=True, **more)


@pytest.mark.parametrize("gate, limit", [(1, None), (3, None), (3, 1), (CLASSES, None)])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 3.0, 3.0, 3.0], [0.5, 2, 1, 4, 8]])
def test_a_listed_answer_is_the_whole_one_and_its_metrics_too(
    made, raw, gate, limit, weights, monkeypatch
):
    monkeypatch.setattr(module, "GENERAL_ROWS", 16)
    monkeypatch.setattr(module, "BLOCK_BYTES", 40 * 4000)
    ensemble = ensemble_of(made, gate=gate, max_specialists=limit, weights=weights)
    labels = torch.arange(ROWS) % CLASSES
    whole = ensemble.forward_with_details(raw)
    dense = dense_log_probabilities(whole.q)
    T = 1.7
    wanted = Wanted(5, (1.0, 1 / T), moments=True)
    start = 0
    for answers in ensemble.ask_in_blocks(raw, wanted, labels):
        q = answers.join(weights)
        rows = slice(start, start + len(q.values))
        start = rows.stop
        own = labels[rows]
        assert torch.equal(answers.active, whole.active[rows])
        torch.testing.assert_close(
            q.values, whole.q[rows].gather(1, q.indices), rtol=2e-6, atol=1e-7
        )
        for temperature in (1.0, T):
            expected = DenseLogits(dense.log_p[rows]).scale_by_temperature(temperature)
            expected = expected.summary(5, own)
            got = q.summary(5, own, temperature)
            torch.testing.assert_close(
                got.probabilities, expected.probabilities, rtol=2e-6, atol=1e-7
            )
            torch.testing.assert_close(got.log_label, expected.log_label, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(got.squares, expected.squares, rtol=2e-6, atol=1e-7)
            assert (got.indices == expected.indices).float().mean() > 0.99  # ties aside
        for each in zip(
            q.slopes(own, 1 / T), logits_slopes(dense.log_p[rows], own, 1 / T), strict=True
        ):
            torch.testing.assert_close(*each, rtol=1e-4, atol=2e-5)
        p = whole.q[rows].double()
        torch.testing.assert_close(
            q.entropy(), -torch.special.xlogy(p, p).sum(1), rtol=1e-5, atol=1e-6
        )
    assert start == ROWS


def test_predictions_are_those_of_whole_rows(made, raw):
    sparse, dense = ensemble_of(made), ensemble_of(made)
    dense.is_sparse = False
    for mine, theirs in zip(sparse.predict(raw, 3), dense.predict(raw, 3), strict=True):
        assert mine["classes"] == theirs["classes"]
        assert mine["specialists"] == theirs["specialists"] and mine["names"] == theirs["names"]
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], rel=1e-5)


def test_a_specialist_is_woken_once_for_all_rows_of_a_block(made, raw, monkeypatch):
    monkeypatch.setattr(module, "GENERAL_ROWS", 8)
    ensemble = ensemble_of(made)
    parts = list(ensemble.ask_in_blocks(raw, Wanted(5)))
    assert len(parts) == 9 and ensemble.runs["trunk"] == 9
    asked = torch.cat([part.active for part in parts]).any(0)
    assert {m: ensemble.runs[m] for m in range(4)} == {m: int(asked[m]) for m in range(4)}


def test_other_combiners_and_shortlists_need_whole_rows(made):
    for more in ({"combine": "mixture"}, {"shortlist": 4}):
        with pytest.raises(ValueError, match="over all classes alone"):
            SpecialistEnsemble(*made, GROUPS, sparse=True, **more)
        assert not SpecialistEnsemble(*made, GROUPS, **more).is_sparse
    assert not SpecialistEnsemble(*made, GROUPS).is_sparse  # 40 classes are few


def test_asked_specialists_and_their_classes_are_those_of_a_mask():
    active = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    assert asked_specialists(active, 3).tolist() == [[0, 3, -1], [-1, -1, -1], [1, 2, -1]]
    labels = torch.tensor([0, 7, 39])
    for also in (None, labels):
        own, counts = own_classes(GROUPS, active, also)
        for row in range(3):
            expected = {c for m in active[row].nonzero()[:, 0] for c in GROUPS.members[m].tolist()}
            expected |= {int(labels[row])} if also is not None else set()
            found = own[row].tolist()
            assert set(found[: counts[row]]) == expected and len(expected) == counts[row]
            # Behind them stands one of them again, which is lowered and raised with it.
            assert not expected or set(found[counts[row] :]) <= {found[0]}
    # Class 3 is in two groups: one class opens two, three classes all four.
    assert [most_active(GROUPS, n, None) for n in (1, 2, 3)] == [2, 4, 4]
    assert most_active(GROUPS, 3, 2) == 2


def test_others_that_had_nothing_share_a_dustbin_evenly():
    p = torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0]])
    listed = Listed.of(p, torch.tensor([[0, 1]]), (1.0, 0.5), moments=True)
    moved = listed.with_values(torch.tensor([[0.5, 0.2]]), torch.tensor([0.3]))
    q = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).double()
    for T in (1.0, 2.0):
        tempered = q ** (1 / T) / (q ** (1 / T)).sum()
        got = moved.summary(2, torch.tensor([1]), T)
        assert float(got.log_label) == pytest.approx(float(tempered[0, 1].log()), rel=1e-6)
        assert float(got.squares) == pytest.approx(float(tempered.square().sum()), rel=1e-6)
    assert float(moved.entropy()) == pytest.approx(float(-(q * q.log()).sum()), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0), st.integers(1, 9))
def test_sums_of_others_scale_as_their_classes_do(seed, beta, k):
    random = np.random.default_rng(seed)
    p = torch.from_numpy(random.dirichlet(np.full(10, 0.5), 3)).clamp_min(1e-12)
    p = p / p.sum(1, keepdim=True)
    indices = torch.from_numpy(np.stack([random.permutation(10)[:k] for _ in range(3)]))
    listed = Listed.of(p.clone(), indices, (beta,), moments=True)
    new_tail = listed.tail * torch.from_numpy(random.uniform(0.1, 1, 3))
    moved = listed.with_values(listed.values, new_tail)
    others = torch.ones_like(p).scatter(1, indices, 0.0).bool()
    for row in range(3):
        q = p[row][others[row]] * (new_tail / listed.tail)[row]
        sums = [
            (q**beta).sum(),
            (q ** (2 * beta)).sum(),
            (q**beta * q.log()).sum(),
            (q**beta * q.log() ** 2).sum(),
        ]
        got = [each[row] for each in moved.sums[beta]]
        for expected, value in zip(sums, got, strict=True):
            assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_a_listed_answer_is_eq_5_of_whole_rows_worked_by_hand():
    # One specialist of {0, 1}: inside q = (g + p) / 2, outside g (G_out + d) / (2 G_out).
    p = torch.tensor([[0.4, 0.2, 0.3, 0.1]])
    special = torch.tensor([[0.5, 0.3, 0.2]])
    groups = ClassGroups([[0, 1]], 4)
    indices = torch.tensor([[0, 1, 2]])
    answers = module.ListedAnswers(
        Listed.of(p.clone(), indices, (1.0,)),
        TabledPredictions(special, torch.tensor([[0]]), groups.sizes),
        groups,
        torch.tensor([[True]]),
    )
    q = answers.join(None)
    assert q.values[0].tolist() == pytest.approx([0.45, 0.25, 0.225])
    assert float(q.tail) == pytest.approx(0.075)
    assert combine_kl(p, [special], groups)[0, 3] == pytest.approx(float(q.tail))
    got = q.summary(1, torch.tensor([2]))
    assert got.squares[0] == pytest.approx(0.45**2 + 0.25**2 + 0.225**2 + 0.075**2)
    assert list(itertools.chain(*got.indices.tolist())) == [0]
