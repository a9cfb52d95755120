"""The content behind a URL, block by block: no more than is expected, and no longer than it moves.

`http:` and `https:` are read here, `s3:`, `gs:` and `hf:` through fsspec where the package for them
is installed, everything else by webdataset's opener, which runs a command.
"""

from __future__ import annotations

import base64
import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pipeline.config import UserError
from pipeline.extras import is_installed, remedy

BLOCK = 1 << 20
STALL_S = 60.0  # a server that sends less than STALL_BYTES in this time has stalled
STALL_BYTES = 64 * 1024
SLOW_STALL_S = 600.0  # as long may a block of a command or of a store's client take
BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP: worth asking again after a while
# The package that reads a scheme, and the command that webdataset runs otherwise.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
COMMANDS = {"s3": "aws", "gs": "gsutil", "hf": "curl"}


class Broken(OSError):
    """What came is not what was asked for.

    answered: the server did answer that it will not give it.  busy: it may in a while.
    """

    def __init__(self, reason: str, answered: bool = False, busy: bool = False):
        super().__init__(reason)
        self.answered = answered
        self.busy = busy

    @property
    def is_final(self) -> bool:
        """Whether asking again is of no use."""
        return self.answered and not self.busy


def longest_wait(url: str) -> float:
    """How many seconds a block of the URL's content may take, the first one too.

    What drips within a block, as a header may, has no other limit.
    """
    if url.startswith(("http:", "https:")):
        return 2 * STALL_S + 1
    return SLOW_STALL_S


def blocks(url: str, size: int = 0) -> Generator[bytes, None, None]:
    """The content of a URL.

    size: its bytes, if they are known, else 0.

    Raises Broken for an answer that is none, is cut short, stalls or has another length, and
    UserError where a package is needed that is not installed.
    """
    scheme = url.partition(":")[0]
    return SCHEMES.get(scheme, command_blocks)(url, size)


# HTTP


