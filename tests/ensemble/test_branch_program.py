"""The parts of the program of branches against plain sums, and the whole of it against eq. 5."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clustering.groups import ClassGroups
from ensemble import SpecialistEnsemble, ensemble_program
from ensemble.branch_program import TILE, Tiles, outside_softmax
from networks import InputSpec, ModelSpec, branch_off, build_classifier

CLASSES = 12
INPUTS = 5


# The classes outside


@pytest.mark.parametrize("gap", [0.0, 5.0, 40.0, 300.0])
def test_what_the_classes_outside_sum_to_is_exact_however_little_it_is(gap):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 500, generator=draw)
    entries = torch.stack([torch.randperm(500, generator=draw)[:90] for _ in range(20)])
    logits = logits.scatter_add(1, entries, torch.full((20, 90), gap))
    outside = outside_softmax(logits, entries, entries[:, 3:4])
    rest = logits.double().scatter(1, entries, -torch.inf)
    torch.testing.assert_close(
        outside.log_sum[:, 0].double(), rest.logsumexp(1), atol=3e-6, rtol=3e-7
    )
    share = outside.share.double().scatter(1, entries, 0)
    mass = outside.mass.double()
    torch.testing.assert_close(share.sum(1, keepdim=True), mass, atol=1e-6, rtol=0)
    torch.testing.assert_close(share / mass, rest.softmax(1), atol=1e-6, rtol=0)
    assert (outside.mass > 0.49).all()


def test_where_no_class_is_outside_their_sum_is_nothing():
    logits = torch.randn(2, 4)
    entries = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1]])
    outside = outside_softmax(logits, entries, entries[:, :1])
    assert (outside.log_sum == -torch.inf).all()
    assert (outside.mass == 0).all()
    assert torch.isfinite(outside.share).all()


# Tiles


@given(
    branches=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    alike=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_every_needed_pair_is_in_a_tile_of_its_branch(branches, alike):
    count = 4
    branch = torch.tensor([branches[0]] * len(branches) if alike else branches)
    tiles = Tiles.of(branch, count)
    owners = torch.cat([torch.arange(count), tiles.further]).repeat_interleave(TILE)
    pairs = tiles.pairs.flatten()
    assert len(owners) == len(pairs)
    for pair, m in enumerate(branch.tolist()):
        if m < count:
            place = tiles.places[pair]
            assert pairs[place] == pair
            assert owners[place] == m
    # A branch has one tile, and another for each TILE pairs more. One there is always.
    needed = [max(0, -(-int((branch == m).sum()) // TILE) - 1) for m in range(count)]
    assert len(tiles.further) == max(1, sum(needed))


# The whole


def ensemble_of(members, missing, seed, **settings):
    """Confident networks of CLASSES classes. No specialist for the groups `missing`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = ModelSpec(
            "mlp",
            CLASSES,
            InputSpec((INPUTS,), dtype="float32", scale=1.0),
            {"width": 8, "depth": 1, "embedding": 4},
        )
        generalist = build_classifier(spec).eval()
        generalist.head.weight.data.mul_(6)
        groups = ClassGroups([np.array(sorted(each)) for each in members], CLASSES)
        branches = {}
        for m, own in enumerate(groups.members):
            if m not in missing:
                branches[m] = branch_off(generalist, own.tolist(), 6).eval()
                nn.init.normal_(branches[m].correction.weight, std=1.5)
                nn.init.normal_(branches[m].correction.bias, std=1.5)
        count = 1 + len(members)
        draw = np.random.default_rng(seed)
        return SpecialistEnsemble(
            generalist,
            branches,
            groups,
            skipped=sorted(missing),
            temperatures=[settings.pop("temperature", 1.0), *draw.uniform(0.5, 2, count - 1)],
            weights=draw.uniform(0.3, 3, count),
            **settings,
        )


@st.composite
def settings_of_ensembles(draw):
    """Arguments of ensemble_of."""
    group = st.sets(st.integers(0, CLASSES - 1), min_size=1, max_size=CLASSES)
    members = draw(st.lists(group, min_size=1, max_size=5))
    return {
        "members": members,
        "missing": draw(st.sets(st.integers(0, len(members) - 1), max_size=len(members) - 1)),
        "seed": draw(st.integers(0, 5)),
        "temperature": draw(st.sampled_from([1.0, 1.7])),
        "gate": draw(st.integers(1, 3)),
        "max_specialists": draw(st.sampled_from([1, 2, 3, 8])),
    }


def inputs(rows):
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows))


@given(made_of=settings_of_ensembles(), rows=st.sampled_from([1, 3, 40]), portable=st.booleans())
@settings(deadline=None, max_examples=50)
def test_the_program_is_eq_5_for_any_groups_and_gate(made_of, rows, portable):
    ensemble = ensemble_of(**made_of)
    raw = inputs(rows)
    with torch.no_grad():
        q = ensemble_program(ensemble, portable)(raw)
    torch.testing.assert_close(q, ensemble.probabilities(raw), atol=1e-5, rtol=0)


EVERY = range(CLASSES)


@pytest.mark.parametrize(
    "members",
    [
        [EVERY],
        [EVERY, EVERY],
        [EVERY, {0, 1}],
        [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}],  # alike in size, and each class in one
        [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}],  # alike in size, and some rows ask nobody
        [{0, 1, 2}, {0, 1, 2}],
        [{c} for c in EVERY],
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_program_is_eq_5_where_groups_are_all_alike_or_everything(members, temperature):
    ensemble = ensemble_of(list(map(set, members)), set(), 0, temperature=temperature)
    program = ensemble_program(ensemble)
    for rows in (1, 50):
        with torch.no_grad():
            q = program(inputs(rows))
        expected = ensemble.probabilities(inputs(rows))
        torch.testing.assert_close(q, expected, atol=1e-5, rtol=0)


def test_a_branch_that_is_sure_of_its_dustbin_is_believed_where_the_generalist_is_sure_of_it():
    ensemble = ensemble_of([{0, 1, 2}, {3, 4, 5, 6}, set(range(7, CLASSES))], set(), 1)
    ensemble.generalist.head.weight.data.mul_(60)
    for branch in ensemble.specialists.values():
        branch.correction.bias.data[-1] = 12.0
    raw = inputs(300)
    expected = ensemble.forward_with_details(raw)
    assert (expected.p_general.amax(1) > 1 - 1e-6).float().mean() > 0.2
    with torch.no_grad():
        q = ensemble_program(ensemble)(raw)
    torch.testing.assert_close(q, expected.q, atol=1e-5, rtol=0)
