"""What is packed is unpacked no further than its size allows, in one line."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from shardsets import tar_files, write_tar

from pipeline.config import UserError
from trainer.commands.shards import main
from trainer.data import packing
from trainer.data.authoring.arrays import Selection, read_arrays
from trainer.data.authoring.reporting import Report
from trainer.data.authoring.tables import Columns, read_table
from trainer.data.packing import Within, most, unpacked

PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """A mebibyte in place of a gibibyte, so that a bomb may be small."""
    monkeypatch.setattr(packing, "FREE_BYTES", 1 << 20)


def refused(path) -> str:
    size = path.stat().st_size
    return f"{path}: its {size} bytes unpack to more than {most(size)}; "


@pytest.mark.parametrize("kind", PACKERS)
def test_a_packed_tar_that_is_all_zeros_is_refused_before_the_disk_is_full(tmp_path, kind):
    path = tmp_path / f"train.tar.{kind}"
    entry = tarfile.TarInfo("0.bin")
    entry.size = 40 << 20
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
        path.write_bytes(PACKERS[kind](file.getvalue()))
    assert path.stat().st_size * packing.RATIO < entry.size
    with pytest.raises(UserError) as error:
        main(["from-webdataset", str(path), "--out", str(tmp_path / "out"), "--val", "0"])
    assert str(error.value).startswith(refused(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", PACKERS)
def test_a_packed_tar_of_pictures_is_read_whole(tmp_path, kind):
    write_tar(tmp_path / "plain.tar", tar_files(range(12)))
    content = (tmp_path / "plain.tar").read_bytes()
    path = tmp_path / f"train.tar.{kind}"
    path.write_bytes(PACKERS[kind](content))
    with unpacked(path) as file:
        assert file.read() == content
    with unpacked(path) as file:
        assert file.read(10) + file.read1(7) + file.read() == content


def test_a_stream_ends_at_its_limit_and_not_a_byte_before(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    limit = most(5)
    assert limit == (1 << 20) + 500
    assert len(Within(io.BytesIO(bytes(limit)), path).read()) == limit
    with pytest.raises(UserError, match="unpack to more than"):
        Within(io.BytesIO(bytes(limit + 1)), path).read()


def test_a_packed_table_of_one_endless_column_is_refused(tmp_path):
    path = tmp_path / "texts.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"a,b\n" * (2 << 20)))
    with pytest.raises(UserError, match="unpack to more than") as error:
        read_table(str(path), Columns("text", "label", "", "", True), "utf-8", Report())
    assert str(error.value).startswith(refused(path))


@pytest.mark.parametrize("name", ["x.npz", "x.idx.gz"])
def test_packed_arrays_of_zeros_are_refused(tmp_path, name):
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez_compressed(path, x=np.zeros(40 << 20, np.uint8), y=np.zeros(4, np.int64))
        with zipfile.ZipFile(path) as archive:
            assert archive.infolist()[0].file_size > 40 << 20
    else:
        path.write_bytes(gzip.compress(bytes(40 << 20)))
    with pytest.raises(UserError) as error:
        read_arrays([str(path)], Selection("", ""), "", "utf-8", Report())
    assert str(error.value).startswith(refused(path))


def test_a_header_of_npy_that_is_too_deep_is_one_line_without_advice_to_trust_it(tmp_path):
    said = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {'(' * 5000}{')' * 5000}, }}\n"
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(said).to_bytes(2, "little") + said.encode())
    with pytest.raises(UserError) as error:
        read_arrays([str(path)], Selection("", ""), "", "utf-8", Report())
    line = str(error.value)
    assert line.startswith(f"{path}: cannot be read") and len(line.splitlines()) == 1
    assert "allow_pickle" not in line
