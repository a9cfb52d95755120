"""Errors of the machine end a run in one line. They are no damage of the data."""

import errno
import io
import os

import numpy as np
import pytest
from shardsets import write_uneven

from networks import pictures
from networks.npy import read_npy
from pipeline.config import Data, UserError
from pipeline.failures import explain
from trainer.data import open_shards, tars
from trainer.data import shards as shards_module

MACHINE = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EACCES]
SKIP = Data(damage="skip", damage_share=0.9, cache="none")


def failing(number):
    def fail(*arguments, **_):
        raise OSError(number, os.strerror(number), str(arguments[0]))

    return fail


@pytest.mark.parametrize("number", MACHINE)
@pytest.mark.parametrize("call", ["open", "pread"])
def test_reading_under_skip_stops_at_an_error_of_the_machine(tmp_path, monkeypatch, number, call):
    shards = open_shards(str(write_uneven(tmp_path, [4, 3])), SKIP, "train")
    assert shards.input_shape == (1, 6, 5)
    shards._close()
    monkeypatch.setattr(shards_module.os, call, failing(number))
    with pytest.raises(UserError) as error:
        shards.read(np.arange(7))
    monkeypatch.undo()
    line = str(error.value)
    assert len(line.splitlines()) == 1 and "train-000000.tar: cannot be read: " in line
    assert "this is no corruption of the data" in line


def test_a_file_that_is_gone_is_damage(tmp_path):
    shards = open_shards(str(write_uneven(tmp_path, [4, 3])), SKIP, "train")
    assert shards.input_shape == (1, 6, 5)
    shards._close()
    (tmp_path / "train-000001.tar").unlink()
    _, unreadable = shards.read(np.arange(7))
    assert sorted(unreadable) == [4, 5, 6]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_opening_under_skip_takes_no_error_of_the_machine_for_an_absent_shard(
    tmp_path, monkeypatch, number
):
    write_uneven(tmp_path, [4, 3], indexed=False)
    real = os.stat

    def stat(path, *arguments, **options):
        if str(path).endswith("000001.tar"):
            failing(number)(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises((UserError, OSError)) as error:
        open_shards(str(tmp_path), SKIP, "train")
    explained = explain(error.value)
    assert explained is not None and "train-000001.tar" in explained[1]


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_a_decoder_that_the_machine_stops_loses_no_sample(tmp_path, monkeypatch, error):
    shards = open_shards(str(write_uneven(tmp_path, [4])), SKIP, "train")
    assert shards.input_shape == (1, 6, 5)

    raised = [error, ValueError("broken")]

    def decoder(_):
        raise raised.pop(0)

    shards._decoders = dict.fromkeys(shards._decoders, decoder)
    with pytest.raises(UserError, match="sample 00000: cannot be read: "):
        shards.read([0])
    assert list(shards.read([0])[1]) == [0]


def test_a_picture_that_memory_has_no_room_for_is_no_broken_picture(monkeypatch):
    content = pictures.encode_png(np.zeros((1, 4, 4), np.uint8))

    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(pictures, "_upright", no_room)
    monkeypatch.setattr(pictures, "UNUSUAL_KEYS", _Everything())
    with pytest.raises(MemoryError, match="a picture of 4 x 4 does not fit into memory"):
        pictures.read_picture(content)


class _Everything:
    def isdisjoint(self, _):
        return False


def test_an_array_that_promises_more_than_it_holds_is_never_allocated():
    file = io.BytesIO()
    np.save(file, np.arange(6.0))
    assert read_npy(file.getvalue()).tolist() == [0, 1, 2, 3, 4, 5]
    lying = file.getvalue().replace(b"(6,), }         ", b"(999999999,), } ")
    with pytest.raises(ValueError, match="its header says 7999999992 bytes, 48 are there"):
        read_npy(lying)
    with pytest.raises(ValueError, match=r"its header says 48 bytes, 40 are there"):
        read_npy(file.getvalue()[:-8])


def test_a_tar_that_cannot_be_read_is_no_tar_without_samples(tmp_path, monkeypatch):
    write_uneven(tmp_path, [3])
    monkeypatch.setattr(tars, "open_regular", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        tars.scan_tar(tmp_path / "train-000000.tar")
