"""PredictionStatistics: exact or of top-k predictions, merged in any order, saved and checked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clustering.statistics
from clustering import PredictionStatistics, group_classes, predictions_to_keep

TINY = np.array([[0.5, 0.5, 0.0], [0.1, 0.7, 0.2], [0.0, 0.0, 1.0], [0.2, 0.6, 0.2]])


def random_predictions(seed, n, num_classes):
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 0.3), size=n)


def top(p, k):
    indices = np.argsort(-p, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(p, indices, 1)


def assert_same(a, b):
    assert (a.num_examples, a.num_labelled, a.top_k) == (b.num_examples, b.num_labelled, b.top_k)
    np.testing.assert_allclose(a.frequency, b.frequency, rtol=1e-12)
    np.testing.assert_allclose(a.covariance, b.covariance, atol=1e-12)
    expected_confusion = b.expected_confusion.toarray()
    np.testing.assert_allclose(a.expected_confusion.toarray(), expected_confusion, atol=1e-12)
    np.testing.assert_array_equal(a.confusion.toarray(), b.confusion.toarray())
    assert a.tail == pytest.approx(b.tail)


def gather(p, labels=None, top_k=None):
    statistics = PredictionStatistics(p.shape[1], top_k)
    statistics.update(p, labels=labels)
    return statistics


@pytest.fixture(params=[None, 2], ids=["exact", "top2"])
def top_k(request):
    return request.param


def test_frequency_is_the_mean_prediction():
    np.testing.assert_allclose(gather(TINY).frequency, [0.2, 0.45, 0.35])


def test_covariance_is_numpys():
    np.testing.assert_allclose(gather(TINY).covariance, np.cov(TINY.T, bias=True), atol=1e-15)


def test_confusion_counts_true_by_predicted():
    # Row 0 ties between 0 and 1: the lower class, as argmax has it.
    confusion = gather(TINY, labels=[0, 0, 2, 1]).confusion
    assert confusion.dtype == np.int64
    assert confusion.toarray().tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_expected_confusion_is_the_mass_by_predicted_class():
    # Predicted: 0, 1, 2, 1.
    expected = [[0.5, 0.1 + 0.2, 0], [0.5, 0.7 + 0.6, 0], [0, 0.2 + 0.2, 1.0]]
    np.testing.assert_allclose(gather(TINY).expected_confusion.toarray(), expected)


def test_expected_confusion_of_calibrated_predictions_is_the_confusion_on_average():
    p = random_predictions(0, 40_000, 4)
    labels = (np.random.default_rng(1).random(len(p))[:, None] > p.cumsum(axis=1)).sum(axis=1)
    statistics = gather(p, np.minimum(labels, 3))
    difference = statistics.expected_confusion.toarray() - statistics.confusion.toarray()
    assert np.abs(difference).max() < 5 * np.sqrt(len(p) / 4)


def test_labels_may_come_second_or_by_name_and_may_be_missing():
    by_position, by_name = PredictionStatistics(3), PredictionStatistics(3)
    by_position.update(TINY, torch.tensor([0, 0, 2, 1]))
    by_name.update(torch.tensor(TINY), labels=np.array([0, 0, 2, 1], dtype=np.uint8))
    assert_same(by_position, by_name)
    by_name.update(TINY)
    assert (by_name.num_examples, by_name.num_labelled) == (8, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_of_any_float_are_taken(dtype):
    p = torch.softmax(torch.arange(12.0).reshape(3, 4) % 5, dim=1).to(dtype).requires_grad_()
    np.testing.assert_allclose(gather(p).frequency, p.detach().double().mean(0), atol=1e-12)


@given(
    st.integers(0, 2**32),
    st.integers(0, 12),
    st.integers(1, 6),
    st.sampled_from([None, 1, 3]),
    st.permutations(range(4)),
)
@settings(deadline=None, max_examples=60)
def test_statistics_merged_in_any_order_equal_one_pass(seed, n, num_classes, k, order):
    p = random_predictions(seed, n, num_classes)
    labels = np.random.default_rng(seed).integers(0, num_classes, n)
    parts = [PredictionStatistics(num_classes, k) for _ in range(4)]
    splits = np.array_split(np.arange(n), [n // 5, n // 2, n // 2])
    for part, rows in zip(parts, splits, strict=True):
        part.update(p[rows], labels[rows])
    merged = PredictionStatistics(num_classes, k)
    for index in order:
        merged.merge(parts[index])
    assert_same(merged, gather(p, labels, k))


def test_merging_leaves_the_other_as_it_was(top_k):
    a, b = gather(TINY[:2], [0, 1], top_k), gather(TINY[2:], [2, 1], top_k)
    a.merge(b)
    a.update(TINY)
    assert_same(b, gather(TINY[2:], [2, 1], top_k))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_with_unequal_counts_and_files_equal_one_pass(tmp_path, world, top_k):
    p, labels = random_predictions(3, 50, 7), np.arange(50) % 7
    for rank in range(world):
        rows = np.arange(50)[rank::world]
        gather(p[rows], labels[rows], top_k).save(tmp_path / f"{rank}.npz")
    merged = PredictionStatistics.load(tmp_path / "0.npz")
    for rank in range(1, world):
        merged.merge(PredictionStatistics.load(tmp_path / f"{rank}.npz"))
    assert_same(merged, gather(p, labels, top_k))


def test_different_arguments_do_not_merge():
    message = "4 classes with top_k 2 do not merge into 4 classes with top_k None"
    with pytest.raises(ValueError, match=message):
        PredictionStatistics(4).merge(PredictionStatistics(4, 2))
    with pytest.raises(ValueError, match="same arguments"):
        PredictionStatistics(4).merge(PredictionStatistics(5))


def test_statistics_of_nothing_are_zero(top_k):
    empty = PredictionStatistics(3, top_k)
    empty.update(np.zeros((0, 3)), labels=np.zeros(0, dtype=int))
    assert empty.frequency.tolist() == [0, 0, 0] and empty.tail == 0
    assert empty.confusion.nnz == 0 and empty.expected_confusion.nnz == 0
    assert not empty.covariance.any()


# Top-k predictions


def test_top_k_of_every_class_equals_the_exact_statistics():
    p, labels = random_predictions(4, 30, 6), np.arange(30) % 6
    exact, sparse = gather(p, labels), gather(p, labels, top_k=6)
    np.testing.assert_allclose(sparse.covariance, exact.covariance, atol=1e-7)
    np.testing.assert_allclose(sparse.frequency, exact.frequency, atol=1e-7)
    np.testing.assert_array_equal(sparse.confusion.toarray(), exact.confusion.toarray())


def test_top_k_from_full_rows_equals_top_k_given_as_such():
    p, labels = random_predictions(5, 20, 8), np.arange(20) % 8
    given_k, given_more = PredictionStatistics(8, 3), PredictionStatistics(8, 3)
    given_k.update(*top(p, 3), labels)
    indices, values = map(torch.tensor, top(p, 5))
    given_more.update(indices, values, labels=torch.tensor(labels))
    assert_same(given_k, gather(p, labels, 3))
    assert_same(given_more, given_k)


def test_the_tail_is_the_mass_beyond_the_top_k_and_is_spread_evenly_in_the_frequency():
    statistics = PredictionStatistics(5, 2)
    statistics.update(np.array([[1, 3]]), np.array([[0.5, 0.2]]))
    assert statistics.tail == pytest.approx(0.3)
    np.testing.assert_allclose(statistics.frequency, [0.1, 0.5, 0.1, 0.2, 0.1], atol=1e-7)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_the_frequency_always_sums_to_one(seed, n, num_classes, k):
    statistics = gather(random_predictions(seed, n, num_classes), top_k=k)
    assert statistics.frequency.sum() == pytest.approx(1, abs=1e-6)


def test_top_k_predictions_come_back_as_they_are():
    statistics = PredictionStatistics(5, 3)
    values = np.array([[0.75, 0.25, 0], [0.5, 0.25, 0.125]])
    statistics.update(np.array([[4, 0, -1], [2, 1, 3]]), values)
    dense = [[0.25, 0, 0, 0, 0.75], [0, 0.25, 0.5, 0.125, 0]]
    assert statistics.predictions.toarray().tolist() == dense


def test_exact_statistics_keep_no_predictions():
    with pytest.raises(ValueError, match="gather them with top_k"):
        gather(TINY).predictions  # noqa: B018


def test_beyond_the_memory_limit_predictions_are_kept_sparse(monkeypatch):
    monkeypatch.setattr(clustering.statistics, "DENSE_BYTES", 8 * 20**2)
    assert PredictionStatistics(20).exact
    beyond = PredictionStatistics(21)
    assert beyond.top_k == 10
    with pytest.raises(ValueError, match="a covariance of 21 classes is above the limit"):
        beyond.covariance  # noqa: B018


def test_a_million_classes_cost_memory_by_the_example_only():
    statistics = PredictionStatistics(1_000_000, 4)
    statistics.update(np.array([[999_999, 0, 5, 7]]), np.array([[0.4, 0.3, 0.2, 0.1]]), labels=[0])
    assert statistics.predictions.nnz == 4 and statistics.confusion[0, 999_999] == 1


# Errors


@pytest.mark.parametrize(
    "p, message",
    [
        ([[0.5, np.nan, 0.5]], "row 0 of the predictions holds NaN"),
        ([[1, 0, 0], [np.inf, 0, 0]], "row 1 of the predictions holds NaN or infinity"),
        ([[1.5, -0.5, 0]], "hold -0.5; probabilities are not negative, so apply softmax"),
        ([[1, 0, 0], [3, 4, 5]], "row 1 of the predictions sums to 12"),
        ([[0.1, 0.1, 0.1]], "sums to 0.3"),
        ([[0.5, 0.5]], "2 columns, the statistics 3 classes"),
        ([0.5, 0.5, 0], r"shape \(3,\)"),
    ],
)
def test_what_is_no_distribution_is_refused_and_changes_nothing(p, message, top_k):
    statistics = gather(TINY, [0, 0, 2, 1], top_k)
    labels = np.zeros(len(p), dtype=int)
    with pytest.raises(ValueError, match=message):
        statistics.update(np.array(p), labels=labels)
    assert_same(statistics, gather(TINY, [0, 0, 2, 1], top_k))


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, 2, 3], "label 3 is not in 0 ... 2"),
        ([0, 1, 2, -1], "label -1"),
        ([0, 1], r"for 4 predictions they must be integers \[4\]"),
        ([0.0, 1.0, 2.0, 0.0], "float64"),
    ],
)
def test_wrong_labels_are_refused_and_change_nothing(labels, message, top_k):
    statistics = PredictionStatistics(3, top_k)
    with pytest.raises(ValueError, match=message):
        statistics.update(TINY, labels=np.array(labels))
    assert statistics.num_examples == 0


@pytest.mark.parametrize(
    "indices, values, message",
    [
        ([[0, 5]], [[0.5, 0.5]], "index 5 is not below 5"),
        ([[0, 0]], [[0.5, 0.5]], "row 0 names class 0 twice"),
        ([[0, 1]], [[0.9, 0.9]], "sums to 1.8"),
        ([[0, 1]], [[0.9, np.nan]], "NaN"),
        ([[0, 1]], [[0.5]], "both must be"),
        ([[0.0, 1.0]], [[0.5, 0.5]], "indices integers"),
        ([[1, 2], [-1, -1]], [[0.5, 0.5], [0, 0]], "row 1 of the predictions names no class"),
    ],
)
def test_wrong_top_k_predictions_are_refused(indices, values, message):
    with pytest.raises(ValueError, match=message):
        PredictionStatistics(5, 2).update(np.array(indices), np.array(values))


def test_top_k_predictions_do_not_fit_exact_statistics():
    with pytest.raises(ValueError, match=r"PredictionStatistics\(3, top_k=2\)"):
        PredictionStatistics(3).update(*top(TINY, 2))


@pytest.mark.parametrize("arguments, message", [((0,), "num_classes is 0"), ((3, 0), "top_k is 0")])
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PredictionStatistics(*arguments)


# Files


def test_saved_statistics_load_and_resume(tmp_path, top_k):
    path = tmp_path / "statistics"
    statistics = gather(TINY, [0, 0, 2, 1], top_k)
    statistics.save(path)
    loaded = PredictionStatistics.load(path)
    assert_same(loaded, statistics)
    loaded.update(TINY)
    assert loaded.num_examples == 8
    assert [file.name for file in tmp_path.iterdir()] == ["statistics"]


def test_statistics_of_nothing_can_be_saved(tmp_path, top_k):
    PredictionStatistics(3, top_k).save(tmp_path / "s.npz")
    assert_same(PredictionStatistics.load(tmp_path / "s.npz"), PredictionStatistics(3, top_k))


def test_the_file_holds_no_pickle(tmp_path, top_k):
    gather(TINY, [0, 0, 2, 1], top_k).save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_a_file_from_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering.statistics, "SCHEMA", 99)
    gather(TINY).save(tmp_path / "s.npz")
    monkeypatch.undo()
    message = "s.npz has schema 99, this version reads 1; gather the statistics again"
    with pytest.raises(ValueError, match=message):
        PredictionStatistics.load(tmp_path / "s.npz")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_statistics_is_refused(tmp_path, content):
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match="s.npz is no statistics file"):
        PredictionStatistics.load(tmp_path / "s.npz")


def test_a_file_cut_short_is_refused(tmp_path):
    gather(TINY).save(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-100])
    with pytest.raises(ValueError, match="no statistics file"):
        PredictionStatistics.load(tmp_path / "s.npz")


def test_a_pickled_array_is_not_read(tmp_path):
    np.savez(tmp_path / "s.npz", schema=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="no statistics file"):
        PredictionStatistics.load(tmp_path / "s.npz")


def test_other_arrays_are_not_statistics(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="a.npz has schema none"):
        PredictionStatistics.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", schema=1)
    with pytest.raises(ValueError, match="b.npz is a corrupt statistics file"):
        PredictionStatistics.load(tmp_path / "b.npz")


def test_an_absent_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        PredictionStatistics.load(tmp_path / "s.npz")


@pytest.mark.parametrize(
    "num_classes, method, kept",
    [
        (2048, "kmeans", None),
        (2049, "kmeans", 32),
        (2049, "graph", 32),
        (5200, "correlation", None),
        (5200, "raw", None),
        (11_585, "minibatch", 32),
        (11_586, "minibatch", None),  # where PredictionStatistics keeps 10
        (11_586, "raw", None),
    ],
)
def test_the_exact_covariance_is_for_few_classes_and_for_who_reads_it(num_classes, method, kept):
    assert predictions_to_keep(num_classes, method) == kept


def test_without_the_covariance_the_expected_confusion_is_the_same_bit_for_bit(monkeypatch):
    monkeypatch.setattr(clustering.statistics, "EXACT_CLASSES", 10)
    p, labels = random_predictions(0, 300, 60), np.random.default_rng(0).integers(0, 60, 300)
    exact, kept = gather(p, labels), gather(p, labels, predictions_to_keep(60))
    assert exact.exact and kept.top_k == 32
    for name in ("expected_confusion", "confusion"):
        mine, other = getattr(kept, name), getattr(exact, name)
        np.testing.assert_array_equal(mine.toarray(), other.toarray())
    assert group_classes(kept, 6, overlap=2) == group_classes(exact, 6, overlap=2)
