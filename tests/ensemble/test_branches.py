"""An ensemble whose specialists are branches: in Python, as a bundle and as one program."""

import numpy as np
import pytest
import torch
from torch import nn

from clustering.groups import ClassGroups
from ensemble import (
    SpecialistEnsemble,
    combine_kl_on_shortlist,
    ensemble_program,
    export_bundle,
    export_onnx,
    export_program,
)
from networks import (
    InputSpec,
    ModelSpec,
    branch_off,
    build_classifier,
    multiplications,
    specialise,
)

CLASSES = 40
SPEC = ModelSpec("convnet", CLASSES, InputSpec((1, 8, 8)), {"channels": [3, 4], "embedding": 6})


def images(rows: int = 64, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 1, 8, 8), dtype=torch.uint8, generator=draw)


def make(blocks: int = 0, gate: int = 1, trained: bool = True, overlap: int = 2, **more):
    """Groups of several sizes, each class in up to `overlap`, and one group without a branch."""
    torch.manual_seed(0)
    generalist = build_classifier(SPEC).eval()
    with torch.no_grad():  # confident, of many classes
        head = generalist.head
        features = generalist.trunk(generalist.preprocess(images(200)))
        head.weight.mul_(100)
        head.bias.copy_(-head.weight @ features.mean(0))
    parts = []
    for _ in range(overlap):
        parts += torch.randperm(CLASSES - 3).split([4, 9, 12, 12])
    groups = ClassGroups([part.numpy() for part in parts], CLASSES)
    branches = {}
    for m, classes in enumerate(groups.members):
        if m != 1:
            branches[m] = branch_off(generalist, classes.tolist(), 10, blocks).eval()
            if trained:
                nn.init.normal_(branches[m].correction.weight, std=2.0)
    weights = [1.0, *[3.0] * len(groups.members)]
    temperatures = [1.3, *np.linspace(0.8, 1.4, len(groups.members))]
    more = {"weights": weights, "temperatures": temperatures} | more
    return SpecialistEnsemble(generalist, branches, groups, gate=gate, skipped=[1], **more)


@pytest.mark.parametrize("blocks", [0, 1])
def test_with_fresh_branches_the_ensemble_is_the_generalist(blocks):
    ensemble = make(blocks, trained=False, weights=None, temperatures=None)
    output = ensemble.forward_with_details(images())
    assert output.active.any()
    torch.testing.assert_close(output.q, output.p_general, atol=1e-6, rtol=0)


def test_the_trunk_runs_once_whatever_branches_are_asked():
    ensemble = make(gate=3)
    calls = []
    ensemble.generalist.trunk[0].register_forward_hook(lambda *_: calls.append(1))
    active = ensemble.forward_with_details(images()).active
    assert active.any(0).sum() > 3
    assert len(calls) == 1
    assert ensemble.runs["trunk"] == 1


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gate": 3},
        {"gate": 3, "max_specialists": 2},
        {"blocks": 1},
        {"overlap": 1},
        {"weights": None, "temperatures": None},
    ],
    ids=str,
)
def test_the_program_asks_only_active_branches_and_equals_the_ensemble(more, portable):
    ensemble = make(**more)
    raw = images(200)
    expected = ensemble.forward_with_details(raw)
    assert 0 < expected.active.float().mean() < 1
    with torch.no_grad():
        q = ensemble_program(ensemble, portable)(raw)
    torch.testing.assert_close(q, expected.q, atol=1e-5, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(200), atol=1e-5, rtol=0)


