"""A store of shards behind HTTP that fails in seeded ways, and what comes of a set fetched from it.

    python tests/trainer/data/faulty_store.py 50
        fetches 50 sets whole and 50 through a window, each through faults of its own:
        `make soak`

Half of the directories that they are fetched to are shared with somebody who planted links there.
A fault befalls one request.  Up to two in a row are survived. Three or more in a row are one line.
Whatever happens, a shard is whole and the manifest's or it is not there.
"""

import hashlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import numpy as np  # noqa: E402
from campaigns import Asked, asked  # noqa: E402
from shardsets import picture, write_uneven  # noqa: E402

from pipeline.config import Data, UserError  # noqa: E402
from trainer.data import (  # noqa: E402
    Source,
    TrainingStream,
    fetching,
    open_shards,
    shuffled,
    transport,
)

SIZES = [4, 9, 5, 6, 3]
FAULTS = {
    "silent": "the connection breaks",
    "refused": "the connection breaks",
    "stall": "it stalls",
    "drip": "it stalls",
    "cut": "its body is cut short",
    "unnoticed": "its body is cut short",
    "busy": "the server answers 503",
    "longer": "bytes, the manifest says",
    "shorter": "bytes, the manifest says",
    "more": "more comes than",
    "changed": "it is not what manifest.json describes",
    "drip_headers": "it stalls",
    "babble": "BadStatusLine",
    "many_headers": "got more than 100 headers",
}
# Those that befall a manifest, whose length and content nobody knows beforehand.
OF_MANIFESTS = ("silent", "refused", "stall", "drip", "cut", "busy", "drip_headers", "babble")
PRECIOUS = b"not to be overwritten"
STALL_S = 0.6  # in place of a minute
SURVIVED = 2


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory. faults[path] befall the requests for a path, one each."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        faults = self.server.faults.get(name)
        if not faults:
            super().do_GET()
            return
        getattr(self, faults.pop(0))(Path(self.translate_path(self.path)).read_bytes())

    def answer(self, content, length=None):
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def silent(self, content):
        self.close_connection = True

    def refused(self, content):
        self.connection.close()
        self.close_connection = True

    def stall(self, content):
        self.answer(content[: len(content) // 2], len(content))
        self.server.closing.wait(4 * STALL_S)

    def drip(self, content):
        self.answer(b"", len(content))
        for byte in content[:40]:
            self.wfile.write(bytes([byte]))
            if self.server.closing.wait(STALL_S / 8):
                return

    def cut(self, content):
        self.answer(content[: len(content) // 2], len(content))
        self.close_connection = True

    def unnoticed(self, content):
        self.answer(content[: len(content) // 2])
        self.close_connection = True

    def busy(self, content):
        self.send_error(503)

    def longer(self, content):
        self.answer(content + b"more", len(content) + 4)

    def shorter(self, content):
        self.answer(content[:-512], len(content) - 512)

    def more(self, content):
        self.answer(content + bytes(5000))
        self.close_connection = True

    def changed(self, content):
        self.answer(content[::-1], len(content))

    def drip_headers(self, content):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not self.server.closing.wait(STALL_S / 4):
            self.wfile.write(b"z")

    def babble(self, content):
        self.wfile.write(b"\x1b[2J\x07 no HTTP at all \r\n\r\n" + content)
        self.close_connection = True

    def many_headers(self, content):
        self.send_response(200)
        for number in range(500):
            self.send_header(f"X-{number}", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, ValueError, OSError):  # the reader has gone away
            pass


@contextmanager
def store(directory: Path):
    """A server of a set of shards, of five where there is none. .url, .faults {name: [...]},
    .requests Counter."""
    if not (directory / "manifest.json").exists():
        write_uneven(directory, SIZES)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
    server.daemon_threads = True
    server.faults, server.requests, server.closing = {}, Counter(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def impatient():
    """Limits of a test in place of those for users."""
    before = transport.STALL_S, fetching.PAUSE_S
    transport.STALL_S, fetching.PAUSE_S = STALL_S, 0.001
    try:
        yield
    finally:
        transport.STALL_S, fetching.PAUSE_S = before


def whole(directory: Path, fetched: Path, parts: bool = False) -> None:
    """AssertionError unless every fetched shard is one of the store's, byte for byte.

    parts: some may be on their way.
    """
    known = {hashlib.sha256(path.read_bytes()).digest() for path in directory.glob("*.tar")}
    for path in filter(fetching.is_ours, fetched.glob("*.tar")):
        assert hashlib.sha256(path.read_bytes()).digest() in known, path
    assert parts or not list(fetched.glob("*.part*")), "a part is left"


def plant(place: Path, directory: Path, fetched: Path, url: str) -> Path:
    """Links where files of known names are written. What they lead to."""
    precious = place / "precious"
    precious.write_bytes(PRECIOUS)
    fetched.mkdir(exist_ok=True)
    manifest = json.loads((directory / "manifest.json").read_text())
    names = [f"{fetching._key(f'{url}/manifest.json')}.json", ".lock", "lease-planted"]
    for shard in manifest["splits"]["train"]["shards"]:
        names.append(f"{fetching._key(f'{url}/' + shard['name'], shard['sha256'])}.tar")
    for name in [*names, *(f"{name}.part" for name in names)]:
        (fetched / name).symlink_to(precious)
    return precious


def judge(place: Path, seed: int, fault: str = "") -> str:
    """Fetch one set through seeded faults (or one kind of fault): "whole" or "refused"."""
    chance = random.Random(seed)
    directory, fetched = place / "store", place / f"fetched-{seed}"
    directory.mkdir(exist_ok=True)
    data = Data(fetch_dir=str(fetched), cache="none")
    with store(directory) as server, impatient():
        hopeless = chance.random() < 0.3
        for number in chance.sample(range(len(SIZES)), 3):
            count = SURVIVED if not hopeless else 2 * fetching.BUSY_ATTEMPTS
            kinds = [fault or chance.choice(list(FAULTS)) for _ in range(count)]
            if hopeless:
                kinds = kinds[:1] * count
            server.faults[f"train-{number:06d}.tar"] = kinds
        if not fault and chance.random() < 0.5:
            server.faults["manifest.json"] = [chance.choice(OF_MANIFESTS) for _ in range(SURVIVED)]
        precious = plant(place, directory, fetched, server.url) if chance.random() < 0.5 else None
        start = time.monotonic()
        try:
            shards = open_shards(server.url, data, "train")
        except UserError as error:
            assert hopeless, error
            line = str(error)
            assert len(line.splitlines()) == 1 and "cannot be fetched: " in line, line
            assert any(reason in line for reason in FAULTS.values()), line
            verdict = "refused"
        else:
            assert not hopeless, "what never came whole was opened"
            pixels = shards.inputs(np.arange(sum(SIZES)))
            assert all((pixels[n, 0] == picture(n)).all() for n in range(sum(SIZES)))
            # Each fault cost one request, and nothing was asked for twice without need.
            assert all(server.requests[name] <= 1 + SURVIVED for name in server.requests)
            verdict = "whole"
        assert time.monotonic() - start < 60, "hangs"
        if precious is not None:
            assert precious.read_bytes() == PRECIOUS, "a planted link was followed"
        whole(directory, fetched)
        if verdict == "refused":  # and when the store has recovered
            server.faults.clear()
            assert open_shards(server.url, data, "train").num_samples == sum(SIZES)
    for lease in fetching._leases.values():
        lease.close()
    fetching._leases.clear()
    return verdict


def judge_window(place: Path, seed: int, fault: str = "") -> str:
    """As `judge`, of two epochs through a window. Once more from where a fault ended them."""
    chance = random.Random(seed)
    directory, fetched = place / "store", place / f"window-{seed}"
    directory.mkdir(exist_ok=True)
    limit = 100_000  # the set takes 110,000
    data = Data(fetch_dir=str(fetched), cache="none", stream_shards=1, fetch_bytes=limit)
    with store(directory) as server, impatient():
        shards = open_shards(server.url, data, "train")
        stream = TrainingStream([Source(shards, shuffled(len(shards), seed), 3)], seed)
        hopeless, steps = chance.random() < 0.3, 2 * len(shards) // 3
        befallen = {step: chance.sample(range(1, len(SIZES)), 2) for step in (0, steps // 2)}
        step, verdict = 0, "whole"
        while step < steps:
            for number in befallen.pop(step, []):
                kind = fault or chance.choice(list(FAULTS))
                count = SURVIVED if not hopeless else 2 * fetching.BUSY_ATTEMPTS
                server.faults[f"train-{number:06d}.tar"] = [kind] * count
            try:
                batch = stream.batch(step, last_step=steps)
            except UserError as error:
                line = str(error)
                assert hopeless and len(line.splitlines()) == 1 and "cannot be fetched: " in line
                assert any(reason in line for reason in FAULTS.values()), line
                server.faults.clear()
                verdict = "refused"
                continue
            expected = stream.sources[0].order(np.arange(3 * step, 3 * step + 3))
            assert batch.ids.tolist() == [expected[turn] for turn in stream._turn]
            for number, pixels in zip(batch.ids.tolist(), batch.inputs, strict=True):
                assert (pixels[0].numpy() == picture(number)).all()
            assert bytes_in(fetched) <= limit
            step += 1
        if not hopeless:
            most = 2 + 2 * SURVIVED  # once an epoch, and each fault cost one request
            assert all(server.requests[f"train-{n:06d}.tar"] <= most for n in range(len(SIZES)))
        whole(directory, fetched, parts=True)
    del stream, shards
    for lease in fetching._leases.values():
        lease.close()
    fetching._leases.clear()
    return verdict


def bytes_in(directory: Path) -> int:
    """Of all files but the leases' few words."""
    total = 0
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # evicted meanwhile, or a part that has got its name
            if not path.name.startswith("lease-"):
                total += path.stat().st_size
    return total


def soak(given: Asked) -> None:
    for name, judged in (("whole", judge), ("through a window", judge_window)):
        verdicts: Counter = Counter()
        for seed in given.numbers:
            with tempfile.TemporaryDirectory() as directory:
                verdicts[judged(Path(directory), seed)] += 1
        is_few = len(given.trials) < 10
        assert is_few or min(verdicts["whole"], verdicts["refused"]) > 0, verdicts
        print(f"sets {name} through faults of their store {given}: {dict(verdicts)}")


if __name__ == "__main__":
    STALL_S = 1.5  # a long campaign meets a busy machine, whose healthy answers take a while too
    soak(asked(50))
