"""combine_kl_sparse is combine_kl with the rest of the classes summed."""

import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import combine_kl, combine_kl_sparse


def problem(seed, rows=60, classes=200, specialists=6, size=12, k=90, dtype=torch.float64):
    """Dense predictions, and for each row `k` classes in random order.

    They hold all classes of its active groups, and others.
    """
    rng = torch.Generator().manual_seed(seed)

    def random_probabilities(width):
        return torch.softmax(2 * torch.randn(rows, width, generator=rng, dtype=dtype), 1)

    shuffled = [torch.randperm(classes, generator=rng) for _ in range(specialists)]
    groups = ClassGroups([order[:size].tolist() for order in shuffled], classes)
    g = random_probabilities(classes)
    p = [random_probabilities(size + 1) for _ in range(specialists)]
    active = torch.rand(rows, specialists, generator=rng) < 0.5
    needed = torch.zeros(rows, classes)
    for m, group_classes in enumerate(groups.members):
        needed[:, torch.tensor(group_classes)] += active[:, m, None].float()
    score = needed.clamp(max=1) + torch.rand(rows, classes, generator=rng)
    order = score.topk(k, dim=1).indices
    shuffle = torch.rand(rows, k, generator=rng).argsort(1)
    return groups, g, p, active, order.gather(1, shuffle)


@pytest.mark.parametrize("rows", [1, 60, 300])
def test_sparse_equals_dense(rows):
    groups, g, p, active, indices = problem(rows, rows)
    values = g.gather(1, indices)
    q = combine_kl(g, p, groups, active)
    tail = 1 - values.sum(1)
    q_indices, q_values, tail = combine_kl_sparse(indices, values, tail, p, groups, active)
    assert torch.equal(q_indices, indices)
    torch.testing.assert_close(q_values, q.gather(1, indices), rtol=0, atol=1e-10)
    torch.testing.assert_close(tail, 1 - q_values.sum(1), rtol=0, atol=1e-10)


def test_weights_and_one_set_for_all_rows():
    groups, g, p, _, _ = problem(1)
    weights = [1, 2, 0.5, 1, 1, 1, 3]
    # Every class: the tail is empty.
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(0)).expand(60, -1)
    values, no_tail = g.gather(1, indices), torch.zeros(60).double()
    _, q_values, tail = combine_kl_sparse(indices, values, no_tail, p, groups, weights=weights)
    expected = combine_kl(g, p, groups, weights=weights).gather(1, indices)
    torch.testing.assert_close(q_values, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(tail, no_tail, rtol=0, atol=1e-12)


def test_a_dustbin_of_classes_without_mass_goes_evenly_to_all_other_classes():
    groups = ClassGroups([[0, 1]], 100)
    p = [torch.tensor([[0.2, 0.2, 0.6]])]
    indices, values = torch.tensor([[0, 1, 7]]), torch.tensor([[0.5, 0.5, 0.0]])
    _, q, tail = combine_kl_sparse(indices, values, torch.zeros(1), p, groups)
    torch.testing.assert_close(q, torch.tensor([[0.35, 0.35, 0.3 / 98]]))
    torch.testing.assert_close(tail, torch.tensor([0.3 * 97 / 98]))


def test_gradcheck():
    groups, g, p, active, indices = problem(2, rows=3, classes=20, specialists=3, size=3, k=14)
    values = g.gather(1, indices)

    def combined(values, tail, *p):
        return combine_kl_sparse(indices, values, tail, list(p), groups, active)[1:]

    arguments = [x.detach().requires_grad_() for x in (values, 1 - values.sum(1), *p)]
    assert torch.autograd.gradcheck(combined, arguments)


def broken(indices, row, column, value):
    indices = indices.clone()
    indices[row, column] = value
    return indices


def test_errors_name_the_row_and_the_class():
    groups, g, p, active, indices = problem(3)
    values = g.gather(1, indices)
    tail = 1 - values.sum(1)
    active[5, 0] = True
    is_needed = indices[5] == int(groups.members[0][3])
    column = int(is_needed.int().argmax())  # 0 if the class is in no column
    grouped = set(torch.cat([torch.tensor(classes) for classes in groups.members]).tolist())
    absent = min(set(range(200)) - set(indices[5].tolist()) - grouped)
    lacking = broken(indices, 5, column, absent)
    message = r"indices of row 5 lack class \d+ of a group that is active there"
    with pytest.raises(ValueError, match=message):
        combine_kl_sparse(lacking, values, tail, p, groups, active)
    twice = broken(indices, 2, 0, int(indices[2, 1]))
    with pytest.raises(ValueError, match="row 2 hold class .* more than once"):
        combine_kl_sparse(twice, values, tail, p, groups, active)
    with pytest.raises(ValueError, match="hold class 200; classes go from 0 to 199"):
        combine_kl_sparse(broken(indices, 2, 0, 200), values, tail, p, groups, active)
    with pytest.raises(ValueError, match=r"row \d+ of p_general sums to"):
        combine_kl_sparse(indices, values, tail + 1, p, groups, active)
    with pytest.raises(ValueError, match="indices must be int64"):
        combine_kl_sparse(indices[:, 1:], values, tail, p, groups, active)
    with pytest.raises(ValueError, match=r"tail must be \[60\]"):
        combine_kl_sparse(indices, values, tail[:, None], p, groups, active)
