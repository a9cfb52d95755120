"""Shards that are fetched when they are read: a set that is larger than the disk allows."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from arriving import AMPLE, BATCH, FETCH_BYTES, SIZES, STEPS, data_of, digests, line, the_stream
from faulty_store import bytes_in, impatient, store
from shardsets import label_of, picture, write_uneven
from test_manifests import as_schema_1

from pipeline.config import Data, UserError
from pipeline.store import read_json
from trainer.data import MeasuringStream, Source, TrainingStream, fetching, open_shards, shuffled
from trainer.data.orders import Windows
from trainer.data.routing import open_routed, route
from trainer.data.sample_accounting import EpochAccounting
from trainer.data.tars import index_bytes, load_index

NAMES = [f"train-{number:06d}.tar" for number in range(len(SIZES))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_uneven(tmp_path_factory.mktemp("written"), SIZES)


@pytest.fixture
def far(tmp_path, monkeypatch, written):
    """A store of 24 shards."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "_leases", {})
    shutil.copytree(written, tmp_path / "store")
    with store(tmp_path / "store") as server, impatient():
        server.directory = tmp_path / "store"
        yield server


@pytest.fixture
def data(far, tmp_path):
    return data_of(far.url, tmp_path / "cache")


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


class MostBytes:
    """The most that a directory held while the block ran, looked at all the time."""

    def __init__(self, directory):
        self.directory, self.most, self._ended = Path(directory), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self):
        while not self._ended.is_set():
            if self.directory.exists():
                self.most = max(self.most, bytes_in(self.directory))
            time.sleep(0.001)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def requests(server) -> dict[str, int]:
    """{shard: requests}."""
    return {name: server.requests[name] for name in NAMES}


def whole(far, place) -> list[str]:
    """The lines of two epochs of a directory that holds all."""
    ample = the_stream(data_of(far.url, place / "ample", AMPLE))
    return [line(step, digests(ample.batch(step))) for step in range(STEPS)]


def on_disk(directory) -> TrainingStream:
    """The same stream of files, in the order of shards that stream. No server is asked."""
    shards = open_shards(str(directory), Data(cache="none"), "train")
    shards.windows = Windows(shards._shard_start, 2)
    return TrainingStream([Source(shards, shuffled(len(shards), 3), BATCH)], 5, "shift")


# A set that is larger than what may be held


def test_the_set_is_twice_the_limit(far):
    assert 2 * FETCH_BYTES < sum(path.stat().st_size for path in far.directory.glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_read_each_shard_once_an_epoch_within_the_limit(far, data, workers):
    with MostBytes(data.fetch_dir) as held:
        stream = the_stream(data.model_copy(update={"workers": workers}))
        account = EpochAccounting(stream, 0)
        for batch in account.watch(stream.loader(0, STEPS, workers=workers)):
            assert len(batch) == BATCH
            account.close_ended(lambda value: [value])  # every sample of an epoch was seen
    assert STEPS * BATCH == 2 * sum(SIZES)
    assert 0.5 * data.fetch_bytes < held.most <= data.fetch_bytes
    assert set(requests(far).values()) <= {1, 2} and requests(far)[NAMES[0]] == 1, "it is kept"


def test_the_batches_are_those_of_a_directory_that_holds_all(far, data, tmp_path):
    small = the_stream(data)
    ample = the_stream(data_of(far.url, tmp_path / "ample", AMPLE))
    assert small.sources[0].shards.arrival.startswith(
        "train: 24 shards behind URLs, 1.2 MiB, stream through"
    )
    assert ample.sources[0].shards.arrival.endswith(f"1.2 MiB, kept in {tmp_path}/ample")
    for step in (0, 1, 7, STEPS - 1, 3):
        assert digests(small.batch(step)) == digests(ample.batch(step))
    parts = [ample.batch(5, rank, 3) for rank in range(3)]
    batch = small.batch(5)
    for rank, part in enumerate(parts):
        assert part.ids.tolist() == batch.ids.tolist()[rank::3]
        assert (part.inputs == batch.inputs[rank::3]).all()


@pytest.mark.parametrize("limit, word", [(AMPLE, "kept in"), (1_700_000, "stream through")])
def test_what_fits_is_fetched_once_and_kept(far, tmp_path, limit, word):
    data = data_of(far.url, tmp_path / "ample", limit)
    assert word in open_shards(far.url, data, "train").arrival
    for _ in range(2):
        stream = the_stream(data)
        assert len(list(stream.loader(0, STEPS))) == STEPS
    assert set(requests(far).values()) == {1}


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (2, 0)])
def test_each_example_is_measured_once_and_each_shard_fetched_once(far, data, ranks, workers):
    shards = open_shards(far.url, data, "train")
    seen: list[int] = []
    for rank in range(ranks):
        for batch in MeasuringStream(shards, 7).loader(rank, ranks, workers=workers):
            seen += batch.ids.tolist()
            for number, label, pixels in zip(batch.ids, batch.labels, batch.inputs, strict=True):
                assert label == label_of(int(number))
                assert (pixels[0].numpy() == picture(int(number))).all()
    assert seen == list(range(sum(SIZES)))
    assert set(requests(far).values()) == {1}


