"""What comes of a store that stalls, cuts, lies or is busy. `make soak` has fifty sets."""

import fcntl
import io
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import pytest
from faulty_store import FAULTS, PRECIOUS, STALL_S, impatient, judge, judge_window, plant, store

from pipeline.config import Data, UserError
from pipeline.extras import install
from trainer.data import fetching, open_shards, private_files, transport


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "_leases", {})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_survived_and_one_that_stays_is_a_line(tmp_path, fault):
    verdicts = set()
    for seed in (0, 1):  # the second is hopeless
        place = tmp_path / str(seed)
        place.mkdir()
        verdicts.add(judge(place, seed, fault))
    assert verdicts == {"whole", "refused"}


@pytest.mark.parametrize("fault", ["stall", "cut", "busy", "longer", "changed"])
def test_through_a_window_a_fault_passes_or_is_a_line_behind_which_it_goes_on(tmp_path, fault):
    verdicts = [judge_window(tmp_path, seed, fault) for seed in (0, 1)]
    assert verdicts == ["whole", "refused"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_line_says_what_the_server_does(tmp_path, fault):
    (tmp_path / "store").mkdir()
    data = Data(fetch_dir=str(tmp_path / "fetched"))
    with store(tmp_path / "store") as server, impatient():
        server.faults["train-000002.tar"] = [fault] * 9
        with pytest.raises(UserError) as error:
            open_shards(server.url, data, "train")
        attempts = 6 if fault == "busy" else 3
        # On a busy machine the server's thread counts the last one after the client gave it up.
        deadline = time.monotonic() + 20
        while server.requests["train-000002.tar"] < attempts and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.requests["train-000002.tar"] == attempts
    line = str(error.value)
    assert line.startswith(f"{server.url}/train-000002.tar: cannot be fetched: ")
    assert FAULTS[fault] in line


def test_of_an_object_that_is_too_long_no_more_is_read_than_the_manifest_says(tmp_path):
    sent = []

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(10_000):
                    sent.append(self.wfile.write(bytes(1 << 16)))
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    received = 0
    with pytest.raises(transport.Broken, match="more comes than the 100000 bytes"):
        for block in transport.blocks(f"http://127.0.0.1:{server.server_address[1]}/x", 100_000):
            received += len(block)
    server.shutdown()
    server.server_close()
    thread.join()
    assert received <= 100_000 and sum(sent) < 64 << 20  # what sockets hold


def test_shards_come_side_by_side(tmp_path):
    (tmp_path / "store").mkdir()
    waiting = threading.Barrier(3)

    with store(tmp_path / "store") as server:
        handler = server.RequestHandlerClass.func
        original = handler.do_GET

        def together(self):
            if self.path.endswith(("0.tar", "1.tar", "2.tar")):
                waiting.wait(30)  # broken unless three are asked for at once
            original(self)

        handler.do_GET = together
        try:
            data = Data(fetch_dir=str(tmp_path / "fetched"))
            assert open_shards(server.url, data, "train").num_samples == 27
        finally:
            handler.do_GET = original
    assert not waiting.broken


def test_names_and_passwords_in_a_url_are_sent_and_not_part_of_the_host():
    request = transport._request("http://me:a%40b@host:81/x y?q=1")
    assert request.full_url == "http://host:81/x%20y?q=1" and request.host == "host:81"
    assert request.unredirected_hdrs["Authorization"] == "Basic bWU6YUBi"


def test_a_file_system_of_fsspec_is_read_to_the_length_that_is_said():
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://store/x.bin", "wb") as file:
        file.write(bytes(range(256)) * 9000)
    content = b"".join(transport.fsspec_blocks("memory://store/x.bin", 2_304_000))
    assert content == bytes(range(256)) * 9000
    with pytest.raises(transport.Broken, match="the store has 2304000 bytes, the manifest says 7"):
        list(transport.fsspec_blocks("memory://store/x.bin", 7))
    with pytest.raises(transport.Broken, match="there is no such object") as error:
        list(transport.fsspec_blocks("memory://store/y.bin", 0))
    assert error.value.is_final


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_a_store_without_its_package_and_command_names_the_extra(monkeypatch, tmp_path, scheme):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, transport.PACKAGES[scheme], None)
    with pytest.raises(UserError) as error:
        list(transport.blocks(f"{scheme}://bucket/train-0.tar"))
    assert str(error.value).endswith(f"neither is installed; {install('stores')}")


def test_a_byte_now_and_then_is_a_stall_as_well(monkeypatch):
    times = iter([0, STALL_S / 2, STALL_S * 2])
    monkeypatch.setattr(transport, "STALL_S", STALL_S)
    monkeypatch.setattr(transport.time, "monotonic", lambda: next(times))
    clock = transport._Clock()
    clock.count(10)
    with pytest.raises(transport.Broken, match="it stalls: 20 bytes"):
        clock.count(10)


@pytest.mark.parametrize("fault", ["stall", "drip_headers", "endless"])
def test_a_manifest_has_the_limits_of_a_shard(tmp_path, monkeypatch, fault):
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(fetching, "MANIFEST_BYTES", 1 << 20)
    data = Data(fetch_dir=str(tmp_path / "fetched"))
    with store(tmp_path / "store") as server, impatient():
        if fault == "endless":
            (tmp_path / "store" / "manifest.json").write_bytes(b" " * (3 << 20))
        else:
            server.faults["manifest.json"] = [fault] * 9
        with pytest.raises(UserError) as error:
            open_shards(server.url, data, "train")
    reason = "more comes than the 1048576 bytes that a manifest may have"
    assert ("it stalls" if fault != "endless" else reason) in str(error.value)
    assert f"{server.url}/manifest.json: cannot be fetched: " in str(error.value)


def test_a_planted_link_in_a_shared_directory_is_never_followed(tmp_path):
    (tmp_path / "store").mkdir()
    data = Data(fetch_dir=str(tmp_path / "fetched"))
    with store(tmp_path / "store") as server, impatient():
        precious = plant(tmp_path, tmp_path / "store", tmp_path / "fetched", server.url)
        assert open_shards(server.url, data, "train").num_samples == 27
    assert precious.read_bytes() == PRECIOUS
    assert not any(path.is_symlink() for path in (tmp_path / "fetched").glob("*.tar"))


def test_a_lock_that_is_never_let_go_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(private_files, "LOCK_S", 0.2)
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process holds this lock"):
            open_shards("http://127.0.0.1:9/x", Data(fetch_dir=str(tmp_path)), "train")


def test_a_command_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(transport, "SLOW_STALL_S", 0.3)
    with pytest.raises(transport.Broken):
        list(transport.blocks("pipe:exec sleep 60", 0))


def test_letters_that_curl_takes_for_patterns_are_escaped(monkeypatch):
    asked = []

    def gopen(url, mode):
        asked.append(url)
        return io.BytesIO(b"x")

    module = import_module("webdataset.gopen")  # the package has a function of that name
    monkeypatch.setattr(module, "gopen", gopen)
    monkeypatch.setattr(module, "set_options", lambda *_, **__: None)
    assert list(transport.command_blocks("ftp://host/a[1-9]{b,c}.tar", 0)) == [b"x"]
    assert asked == ["ftp://host/a%5B1-9%5D%7Bb,c%7D.tar"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:1/x", "data:,x"])
def test_a_redirection_leads_to_no_other_protocol(target):
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(transport.Broken, match="is not allowed") as error:
            list(transport.blocks(f"http://127.0.0.1:{server.server_address[1]}/a.tar"))
        assert error.value.is_final
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
