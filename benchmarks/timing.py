"""How long programs take that answer the same inputs, measured in turns."""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble import export_onnx
from networks import Classifier
from networks.gathered_rows import head_logits

CALLS_OF_ONE_ROW = 20
Forms = dict[str, Callable[[Tensor], object]]


class Softmax(nn.Module):
    """A network's probabilities."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, raw: Tensor) -> Tensor:
        return torch.softmax(self.network(raw), 1)


class SoftmaxOfWideHead(nn.Module):
    """The same, with the head as the ensembles' programs have it."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, raw: Tensor) -> Tensor:
        features = self.network.trunk(self.network.preprocess(raw))
        return torch.softmax(head_logits(self.network.linear_head, features), 1)


@dataclass
class Times:
    """Milliseconds of each round: of the process's CPU, and of the clock."""

    cpu: list[float]
    clock: list[float]


def measure(forms: Forms, raw: Tensor, rounds: int) -> dict[str, Times]:
    """Milliseconds of one call of each form. The forms take turns."""
    calls = CALLS_OF_ONE_ROW if len(raw) == 1 else 1
    times = {name: Times([], []) for name in forms}
    for call in forms.values():
        call(raw)
    for _ in range(rounds):
        for name, call in forms.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                call(raw)
            times[name].clock.append(1000 * (time.perf_counter() - began) / calls)
            times[name].cpu.append(1000 * (time.process_time() - began_cpu) / calls)
    return times


def ratio(
    times: dict[str, Times], form: str, over: str, less: str | None = None, clock: bool = False
) -> float:
    """The median over the rounds of (form - less) / over."""

    def of(name: str) -> list[float]:
        return times[name].clock if clock else times[name].cpu

    beside = of(less) if less else [0.0] * len(of(form))
    rounds = zip(of(form), beside, of(over), strict=True)
    return round(statistics.median((one - other) / base for one, other, base in rounds), 3)


def medians(times: dict[str, Times], clock: bool = False) -> dict[str, float]:
    return {
        name: round(statistics.median(each.clock if clock else each.cpu), 4)
        for name, each in times.items()
    }


def in_torch(modules: dict[str, nn.Module]) -> Forms:
    return dict(modules)


def in_onnx(modules: dict[str, nn.Module]) -> Forms:
    """The same as programs of ONNX in onnxruntime, one thread each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    forms: Forms = {}
    for name, module in modules.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program.onnx"
            example = next(m for m in module.modules() if isinstance(m, Classifier)).zero_input()
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
                export_onnx(module, example.expand(3, *example.shape[1:]), path)
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        forms[name] = lambda raw, session=session: session.run(None, {"raw": raw.numpy()})[0]
    return forms
