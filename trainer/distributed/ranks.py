"""Ranks: one group of processes, started by torchrun or alone.

World size 1 is not a second path.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.config import Engine, UserError

from .die_with_parent import die_with_parent
from .numerics import numerics

T = TypeVar("T")
COLLECTIVE_LIMIT = timedelta(minutes=30)  # in which every rank must come to an exchange of data
RANK_0_ALONE = timedelta(days=30)  # that others may wait while rank 0 works alone
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
SEVERAL_OBJECTS = 20_000  # new ones, after which Python looks for cycles
LOST_S = 60.0  # in which the launcher ends a rank that has lost another
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Watchdog:
    """Ends this process `seconds` after the last sign of progress, with every thread's traceback.

    The exit code is 1, and the launcher then ends the other ranks.  Python's own faulthandler does
    it, from a thread that needs no interpreter, so that a hang in a collective or in an engine is
    ended too.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.armed = False
        self.last = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Progress is expected inside."""
        self.armed = True
        self.last = 0.0
        self.progress()
        try:
            yield
        finally:
            self.armed = False
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """Report that a step, or a batch, is done."""
        # Setting the clock anew costs a thread: once a second, or a fiftieth of `seconds`.
        now = time.monotonic()
        if self.armed and now - self.last > min(1.0, self.seconds / 50):
            self.last = now
            faulthandler.dump_traceback_later(
                self.seconds, exit=True, file=cast(TextIO, sys.__stderr__)
            )


@dataclass(frozen=True)
class Ranks:
    """This process's rank of world_size, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog | None = None
    patient: dist.ProcessGroup | None = None  # all ranks, whose barrier waits RANK_0_ALONE

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here, however long rank 0 works alone before. Collective."""
        if self.world_size > 1:
            dist.barrier(group=self.patient)

    def progress(self) -> None:
        """Tell the watchdog that this rank is alive."""
        if self.watchdog is not None:
            self.watchdog.progress()

    def watching(self) -> AbstractContextManager[None]:
        """While this holds, the watchdog expects progress."""
        return self.watchdog.watching() if self.watchdog else nullcontext()


ALONE = Ranks(0, 1, torch.device("cpu"))


@contextmanager
def process_group(engine: Engine, guest: bool = False) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be alone.

    torchrun sets RANK, WORLD_SIZE, ... in the environment.  An error of one of several ranks leaves
    the group as it is: the others wait, and the process that ends with the error is what they lose.
    guest: the process is a user's own.  Then this is alone, and neither ties it to its parent, nor
    sets its threads, nor ends it where it hangs.
    """
    collecting = gc.get_threshold()
    if not guest:
        die_with_parent()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        collect_seldom()
    device = choose_device(engine)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    if "RANK" in os.environ and not guest:
        dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT)
    else:
        # Documented, but missing from torch.distributed's __all__.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    # Softmaxes over many classes are full of denormals, and a CPU takes ages over each.
    torch.set_flush_denormal(True)
    patient = None
    if dist.get_world_size() > 1:
        group = dist.new_group(backend="gloo", timeout=RANK_0_ALONE)
        patient = cast(dist.ProcessGroup, group)  # every rank is in it
        if device.type == "cuda":
            check_own_gpus(gpus_of_ranks(device, patient))
    watchdog = None if guest else Watchdog(engine.hang_s)
    is_left = False
    try:
        with numerics(engine):
            yield Ranks(dist.get_rank(), dist.get_world_size(), device, watchdog, patient)
    except Exception as error:
        is_left = dist.get_world_size() > 1
        if is_left and has_lost_another(error):
            wait_for_launcher()
        raise
    finally:
        torch.set_flush_denormal(False)  # whoever called may want them
        if not guest:
            gc.unfreeze()
            gc.set_threshold(*collecting)
        if not is_left:
            dist.destroy_process_group()


def collect_seldom() -> None:
    """Let Python look for cycles of objects after so many new ones as SEVERAL_OBJECTS, not 700.

    Thousands of specialists are objects enough to make it look again and again, in a quarter of
    the time of their reading.  What there is now stays, and is not looked at.
    """
    gc.freeze()
    gc.set_threshold(SEVERAL_OBJECTS)


