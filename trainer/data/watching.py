"""Blocks of a source that may stop for ever, with a limit on how long one is waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator

WAITING = 2  # blocks read ahead
LOOK_S = 0.2


def watched(
    source: Callable[[], Iterator[bytes]], limit_s: float, stalled: Exception
) -> Generator[bytes, None, None]:
    """The blocks of `source()`, read by a thread of its own.

    Raises `stalled` where none comes in `limit_s` seconds: a header that drips, a command that
    hangs and a store's client without a limit hold nobody up.  Its thread is left to end by itself.
    """
    blocks: queue.Queue = queue.Queue(WAITING)
    over = threading.Event()

    def put(item: object) -> bool:
        while not over.is_set():
            try:
                blocks.put(item, timeout=LOOK_S)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        content = source()
        try:
            for block in content:
                if not put(block):
                    break
            else:
                put(None)
        except BaseException as error:  # raised where it is waited for
            put(error)
        finally:
            close = getattr(content, "close", None)
            if close is not None:
                close()

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                block = blocks.get(timeout=limit_s)
            except queue.Empty:
                raise stalled from None
            if block is None:
                return
            if isinstance(block, BaseException):
                raise block
            yield block
    finally:
        over.set()
