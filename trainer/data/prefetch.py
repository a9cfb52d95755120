"""Batches on the device, the next one on its way while a step computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .streams import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches, in order, on the device.

    On CUDA one is read ahead, and copied by a stream of its own: from page-locked memory the copy
    and the step before go on at the same time.  Elsewhere each is moved when it is asked for.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
            done = torch.cuda.Event()
            done.record(copying)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = moved, done
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Batch, done: torch.cuda.Event) -> Batch:
    """The batch, which what is asked of the current stream from now on may read."""
    current = torch.cuda.current_stream()
    current.wait_event(done)
    for name in batch.on_devices:
        getattr(batch, name).record_stream(current)  # its memory is the copying stream's
    return batch