def test_a_saved_program_takes_any_batch_size(tmp_path):
    ensemble = make()
    path = export_program(ensemble_program(ensemble), images(3), tmp_path / "ensemble.pt2")
    program = torch.export.load(path).module()
    for rows in (1, 17):
        raw = images(rows, rows)
        torch.testing.assert_close(program(raw), ensemble.probabilities(raw), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_onnx_program_takes_any_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ensemble = make()
    path = export_onnx(ensemble_program(ensemble, True), images(3), tmp_path / "ensemble.onnx")
    session = onnxruntime.InferenceSession(path)
    for rows in (1, 17):
        raw = images(rows, rows)
        (q,) = session.run(None, {"raw": raw.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(q), ensemble.probabilities(raw), atol=1e-5, rtol=0
        )


def test_a_bundle_of_branches_answers_as_they_do_and_stores_no_trunk_twice(tmp_path):
    ensemble = make(blocks=1)
    sizes = export_bundle(ensemble, tmp_path / "bundle")
    assert sizes["shared"] == 0
    loaded = SpecialistEnsemble.load(tmp_path / "bundle")
    raw = images()
    assert torch.equal(loaded.probabilities(raw), ensemble.probabilities(raw))
    assert loaded.specialists.loads < len(ensemble.specialists) + 1


def asked_by(ensemble, raw) -> list[int]:
    return ensemble.forward_with_details(raw).active.any(0).nonzero()[:, 0].tolist()


def test_copies_and_branches_may_stand_in_one_ensemble():
    fresh = make(trained=False, weights=None, temperatures=None)
    raw = images(200)
    m = asked_by(fresh, raw)[0]
    copied = specialise(fresh.generalist, fresh.groups.members[m].tolist())
    specialists = fresh.specialists | {m: copied}
    mixed = SpecialistEnsemble(fresh.generalist, specialists, fresh.groups, skipped=[1])
    both = [each.logits(raw)[1][m][1].softmax(1) for each in (fresh, mixed)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="copies and branches in one ensemble have no program"):
        ensemble_program(mixed)


def test_a_branch_of_another_group_is_refused():
    ensemble = make()
    raw = images(200)
    m = asked_by(ensemble, raw)[0]
    other = next(k for k in ensemble.specialists if k != m)
    swapped = ensemble.specialists | {m: ensemble.specialists[other]}
    wrong = SpecialistEnsemble(ensemble.generalist, swapped, ensemble.groups, skipped=[1])
    with pytest.raises(ValueError, match="trained for other classes"):
        wrong.probabilities(raw)


# Multiplications


def test_multiplications_are_counted_from_the_layers():
    network = build_classifier(SPEC)
    # 8x8 -> 4x4 (3 maps of 3x3) -> 2x2 (4 maps of 3x3 on 3), embedding of 6, 40 classes.
    expected = 16 * 3 * 9 + 4 * 4 * 27 + 16 * 6 + 6 * 40
    assert multiplications(network, images(1)) == expected
    bag = nn.EmbeddingBag(50, 7)
    assert multiplications(bag, torch.tensor([[1, 2, 3]])) == 3 * 7


def test_a_branch_costs_its_own_layers_where_it_is_asked():
    ensemble = make(overlap=1)
    raw = images(1)
    active = torch.zeros(4, 4, dtype=torch.bool)
    base = multiplications(ensemble.generalist, raw)
    assert ensemble.multiplications(active) == base
    active[0, 0] = True  # one row of four asks a branch of 4 classes
    assert ensemble.multiplications(active) == base + (16 * 10 + 10 * 5) / 4


def test_a_copy_costs_what_it_does_not_share():
    ensemble = make(overlap=1)
    copied = specialise(ensemble.generalist, ensemble.groups.members[0].tolist())
    copies = SpecialistEnsemble(
        ensemble.generalist, {0: copied}, ensemble.groups, skipped=[1, 2, 3]
    )
    base = multiplications(ensemble.generalist, images(1))
    active = torch.tensor([[True, False, False, False]])
    assert copies.multiplications(active) == base + 40 * 6  # the head alone: the trunk is shared


@pytest.mark.parametrize("blocks", [0, 1])
def test_with_every_class_on_the_shortlist_it_is_the_ensemble_without_one(blocks):
    expected = make(blocks, gate=3).forward_with_details(images())
    output = make(blocks, gate=3, shortlist=40).forward_with_details(images())
    for value, other in zip(output, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k", [4, 15])
def test_a_branchs_dustbin_is_the_generalists_logits_of_the_listed_classes(k):
    plain = make(gate=3, temperatures=None)
    p_general, p_special, active = plain.predictions(images())
    expected = combine_kl_on_shortlist(p_general, p_special, plain.groups, k, active, plain.weights)
    q = make(gate=3, temperatures=None, shortlist=k).probabilities(images())
    torch.testing.assert_close(q, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gate": 3},
        {"gate": 3, "max_specialists": 2},
        {"blocks": 1},
        {"weights": None, "temperatures": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [4, 15, 40])
def test_the_program_of_a_shortlist_equals_the_ensemble(k, more, portable):
    ensemble = make(shortlist=k, **more)
    raw = images(200)
    with torch.no_grad():
        q = ensemble_program(ensemble, portable)(raw)
    torch.testing.assert_close(q, ensemble.probabilities(raw), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # torch's exporter takes minutes on a busy machine
def test_saved_programs_of_a_shortlist_take_any_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ensemble = make(shortlist=15)
    path = export_program(ensemble_program(ensemble), images(3), tmp_path / "ensemble.pt2")
    program = torch.export.load(path).module()
    path = export_onnx(ensemble_program(ensemble, True), images(3), tmp_path / "ensemble.onnx")
    session = onnxruntime.InferenceSession(path)
    for rows in (1, 17):
        raw = images(rows, rows)
        expected = ensemble.probabilities(raw)
        torch.testing.assert_close(program(raw), expected, atol=1e-5, rtol=0)
        (q,) = session.run(None, {"raw": raw.numpy()})
        torch.testing.assert_close(torch.from_numpy(q), expected, atol=1e-5, rtol=0)


def test_counting_multiplications_leaves_every_copy_in_eval_mode():
    """A copy that was left in train mode would move its batch norms' statistics from then on."""
    ensemble = make(overlap=1)
    copied = specialise(ensemble.generalist, ensemble.groups.members[0].tolist()).eval()
    with torch.no_grad():  # its trunk is its own
        for parameter in copied.trunk.parameters():
            parameter += 1
    groups, skipped = ensemble.groups, [1, 2, 3]
    copies = SpecialistEnsemble(ensemble.generalist, {0: copied}, groups, skipped=skipped)
    copies.multiplications(torch.tensor([[True, False, False, False]]))
    modes = [part.training for part in copied.modules()]
    assert len(modes) > 3 and not any(modes)
