"""Arrays that somebody else may have written are whole and plain, or a ValueError of one line."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from clustering import PredictionStatistics
from clustering.array_files import check_form, map_npy, read_npz

GOOD = {"a": np.arange(6).reshape(2, 3), "b": np.float32(1.5), "c": np.zeros((0, 4), bool)}


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npz(path, content: bytes, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", content)
    return path


def test_what_savez_wrote_is_read_as_it_was(tmp_path):
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.savez(tmp_path / "a.npz", **GOOD, columns=columns)
    arrays = read_npz(tmp_path / "a.npz")
    for name, array in (GOOD | {"columns": columns}).items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype and arrays[name].flags.writeable


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


LIES = {
    "a terabyte": header("'<f4'", "(1099511627776,)") + bytes(64),
    "a product that overflows": header("'<f4'", "(4294967296, 4294967296)") + bytes(64),
    "a negative length": header("'<f4'", "(-1,)") + bytes(64),
    "no number": header("'<f4'", "(3, 'x')") + bytes(64),
    "less than it holds": header("'<f4'", "(3,)") + bytes(64),
    "no dtype": header("'<q9x'", "(3,)") + bytes(64),
    "a header of code": header("__import__('os')", "(3,)") + bytes(64),
    "nothing": b"",
    "half a header": header("'<f4'", "(3,)")[:40],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_without_its_memory(tmp_path, lie):
    with pytest.raises(ValueError) as refusal:
        read_npz(npz(tmp_path / "a.npz", LIES[lie]))
    assert "\n" not in str(refusal.value)
    (tmp_path / "a.npy").write_bytes(LIES[lie])
    with pytest.raises(ValueError) as refusal:
        map_npy(tmp_path / "a.npy", "f", (16,))
    assert "\n" not in str(refusal.value)


def test_compressed_arrays_and_objects_are_refused_and_nothing_is_executed(tmp_path):
    zeros = header("'|u1'", "(100000000,)") + bytes(100_000_000)
    with pytest.raises(ValueError, match="a.npy is compressed"):
        read_npz(npz(tmp_path / "bomb.npz", zeros, zipfile.ZIP_DEFLATED))
    content = header("'|O'", "(1,)") + pickle.dumps([Executes(tmp_path / "EXECUTED")])
    with pytest.raises(ValueError, match="holds objects"):
        read_npz(npz(tmp_path / "objects.npz", content))
    (tmp_path / "objects.npy").write_bytes(content)
    with pytest.raises(ValueError):
        map_npy(tmp_path / "objects.npy", "O", (1,))
    assert not (tmp_path / "EXECUTED").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_npz, lambda path: map_npy(path, "f", (1,))):
        with pytest.raises(ValueError, match="only regular files"):
            read(tmp_path / "pipe")


def test_a_form_names_kinds_and_lengths():
    array = np.zeros((2, 3), np.float32)
    for shape in ((2, 3), (None, 3), (None, None), (2, ...), (...,)):
        check_form(array, "f", shape)
    for kinds, shape in (("iu", (2, 3)), ("f", (3, 3)), ("f", (None,)), ("f", (3, ...))):
        with pytest.raises(ValueError, match="an array float32"):
            check_form(array, kinds, shape)


@pytest.mark.parametrize("top_k", [None, 3])
def test_statistics_whose_arrays_do_not_fit_each_other_are_no_statistics(tmp_path, top_k):
    rng, path = np.random.default_rng(0), tmp_path / "statistics.npz"
    statistics = PredictionStatistics(5, top_k=top_k)
    statistics.update(rng.dirichlet(np.ones(5), 20), rng.integers(0, 5, 20))
    statistics.save(path)
    whole = read_npz(path)
    others = [np.zeros(0), np.zeros((2, 2)), np.full(7, np.nan), np.array("text"), np.int64(-9)]
    beyond = np.full_like(whole["confusion_indices"], 2**30)
    changes = [(name, other) for name in whole for other in others]
    for name, other in [*changes, ("confusion_indices", beyond)]:
        np.savez(path, **(whole | {name: other}))
        try:
            PredictionStatistics.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert name in ("num_examples", "num_labelled", "top_k", "tail_sum", "schema"), name
