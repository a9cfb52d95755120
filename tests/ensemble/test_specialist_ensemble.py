"""SpecialistEnsemble over small networks: what runs, how often, and what it predicts.

Also runs, bundles and programs.
"""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from clustering.groups import ClassGroups
from ensemble import (
    DeepEnsemble,
    EnsembleProgram,
    SpecialistEnsemble,
    combine_kl,
    export_bundle,
    export_onnx,
    export_program,
    gate,
)
from ensemble.lazy_specialists import LazySpecialists, load_specialist, specialist_folder
from ensemble.sharing import shared_names
from networks import (
    InputSpec,
    ModelSpec,
    build_classifier,
    load_classifier,
    save_classifier,
    specialise,
)

CLASSES = 12
GROUPS = ClassGroups([[0, 1, 2], [2, 3, 4, 5], [6, 7, 8], [9, 10]], CLASSES)


# The parts of each specialist that are no longer the generalist's.
MOVED = {0: ("head",), 1: ("head", "trunk.embedding"), 2: ("head", "trunk"), 3: ("head",)}


@pytest.fixture(scope="module")
def networks():
    """A generalist, and specialists that moved away from it.

    Specialist 0 its head, 1 its last block too, 2 everything, 3 its head.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = dict(width=2, depth=2, embedding=8)
        spec = ModelSpec("convnet", CLASSES, InputSpec((1, 8, 8)), options)
        generalist = build_classifier(spec).eval()
        with torch.no_grad():
            generalist.head.weight.mul_(8)
        specialists = {}
        for m, classes in enumerate(GROUPS.members):
            specialist = specialise(generalist, classes.tolist()).eval()
            with torch.no_grad():
                for name, parameter in specialist.named_parameters():
                    if name.startswith(MOVED[m]):
                        parameter.add_(0.3 * torch.randn(parameter.shape))
            specialists[m] = specialist
    return generalist, specialists


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=rng)


def computed_directly(networks, images, n, temperatures=None, weights=None):
    """The same without sharing and without leaving anything out."""
    generalist, specialists = networks
    T = temperatures or [1.0] * 5
    with torch.no_grad():
        active = gate(torch.softmax(generalist(images), 1), GROUPS, n)
        p_general = torch.softmax(generalist(images) / T[0], 1)
        p_special = [torch.softmax(specialists[m](images) / T[1 + m], 1) for m in range(4)]
        return p_general, combine_kl(p_general, p_special, GROUPS, active, weights), active


@pytest.mark.parametrize("n", [1, 3])
def test_predictions_equal_those_of_running_everything_on_every_row(networks, images, n):
    ensemble = SpecialistEnsemble(*networks, GROUPS, gate=n)
    output = ensemble.forward_with_details(images)
    for value, expected in zip(output, computed_directly(networks, images, n), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    of_array = ensemble.probabilities(images.numpy())
    torch.testing.assert_close(of_array, ensemble.probabilities(images))


def test_temperatures_and_weights_are_applied(networks, images):
    T, w = [1.5, 2.0, 0.5, 1.0, 3.0], [1.0, 2.0, 0.5, 1.0, 4.0]
    ensemble = SpecialistEnsemble(*networks, GROUPS, gate=2, temperatures=T, weights=w)
    expected = computed_directly(networks, images, 2, T, w)[1]
    torch.testing.assert_close(ensemble.probabilities(images), expected, rtol=0, atol=1e-6)


def test_only_specialists_that_a_row_needs_run_and_only_on_its_rows(networks, images):
    generalist, specialists = networks
    ensemble = SpecialistEnsemble(generalist, specialists, GROUPS)
    seen, hooks = {}, []
    for m, specialist in specialists.items():

        def count_rows(_, inputs, __, m=m):
            seen.setdefault(m, []).append(len(inputs[0]))

        hooks.append(specialist.head.register_forward_hook(count_rows))
    active = ensemble.forward_with_details(images).active
    for hook in hooks:
        hook.remove()
    assert seen == {m: [int(active[:, m].sum())] for m in range(4) if active[:, m].any()}
    one_needs_nothing = active.any(1).logical_not().nonzero()
    if len(one_needs_nothing):
        before = dict(ensemble.runs)
        ensemble.forward_with_details(images[one_needs_nothing[:1, 0]])
        assert ensemble.runs - type(ensemble.runs)(before) == {"trunk": 1}


def test_a_shared_trunk_runs_once_and_a_shared_block_too(networks, images):
    generalist, specialists = networks
    ensemble = SpecialistEnsemble(generalist, specialists, GROUPS, gate=CLASSES)
    ran, hooks = set(), []
    for owner, network in specialists.items():
        for name, block in network.trunk.named_children():

            def note(*_, key=(owner, name)):
                ran.add(key)

            hooks.append(block.register_forward_hook(note))
    ensemble.probabilities(images)
    ensemble.probabilities(images)
    for hook in hooks:
        hook.remove()
    assert ensemble.runs["trunk"] == 2
    assert all(ensemble.runs[m] == 2 for m in range(4))
    # Specialists 0 and 3 have a frozen trunk: none of their blocks ever runs.
    assert ("trunk", 0) not in ensemble.runs and ("trunk", 3) not in ensemble.runs
    assert {owner for owner, _ in ran} == {1, 2}
    # Specialist 1 shares all but the last block.  The first time the branch is not known yet and
    # its prefix runs again.
    assert {name for owner, name in ran if owner == 1} == {"embedding"}
    assert len({name for owner, name in ran if owner == 2}) == 3


def test_predictions_name_classes_and_specialists(networks, images):
    ensemble = SpecialistEnsemble(*networks, GROUPS)
    q, active = ensemble.forward_with_details(images)[1:]
    for row, prediction in enumerate(ensemble.predict(images, top=3)):
        assert prediction["classes"] == q[row].topk(3).indices.tolist()
        assert prediction["names"] == [str(c) for c in prediction["classes"]]
        assert prediction["probabilities"] == pytest.approx(q[row].topk(3).values.tolist())
        assert prediction["specialists"] == active[row].nonzero()[:, 0].tolist()
    assert len(ensemble.predict(images[:1], top=99)[0]["classes"]) == CLASSES


def test_missing_specialists_are_an_error_unless_allowed_and_skipped_ones_are_none(
    networks, images
):
    generalist, specialists = networks
    some = {m: specialists[m] for m in (0, 2)}
    with pytest.raises(ValueError, match="specialists 1, 3 of 4 are missing.*allow_missing=True"):
        SpecialistEnsemble(generalist, some, GROUPS)
    with pytest.raises(ValueError, match="specialists 3 of 4"):
        SpecialistEnsemble(generalist, some, GROUPS, skipped=[1])
    ensemble = SpecialistEnsemble(generalist, some, GROUPS, skipped=[1], allow_missing=True, gate=4)
    assert ensemble.missing == [3]
    active = ensemble.forward_with_details(images).active
    assert not active[:, [1, 3]].any() and active[:, [0, 2]].any()


def test_specialists_of_other_groups_are_refused(networks, images):
    other = ClassGroups([[0, 1, 3], [2, 3, 4, 5], [6, 7, 8], [9, 10]], CLASSES)
    with pytest.raises(ValueError, match="specialist 0 was trained for other classes"):
        SpecialistEnsemble(*networks, other, gate=CLASSES).probabilities(images)


# ---- runs and bundles


@pytest.fixture
def run(networks, tmp_path):
    generalist, specialists = networks
    save_classifier(generalist, tmp_path / "generalist")
    for m, specialist in specialists.items():
        save_classifier(specialist, tmp_path / "specialists" / f"{m:03d}")
    (tmp_path / "clusters").mkdir()
    GROUPS.save(tmp_path / "clusters" / "groups.json")
    settings = {
        "schema": 1,
        "gate": CLASSES,
        "max_specialists": None,
        "combine": "kl",
        "temperatures": [1, 2, 1, 1, 1],
        "weights": None,
        "skipped": [],
        "missing": [],
    }
    (tmp_path / "ensemble.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_loaded_run_predicts_as_its_networks_do(run, networks, images):
    expected = computed_directly(networks, images, CLASSES, [1, 2, 1, 1, 1])[1]
    for cache, loads in ((None, 4), (1, 8), (2, 8)):
        loaded = SpecialistEnsemble.load(run, cache=cache)
        torch.testing.assert_close(loaded.probabilities(images), expected, rtol=0, atol=1e-6)
        assert loaded.specialists.loads == 4
        loaded.probabilities(images)
        assert loaded.specialists.loads == loads
        assert len(loaded.specialists._loaded) == (cache or 4)
    q = SpecialistEnsemble.load(run, gate=1).probabilities(images)
    expected = computed_directly(networks, images, 1, [1, 2, 1, 1, 1])[1]
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)


def test_a_loaded_specialist_shares_the_generalists_storage(run):
    loaded = SpecialistEnsemble.load(run)
    generalist, specialist = loaded.generalist, loaded.specialists[0]
    mine, theirs = generalist.trunk.state_dict(), specialist.trunk.state_dict()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)


def test_specialists_may_be_loaded_under_inference_mode(run, images):
    expected = SpecialistEnsemble.load(run).probabilities(images)
    with torch.inference_mode():
        ensemble = SpecialistEnsemble.load(run)
        q = ensemble.probabilities(images)  # which loads them
    torch.testing.assert_close(q, expected)
    loaded = [p for m in range(len(ensemble.groups)) for p in ensemble.specialists[m].parameters()]
    assert not any(p.is_inference() for p in loaded)


def test_a_bundle_is_smaller_and_predicts_alike(run, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle")
    original = SpecialistEnsemble.load(run)
    sizes = export_bundle(original, out)
    assert sizes["shared"] > 0
    loaded = SpecialistEnsemble.load(out)
    expected = original.probabilities(images)
    torch.testing.assert_close(loaded.probabilities(images), expected, rtol=0, atol=0)
    whole = (run / "specialists/000/model.safetensors").stat().st_size
    assert (out / "specialists/000/model.safetensors").stat().st_size < whole
    assert not list(out.rglob("*.pt")) and not list(out.rglob("*.pkl"))


def test_specialists_of_so_many_bytes_are_held_and_what_is_the_generalists_counts_nothing(
    run, networks, images
):
    generalist = load_classifier(run / "generalist")

    def load(m):
        return load_specialist(specialist_folder(run, m), generalist, (), "cpu", None)

    free = LazySpecialists(load, range(4), generalist=generalist)
    sizes = []
    for m in range(4):
        before = free.held_bytes
        own = load(m)
        sizes.append(sum(x.nbytes for x in own.state_dict().values()))
        shared = sum(own.state_dict()[n].nbytes for n in shared_names(generalist, own))
        assert shared <= sizes[m]
        _ = free[m]
        held = free.held_bytes - before
        # The classes of a dustbin's head are int64 and not saved. The norms have none.
        assert sizes[m] - shared <= held <= sizes[m] - shared + 4096
        sizes[m] = held
    assert free.fits and free.loads == 4
    tight = LazySpecialists(load, range(4), generalist=generalist, most_bytes=sum(sizes) - 1)
    for m in (0, 1, 2, 3, 3, 0):
        _ = tight[m]
        assert tight.held_bytes < sum(sizes)
    assert not tight.fits and tight.loads == 5  # the first was let go, and is read again
    one = LazySpecialists(load, range(4), generalist=generalist, most_bytes=1)
    assert [one[m] is not None for m in range(4)] and len(one._loaded) == 1


def test_names_of_classes_are_written_with_the_generalist_alone_and_held_once(run, networks):
    names = json.loads((run / "generalist/model.json").read_text())["class_names"]
    for m in range(4):
        path = run / f"specialists/{m:03d}/model.json"
        assert "class_names" not in json.loads(path.read_text())
    loaded = SpecialistEnsemble.load(run)
    assert loaded.class_names == names
    # An earlier version's file repeats them. They are the generalist's own all the same.
    older = json.loads((run / "specialists/000/model.json").read_text()) | {"class_names": names}
    (run / "specialists/000/model.json").write_text(json.dumps(older))
    again = SpecialistEnsemble.load(run)
    for m in range(4):
        assert again.specialists[m].spec.class_names is again.generalist.spec.class_names


def test_many_threads_get_the_same_predictions(run, images):
    loaded = SpecialistEnsemble.load(run, cache=1)
    expected = SpecialistEnsemble.load(run).probabilities(images)
    results = [None] * 8

    def run_one(i):
        results[i] = loaded.probabilities(images)

    threads = [threading.Thread(target=run_one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for q in results:
        torch.testing.assert_close(q, expected, rtol=0, atol=0)


def test_what_is_wrong_with_a_run_is_named(run):
    (run / "specialists/002/model.safetensors").unlink()
    with pytest.raises(ValueError, match="specialists 2 of 4 are missing"):
        SpecialistEnsemble.load(run)
    assert SpecialistEnsemble.load(run, allow_missing=True).missing == [2]
    (run / "specialists/000/model.safetensors").write_bytes(b"corrupt")
    with pytest.raises(ValueError, match="model.safetensors"):
        SpecialistEnsemble.load(run, allow_missing=True).specialists[0]
    (run / "ensemble.json").write_text('{"schema": 7}')
    with pytest.raises(ValueError, match="schema 7; this version reads 1"):
        SpecialistEnsemble.load(run)
    with pytest.raises(ValueError, match="generalist/model.json"):
        SpecialistEnsemble.load(run / "nowhere")
    (run / "ensemble.json").unlink()
    with pytest.raises(ValueError, match="cache = 0"):
        SpecialistEnsemble.load(run, cache=0)


# ---- one program


@pytest.mark.parametrize("n, limit", [(1, None), (6, None), (CLASSES, 1)])
def test_the_program_of_fixed_shape_equals_the_ensemble(networks, images, n, limit):
    settings = {"gate": n, "max_specialists": limit, "weights": [1, 2, 1, 0.5, 1]}
    ensemble = SpecialistEnsemble(*networks, GROUPS, **settings)
    with torch.no_grad():
        q = EnsembleProgram(ensemble)(images)
    torch.testing.assert_close(q, ensemble.probabilities(images), rtol=0, atol=1e-5)


def test_the_exported_program_equals_the_ensemble_at_another_batch_size(networks, images, tmp_path):
    ensemble = SpecialistEnsemble(*networks, GROUPS, gate=6)
    path = export_program(EnsembleProgram(ensemble), images[:4], tmp_path / "ensemble.pt2")
    program = torch.export.load(path).module()
    torch.testing.assert_close(program(images), ensemble.probabilities(images), rtol=0, atol=1e-5)


def test_a_program_that_was_exported_can_be_run_and_exported_again(networks, images, tmp_path):
    """Tracing leaves none of its placeholders in what the next program is made of."""
    ensemble = SpecialistEnsemble(*networks, GROUPS, gate=6)
    program = EnsembleProgram(ensemble)
    export_program(program, images[:4], tmp_path / "first.pt2")
    with torch.no_grad():
        q = program(images)
    torch.testing.assert_close(q, ensemble.probabilities(images), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # torch's exporter takes minutes on a busy machine
def test_onnx_equals_the_ensemble(networks, images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ensemble = SpecialistEnsemble(*networks, GROUPS, gate=6)
    program = EnsembleProgram(ensemble, portable=True)
    path = export_onnx(program, images[:4], tmp_path / "ensemble.onnx")
    session = runtime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
    for rows in (len(images), 1, 7, 0):
        (q,) = session.run(None, {"raw": images[:rows].numpy()})
        expected = ensemble.probabilities(images[:rows])
        torch.testing.assert_close(torch.from_numpy(q), expected, rtol=0, atol=1e-5)


def test_both_ensembles_read_pictures_in_any_form(networks, images):
    generalist, specialists = networks
    both = SpecialistEnsemble(generalist, specialists, GROUPS), DeepEnsemble([generalist] * 2)
    for ensemble in both:
        expected = ensemble.probabilities(images[:3])
        pictures = [Image.fromarray(picture[0].numpy()) for picture in images[:3]]
        for form in (pictures, images[:3].float() / 255, images[:3, 0].numpy()[..., None]):
            torch.testing.assert_close(ensemble.probabilities(form), expected)
        assert len(ensemble.predict(images[0], top=2)) == 1
        for top in (0, -1):
            with pytest.raises(ValueError, match="at least 1 class is needed"):
                ensemble.predict(images[0], top=top)
        with pytest.raises(ValueError, match=r"holds float32 from .* the network reads uint8 \["):
            ensemble.predict(images[:3].float() - 300)
        assert "12 classes" in repr(ensemble) and "made in memory" in repr(ensemble)


def test_gate_and_combiner_take_arrays_and_lists():
    p_general, p_special, groups = [[0.4, 0.3, 0.2, 0.1]], [[[0.5, 0.3, 0.2]]], [[0, 1]]
    tensor = torch.tensor(p_general, dtype=torch.float64)
    special = torch.tensor(p_special[0], dtype=torch.float64)
    expected = combine_kl(tensor, [special], ClassGroups(groups, 4))
    arrays = np.array(p_general), [np.array(p_special[0])], [np.array([0, 1])]
    for given in ((p_general, p_special, groups), arrays, (tensor, [([0], p_special[0])], groups)):
        torch.testing.assert_close(combine_kl(*given), expected)
        assert gate(given[0], given[2]).tolist() == [[True]]
    for wrong in ("x", [[0.5, 0.5], [1]], 0.5):
        with pytest.raises(ValueError, match="p_general is"):
            combine_kl(wrong, p_special, groups)


def test_a_bundle_of_students_alone_says_how_one_is_loaded(networks, tmp_path):
    save_classifier(networks[0], tmp_path / "students" / "main")
    with pytest.raises(ValueError, match=r"no ensemble; load one with load_classifier\(.*main"):
        SpecialistEnsemble.load(tmp_path)
