"""The data and the network of Allen-Zhu & Li, by hand and by their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.papers import multiview
from benchmarks.papers.multiview import (
    QUICK,
    SMALL,
    Descent,
    Drawn,
    Laboratory,
    MultiViewNetwork,
    Problem,
    RandomFeatures,
    draw_examples,
    errors_of,
    in_units_of_mu,
    orthonormal_views,
    raise_to,
    smoothed_relu,
    view_correlations,
    views_learned,
)
from pipeline.config import Engine, UserError
from trainer.data.streams import Batch
from trainer.distributed.ranks import process_group

PROBLEM = Problem(classes=5, patches=6, dimension=64, off_classes=1.5)


def network_of(weight, q=3, rho=2.0) -> MultiViewNetwork:
    """With these weights [C, R, d]."""
    classes, neurons, dimension = weight.shape
    network = MultiViewNetwork(classes, dimension, neurons, q, rho, scale=1.0)
    network.weight.data = weight.flatten(0, 1)
    return network


# The data


@given(seed=st.integers(0, 1000), classes=st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_views_are_orthonormal(seed, classes):
    views = orthonormal_views(Problem(classes=classes, dimension=40), seed).reshape(2 * classes, 40)
    np.testing.assert_allclose(views @ views.T, np.eye(2 * classes), atol=1e-6)


def test_the_asked_share_of_each_class_shows_one_view_and_all_others_both():
    drawn = draw_examples(
        PROBLEM, orthonormal_views(PROBLEM, 0), per_class=40, single_share=0.25, seed=1
    )
    own = drawn.weights[np.arange(200), drawn.labels]
    np.testing.assert_array_equal(np.bincount(drawn.labels), [40] * 5)
    np.testing.assert_array_equal(np.bincount(drawn.labels[drawn.single]), [10] * 5)
    np.testing.assert_array_equal(own[~drawn.single], np.ones((150, 2)))
    np.testing.assert_array_equal(np.sort(own[drawn.single], 1), np.tile([0, 1], (50, 1)))


def test_either_view_is_as_likely_to_be_the_one_shown():
    drawn = draw_examples(
        PROBLEM, orthonormal_views(PROBLEM, 0), per_class=800, single_share=1.0, seed=1
    )
    first = drawn.weights[np.arange(4000), drawn.labels, 0]
    assert abs(first.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_views_of_other_classes_come_with_their_probability_and_weight():
    # Room for all: off-class views are 1.5 / 5 of the other eight.
    problem = replace(PROBLEM, patches=10)
    drawn = draw_examples(
        problem, orthonormal_views(problem, 0), per_class=400, single_share=0.5, seed=1
    )
    others = np.ones((2000, 5, 2), bool)
    others[np.arange(2000), drawn.labels] = False
    weights = drawn.weights[others].reshape(2000, 8)
    assert abs((weights > 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 16000)
    for kind, weight in (
        (drawn.single, problem.off_weight_single),
        (~drawn.single, problem.off_weight),
    ):
        assert set(np.unique(weights[kind])) == {np.float32(0), np.float32(weight)}


@given(seed=st.integers(0, 100), patches=st.integers(3, 10))
@settings(max_examples=20, deadline=None)
def test_without_noise_each_view_lies_in_a_patch_of_its_own_with_its_weight(seed, patches):
    problem = replace(PROBLEM, patches=patches, noise=0.0)
    views = orthonormal_views(problem, seed)
    drawn = draw_examples(problem, views, per_class=8, single_share=0.5, seed=seed)
    found = np.einsum("npd,cld->npcl", drawn.inputs.astype(np.float64), views)
    assert ((found > 0.1).sum((2, 3)) <= 1).all()
    np.testing.assert_allclose(found.sum(1), drawn.weights, atol=5e-3)  # inputs are float16


def test_noise_has_its_norm_in_every_patch():
    problem = replace(PROBLEM, dimension=2048, noise=1.5, off_classes=0.0)
    drawn = draw_examples(
        problem, np.zeros((5, 2, 2048), np.float32), per_class=20, single_share=0.5, seed=0
    )
    norms = np.linalg.norm(drawn.inputs.astype(np.float64), axis=2)
    assert norms.shape == (100, 6) and abs(norms - 1.5).max() < 0.2


def test_draws_of_other_seeds_share_nothing_and_of_one_seed_everything():
    views = orthonormal_views(PROBLEM, 0)
    one, again, other = (draw_examples(PROBLEM, views, 4, 0.25, seed).inputs for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9


# The network


def test_smoothed_relu_is_as_worked_by_hand():
    # q = 3, rho = 2: z^3 / 12 up to 2, where it is 2/3, then z - 4/3.
    z = torch.tensor([-3.0, 0.0, 1.0, 2.0, 5.0])
    torch.testing.assert_close(
        smoothed_relu(z, 3, 2.0), torch.tensor([0.0, 0.0, 1 / 12, 2 / 3, 11 / 3])
    )
    # q = 4, rho = 1: z^4 / 4, then z - 3/4.
    torch.testing.assert_close(
        smoothed_relu(torch.tensor([0.5, 2.0]), 4, 1.0), torch.tensor([1 / 64, 1.25])
    )


@given(q=st.integers(2, 5), rho=st.floats(0.1, 3))
def test_smoothed_relu_and_its_slope_have_no_jump(q, rho):
    for knot, slope in ((0.0, 0.0), (rho, 1.0)):
        z = torch.tensor([knot - 1e-9, knot + 1e-9], dtype=torch.float64, requires_grad=True)
        value = smoothed_relu(z, q, rho)
        (slopes,) = torch.autograd.grad(value.sum(), z)
        assert abs(value[0] - value[1]) < 1e-8
        torch.testing.assert_close(slopes, torch.full_like(slopes, slope), atol=1e-6, rtol=1e-6)


def test_the_network_sums_over_neurons_and_patches():
    # Class 0 has neurons 3 e_0 and 2 e_1, class 1 has e_1 and -e_0. Patches 2 e_0 and e_1.
    weight = torch.tensor([[[3.0, 0], [0, 2]], [[0, 1], [-1, 0]]])
    found = network_of(weight)(torch.tensor([[[2.0, 0], [0, 1]]]))
    # 6 - 4/3 + 2/3 (2 is rho) and 1/12 + 0
    torch.testing.assert_close(found, torch.tensor([[16 / 3, 1 / 12]]))


def test_views_are_counted_from_hand_made_weights():
    views = np.eye(6, dtype=np.float32).reshape(3, 2, 6)
    weight = torch.zeros(3, 2, 6)
    weight[0, 0, 0], weight[0, 1, 0] = 3.0, 2.0  # class 0: its first view by two neurons, 3 + 2
    weight[0, 0, 1] = -4.0  # against its second
    weight[1, 0, 2], weight[1, 1, 3] = 4.0, 2.5  # class 1: both
    # Class 2: hardly its first. Class 0's is none of its own.
    weight[2, 0, 4], weight[2, 1, 0] = 1.9, 9.0
    phi = view_correlations(network_of(weight), views)
    torch.testing.assert_close(phi, torch.tensor([[5.0, 0], [4.0, 2.5], [1.9, 0]]))
    # Above 0.4 x 5.
    assert views_learned(phi, 0.4).tolist() == [[True, False], [True, True], [False, False]]


# The control, and what is measured


def test_random_features_are_standardised_where_they_were_made_and_moved_by_nothing_else():
    inputs = np.random.default_rng(0).normal(size=(300, 4, 16)).astype(np.float16)
    fixed = RandomFeatures(8, 16, 0, inputs)
    found = fixed(inputs)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(fixed(inputs[:5]), found[:5], atol=1e-5)


def test_errors_are_shares_of_each_kind_and_weighed_by_the_share_of_one_view():
    labels, single = np.array([0, 1, 0, 1]), np.array([False, False, True, True])
    drawn = Drawn(np.empty(0), labels, single, np.empty(0))
    logits = torch.tensor([[2.0, 1], [2, 1], [1, 2], [2, 1]])
    assert errors_of(logits, drawn) == {"multi": 0.5, "single": 1.0}
    expected = pytest.approx((0.9 * 0.01 + 0.1 * 0.5) / 0.1)
    assert in_units_of_mu({"multi": 0.01, "single": 0.5}, 0.1) == expected


def test_a_finished_laboratory_is_read_and_not_done_again_and_another_plan_is_refused(
    tmp_path, monkeypatch
):
    plan = replace(
        QUICK,
        problem=Problem(classes=3, patches=5, dimension=32, per_class=6, single_share=1 / 6),
        members=2,
        features=8,
        network=Descent(3, 1.0, "fp32"),
        student=Descent(3, 1.0, "fp32"),
        kl_student=Descent(3, 1.0, "fp32"),
        random=Descent(3, 0.1, "fp32"),
        test_per_class=4,
    )
    with process_group(Engine(device="cpu")) as ranks:
        first = Laboratory(plan, 0, tmp_path, ranks).results()
        monkeypatch.setattr(multiview, "train", lambda *_, **__: pytest.fail("trained again"))
        assert Laboratory(plan, 0, tmp_path, ranks).results() == first
        with pytest.raises(UserError, match="another plan"):
            Laboratory(replace(plan, members=3), 0, tmp_path, ranks)
    assert {name: len(rows) for name, rows in first.items()} == {
        "single": 2,
        "ensemble": 1,
        "distilled": 1,
        "self": 1,
        "distilled_kl": 1,
        "self_kl": 1,
        "random": 2,
        "random_ensemble": 1,
        "random_distilled": 1,
        "random_to_network": 1,
    }
    table = multiview.table_of([first, first])
    assert len(table.splitlines()) == 2 + len(multiview.NAMES)
    assert len(multiview.verdicts([first])) == 7


@pytest.mark.slow
def test_an_ensemble_of_six_knows_views_that_its_members_lack_and_teaches_them(tmp_path):
    with process_group(Engine(device="cpu")) as ranks:
        laboratory = Laboratory(SMALL, 0, tmp_path, ranks)
        results = laboratory.results()
    singles = [row["test"]["single"] for row in results["single"]]
    assert all(row["test"]["multi"] == 0 for row in results["single"])
    # As the table compares them.
    assert results["ensemble"][0]["test"]["single"] < 0.5 * np.mean(singles)
    assert results["distilled"][0]["test"]["single"] < min(singles)
    both = [row["classes_by_views"][2] for row in results["single"]]
    assert results["distilled"][0]["classes_by_views"][2] > max(both)


def test_raising_adds_half_the_square_of_what_the_student_lacks_and_nothing_where_it_has_more():
    # The teachers' mean is [2, 1, 0]. The student's logits are [1, 3, 0]: it lacks 1 of the first.
    teachers = torch.tensor([[[1.0, 0.0, 0.0]], [[3.0, 2.0, 0.0]]])
    student = torch.tensor([[1.0, 3.0, 0.0]], requires_grad=True)
    zero = torch.tensor([0])
    batch = Batch(student, labels=torch.tensor([1]), ids=zero, source=zero)
    loss = raise_to(teachers, weight=0.5)(torch.nn.Identity(), batch)
    raised = loss - F.cross_entropy(student, batch.labels)
    assert raised.item() == pytest.approx(0.5 * 1 / 2)
    (slope,) = torch.autograd.grad(raised, student)
    torch.testing.assert_close(slope, torch.tensor([[-0.5, 0.0, 0.0]]))