def test_a_part_of_the_classes_reads_only_the_shards_that_hold_them(far, data):
    shards = open_shards(far.url, data, "train")
    assert shards.input_shape == (1, 6, 5)
    ids = np.arange(5 * 24, 9 * 24, 5)  # of shards 5 to 8
    assert [n for batch in MeasuringStream(shards, 4, ids).loader() for n in batch.ids] == [*ids]
    stream = TrainingStream([Source(shards, shuffled(ids, 1), 4)], 0)
    assert len(list(stream.loader(0, 9))) == 9
    assert {name for name, count in requests(far).items() if count} == {
        NAMES[0],
        *NAMES[5:9],
    }


def test_samples_of_everywhere_are_read_shard_by_shard(far, data):
    ids = np.random.default_rng(0).permutation(sum(SIZES))[:200]
    with MostBytes(data.fetch_dir) as held:
        inputs = open_shards(far.url, data, "train").inputs(ids)
    assert all((pixels[0] == picture(n)).all() for n, pixels in zip(ids, inputs, strict=True))
    assert held.most <= data.fetch_bytes and set(requests(far).values()) == {1}


def test_groups_are_routed_in_one_pass(far, data, tmp_path):
    shards = open_shards(far.url, data, "train")
    groups = {0: np.array([1, 2]), 1: np.array([2, 4])}
    assert route(shards, groups, tmp_path / "routed", "copy", say=lambda _: None) == {}
    copied, ids = open_routed(tmp_path / "routed" / "000", shards)
    expected = [n for n in range(sum(SIZES)) if label_of(n) in (1, 2)]
    assert len(ids) == len(expected)
    assert (copied.inputs([7])[0, 0] == picture(expected[7])).all()
    assert max(requests(far).values()) == 1


