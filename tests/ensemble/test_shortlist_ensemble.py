"""Further networks that are asked about likely classes, and geometric deep ensembles."""

import json

import pytest
import torch

from ensemble import (
    DeepEnsemble,
    ShortlistEnsemble,
    SpecialistEnsemble,
    export_onnx,
    export_program,
    generalised_mean,
    join_on_shortlist,
    load_ensemble,
)
from networks import InputSpec, ModelSpec, build_classifier, hydra, mean_log_probabilities, top_k

CLASSES = 12


def network(seed, classes=CLASSES, width=2, names=(), shape=(1, 8, 8)):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = dict(width=width, depth=2, embedding=4 * width)
        spec = ModelSpec("convnet", classes, InputSpec(shape), options, class_names=names)
        made = build_classifier(spec).eval()
        with torch.no_grad():
            made.head.weight.mul_(30)
        return made


@pytest.fixture(scope="module")
def networks():
    """Three, of which one is larger."""
    return [network(0), network(1, width=3), network(2)]


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0])
def test_a_shortlist_of_all_classes_is_the_deep_ensemble_of_that_order(networks, images, order):
    deep = DeepEnsemble(networks, order).probabilities(images)
    for k in (CLASSES, 10 * CLASSES):
        q = ShortlistEnsemble(networks, k, order).probabilities(images)
        torch.testing.assert_close(q, deep, atol=1e-6, rtol=0)


def test_it_is_what_the_pure_functions_say_at_its_temperatures_and_weights(networks, images):
    weights, temperatures = [1.0, 2.0, 0.5], [0.7, 1.5, 2.0]
    with torch.no_grad():
        logits = [each(images) / T for each, T in zip(networks, temperatures, strict=True)]
    general = logits[0].log_softmax(1)
    indices = top_k(general, 4)[1]
    members = torch.stack([each.gather(1, indices) for each in logits[1:]])
    expected = join_on_shortlist(general, indices, members, 0.3, weights).exp()
    ensemble = ShortlistEnsemble(networks, 4, 0.3, weights, temperatures)
    torch.testing.assert_close(ensemble.probabilities(images), expected, atol=1e-6, rtol=0)


def test_a_further_networks_whole_head_is_never_run(networks, images):
    ran = []
    hooks = [
        each.head.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, each in enumerate(networks)
    ]
    ShortlistEnsemble(networks, 3).probabilities(images)
    for hook in hooks:
        hook.remove()
    assert ran == [0]


def test_one_network_is_itself(networks, images):
    alone = ShortlistEnsemble(networks[:1], 3).probabilities(images)
    torch.testing.assert_close(alone, networks[0](images).softmax(1).detach())


def test_a_network_with_members_gives_their_mean(networks, images):
    several = hydra(network(3), 2, 0).eval()
    q = ShortlistEnsemble([networks[0], several], CLASSES).probabilities(images)
    with torch.no_grad():
        log_p = [mean_log_probabilities(each, images) for each in (networks[0], several)]
    expected = generalised_mean(torch.stack(log_p)).exp()
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)


def test_what_is_saved_comes_back_bit_for_bit(networks, images, tmp_path):
    ensemble = ShortlistEnsemble(networks, 4, 0.25, [1, 2, 3], [1.0, 0.5, 2.0])
    ensemble.save(tmp_path)
    content = json.loads((tmp_path / "ensemble.json").read_text())
    keys = "schema kind members order shortlist weights temperatures"
    assert list(content) == keys.split()
    loaded = load_ensemble(tmp_path)
    assert isinstance(loaded, ShortlistEnsemble)
    assert torch.equal(loaded.probabilities(images), ensemble.probabilities(images))
    assert loaded.predict(images, 2) == ensemble.predict(images, 2)
    for other in (DeepEnsemble, SpecialistEnsemble):
        with pytest.raises(ValueError, match="load it with load_ensemble"):
            other.load(tmp_path)


@pytest.mark.parametrize("order, keys", [(1.0, []), (0.0, ["order"])])
def test_a_deep_ensemble_keeps_its_order_and_old_files_are_arithmetic(
    networks, images, tmp_path, order, keys
):
    ensemble = DeepEnsemble(networks, order)
    ensemble.save(tmp_path)
    content = json.loads((tmp_path / "ensemble.json").read_text())
    assert list(content) == ["schema", "kind", "members", *keys]
    loaded = load_ensemble(tmp_path)
    assert torch.equal(loaded.probabilities(images), ensemble.probabilities(images))


@pytest.mark.parametrize(
    "other, message",
    [
        (network(1, classes=11), "network 1 knows 11 classes, the generalist 12"),
        (network(1, shape=(1, 9, 9)), r"network 1 reads uint8 \[1, 9, 9\], the generalist"),
        (
            network(1, names=tuple("abcdefghijkl")),
            "class 0 of network 1 is 'a', the generalist's '0'",
        ),
    ],
)
def test_networks_of_other_classes_or_inputs_are_named(networks, other, message):
    with pytest.raises(ValueError, match=message):
        ShortlistEnsemble([networks[0], other], 3)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"shortlist": 0}, "shortlist = 0; at least 1"),
        ({"order": 2.0}, "order = 2.0"),
        ({"weights": [1, 2]}, "weights = .*; 3 positive"),
        ({"temperatures": [1, 2, 0]}, "temperatures = .*; 3 positive"),
    ],
)
def test_settings_that_cannot_be_are_named(networks, keys, message):
    with pytest.raises(ValueError, match=message):
        ShortlistEnsemble(networks, **{"shortlist": 3} | keys)


@pytest.mark.parametrize("classes", [CLASSES, 5000])
def test_a_program_predicts_what_the_ensemble_does_at_any_batch_size(images, classes, tmp_path):
    ensemble = ShortlistEnsemble([network(s, classes) for s in (0, 1)], 5, 0.0, [1, 2], [1, 0.5])
    path = export_program(ensemble.program, images[:3], tmp_path / "ensemble.pt2")
    module = torch.export.load(path).module()
    for rows in (1, 7):
        q = module(images[:rows])
        torch.testing.assert_close(q, ensemble.probabilities(images[:rows]), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # torch's exporter takes minutes on a busy machine
@pytest.mark.parametrize("order", [0.0, 0.5])
def test_onnx_predicts_what_the_ensemble_does_at_any_batch_size(images, order, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ensemble = ShortlistEnsemble([network(s, 5000) for s in (0, 1, 2)], 5, order)
    path = export_onnx(ensemble.program, images[:3], tmp_path / "ensemble.onnx")
    session = runtime.InferenceSession(str(path))
    for rows in (1, 7):
        (q,) = session.run(None, {"raw": images[:rows].numpy()})
        expected = ensemble.probabilities(images[:rows])
        torch.testing.assert_close(torch.from_numpy(q), expected, atol=1e-6, rtol=0)
