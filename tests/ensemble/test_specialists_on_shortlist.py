"""An ensemble whose specialists are asked about each row's shortlist alone."""

import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import (
    SpecialistEnsemble,
    combine_kl_on_shortlist,
    ensemble_program,
    export_bundle,
    export_onnx,
    export_program,
)
from ensemble.rows_on_shortlist import rows_asked
from networks import (
    InputSpec,
    ModelSpec,
    build_classifier,
    fit_residual_row,
    multiplications,
    specialise,
)

CLASSES = 60
GROUPS = ClassGroups([[0, 1, 2, 30], list(range(2, 20)), list(range(15, 45)), [50, 51]], CLASSES)
HEADS = ("all", "kept", "fresh")


def raw(rows=48):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, 1, 8, 8), dtype=torch.uint8, generator=rng)


def make(head="all", gate=3, copies=4, **more):
    """A generalist and copies that moved away from it, their heads with all rows or with few."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = ModelSpec("mlp", CLASSES, InputSpec((1, 8, 8)), dict(width=12, depth=1))
        generalist = build_classifier(spec).eval()
        with torch.no_grad():
            features = generalist.trunk(generalist.preprocess(raw()))
            generalist.head.weight.mul_(12)
            generalist.head.bias.copy_(-generalist.head.weight @ features.mean(0))
        specialists = {}
        for m, classes in enumerate(GROUPS.members):
            kept = rest = None
            if head == "kept":
                kept = [c for c in range(0, CLASSES, 3) if c not in classes]
                rest = fit_residual_row(generalist.head, features, classes, kept)
            kind = "fresh" if head == "fresh" else "preserving"
            specialists[m] = specialise(generalist, classes.tolist(), kind, kept, rest).eval()
            with torch.no_grad():
                for parameter in specialists[m].parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape))
    some = {m: specialists[m] for m in range(copies)}
    skipped = range(copies, 4)
    return SpecialistEnsemble(generalist, some, GROUPS, gate=gate, skipped=skipped, **more)


TUNED = {"temperatures": [1.2, 0.7, 1.5, 1.0, 2.0], "weights": [1.0, 3.0, 0.5, 2.0, 1.0]}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tuned", [{}, TUNED])
def test_with_every_class_listed_it_is_the_ensemble_without_a_shortlist(head, tuned):
    expected = make(head, **tuned).forward_with_details(raw())
    output = make(head, shortlist=10**6, **tuned).forward_with_details(raw())
    assert expected.active.any(0).all()
    for value, other in zip(output, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6)


def restricted(ensemble, k):
    """combine_kl_on_shortlist of what each copy says with all of its rows, at temperature 1.

    Its dustbin is what it says itself about the listed classes that are not its own.
    """
    with torch.no_grad():
        logits = ensemble.generalist(raw())
        listed = torch.zeros_like(logits).scatter(1, logits.topk(k).indices, 1.0)
        g = logits.softmax(1)
        special = []
        for m, classes in enumerate(GROUPS.members):
            specialist = ensemble.specialists[m]
            head = specialist.head
            x = specialist.trunk(specialist.preprocess(raw()))
            z = torch.empty(len(x), CLASSES)
            z[:, head.row_classes] = x @ head.weight.T + head.bias
            said = (z.exp() * listed) / (z.exp() * listed).sum(1, keepdim=True)
            own = said[:, torch.tensor(classes)]
            outside = torch.ones(CLASSES, dtype=torch.bool)
            outside[torch.tensor(classes)] = False
            # combine_kl_on_shortlist takes a share of the dustbin, by the generalist: undo that.
            share = (g * listed)[:, outside].sum(1) / g[:, outside].sum(1)
            dustbin = 1 - own.sum(1)
            whole = torch.where(share > 0, dustbin / share, 0.0)
            full = torch.cat([own, whole[:, None]], 1)
            special.append(full / full.sum(1, keepdim=True))
        active = ensemble.forward_with_details(raw()).active
        return combine_kl_on_shortlist(g, special, GROUPS, k, active)


@pytest.mark.parametrize("k", [3, 10, 40])
def test_a_copy_with_all_rows_says_itself_how_the_listed_classes_share_its_dustbin(k):
    ensemble = make(shortlist=k)
    q = ensemble.probabilities(raw())
    torch.testing.assert_close(q, restricted(ensemble, k), rtol=0, atol=1e-5)


def test_a_single_dustbin_row_is_shared_as_the_generalist_shares_it():
    plain = make("fresh")
    p_general, p_special, active = plain.predictions(raw())
    expected = combine_kl_on_shortlist(p_general, p_special, GROUPS, 8, active)
    q = make("fresh", shortlist=8).probabilities(raw())
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)


def test_outside_the_shortlist_the_generalist_stands():
    output = make(shortlist=5, **TUNED).forward_with_details(raw())
    listed = torch.zeros_like(output.q, dtype=torch.bool)
    listed = listed.scatter(1, output.p_general.topk(5).indices, True)
    assert torch.equal(output.q[~listed], output.p_general[~listed])
    torch.testing.assert_close(output.q.sum(1), torch.ones(len(output.q)))
    assert not torch.allclose(output.q, output.p_general, atol=1e-3)


def test_only_k_rows_of_a_head_count():
    spec = ModelSpec("mlp", 2000, InputSpec((1, 8, 8)), dict(width=12, depth=1))
    generalist = build_classifier(spec).eval()
    groups = ClassGroups([list(range(100))], 2000)
    copies = {0: specialise(generalist, range(100)).eval()}
    asked = torch.ones(1, 1, dtype=torch.bool)
    alone = multiplications(generalist, generalist.zero_input())
    whole = SpecialistEnsemble(generalist, copies, groups)
    short = SpecialistEnsemble(generalist, copies, groups, shortlist=20)
    features = generalist.head.in_features
    saved = whole.multiplications(asked) - short.multiplications(asked)
    assert saved == (2000 - 20) * features
    assert short.multiplications(~asked) == alone
    assert rows_asked(copies[0].head, 20) == 20
    assert rows_asked(copies[0].head, 200) == 2000  # all rows are then the quicker way
    assert rows_asked(torch.nn.Linear(4, 1000), 20) == 21


@pytest.mark.parametrize("head", HEADS)
def test_a_bundle_keeps_the_shortlist(head, tmp_path):
    ensemble = make(head, shortlist=7, **TUNED)
    export_bundle(ensemble, tmp_path)
    loaded = SpecialistEnsemble.load(tmp_path)
    assert loaded.shortlist == 7
    torch.testing.assert_close(loaded.probabilities(raw()), ensemble.probabilities(raw()))
    again = SpecialistEnsemble.load(tmp_path, gate=9, shortlist=20)
    assert (again.gate, again.shortlist) == (9, 20)
    with pytest.raises(ValueError, match="shortlist = 7 is shorter than gate = 9"):
        SpecialistEnsemble.load(tmp_path, gate=9)


def test_a_bundle_without_one_says_nothing_of_it(tmp_path):
    export_bundle(make(), tmp_path)
    assert "shortlist" not in (tmp_path / "ensemble.json").read_text()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='combine = "mixture": only "kl" is solved on a shortlist'):
        make(shortlist=5, combine="mixture")
    with pytest.raises(ValueError, match="shortlist = 2 is shorter than gate = 3"):
        make(shortlist=2)
    with pytest.raises(ValueError, match="shortlist = 0; at least 1 class"):
        make(shortlist=0)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("more", [{}, TUNED, {"gate": 1}, {"max_specialists": 1}], ids=str)
@pytest.mark.parametrize("head, k", [("all", 7), ("kept", 40), ("fresh", 12), ("all", 60)])
def test_the_program_equals_the_ensemble(head, k, more, portable):
    ensemble = make(head, shortlist=k, **more)
    with torch.no_grad():
        q = ensemble_program(ensemble, portable)(raw())
    torch.testing.assert_close(q, ensemble.probabilities(raw()), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # torch's exporter takes minutes on a busy machine
@pytest.mark.parametrize("head, copies", [("all", 2), ("kept", 1), ("fresh", 1)])
def test_saved_programs_equal_the_ensemble_at_any_batch_size(head, copies, tmp_path):
    """Of one copy or two eq. 5 is solved in closed form, and the graph is small."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ensemble = make(head, shortlist=7, copies=copies, **TUNED)
    path = export_program(ensemble_program(ensemble), raw(3), tmp_path / "ensemble.pt2")
    program = torch.export.load(path).module()
    path = export_onnx(ensemble_program(ensemble, True), raw(3), tmp_path / "ensemble.onnx")
    session = runtime.InferenceSession(path)
    for rows in (1, 17):
        expected = ensemble.probabilities(raw(rows))
        torch.testing.assert_close(program(raw(rows)), expected, rtol=0, atol=1e-5)
        (q,) = session.run(None, {"raw": raw(rows).numpy()})
        torch.testing.assert_close(torch.from_numpy(q), expected, rtol=0, atol=1e-5)
