"""What an answer costs: counted by hand for a small network."""

import pytest
import torch

from benchmarks import rows
from networks import InputSpec, ModelSpec, build_classifier, save_classifier

CLASSES, FEATURES, WIDTH, EMBEDDING = 7, 5, 4, 3


@pytest.fixture
def saved(tmp_path):
    options = {"width": WIDTH, "depth": 1, "embedding": EMBEDDING}
    spec = ModelSpec("mlp", CLASSES, InputSpec((FEATURES,), "float32"), options)
    torch.manual_seed(0)
    save_classifier(build_classifier(spec), tmp_path / "network")
    return tmp_path / "network"


def test_a_network_costs_its_weights_and_biases(saved):
    weights = FEATURES * WIDTH + WIDTH * EMBEDDING + EMBEDDING * CLASSES
    assert rows.cost_of_network(saved) == (weights, weights + WIDTH + EMBEDDING + CLASSES)


@pytest.mark.parametrize("shortlist, asked", [(1, 1), (7, 7), (100, 7)])
def test_an_opinion_costs_its_trunk_and_the_rows_that_it_is_asked_about(saved, shortlist, asked):
    trunk = FEATURES * WIDTH + WIDTH * EMBEDDING
    whole = rows.cost_of_network(saved)
    cost = rows.cost_of_opinion(saved, shortlist)
    assert cost == (trunk + asked * EMBEDDING, whole.parameters)


def test_costs_add_up():
    assert rows.Cost(2, 3) + rows.Cost(10, 20) == rows.Cost(12, 23)


def test_the_table_has_a_line_for_each_row_and_percentages_where_a_row_has_them():
    row = {"top1": 0.5, "nll": 1.25, "multiplications": 1000, "parameters": 2000, "seconds": 3.0}
    lines = rows.table({"a": row, "longer": row | {"removed": 0.25}}, ["removed"]).splitlines()
    assert lines[0].split() == [
        "top-1", "NLL", "multiplications", "parameters", "seconds", "removed"
    ]  # fmt: skip
    assert lines[1].split() == ["a", "50.00%", "1.250", "1,000", "2,000", "3"]
    assert lines[2].split()[-1] == "25.0%" and len({len(line) for line in lines}) == 1
