"""A branch corrects the generalist's logits of its classes, and of all others as one."""

import copy
import json

import pytest
import torch
from torch import nn

from networks import (
    Branch,
    BranchedClassifier,
    InputSpec,
    ModelSpec,
    branch_off,
    build_classifier,
    load_branch,
    load_classifier,
    named_by,
    save_classifier,
)
from networks.branches import LEAST_SHARE, GeneralOutput, log_rest, log_sum
from networks.cutting import cut_at

SPEC = ModelSpec(
    "convnet", 12, InputSpec(shape=(1, 8, 8)), {"channels": [3, 4], "embedding": 2, "dropout": 0.5}
)
CLASSES = [1, 4, 5, 9]


def generalist(spec: ModelSpec = SPEC):
    torch.manual_seed(0)
    return build_classifier(spec).eval()


def images(rows: int = 6, shape=(1, 8, 8)) -> torch.Tensor:
    return torch.randint(0, 256, (rows, *shape), generator=torch.Generator().manual_seed(1)).byte()


def summed(logits: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """The distribution over the classes and the sum of all others, in float64."""
    p = logits.double().softmax(1)
    others = [c for c in range(logits.shape[1]) if c not in classes]
    return torch.cat([p[:, classes], p[:, others].sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_fresh_branch_answers_as_the_generalist_does(blocks):
    network = generalist()
    branched = BranchedClassifier(network, branch_off(network, CLASSES, 16, blocks))
    raw = images()
    torch.testing.assert_close(
        branched(raw).double().softmax(1), summed(network(raw), CLASSES), atol=1e-6, rtol=0
    )


def test_without_own_blocks_a_branch_reads_what_the_embedding_reads():
    network = generalist()
    branch = branch_off(network, CLASSES, 16)
    assert branch.hidden.in_features == 4 * 2 * 2  # the last map, not the two numbers behind it
    assert not list(branch.blocks.parameters())


def test_own_blocks_are_copies_that_start_as_the_generalists():
    network = generalist()
    branch = branch_off(network, CLASSES, 16, blocks=1)
    own, theirs = branch.blocks[0], network.trunk[1]
    assert own is not theirs
    assert all(map(torch.equal, own.state_dict().values(), theirs.state_dict().values()))


def test_a_branch_changes_nothing_of_the_generalist():
    network = generalist()
    before = copy.deepcopy(network.state_dict())
    branched = BranchedClassifier(network, branch_off(network, CLASSES, 16, 1)).train()
    branched.generalist.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(branched.branch.parameters(), lr=1.0)
    for _ in range(2):
        branched(images()).logsumexp(1).sum().backward()
        optimizer.step()
    assert all(map(torch.equal, before.values(), network.state_dict().values()))


def confident_logits(scale: float) -> torch.Tensor:
    """[400, 60]. Half of the rows have their largest logits first, so that these hold the mass."""
    logits = scale * torch.randn(400, 60, generator=torch.Generator().manual_seed(0))
    logits[::2] = logits[::2].sort(descending=True).values
    return logits


@pytest.mark.parametrize("scale", [0.1, 1, 10, 50])
@pytest.mark.parametrize("size", [1, 30, 59])
@pytest.mark.parametrize("way", ["from L", "from probabilities"])
def test_the_rest_by_subtraction_is_the_sum_over_all_others(way, size, scale):
    logits, classes = confident_logits(scale), torch.arange(size)
    if way == "from L":
        rest = log_rest(logits[:, :size], log_sum(logits))
    else:
        rest = GeneralOutput.of(logits).own_and_rest(classes)[1]
    direct = logits[:, size:].double().logsumexp(1)
    share, exact = ((each - log_sum(logits)).exp() for each in (rest, direct))
    assert float((share - exact).abs().max()) < 1e-7
    told = exact > 1e-6
    torch.testing.assert_close(rest[told], direct[told], atol=1e-6, rtol=0)
    # What is too small to be told from nothing stays that small.
    assert bool((share[exact < LEAST_SHARE] < 1.1 * 1e-12).all())


def test_gradients_of_the_rest_are_right():
    own = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    total = (own.detach().logsumexp(1) + 1).requires_grad_()
    assert torch.autograd.gradcheck(log_rest, (own, total))


def test_with_every_class_its_own_a_branch_has_an_empty_dustbin():
    network = generalist()
    logits = BranchedClassifier(network, branch_off(network, range(12), 4))(images())
    assert torch.equal(logits[:, -1], torch.full((6,), -torch.inf))


def test_gradients_of_a_branch_are_right():
    network = generalist().double()
    torch.manual_seed(1)
    branch = branch_off(network, CLASSES, 3).double()
    nn.init.normal_(branch.correction.weight)
    h = torch.randn(4, branch.hidden.in_features, dtype=torch.float64, requires_grad=True)
    own = (10 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    rest = torch.randn(4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 4, 4])

    def loss(h, own, rest, *weights):
        names = [name for name, _ in branch.named_parameters()]
        values = torch.func.functional_call(
            branch, dict(zip(names, weights, strict=True)), (h, own, rest)
        )
        return nn.functional.cross_entropy(values, targets)

    assert torch.autograd.gradcheck(loss, (h, own, rest, *branch.parameters()))


def test_a_saved_branch_holds_only_its_own_tensors_and_answers_the_same(tmp_path):
    network = generalist()
    branch = branch_off(network, CLASSES, 5, blocks=1)
    nn.init.normal_(branch.correction.weight)
    save_classifier(branch, tmp_path)
    loaded = load_branch(tmp_path)
    assert named_by(loaded.spec, network.spec) == branch.spec
    assert json.loads((tmp_path / "model.json").read_text())["head"] == {
        "kind": "branch",
        "members": CLASSES,
        "embedding": 5,
        "blocks": 1,
        "features": 16,
    }
    assert not any(name.startswith(("trunk", "head")) for name in loaded.state_dict())
    raw = images()
    both = [BranchedClassifier(network, each)(raw) for each in (branch.eval(), loaded)]
    assert torch.equal(*both)
    with pytest.raises(ValueError, match="no network by itself; load the run"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("key", ["embedding", "features", "blocks"])
def test_a_branch_with_an_impossible_size_is_refused(key):
    head = {"kind": "branch", "members": [0], "embedding": 4, "blocks": 0, "features": 8}
    with pytest.raises(ValueError, match=f"head.{key} = -1"):
        ModelSpec("mlp", 3, InputSpec(shape=(4,)), head=head | {key: -1})


# Where trunks are cut


class Chain(nn.Module):
    """A network whose forward is code.  skip: its last layer reads the first one's output, too."""

    def __init__(self, skip: bool = False):
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.skip = skip

    def forward(self, x):
        first = x = self.stem(x).relu()
        for layer in self.layers:
            x = x + layer(x).relu()
        return x + first if self.skip else x


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("trunk", ["Sequential", "bare linear", "code"])
def test_both_parts_of_a_cut_trunk_are_the_trunk(trunk, blocks):
    torch.manual_seed(0)
    made = {
        "Sequential": lambda: generalist().trunk,
        "bare linear": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
        ),
        "code": lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)),
    }[trunk]()
    x = torch.randn(3, 1, 8, 8)
    if trunk == "code":
        x = torch.randn(3, 5)
    cut = cut_at(made.eval(), blocks)
    at_cut = cut.body(x)
    torch.testing.assert_close(cut.end(at_cut), made(x))
    torch.testing.assert_close(cut.end(at_cut), made(x))  # the first pass left the cut as it was


def test_the_forward_of_a_network_of_code_is_followed_to_its_last_block():
    trunk = Chain()
    x = torch.randn(4, 6)
    for blocks in (0, 1, 2, 3):
        cut = cut_at(trunk, blocks)
        torch.testing.assert_close(cut.end(cut.body(x)), trunk(x))
    assert len(list(cut_at(trunk, 1).own.parameters())) == 2


class Masked(Chain):
    """As timm's transformers: what the forward does depends on arguments that a trunk never has."""

    def forward(self, x, mask=None, *, causal: bool = False):
        x = self.stem(x)
        if mask is not None or causal:
            return x
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("blocks", [1, 2])
def test_arguments_of_a_forward_keep_their_defaults_where_it_is_followed(blocks):
    trunk = Masked()
    x = torch.randn(4, 6)
    cut = cut_at(trunk, blocks)
    torch.testing.assert_close(cut.end(cut.body(x)), trunk(x))
    assert len(list(cut.own.parameters())) == 2 * blocks


def test_a_trunk_that_cannot_be_cut_there_says_where_it_can():
    with pytest.raises(ValueError, match="take blocks = 0, which cuts Chain at the input"):
        cut_at(Chain(skip=True), 1)


def test_more_blocks_than_there_are_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"blocks = 3: the trunk has 2 \(stage1, stage2\)"):
        cut_at(generalist().trunk, 3)


def test_a_specialist_has_no_branches():
    network = generalist()
    network.spec = branch_off(network, CLASSES, 4).spec
    with pytest.raises(ValueError, match="needs a plain generalist"):
        branch_off(network, CLASSES)
    assert isinstance(branch_off(generalist(), CLASSES), Branch)


def test_a_branch_of_a_network_of_code_has_a_block_of_its_own_and_is_read_back(tmp_path):
    builders = {"own:chain": lambda shape: Chain()}
    spec = ModelSpec("own:chain", 9, InputSpec((6,), "float32"))
    network = build_classifier(spec, builders).eval()
    branch = branch_off(network, [0, 1, 2], 4, blocks=1).eval()
    save_classifier(branch, tmp_path)
    loaded = load_branch(tmp_path, builders=builders)
    assert sum(name.startswith("blocks.") for name in loaded.state_dict()) == 2  # of one layer
    x = torch.randn(5, 6)
    both = [BranchedClassifier(network, each)(x) for each in (branch, loaded)]
    assert torch.equal(*both)
