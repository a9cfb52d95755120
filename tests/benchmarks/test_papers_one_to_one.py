"""Self-distillation and Jacobians: runs that differ in what they should, distances by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.papers import one_to_one
from pipeline.config import load_config


def test_students_of_memorised_data_differ_in_perturb_alone():
    config = load_config(None, [], one_to_one.memorised(Path("data"), seed=3))
    students = dict(config.students)
    labels = students.pop("labels")
    others = [student.model_dump(exclude={"perturb"}) for student in students.values()]
    assert all(each == others[0] for each in others)
    assert [student.perturb for student in students.values()] == ["none", "gaussian", "ods"]
    assert labels.method == "hard" and labels.epochs == students["plain"].epochs


def test_self_distillation_and_its_rival_on_labels_see_the_same_views_for_as_long():
    students = load_config(None, [], one_to_one.augmented(Path("data"), seed=3)).students
    alone, labels = students["self"], students["labels"]
    assert (alone.teacher, labels.method) == ("generalist", "hard")
    assert (alone.epochs, alone.start, alone.augment) == (
        labels.epochs, labels.start, labels.augment,
    )  # fmt: skip


def test_a_jacobian_of_zeros_is_at_distance_one_and_a_doubled_one_has_cosine_one():
    teacher = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    none = one_to_one.jacobian_distance(torch.zeros_like(teacher), teacher)
    assert none["relative"].item() == 1
    doubled = one_to_one.jacobian_distance(2 * teacher, teacher)
    assert doubled["relative"].item() == pytest.approx(1)
    assert doubled["cosine"].item() == pytest.approx(1)
    # (3, 0, 0, 4) against (3, 0, 0, 0): a distance of 4 of 5, a cosine of 9 / 15.
    part = one_to_one.jacobian_distance(torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]), teacher)
    assert part["relative"].item() == pytest.approx(0.8)
    assert part["cosine"].item() == pytest.approx(0.6)


def test_the_jacobian_of_a_linear_network_is_its_weights_less_their_mean():
    # d log p_c / dx = W_c - sum_k p_k W_k. Pixels count 0..1, and the network reads 0..255.
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3))
    network.spec = SimpleNamespace(input=SimpleNamespace(scale=1 / 255))
    raw = torch.randint(0, 256, (4, 1, 2, 3), dtype=torch.uint8)
    with torch.no_grad():
        network[1].weight /= 255
        p = network(raw.float()).softmax(1)
    weight = 255 * network[1].weight.detach()
    expected = weight - (p @ weight)[:, None]
    torch.testing.assert_close(one_to_one.jacobian(network, raw), expected, atol=1e-5, rtol=1e-4)
