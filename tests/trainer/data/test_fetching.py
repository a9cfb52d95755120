"""Shards behind URLs, served by a real server."""

import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from shardsets import CLASSES, picture, tar_files, write_tar, write_uneven

from pipeline.config import Data, UserError
from trainer.commands.shards import main
from trainer.data import fetching, open_shards
from trainer.data.patterns import url_name


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory. `server.faults` befall the first requests for shards, one each."""

    def do_GET(self):
        self.server.requests.append(self.path)
        fault = None
        if self.server.faults and self.path.endswith(".tar"):
            fault = self.server.faults.pop(0)
        if fault == "silent":
            self.close_connection = True
        elif fault == "short":
            self.send_half(with_length=True)
        elif fault == "unnoticed":
            self.send_half(with_length=False)
        elif fault == "busy":
            self.send_error(503)
        else:
            super().do_GET()

    def send_half(self, with_length):
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        if with_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server of `write_uneven([4, 9, 5])`. .url, .directory, .faults, .requests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    directory = tmp_path / "served"
    directory.mkdir()
    write_uneven(directory, [4, 9, 5])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
    server.faults, server.requests = [], []
    server.directory = directory
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_leases", {})
    monkeypatch.setattr(fetching, "PAUSE_S", 0.001)
    return Data(fetch_dir=str(tmp_path / "fetched"))


def requested(server) -> list[str]:
    """The names of the shards that were requested."""
    return [path.rpartition("/")[2] for path in server.requests if ".tar" in path]


def fetched(data) -> list[Path]:
    return sorted(Path(data.fetch_dir).glob("*.tar"))


def partial_files(data) -> list[Path]:
    return list(Path(data.fetch_dir).glob("*.part"))


def refusal(call, *arguments) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def forget(data) -> None:
    """As if the process that fetched the shards had ended."""
    for lease in fetching._leases.values():
        lease.close()
    fetching._leases.clear()


BRACES = "{}/train-{{000000..000002}}.tar"


@pytest.mark.parametrize(
    "pattern", [BRACES, "{0}/train-000000.tar::{0}/train-{{000001..000002}}.tar", "{}", "{}/"]
)
def test_shards_behind_urls_are_those_on_disk(served, data, pattern):
    local = open_shards(str(served.directory), Data(), "train")
    remote = open_shards(pattern.format(served.url), data, "train")
    assert remote.fingerprint == local.fingerprint and remote.class_names == CLASSES
    ids = np.arange(18)
    assert (remote.inputs(ids) == local.inputs(ids)).all() and remote.keys(ids) == local.keys(ids)
    # Imported here, because the processes that are started below need no torch.
    from trainer.data import MeasuringStream

    batches = list(MeasuringStream(remote, 4).loader())
    assert sorted(int(i) for batch in batches for i in batch.ids) == list(range(18))


def test_the_array_beside_a_manifest_is_fetched_once_and_checked(served, data):
    local = open_shards(str(served.directory), Data(), "train")
    for _ in range(2):
        remote = open_shards(served.url, data, "train")
        assert remote.labels.tolist() == local.labels.tolist() and not remote.labels.flags.owndata
    (name,) = (path.name for path in served.directory.glob("*.labels-*"))
    assert served.requests.count(f"/{name}") == 1
    (copy,) = Path(data.fetch_dir).glob("*.npy")
    copy.unlink()
    (served.directory / name).write_bytes(bytes(200))
    message = refusal(open_shards, served.url, data, "train")
    assert f"/{name}: cannot be fetched: it is not what manifest.json describes" in message


def test_each_shard_is_fetched_once(served, data):
    for _ in range(2):
        open_shards(BRACES.format(served.url), data, "train")
    assert sorted(requested(served)) == [f"train-{n:06d}.tar" for n in range(3)]


def test_fetched_shards_need_their_server_no_more(served, data, capsys):
    pattern = BRACES.format(served.url)
    fingerprint = open_shards(pattern, data, "train").fingerprint
    served.shutdown()
    served.server_close()
    assert open_shards(pattern, data, "train").fingerprint == fingerprint
    assert "the connection is refused; its copy in" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["silent", "short", "unnoticed"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_server_that_fails_twice_is_tried_a_third_time(served, data, fault, manifest):
    if not manifest:
        (served.directory / "manifest.json").unlink()
        data = data.model_copy(update={"classes": 7})
    served.faults += [fault, fault]
    shards = open_shards(f"{served.url}/train-000001.tar", data, "train")
    assert requested(served) == ["train-000001.tar"] * 3
    assert (shards.inputs([8])[0, 0] == picture(12)).all()


@pytest.mark.slow  # curl waits two seconds
def test_a_busy_server_is_tried_again(served, data):
    served.faults += ["busy"]
    assert open_shards(f"{served.url}/train-000001.tar", data, "train").num_samples == 9


@pytest.mark.parametrize("fault", ["silent", "short", "unnoticed"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_shard_that_stays_cut_short_is_refused_and_leaves_no_file(served, data, fault, manifest):
    if not manifest:
        (served.directory / "manifest.json").unlink()
        data = data.model_copy(update={"classes": 7})
    served.faults += [fault] * 3
    message = refusal(open_shards, f"{served.url}/train-000001.tar", data, "train")
    assert message.startswith(f"{served.url}/train-000001.tar: cannot be fetched: ")
    assert not fetched(data) and not partial_files(data)


def test_a_shard_that_is_not_the_manifests_is_refused(served, data):
    write_tar(served.directory / "train-000001.tar", tar_files(range(30, 39)))
    message = refusal(open_shards, BRACES.format(served.url), data, "train")
    assert "train-000001.tar: cannot be fetched: it is not what manifest.json describes" in message
    assert len(fetched(data)) == 2 and not partial_files(data)


def test_changed_shards_are_fetched_again(served, data):
    old = open_shards(BRACES.format(served.url), data, "train")
    write_uneven(served.directory, [2, 9, 5])
    new = open_shards(BRACES.format(served.url), data, "train")
    assert (old.num_samples, new.num_samples) == (18, 16) and old.inputs([17]).shape == (1, 1, 6, 5)


NOT_FOUND = "cannot be fetched: the server answers 404 File not found"
NO_SERVER = "cannot be fetched: the connection is refused"


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{url}/train-000009.tar", "its manifest has no shard 'train-000009.tar'"),
        ("{url}/sub/train-0.tar", f"/sub/train-0.tar: {NOT_FOUND}"),
        ("{url}/sub", "/sub has no manifest.json: name its shards"),
        ("{url}/train-*.tar", "a URL cannot have *"),
        ("{url}/train-{{0..", "the braces do not match"),
        ("{url}/train-000000.tar::{url}/train-{{000000..000002}}.tar", "/train-000000.tar 2 times"),
        ("http://127.0.0.1:9/train-0.tar", f":9/manifest.json: {NO_SERVER}"),
        ("pipe:exit 3", "pipe:exit 3: cannot be fetched: exit code 3"),
        ("pipe:true", "pipe:true: cannot be fetched: it is empty"),
        ("nonsense:thing", "no train shard matches"),
    ],
)
def test_a_wrong_url_gets_one_line(served, data, pattern, message):
    assert message in refusal(open_shards, pattern.format(url=served.url), data, "train")


def test_a_wrong_url_is_one_line_and_exit_code_2_of_the_command(served, data):
    url = f"{served.url}/sub/train-0.tar"
    command = [sys.executable, "-P", "-m", "trainer", "shards", "validate", url]
    command += ["--fetch-dir", data.fetch_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{url}: cannot be fetched" in done.stderr


def test_compressed_shards_are_refused_with_the_remedy(served, data):
    (served.directory / "manifest.json").unlink()
    path = served.directory / "train-000000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    options = data.model_copy(update={"classes": 7})
    url = f"{served.url}/train-000000.tar"
    message = refusal(open_shards, url, options, "train")
    assert "is compressed; `pipe:curl -sf URL | gunzip`" in message
    unpacked = open_shards(f"pipe:curl -sf {url} | gunzip", options, "train")
    assert unpacked.num_samples == 4


# Pipes, and a manifest that does not lie beside its shards


def test_a_pipe_is_fetched_once_and_read_like_a_file(tmp_path, data):
    write_uneven(tmp_path, [4, 5])
    options = data.model_copy(update={"classes": 7})
    url = f"pipe:cat {tmp_path}/train-{{000000..000001}}.tar"
    shards = open_shards(url, options, "train")
    assert shards.num_samples == 9 and (shards.inputs([8])[0, 0] == picture(8)).all()
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    assert open_shards(url, options, "train").fingerprint == shards.fingerprint


def test_the_config_names_the_manifest_of_a_pipe(served, data, tmp_path):
    url = f"pipe:cat {served.directory}/train-{{000000..000002}}.tar"
    assert "set data.classes" in refusal(open_shards, url, data, "train")
    for manifest in (str(served.directory / "manifest.json"), f"{served.url}/manifest.json"):
        shards = open_shards(url, data.model_copy(update={"manifest": manifest}), "train")
        assert shards.class_names == CLASSES and shards.num_samples == 18
    write_tar(served.directory / "train-000001.tar", tar_files(range(9)))
    forget(data)
    shutil.rmtree(data.fetch_dir)
    options = data.model_copy(update={"manifest": manifest})
    message = refusal(open_shards, url, options, "train")
    assert "it is not what manifest.json describes" in message
    options = data.model_copy(update={"manifest": str(tmp_path / "absent.json")})
    assert "data.manifest = " in refusal(open_shards, url, options, "train")


@pytest.mark.parametrize(
    "url, name",
    [
        ("http://host/d/train-0.tar", "train-0.tar"),
        ("https://host/train-0.tar?X-Sig=a/b.c", "train-0.tar"),
        ("pipe:ssh host 'cat /data/train-0.tar'", "train-0.tar"),
        ("s3://bucket/a.b/train-0.tar", "train-0.tar"),
        ("pipe:curl -sf http://host/x.tar.gz | gunzip", "x.tar.gz"),
        ("pipe:make shards", "pipe:make shards"),
    ],
)
def test_a_url_is_known_to_its_manifest_by_its_file_name(url, name):
    assert url_name(url) == name


# The bounded directory


def total_size(paths) -> int:
    return sum(path.stat().st_size for path in paths)


def test_the_least_recently_used_shard_makes_room(served, data):
    size = total_size(served.directory / f"train-{n:06d}.tar" for n in range(3))
    indexes = 3 * 8_000  # what opening keeps beside each shard
    options = data.model_copy(update={"fetch_bytes": size - 1 + indexes})
    for turn, shard in enumerate((0, 1, 0)):
        open_shards(f"{served.url}/train-{shard:06d}.tar", options, "train")
        forget(data)
        for path in fetched(data):  # a clock that ticks between uses
            used = path.stat().st_atime_ns - 10**9 * (3 - turn)
            os.utime(path, ns=(used, path.stat().st_mtime_ns))
    limit = total_size(Path(data.fetch_dir).iterdir()) + 10_000
    options = data.model_copy(update={"fetch_bytes": limit})
    open_shards(f"{served.url}/train-000002.tar", options, "train")
    before = requested(served)
    open_shards(f"{served.url}/train-000000.tar", options, "train")
    assert requested(served) == before == [f"train-{n:06d}.tar" for n in (0, 1, 2)]
    assert len(fetched(data)) == 2


def test_no_shard_of_a_set_in_use_is_evicted(served, data):
    options = data.model_copy(update={"fetch_bytes": 45_000})
    shards = open_shards(f"{served.url}/train-{{000000..000001}}.tar", options, "train")
    message = refusal(open_shards, f"{served.url}/train-000002.tar", options, "train")
    assert "in use" in message and "more than data.fetch_bytes = 45000" in message
    assert shards.inputs(np.arange(13)).shape == (13, 1, 6, 5)
    forget(data)
    assert open_shards(f"{served.url}/train-000002.tar", options, "train").num_samples == 5


def test_another_process_keeps_what_it_uses(served, data):
    options = data.model_copy(update={"fetch_bytes": 45_000})
    pattern = f"{served.url}/train-{{000000..000001}}.tar"
    context = multiprocessing.get_context("spawn")
    opened, enough = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(pattern, options, opened, enough))
    process.start()
    assert opened.wait(60)
    assert "in use" in refusal(open_shards, f"{served.url}/train-000002.tar", options, "train")
    enough.set()
    process.join()
    forget(data)
    assert open_shards(f"{served.url}/train-000002.tar", options, "train").num_samples == 5


def _hold(pattern, data, opened, enough):
    shards = open_shards(pattern, data, "train")
    opened.set()
    enough.wait(60)
    assert shards.inputs([0]).shape == (1, 1, 6, 5)


@pytest.mark.slow
def test_processes_that_open_at_once_fetch_each_shard_once(served, data):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (BRACES.format(served.url), data, results)
    processes = [context.Process(target=_open, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [18, 18, 18]
    for process in processes:
        process.join()
    assert sorted(requested(served)) == [f"train-{n:06d}.tar" for n in range(3)]


def _open(pattern, data, results):
    results.put(len(open_shards(pattern, data, "train").inputs(np.arange(18))))


def test_a_set_that_the_manifest_says_is_too_large_is_refused_before_anything_is_fetched(
    served, data
):
    options = data.model_copy(update={"fetch_bytes": 20_000})
    assert "3 shards of" in refusal(open_shards, BRACES.format(served.url), options, "train")
    assert requested(served) == []


def test_a_shard_larger_than_the_limit_is_refused_while_it_comes(served, data, tmp_path):
    large = tmp_path / "large.tar"
    write_tar(large, [("a.cls", b"0"), ("a.npy", os.urandom(3 << 20))])
    options = data.model_copy(update={"fetch_bytes": 2 << 20, "classes": 7})
    message = refusal(open_shards, f"pipe:cat {large}", options, "train")
    assert "more than data.fetch_bytes = 2097152" in message
    assert not partial_files(data) and not fetched(data)


def test_a_disk_smaller_than_one_shard_is_one_clear_error(served, data, monkeypatch):
    usage = shutil._ntuple_diskusage(10_000, 5_000, 5_000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    message = refusal(open_shards, BRACES.format(served.url), data, "train")
    assert "has 5000 left; set data.fetch_dir to a place on a larger one" in message
    assert not fetched(data)


def test_partial_files_of_a_killed_process_are_removed(served, data):
    Path(data.fetch_dir).mkdir()
    (Path(data.fetch_dir) / "0123456789abcdef.tar.part").write_bytes(b"half")
    open_shards(BRACES.format(served.url), data, "train")
    assert not partial_files(data)


# The commands


def test_validate_reads_urls(served, data, capsys):
    arguments = ["validate", BRACES.format(served.url), "--fetch-dir", data.fetch_dir]
    assert main(arguments) == 0
    assert main(["validate", served.url, "--split", "train", "--fetch-dir", data.fetch_dir]) == 0
    (served.directory / "manifest.json").unlink()
    content = tar_files(range(5))[:-1]
    write_tar(served.directory / "train-000001.tar", content)
    forget(data)
    shutil.rmtree(data.fetch_dir)
    assert main(arguments) == 1
    message = f"{served.url}/train-000001.tar: 00004 has only the member .cls"
    assert message in capsys.readouterr().err


def test_index_describes_shards_behind_urls(served, data, tmp_path):
    expected = json.loads((served.directory / "manifest.json").read_text())
    (served.directory / "manifest.json").unlink()
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    out = tmp_path / "described"
    arguments = ["index", BRACES.format(served.url), "--classes", str(tmp_path / "names.txt")]
    assert "say with --out where" in refusal(main, arguments)
    assert main([*arguments, "--out", str(out), "--fetch-dir", data.fetch_dir]) == 0
    written = json.loads((out / "manifest.json").read_text())
    assert (written["classes"], written["splits"]) == (expected["classes"], expected["splits"])
    options = data.model_copy(update={"manifest": str(out / "manifest.json")})
    assert open_shards(BRACES.format(served.url), options, "train").num_samples == 18


@pytest.mark.parametrize("packed", [False, True])
def test_from_webdataset_rewrites_what_lies_behind_urls(served, data, tmp_path, packed):
    if packed:
        path = served.directory / "train-000001.tar"
        path.write_bytes(gzip.compress(path.read_bytes()))
    out = tmp_path / "out"
    source = ["from-webdataset", BRACES.format(served.url), "--fetch-dir", data.fetch_dir]
    assert main([*source, "--out", str(out)]) == 0
    assert open_shards(str(out), Data(), "train").num_samples == 18
    served.faults += ["short"] * 9
    forget(data)
    shutil.rmtree(data.fetch_dir)
    options = ["--out", str(tmp_path / "b"), "--damage", "skip"]
    assert "cannot be fetched" in refusal(main, [*source, *options])
