"""What the host reads of a device, and when.

A GPU works off a queue.  Whoever reads a number of it waits until all that was asked before is
done, and the queue runs empty meanwhile.  So on such devices rules are looked at together, Newton's
steps are taken several at a time, and all blocks of rows go on between two looks.  A CPU has no
queue: there a look is free, and what fails is known at once.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

WITHOUT_QUEUE = {"cpu"}

# What asks the host for flags, bool [], one after the other, and is sent each as the host reads it.
Asking: TypeAlias = Generator[Tensor, bool, T]


def is_queued(device: torch.device) -> bool:
    """Whether reading a number of a tensor there waits for a queue."""
    return device.type not in WITHOUT_QUEUE


def read(flags: Sequence[Tensor]) -> list[bool]:
    """Flags, bool [] of one device, by one wait."""
    return torch.stack(list(flags)).tolist()


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The host's numbers on a device, without waiting for its queue."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # torch knows no tensors that are only read
    return torch.as_tensor(values).to(device, non_blocking=True)


class Checks:
    """Rules that tensors of a device must keep.

    is_deferred: whether they are looked at together, by `settle`, or each at once.
    """

    def __init__(self, is_deferred: bool = False):
        self.is_deferred = is_deferred
        self._rules: list[tuple[Tensor, Callable[[], ValueError]]] = []

    def require_none(self, wrong: Tensor, error: Callable[[], ValueError]) -> None:
        """No entry of `wrong` is true. Else `error` makes what is raised."""
        if self.is_deferred:
            self._rules.append((wrong.any(), error))
        elif bool(wrong.any()):
            raise error()

    def settle(self, flags: Sequence[Tensor] = ()) -> list[bool]:
        """Look at all rules so far, and read these flags by the same wait."""
        rules, self._rules = self._rules, []
        asked = [wrong for wrong, _ in rules] + list(flags)
        if not asked:
            return []
        answers = read(asked)
        for is_wrong, (_, error) in zip(answers, rules, strict=False):
            if is_wrong:
                raise error()
        return answers[len(rules) :]


AT_ONCE = Checks()


def answered(asking: Asking[T]) -> T:
    """What one that asks the host returns, each flag read by a wait of its own."""
    try:
        flag = next(asking)
        while True:
            flag = asking.send(bool(flag))
    except StopIteration as end:
        return end.value


def answered_together(asking: Sequence[Asking[T]], checks: Checks) -> list[T]:
    """What each returns.  They go on side by side: a wait reads a flag of each."""
    returned: dict[int, T] = {}
    flags: dict[int, Tensor] = {}

    def resume(index: int, answer: bool | None) -> None:
        try:
            if answer is None:
                flags[index] = next(asking[index])
            else:
                flags[index] = asking[index].send(answer)
        except StopIteration as end:
            returned[index] = end.value

    for index in range(len(asking)):
        resume(index, None)
    while flags:
        waiting, flags = flags, {}
        answers = checks.settle(list(waiting.values()))
        for index, answer in zip(waiting, answers, strict=True):
            resume(index, answer)
    return [returned[index] for index in range(len(asking))]