def has_lost_another(error: Exception) -> bool:
    """Whether it says that another rank's process has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def wait_for_launcher() -> None:
    """Let the launcher end this process, since another rank has ended and said why.

    A traceback of this one would hide the other's line, and its exit code the other's.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(LOST_S)


def choose_device(engine: Engine) -> torch.device:
    """The device of this process: of several GPUs the one of its LOCAL_RANK."""
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            'engine.device = "cuda", but torch sees no CUDA device; use "auto" or "cpu"'
        )
    if engine.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def gpus_of_ranks(device: torch.device, group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """(host, the GPU's own id) of each rank. Collective, over a group of the host's."""
    own = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    of_ranks = [own] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, own, group=group)
    return of_ranks


def check_own_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """UserError where two ranks have one GPU, which NCCL refuses later and in other words.

    gpus: (host, the GPU's own id) of each rank.  Indices say nothing, since a process may see some
    GPUs alone.
    """
    first: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu in first:
            here = len({each for each in gpus if each[0] == gpu[0]})
            raise UserError(
                f"ranks {first[gpu]} and {rank} have one GPU on {gpu[0]}, and each needs its own; "
                f"start {here} there (launch.processes, --nproc-per-node), or take "
                'engine.device = "cpu"'
            )
        first[gpu] = rank


def precision(engine: Engine, device: torch.device) -> torch.dtype:
    """The dtype that the forward pass computes in. Weights are float32 always."""
    lacks_bf16 = device.type == "cuda" and not has_bf16()
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and not lacks_bf16 else torch.float32
    if engine.precision == "fp16" and device.type == "cpu":
        raise UserError('engine.precision = "fp16" needs a GPU; on a CPU take "bf16" or "fp32"')
    if engine.precision == "bf16" and lacks_bf16:
        raise UserError(
            f'engine.precision = "bf16", which {torch.cuda.get_device_name(device)} lacks; '
            'take "fp16" or "fp32", or "auto"'
        )
    return PRECISIONS[engine.precision]


def has_bf16() -> bool:
    """Whether this process's GPU computes in bfloat16, and does not only imitate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(engine: Engine, device: torch.device) -> torch.autocast:
    """The context in which networks compute, in training and in measuring."""
    kind = precision(engine, device)
    return torch.autocast(device.type, kind, enabled=kind != torch.float32)


def broadcast(value: T, ranks: Ranks) -> T:
    """Rank 0's value (any small JSON-able object) on every rank. Collective."""
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def gather(value: T, ranks: Ranks) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank. Collective."""
    if ranks.world_size == 1:
        return [value]
    values = [value] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over the ranks, in float64: it does not depend on how examples fell to ranks."""
    total = tensor.detach().to(ranks.device, torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return total


class StopSignal:
    """SIGTERM and SIGUSR2 ask for a checkpoint soon. All ranks agree on the step.

    Of several ranks each says at every step whether it has received one, and reads at the next step
    what the others said.  The exchange goes on beside the step, and no rank waits for its GPU.
    One that comes between two trainings of a process is heeded at the first step of the second.
    """

    received = False  # by this process

    def __init__(self):
        self._said: tuple[dist.Work, torch.Tensor] | None = None  # at the last step, by any rank
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's business
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, *_) -> None:
        StopSignal.received = True

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank had received a signal, alone now, of several a step ago. Collective."""
        if ranks.world_size == 1:
            return self.received
        answer = self.close()
        device = ranks.device if ranks.patient is None else "cpu"
        flag = torch.tensor([float(self.received)], device=device)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=ranks.patient, async_op=True)
        assert work is not None, "every rank is in the group"
        self._said = work, flag
        return answer

    def close(self) -> bool:
        """End the exchange that is under way: whether any rank said yes."""
        if self._said is None:
            return False
        (work, flag), self._said = self._said, None
        work.wait()
        return bool(flag.item())