class _WithinHttp(urllib.request.HTTPRedirectHandler):
    """A redirection leads to no other protocol: urllib itself would go on to ftp:."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("http:", "https:")):
            reason = f"{msg} - Redirection to url '{newurl}' is not allowed"
            raise urllib.error.HTTPError(newurl, code, reason, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def http_blocks(url: str, size: int) -> Generator[bytes, None, None]:
    """As `blocks`."""
    try:
        opener = urllib.request.build_opener(_WithinHttp)
        with opener.open(_request(url), timeout=STALL_S) as response:
            yield from _body(response, size)
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}".strip()
        error.close()
        raise Broken(reason, answered=True, busy=error.code in BUSY) from None
    except urllib.error.URLError as error:
        raise _unreached(error.reason) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreached(error) from None


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    plain = quote(urlunsplit(parts._replace(netloc=host)), safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(plain, headers={"User-Agent": "referral"})
    if parts.username is not None:
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        word = base64.b64encode(words.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {word}")
    return request


def _body(response: http.client.HTTPResponse, size: int) -> Generator[bytes, None, None]:
    said = response.headers.get("Content-Length", "")
    expected = int(said) if said.isdigit() else size
    if size and expected != size:
        raise Broken(f"the server has {expected} bytes, the manifest says {size}")
    received, clock = 0, _Clock()
    while block := response.read1(BLOCK):
        received += len(block)
        if size and received > size:
            raise Broken(f"more comes than the {size} bytes that the manifest says")
        clock.count(len(block))
        yield block
    if received < expected:
        raise Broken(f"its body is cut short: {received} of {expected} bytes")


class _Clock:
    """Watches that enough comes in every STALL_S seconds.

    A socket's own limit is met by a byte now and then.
    """

    def __init__(self):
        self.since = time.monotonic()
        self.received = 0

    def count(self, received: int) -> None:
        """Note bytes.  Raises Broken where they are too few for the time they took."""
        self.received += received
        now = time.monotonic()
        if now - self.since < STALL_S:
            return
        if self.received < STALL_BYTES:
            raise Broken(f"it stalls: {self.received} bytes in {now - self.since:.0f} s")
        self.since, self.received = now, 0


def _unreached(error: object) -> Broken:
    """The reason why there was no answer, in a user's words."""
    if isinstance(error, Broken):
        return error
    if isinstance(error, ConnectionRefusedError):
        return Broken("the connection is refused")
    if isinstance(error, socket.gaierror):
        return Broken("there is no such host", busy=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Broken("the server's certificate is not trusted")
    if isinstance(error, TimeoutError):
        return Broken(f"it stalls: nothing in {STALL_S:.0f} s")
    if isinstance(error, http.client.RemoteDisconnected | ConnectionError):
        return Broken("the connection breaks")
    return Broken(f"{type(error).__name__}: {error}")


# Object stores


def store_blocks(url: str, size: int) -> Generator[bytes, None, None]:
    """Like `blocks`, for an object store: by its package, else by its command."""
    scheme = url.partition(":")[0]
    package, command = PACKAGES[scheme], COMMANDS[scheme]
    if is_installed("fsspec") and is_installed(package):
        return fsspec_blocks(url, size)
    if shutil.which(command):
        return command_blocks(url, size)
    raise UserError(
        f"{url}: {scheme}: needs the package {package} or the command {command}, "
        f"neither is installed; {remedy(package)}"
    )


def fsspec_blocks(url: str, size: int) -> Generator[bytes, None, None]:
    """Like `blocks`, for any URL that fsspec knows."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        there = system.size(path)
        if size and there not in (None, size):
            raise Broken(f"the store has {there} bytes, the manifest says {size}")
        received, expected = 0, size or there or 0
        with system.open(path, "rb", cache_type="readahead") as file:
            while block := file.read(BLOCK):
                received += len(block)
                if size and received > size:
                    raise Broken(f"more comes than the {size} bytes that the manifest says")
                yield bytes(block)
        if received < expected:
            raise Broken(f"its body is cut short: {received} of {expected} bytes")
    except (FileNotFoundError, PermissionError) as error:
        reason = "there is no such object" if isinstance(error, FileNotFoundError) else "forbidden"
        raise Broken(f"the store answers: {reason}", answered=True) from None
    except (Broken, GeneratorExit):
        raise
    except Exception as error:  # each store's client has exceptions of its own
        raise Broken(f"{type(error).__name__}: {error}") from None


# Commands


def command_blocks(url: str, size: int) -> Generator[bytes, None, None]:
    """Like `blocks`, by webdataset's opener. The command's exit code says if it failed."""
    from webdataset.gopen import gopen, set_options

    if not url.startswith(("pipe:", "s3:", "gs:")):
        # curl takes these for a pattern that means several URLs.
        url = url.translate({ord(letter): f"%{ord(letter):02X}" for letter in "[]{}"})
    stream = gopen(url, "rb")
    # webdataset's own check is silent where GOPEN_VERBOSE is set.
    set_options(stream, ignore_errors=True)
    received = 0
    process = getattr(stream, "proc", None)
    with stream:
        while block := _read_or_end(stream, process):
            received += len(block)
            if size and received > size:
                raise Broken(f"more comes than the {size} bytes that the manifest says")
            yield block
    status = getattr(stream, "status", 0)
    if status not in getattr(stream, "ignore_status", [0]):
        raise Broken(f"exit code {status}")


def _read_or_end(stream: Any, process: subprocess.Popen | None) -> bytes:
    """The next block. A command that gives none in SLOW_STALL_S is ended."""
    if process is None:
        return stream.read(BLOCK)
    timer = threading.Timer(SLOW_STALL_S, process.kill)
    timer.daemon = True
    timer.start()
    try:
        return stream.read(BLOCK)
    finally:
        timer.cancel()


SCHEMES: dict[str, Callable[[str, int], Generator[bytes, None, None]]] = {
    "http": http_blocks,
    "https": http_blocks,
    "s3": store_blocks,
    "gs": store_blocks,
    "hf": store_blocks,
}