def test_two_runs_that_share_a_directory_keep_what_the_other_reads(far, data):
    data = data.model_copy(update={"fetch_bytes": 700_000})
    streams = [
        TrainingStream([Source(shards, shuffled(len(shards), seed), BATCH)], seed)
        for seed, shards in enumerate(open_shards(far.url, data, "train") for _ in range(2))
    ]
    ended: list[int] = []

    def read(stream):
        for step, batch in enumerate(stream.loader(0, STEPS // 2)):
            numbers = batch.ids.tolist()
            pixels = batch.inputs[:, 0].numpy()
            assert all((pixels[i] == picture(n)).all() for i, n in enumerate(numbers))
            ended.append(step)

    with MostBytes(data.fetch_dir) as held:
        threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ended) == 2 * (STEPS // 2) and held.most <= data.fetch_bytes


@pytest.mark.slow
def test_an_object_store_is_read_within_the_limit_and_once_an_epoch(written, tmp_path, monkeypatch):
    s3fs, server = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    monkeypatch.setattr(fetching, "_leases", {})
    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        environment = {
            "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        for path in written.iterdir():
            if path.name.endswith((".tar", ".json", ".npy")):
                files.put_file(str(path), f"bucket/set/{path.name}")
        asked: list[str] = []
        blocks = fetching.blocks
        counting = lambda url, size: asked.append(url) or blocks(url, size)  # noqa: E731
        monkeypatch.setattr(fetching, "blocks", counting)
        data = data_of("s3://bucket/set", tmp_path / "cache")
        with MostBytes(data.fetch_dir) as held:
            stream = the_stream(data)
            found = [line(step, digests(b)) for step, b in enumerate(stream.loader(0, STEPS))]
        of_disk = on_disk(written)
        assert found == [line(step, digests(of_disk.batch(step))) for step in range(STEPS)]
        assert held.most <= data.fetch_bytes
        shards = [url for url in asked if url.endswith(".tar")]
        assert max(shards.count(url) for url in shards) <= 2
        files.pipe_file("bucket/set/train-000005.tar", bytes(1000))
        data = data.model_copy(update={"fetch_dir": str(tmp_path / "another")})
        message = refused(lambda: list(the_stream(data).loader(0, STEPS)))
        assert "the store has 1000 bytes, the manifest says 51200" in message
    finally:
        store.stop()


# Faults


def test_faults_that_pass_leave_the_batches_as_they_are(far, data, tmp_path):
    for number, fault in enumerate(["cut", "busy", "changed", "stall", "longer", "unnoticed"]):
        far.faults[NAMES[2 * number]] = [fault, fault]
    stream = the_stream(data)
    found = [line(step, digests(stream.batch(step))) for step in range(STEPS // 2)]
    assert found == whole(far, tmp_path)[: STEPS // 2]


def test_a_shard_that_cannot_be_fetched_ends_the_run_with_a_line(far, data):
    stream = the_stream(data)
    far.faults[NAMES[7]] = ["cut"] * 99
    message = refused(lambda: list(stream.loader(0, STEPS)))
    assert f"{NAMES[7]}: cannot be fetched: its body is cut short" in message


@pytest.mark.parametrize("longer", [False, True])
def test_a_shard_that_the_server_changes_between_epochs_is_a_line(far, data, longer):
    stream = the_stream(data)
    batches = stream.loader(0, STEPS)
    for _ in range(STEPS // 2):
        next(batches)
    for path in far.directory.glob("*.tar"):  # a time or an ETag says nothing: the content does
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(bytes(content) + bytes(512 * longer))
    message = refused(lambda: list(batches))
    reason = "it is not what manifest.json describes"
    if longer:
        reason = "the server has 51712 bytes, the manifest says 51200"
    assert f"{far.url}/train-0000" in message and f"cannot be fetched: {reason}" in message


def test_a_directory_without_room_is_a_line(far, data, monkeypatch):
    monkeypatch.setattr(fetching, "ROOM_S", 0.2)
    stream = the_stream(data)
    Path(data.fetch_dir, "0123.json").write_bytes(bytes(350_000))  # nothing that may be evicted
    message = refused(lambda: list(stream.loader(0, STEPS)))
    assert "of shards in use that is more than data.fetch_bytes = 540000" in message


# Killed


def started(url: str, place: Path, ranks: int, workers: int) -> subprocess.Popen:
    program = Path(__file__).with_name("arriving.py")
    words = [program, url, place, place / "cache", ranks, workers]
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    return subprocess.Popen(command, start_new_session=True)


def lines(place: Path) -> list[str]:
    path = place / "seen"
    return path.read_text().splitlines() if path.exists() else []


def reached(place: Path) -> tuple[int, int]:
    """(the step of the last state, that of the last line)."""
    return read_json(place / "state.json")["step"], int(lines(place)[-1].split()[0])


def windows_between(far, state: int, last: int, workers: int) -> int:
    """Shards of the windows from a state to what was in flight at a step, and the next one's."""
    order = on_disk(far.directory).sources[0].order
    behind = (last + 1 + 2 * workers + 2) * BATCH
    _, end = order._window(min(behind, STEPS * BATCH) - 1)
    return len(order.need(state * BATCH, min(end + 1, STEPS * BATCH)).now)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, workers", [(2, 1)])
def test_a_run_killed_in_each_epoch_goes_on_exactly(far, tmp_path, ranks, workers):
    place = tmp_path / "run"
    place.mkdir()
    again = 0
    with MostBytes(place / "cache") as held:
        for enough in (STEPS // 4, 3 * STEPS // 4):
            process = started(far.url, place, ranks, workers)
            deadline = time.monotonic() + 60
            while len(set(lines(place))) < enough and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.002)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            again += windows_between(far, *reached(place), workers)
        assert started(far.url, place, ranks, workers).wait(60) == 0
    count = requests(far)
    assert set(lines(place)) == set(whole(far, tmp_path))
    # Once an epoch, and of each kill once more what was read since the last state, or was coming.
    assert sum(count.values()) <= 2 * len(SIZES) + again and max(count.values()) <= 4
    assert held.most <= FETCH_BYTES
    left = [path.name for path in (place / "cache").iterdir() if path.name.endswith(".part")]
    assert not left


def test_what_a_killed_process_left_is_cleared(far, data):
    cache = Path(data.fetch_dir)
    cache.mkdir()
    for name in ("0.tar.part", "0.tar.part.index.npz", "1.tar.index.npz", "lease-host-1-0"):
        (cache / name).write_bytes(bytes(100_000))
    stream = the_stream(data)
    assert len(list(stream.loader(0, STEPS))) == STEPS
    assert not list(cache.glob("[01].tar*")) and not (cache / "lease-host-1-0").exists()


# What is refused


def test_a_limit_below_what_is_read_at_once_is_refused(far, data):
    message = refused(
        open_shards, far.url, data.model_copy(update={"fetch_bytes": 200_000}), "train"
    )
    assert message.startswith("data.stream_shards = 2: two windows may take ")
    assert "bytes of train" in message and "more than data.fetch_bytes = 200000" in message
    assert not any(requests(far).values())


def test_a_shard_larger_than_the_limit_is_refused(far, data):
    message = refused(open_shards, far.url, data.model_copy(update={"fetch_bytes": 9_000}), "train")
    assert message.startswith(f"{far.url}/{NAMES[0]}: one shard of ")
    assert "take more than data.fetch_bytes = 9000" in message and not any(requests(far).values())


def test_without_a_window_the_error_names_it(far, data):
    data = data.model_copy(update={"stream_shards": 0})
    assert "with data.stream_shards = N they stream" in refused(open_shards, far.url, data, "train")


def test_a_manifest_without_the_classes_of_samples_is_refused(far, data):
    as_schema_1(far.directory)
    assert "needs a manifest with the classes" in refused(open_shards, far.url, data, "train")


def test_another_label_than_the_manifests_is_refused(far, data):
    data = data.model_copy(update={"label": "json:x"})
    message = refused(open_shards, far.url, data, "train")
    assert "has the labels of 'cls', data.label is 'json:x'" in message


def test_unlabelled_shards_stream_as_well(far, data):
    data = data.model_copy(update={"label": "", "input": "png"})
    shards = open_shards(far.url, data, "train")
    assert (shards.labels == -1).all() and (shards.inputs([40])[0, 0] == picture(40)).all()


def test_no_thread_is_left_behind(far, data):
    stream = the_stream(data)
    stream.batch(0)
    del stream
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not [each for each in threading.enumerate() if each.name == "shards"]:
            return
        time.sleep(0.01)
    raise AssertionError([each.name for each in threading.enumerate()])


def test_the_limit_counts_the_indexes(far, data):
    shards = open_shards(far.url, data, "train")
    assert shards.input_shape == (1, 6, 5)
    (index,) = Path(data.fetch_dir).glob("*.tar.index.npz")
    loaded, _ = load_index(str(index).removesuffix(".index.npz"))
    assert index.stat().st_size <= index_bytes(loaded) < 4 * index.stat().st_size
