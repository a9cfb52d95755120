"""Classes that come later: which weights stay, where new rows start, what specialists predict."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from networks import (
    ModelSpec,
    add_classes,
    batch_ensemble,
    build_classifier,
    fit_residual_row,
    load_classifier,
    match_classes,
    merge_grown_head,
    remap_specialist,
    save_classifier,
    specialise,
)

OLD, NOW = list("abcde"), list("xeacbyd")  # x and y are new, the others in another order
INDICES = [2, 4, 3, 6, 1]  # of the old ones among all


def small(names=OLD, seed=0, **options):
    torch.manual_seed(seed)
    options = {"width": 6, "depth": 2, "embedding": 5} | options
    spec = ModelSpec("convnet", len(names), {"shape": [1, 8, 8]}, options, tuple(names))
    network = build_classifier(spec)
    with torch.no_grad():  # batch statistics that are not the initial ones
        network.train()(inputs(64))
    return network.eval()


def inputs(n=9):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=draw)


def trained(network, steps=8):
    """A few steps on labels of every class, with weight decay and in train mode."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.1, weight_decay=0.1)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs(14)), torch.arange(14) % network.spec.num_outputs).backward()
        optimizer.step()
    return network.eval()


def test_classes_are_matched_by_name_whatever_their_order():
    assert match_classes(OLD, NOW) == INDICES


@pytest.mark.parametrize(
    ("old", "now", "message"),
    [
        (["a", "q"], NOW, "class 'q' is not among the 7 classes now"),
        (["a", "a"], NOW, "two classes are called 'a'"),
        (["a"], ["a", "b", "b"], "two classes are called 'b'"),
    ],
)
def test_names_that_cannot_be_matched_are_refused(old, now, message):
    with pytest.raises(ValueError, match=message):
        match_classes(old, now)


def test_learning_new_rows_leaves_everything_else_bit_for_bit():
    before = small()
    after = merge_grown_head(trained(add_classes(before, NOW)))
    one, other = before.state_dict(), after.state_dict()
    assert one.keys() == other.keys()
    for name, value in other.items():
        if name.startswith("head."):
            value = value[INDICES]
        assert torch.equal(one[name], value), name
    # A wider product may round otherwise.
    torch.testing.assert_close(after(inputs())[:, INDICES], before(inputs()))
    new = after.head.weight[[0, 5]]
    assert not torch.allclose(new[0], new[1])
    assert not torch.allclose(new.mean(0), before.head.weight.mean(0))


def test_merging_a_grown_head_changes_no_logit():
    growing = trained(add_classes(small(), NOW), 2)
    logits, weight = growing(inputs()), growing.head.weight.detach().clone()
    merged = merge_grown_head(growing)
    assert torch.equal(merged.head.weight, weight)
    torch.testing.assert_close(merged(inputs()), logits)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_grown_network_is_saved_as_any_other(tmp_path):
    merged = merge_grown_head(add_classes(small(), NOW))
    save_classifier(merged, tmp_path)
    again = load_classifier(tmp_path)
    assert again.spec.class_names == tuple(NOW) and torch.equal(again(inputs()), merged(inputs()))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99), st.floats(0.1, 30))
def test_at_the_start_new_classes_together_have_at_most_a_mass_of_1_in_c_plus_1(
    old, new, seed, scale
):
    names = [str(c) for c in range(old + new)]
    network = small(names[new:], seed).double()
    with torch.no_grad():
        network.head.weight.mul_(scale)
    after = merge_grown_head(add_classes(network, names))(inputs()).softmax(1)
    assert (after[:, :new].sum(1) <= 1 / (old + 1) + 1e-12).all()
    before = network(inputs()).softmax(1)  # the old classes share the rest as before
    torch.testing.assert_close(after[:, new:] / after[:, new:].sum(1, keepdim=True), before)


def test_the_bound_is_reached_where_the_old_network_is_uninformative():
    network = small()
    for parameter in network.head.parameters():
        torch.nn.init.zeros_(parameter)
    p = merge_grown_head(add_classes(network, NOW))(inputs(1)).softmax(1)[0]
    torch.testing.assert_close(p[[0, 5]].sum().item(), 1 / 6)
    torch.testing.assert_close(p[INDICES], torch.full((5,), 1 / 6))


@pytest.mark.parametrize(
    ("network", "names", "message"),
    [
        (lambda: small(), OLD[::-1], "knows all 5 classes already"),
        (lambda: small(), NOW[:-1], "class 'd' is not among"),
        (lambda: specialise(small(), [0, 1]), NOW, "not to a specialist"),
        (lambda: batch_ensemble(small(), 2), NOW, "or a network with members"),
    ],
    ids=["none is new", "one is gone", "a specialist", "members"],
)
def test_what_cannot_grow_is_refused(network, names, message):
    with pytest.raises(ValueError, match=message):
        add_classes(network(), names)


def rows_kept(network):
    rest = fit_residual_row(network.head, torch.randn(40, 5), [0, 3], [4])
    return specialise(network, [0, 3], kept=[4], rest=rest)


SPECIALISTS = {
    "all": specialise,
    "fresh": lambda network, classes: specialise(network, classes, "fresh"),
    "kept": lambda network, classes: rows_kept(network),
}


@pytest.mark.parametrize("rows", SPECIALISTS)
def test_an_old_specialist_predicts_its_classes_as_before(rows, tmp_path):
    """a and d are 2 and 6 now.  The order of b and e changes too: 1 and 4 are 4 and 1."""
    old, now = small(), merge_grown_head(trained(add_classes(small(), NOW)))
    for classes, columns, renumbered in (([0, 3], [0, 1], [2, 6]), ([1, 4], [1, 0], [1, 4])):
        if rows == "kept" and classes != [0, 3]:
            continue
        special = trained(SPECIALISTS[rows](old, classes).train()).eval()
        save_classifier(remap_specialist(special, now), tmp_path)
        remapped = load_classifier(tmp_path)
        assert remapped.spec.head["members"] == renumbered
        assert remapped.spec.class_names == ()  # they are in the file of its generalist
        before, after = special(inputs()), remapped(inputs())
        torch.testing.assert_close(after[:, :2], before[:, :2][:, columns])
        if rows != "all":  # the row for the rest stands for new classes too
            torch.testing.assert_close(after[:, 2], before[:, 2])
            continue
        features = special.trunk(special.preprocess(inputs()))
        new = F.linear(features, now.head.weight[[0, 5]], now.head.bias[[0, 5]]).logsumexp(1)
        torch.testing.assert_close(after[:, 2], torch.logaddexp(before[:, 2], new))


def test_an_untrained_old_specialist_is_the_grown_generalist_with_the_rest_summed():
    old, now = small(), merge_grown_head(trained(add_classes(small(), NOW)))
    p = remap_specialist(specialise(old, [1, 4]), now)(inputs()).softmax(1)
    torch.testing.assert_close(p, specialise(now, [1, 4])(inputs()).softmax(1))


def test_only_a_specialist_can_be_remapped():
    with pytest.raises(ValueError, match="no specialist"):
        remap_specialist(small(), small())
