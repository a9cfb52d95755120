"""The loss of many branches at once, and their stacked layers."""

import pytest
import torch
from torch import nn

from networks import InputSpec, ModelSpec, branch_off, build_classifier
from networks.branches import GeneralOutput
from networks.stacked_branches import StackedBranches
from trainer.core.branch_training import (
    BranchBatch,
    GeneralLogits,
    branch_logits,
    stacked_loss,
    validations,
)
from trainer.core.losses import cross_entropy, specialist_loss

SPEC = ModelSpec("convnet", 12, InputSpec((1, 8, 8)), {"channels": [3, 4], "embedding": 2})
GROUPS = [[0, 3, 5], [1, 2], list(range(12)), [4, 6, 7, 8, 11]]
K = 12


@pytest.fixture
def generalist():
    torch.manual_seed(0)
    return build_classifier(SPEC).eval()


def branches_of(generalist, blocks: int = 0):
    made = [branch_off(generalist, classes, 6, blocks).eval() for classes in GROUPS]
    for branch in made:
        nn.init.normal_(branch.correction.weight)
        nn.init.normal_(branch.correction.bias)
    return made


def kept(generalist, rows: int = 7):
    """(at_cut [M, rows, ...], general, total) of inputs of each branch's own."""
    raw = torch.randint(0, 256, (len(GROUPS) * rows, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        maps = generalist.trunk[:2](generalist.preprocess(raw))
        general = generalist.trunk[2](maps)
        logits = generalist.head(general)
    parts = maps.flatten(1), general, logits.double().logsumexp(1), logits
    return [part.unflatten(0, (len(GROUPS), rows)) for part in parts]


def test_stacked_branches_answer_as_each_does_alone(generalist):
    made = branches_of(generalist)
    stack = StackedBranches(made)
    at_cut, general, total, logits = kept(generalist)
    targets = torch.zeros(len(GROUPS), 7, dtype=torch.int64)
    base = GeneralLogits(generalist.head, stack)(BranchBatch(at_cut, general, total, targets))
    with torch.no_grad():
        together = base + stack(at_cut)
    for m, (branch, classes) in enumerate(zip(made, GROUPS, strict=True)):
        with torch.no_grad():
            own = GeneralOutput.of(logits[m]).own_and_rest(branch.classes)
            alone = branch(at_cut[m], *own)
        columns = [*range(len(classes)), K]
        torch.testing.assert_close(together[m][:, columns], alone, atol=1e-5, rtol=0)
        assert bool((together[m][:, len(classes) : K] == -torch.inf).all())
        of_kept = branch_logits(branch, generalist.head, at_cut[m], general[m], total[m])
        torch.testing.assert_close(of_kept, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_branch_leaves_a_stack_as_it_entered(generalist, blocks):
    made = branches_of(generalist, blocks)
    stack = StackedBranches(made)
    for m, branch in enumerate(made):
        left = stack.branch(m)
        assert left.spec == branch.spec
        for name, tensor in branch.state_dict().items():
            assert torch.equal(left.state_dict()[name], tensor), name


def test_own_blocks_run_side_by_side_as_each_does_alone(generalist):
    made = branches_of(generalist, blocks=1)
    for branch in made:
        nn.init.normal_(branch.blocks[0].conv.weight)
    x = torch.randn(len(GROUPS), 5, 3, 4, 4)
    with torch.no_grad():
        together = StackedBranches(made)(x)
        for m, (branch, classes) in enumerate(zip(made, GROUPS, strict=True)):
            columns = [*range(len(classes)), K]
            torch.testing.assert_close(
                together[m][:, columns], branch.correct(x[m]), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_stack_is_that_of_each_branch(smoothing):
    torch.manual_seed(0)
    sizes = [3, 2, 5]
    logits = torch.randn(3, 8, 6, dtype=torch.float64)
    targets = torch.empty(3, 8, dtype=torch.int64)
    for m, size in enumerate(sizes):
        logits[m, :, size:5] = -torch.inf
        targets[m] = torch.randint(0, size + 1, (8,))
    targets = torch.where(targets == torch.tensor(sizes)[:, None], 5, targets)
    logits.requires_grad_()
    losses = stacked_loss(logits, targets, sizes, smoothing, cross_entropy)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for m, size in enumerate(sizes):
        own = torch.cat([logits[m, :, :size], logits[m, :, -1:]], 1).detach().requires_grad_()
        alone = specialist_loss(own, targets[m].clamp_max(size), 0.0, smoothing)
        (own_gradient,) = torch.autograd.grad(alone, own)
        torch.testing.assert_close(losses[m].float(), alone.float())
        torch.testing.assert_close(gradient[m][:, [*range(size), 5]], own_gradient)
        assert bool((gradient[m][:, size:5] == 0).all())


def test_the_gradient_of_the_stacked_loss_is_right():
    targets = torch.tensor([[0, 2], [1, 1]])
    logits = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: stacked_loss(z, targets, [2, 2], 0.0, cross_entropy), (logits,)
    )


@pytest.mark.parametrize(
    "trained, measured, times",
    [
        (76_800, 1_250, 10),  # a small val: as often as ever
        (76_800, 11_000, 3),  # 33,000 rows of at most 38,400
        (76_800, 200_000, 2),  # even twice is more than half of the training
        (76_800, 0, 10),
    ],
)
def test_validations_read_at_most_half_as_many_rows_as_the_training(trained, measured, times):
    assert validations(trained, measured) == times
