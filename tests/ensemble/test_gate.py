"""Which specialists are active."""

import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import gate

GROUPS = ClassGroups([[0, 1], [1, 2, 3], [4]], 6)
P = torch.tensor(
    [
        [0.05, 0.50, 0.25, 0.10, 0.06, 0.04],  # most probable 1, then 2, 3
        [0.02, 0.08, 0.10, 0.20, 0.25, 0.35],  # 5, then 4, 3
        [0.50, 0.03, 0.07, 0.10, 0.20, 0.10],  # 0, then 4
    ]
)


def test_specialists_of_the_n_most_probable_classes_by_hand():
    one = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    two = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 1]]).bool()
    assert torch.equal(gate(P, GROUPS), one)
    assert torch.equal(gate(P, GROUPS, n=2), two)
    assert gate(P, GROUPS, n=6).all()


def test_the_limit_keeps_those_with_most_of_the_generalists_mass():
    # Mass in S_0, S_1, S_2: .55 .85 .06 / .10 .38 .25 / .53 .20 .20
    def limited(n, limit):
        return gate(P, GROUPS, n=n, max_specialists=limit).int().tolist()

    assert limited(6, 1) == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    # A tie goes to the first, and one that is not active does not count.
    assert limited(6, 2) == [[1, 1, 0], [0, 1, 1], [1, 1, 0]]
    assert limited(2, 1) == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_absent_specialists_do_not_count_against_the_limit():
    active = gate(P, GROUPS, n=6, max_specialists=1, available=[True, False, True])
    assert torch.equal(active, torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 0]]).bool())


def test_gate_agrees_with_its_definition_on_random_groups():
    rng = torch.Generator().manual_seed(0)
    groups = ClassGroups([torch.randperm(50, generator=rng)[:12].tolist() for _ in range(9)], 50)
    p = torch.softmax(torch.randn(40, 50, generator=rng), 1)
    for n in (1, 4):
        active = gate(p, groups, n)
        for row in range(40):
            top = set(p[row].topk(n).indices.tolist())
            assert active[row].tolist() == [bool(top & set(S.tolist())) for S in groups.members]


def test_no_rows_give_no_rows():
    assert gate(P[:0], GROUPS).shape == (0, 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(p_general=P[:, :5]), ["[3, 5]", "[B, 6]"]),
        (dict(n=0), ["n = 0", "1 to 6"]),
        (dict(n=7), ["n = 7", "1 to 6"]),
        (dict(max_specialists=0), ["max_specialists = 0", "None"]),
        (dict(p_general=P.index_fill(0, torch.tensor([1]), float("nan"))), ["NaN in row 1"]),
    ],
)
def test_an_error_names_the_value_and_the_rule(arguments, words):
    with pytest.raises(ValueError) as error:
        gate(**(dict(p_general=P, groups=GROUPS) | arguments))
    for word in words:
        assert word in str(error.value)
