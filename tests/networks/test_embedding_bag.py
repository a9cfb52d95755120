"""Bags of indices: the decoder ngram_bag, inputs of int32 and the network embedding_bag."""

import json

import numpy as np
import pytest
import torch

from networks import (
    InputSpec,
    ModelSpec,
    batch_ensemble,
    build_classifier,
    hydra,
    load_classifier,
    parameter_count,
    read_inputs,
    save_classifier,
    specialise,
    widen,
)
from networks.builders import IndexBag
from networks.texts import hashed_ngrams, ngram_bag

INPUT = InputSpec((256,), "int32", decoders={"txt": "ngram_bag"})
TEXTS = ["Soybean farming", "a", "", "A phrase of some more letters", "soybean FARMING"]


def network(options=None, num_classes=7):
    torch.manual_seed(0)
    return build_classifier(ModelSpec("embedding_bag", num_classes, INPUT, options or {})).eval()


def bags(texts=TEXTS):
    return torch.tensor(np.stack([ngram_bag(text.encode()) for text in texts]))


def test_a_bag_lists_the_bins_that_hashed_ngrams_counts():
    bag = ngram_bag(b"  Soybean   FARMING ", bins=2048)
    assert bag.dtype == np.int32 and bag.shape == (256,)
    kept = bag[bag >= 0]
    assert (bag[len(kept) :] == -1).all()
    counts = np.bincount(kept, minlength=2048)
    expected = hashed_ngrams(b"soybean farming")
    np.testing.assert_allclose(counts / np.sqrt(counts @ counts), expected, rtol=1e-6)


def test_a_text_with_more_ngrams_than_the_bag_holds_is_read_from_its_beginning():
    long = b"abcdefghij" * 40
    np.testing.assert_array_equal(ngram_bag(long), ngram_bag(long[:88]))
    assert (ngram_bag(long) >= 0).all()
    assert (ngram_bag(long, max_ngrams=1300) >= 0).sum() == 401 + 400 + 399


def test_every_text_has_a_bag_and_bytes_that_are_no_text_have_none():
    assert (ngram_bag(b"") >= 0).sum() == 1
    with pytest.raises(UnicodeDecodeError):
        ngram_bag(b"\xff")


def test_a_bag_is_the_sum_of_its_rows_over_the_root_of_their_number():
    bag = IndexBag(5, 3, dropout=0.5).eval()
    with torch.no_grad():
        features = bag(torch.tensor([[4, 1, -1, 4], [-1, -1, -1, -1]], dtype=torch.int32))
    expected = (2 * bag.weight[4] + bag.weight[1]) / 3**0.5
    torch.testing.assert_close(features, torch.stack([expected, torch.zeros(3)]))


def test_features_start_at_unit_variance_whatever_the_number_of_indices():
    torch.manual_seed(1)
    bag = IndexBag(4000, 64, dropout=0.0)
    for length in (4, 100):
        indices = torch.randint(4000, (500, length))
        assert bag(indices).detach().std().item() == pytest.approx(1, abs=0.05)


def test_training_leaves_indices_out_and_measuring_does_not():
    torch.manual_seed(2)
    bag = IndexBag(1000, 16, dropout=0.3)
    indices = torch.arange(1000).view(1, -1)
    bag(indices).sum().backward()
    assert bag.weight.grad is not None
    dropped = (bag.weight.grad[:, 0] == 0).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.05)
    assert torch.equal(bag.eval()(indices), bag(indices))
    assert not torch.equal(bag.train()(indices), bag(indices))


def test_the_classifier_is_linear_without_depth_and_has_its_layers_with_it():
    plain = network()
    assert parameter_count(plain) == 8192 * 64 + 64 * 7 + 7
    deep = network({"width": 9000, "embedding": 8, "depth": 2})
    assert parameter_count(deep) == 9000 * 8 + 2 * (8 * 8 + 8) + 8 * 7 + 7
    assert [name for name, _ in deep.trunk.named_children()] == ["bag", "hidden1", "hidden2"]


def test_a_saved_network_reads_texts_and_answers_the_same(tmp_path):
    saved = network({"dropout": 0.2})
    save_classifier(saved, tmp_path)
    loaded = load_classifier(tmp_path)
    raw = read_inputs(TEXTS, loaded.spec.input)
    assert torch.equal(raw, bags()) and torch.equal(loaded(raw), saved(raw))
    assert torch.equal(loaded(raw)[0], loaded(raw)[4])
    recorded = json.loads((tmp_path / "model.json").read_text())["input"]
    assert recorded["dtype"] == "int32" and recorded["decoders"] == {"txt": "ngram_bag"}


def test_arrays_of_indices_are_read_and_other_numbers_refused():
    indices = bags().numpy()
    for given in (indices.astype(np.int64), indices.astype(np.float64), indices.tolist()):
        assert torch.equal(read_inputs(given, INPUT), bags())
    for given in (indices + 0.5, indices.astype(np.int64) + 2**31):
        with pytest.raises(ValueError, match=r"the network reads int32 \[256\]$"):
            read_inputs(given, INPUT)


@pytest.mark.parametrize("options", [{}, {"depth": 1}], ids=["linear", "deep"])
def test_a_program_of_any_batch_size_answers_as_the_network(options):
    classifier, raw = network(options), bags()
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(classifier, (raw[:3],), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(raw), classifier(raw), atol=1e-5, rtol=1e-5)


def test_specialists_and_members_are_made_of_it():
    generalist, raw = network({"depth": 1}), bags()
    expected = generalist(raw)
    special = specialise(generalist, [1, 4], "preserving").eval()(raw)
    assert special.shape == (5, 3)
    torch.testing.assert_close(special[:, :2], expected[:, [1, 4]])
    torch.testing.assert_close(hydra(generalist, 2, 1)(raw), expected.expand(2, -1, -1))
    members = batch_ensemble(generalist, 2, std=0)(raw)
    torch.testing.assert_close(members, expected.expand(2, -1, -1))


def test_what_does_not_fit_is_one_line():
    classifier = network()
    together = "embedding_bag and the decoder ngram_bag go together"
    for mistake, words in (
        (lambda: build_classifier(ModelSpec("mlp", 3, INPUT)), f"mlp reads numbers.*{together}"),
        (
            lambda: build_classifier(ModelSpec("embedding_bag", 3, InputSpec((9,)))),
            f"embedding_bag reads int32 indices.*{together}",
        ),
        (
            lambda: build_classifier(ModelSpec("embedding_bag", 3, InputSpec((1, 2), "int32"))),
            r"takes indices \[L\]; the input shape is \[1, 2\]",
        ),
        (lambda: InputSpec((9,), "int32", mean=(0.5,)), "are indices and are not scaled"),
        (lambda: classifier(bags().float()), "int32 indices are needed"),
        (lambda: classifier(bags() + 8192), "the network has 8192 rows: raise model.width"),
        (lambda: widen(classifier, 2), "only mlp and convnet can be widened"),
        (lambda: network({"embedding": 0}), "embedding = 0: must be a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            mistake()
