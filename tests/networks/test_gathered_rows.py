"""The k likeliest classes, and the logits of each row's own classes, are those of dense logits."""

import pytest
import torch
import torch.nn.functional as F

from networks import gathered_rows, top_k
from networks.linear_logits import LinearLogits, LocalComm

ROWS, SIZE, CLASSES = 5, 4, 23


def parts(classes=CLASSES, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = ((ROWS, SIZE), (classes, SIZE), (classes,))
    drawn = [torch.randn(*shape, generator=draw, dtype=dtype) for shape in shapes]
    return [part.requires_grad_() for part in drawn]


def chosen(k, classes=CLASSES):
    draw = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(classes, generator=draw)[:k] for _ in range(ROWS)])


@pytest.mark.parametrize("classes", [10, 4095, 4096, 20_001])
@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("entries", [0, 2**30])
def test_top_k_has_the_values_of_torchs_in_their_order(classes, k, entries, monkeypatch):
    z = torch.randn(3, classes, generator=torch.Generator().manual_seed(classes))
    monkeypatch.setattr(gathered_rows, "FEWEST_ENTRIES", entries)
    values, indices = top_k(z, k)
    assert torch.equal(values, z.topk(k).values)
    assert torch.equal(z.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    unordered, indices = top_k(z, k, ordered=False)
    assert torch.equal(unordered.sort(1, descending=True).values, values)
    assert torch.equal(z.gather(1, indices), unordered)


@pytest.mark.parametrize("k", [20, 100])
def test_top_k_is_exact_where_entries_tie_and_where_the_best_are_last(k, monkeypatch):
    monkeypatch.setattr(gathered_rows, "FEWEST_ENTRIES", 0)
    z = torch.randint(0, 40, (4, 9_999), generator=torch.Generator().manual_seed(0)).float()
    z[:, -5:] = 100
    z[0] = -torch.inf
    values, indices = top_k(z, k)
    assert torch.equal(values, z.topk(k).values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_top_k_takes_any_floating_type(dtype, monkeypatch):
    monkeypatch.setattr(gathered_rows, "FEWEST_ENTRIES", 0)
    z = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(top_k(z, 7)[0], z.topk(7).values)


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_any_number_of_rows_will_do(rows):
    x, weight, bias = (part.detach() for part in parts(97))
    indices = chosen(3, 97)[:rows]
    z = LinearLogits(x[:rows], weight, bias, 97).logits_at(indices)
    torch.testing.assert_close(z, F.linear(x[:rows], weight, bias).gather(1, indices))


def test_half_precision_is_that_of_its_products():
    x, weight, bias = (part.detach().bfloat16() for part in parts(97))
    indices = chosen(3, 97)
    z = LinearLogits(x, weight, bias, 97).logits_at(indices)
    expected = F.linear(x.float(), weight.float(), bias.float()).gather(1, indices)
    torch.testing.assert_close(z.float(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("entries", [1, 2**18])
@pytest.mark.parametrize("k, classes", [(3, 97), (3, CLASSES), (CLASSES, CLASSES)])
def test_logits_at_are_dense_ones_gathered_and_so_are_their_gradients(
    k, classes, entries, monkeypatch
):
    monkeypatch.setitem(gathered_rows.GATHERED_ENTRIES, "cpu", entries)
    ours, theirs, indices = parts(classes), parts(classes), chosen(k, classes)
    z = LinearLogits(*ours, classes).logits_at(indices)
    dense = F.linear(*theirs).gather(1, indices)
    torch.testing.assert_close(z, dense)
    slopes = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z)
    with torch.no_grad():
        assert torch.equal(LinearLogits(*ours, classes).logits_at(indices), z)
    (z * slopes).sum().backward()
    (dense * slopes).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_gradient_of_logits_at_is_that_of_finite_differences():
    indices = torch.tensor([[0, 3], [2, 2], [1, 0], [22, 5], [7, 8]])  # a class twice in a row, too
    assert torch.autograd.gradcheck(
        lambda *each: LinearLogits(*each, CLASSES).logits_at(indices), parts()
    )
    features, weight, _ = parts()
    assert torch.autograd.gradcheck(
        lambda x, w: LinearLogits(x, w, None, CLASSES).logits_at(indices), (features, weight)
    )


class Half(LocalComm):
    """One of two ranks that hold the same rows of the batch and a part of the classes."""

    def __init__(self, first: int):
        self._first = first

    @property
    def first(self) -> int:
        return self._first


def test_each_rank_adds_the_logits_of_its_own_classes():
    x, weight, bias = parts()
    indices = chosen(4)
    halves = [
        LinearLogits(x, weight[own], bias[own], CLASSES, None, Half(own.start)).logits_at(indices)
        for own in (slice(0, 9), slice(9, CLASSES))
    ]
    torch.testing.assert_close(sum(halves), F.linear(x, weight, bias).gather(1, indices))


# As ONNX has it


@pytest.fixture
def exporting(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(gathered_rows, "FEWEST_CLASSES", 100)


# 64 divides the first, 79 the second, nothing the third. The last run of the third is short.
RUN_COUNTS = [64 * 30, 79 * 40, 3001]


@pytest.mark.parametrize("classes", RUN_COUNTS)
@pytest.mark.parametrize("k", [1, 7, 15])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_search_in_runs_is_exact(classes, k, steps, exporting):
    z = torch.randn(9, classes, generator=torch.Generator().manual_seed(k))
    if steps:  # many entries tie
        z = (z * steps).round()
    z[0] = torch.arange(classes)  # the best are in the last run
    z[1, 3:] = -torch.inf
    values, indices = top_k(z, k)
    assert torch.equal(values, z.topk(k).values)
    assert torch.equal(z.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices[[0, *range(2, 9)]].tolist())
    assert indices.max() < classes
    best = gathered_rows.most_probable(z)
    assert torch.equal(z.gather(1, best), z.amax(1, keepdim=True))


def test_runs_are_searched_in_onnx_where_there_are_many_for_one_wanted(exporting, monkeypatch):
    searched = []
    within = gathered_rows._in_runs

    def spy(logits, k, ordered):
        searched.append(k)
        return within(logits, k, ordered)

    monkeypatch.setattr(gathered_rows, "_in_runs", spy)
    z = torch.randn(2, 64 * 30)
    for k in (15, 16, 64 * 30):
        assert torch.equal(top_k(z, k)[0], z.topk(k).values)
    assert searched == [15]


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_heads_bias_as_the_weight_of_a_feature_of_1_gives_the_same_logits(bias, exporting):
    head = torch.nn.Linear(5, 300, bias=bias)
    x = torch.randn(4, 5)
    torch.testing.assert_close(gathered_rows.head_logits(head, x), head(x))
