"""Load specialists when they are needed, and keep a bounded number of them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from networks import (
    Branch,
    Classifier,
    ModelSpec,
    build_classifier,
    named_by,
)
from networks.branches import build_branch
from networks.builders import Builders
from networks.files import built_for, read_weights
from networks.likening import is_like, made_like

from .sharing import own_bytes, share_storage

# What is held of specialists where no number of them is given: their own tensors, without those
# that are the generalist's.
BYTES_HELD = 2**29


class LazySpecialists(Mapping[int, Classifier | Branch]):
    """Specialists by number, loaded when they are needed.  Threads may share it.

    load: loads one. numbers: of all that exist. generalist: its tensors count as no memory.
    cache: how many recently used ones are kept. None: as many as fit `most_bytes`, at least one.
    loads: how often one was loaded.  held_bytes: of the tensors of those that are kept.
    fits: whether all that were ever loaded could be kept.
    """

    def __init__(
        self,
        load: Callable[[int], Classifier | Branch],
        numbers: Iterable[int],
        cache: int | None = None,
        generalist: Classifier | None = None,
        most_bytes: int = BYTES_HELD,
    ):
        if cache is not None and cache < 1:
            raise ValueError(
                f"cache = {cache}; at least 1 specialist must be held, or None for as many as "
                f"{most_bytes:,} bytes hold"
            )
        self._load = load
        self._numbers = sorted(numbers)
        self._cache = cache
        self._generalist = generalist
        self._most_bytes = most_bytes
        self._loaded: OrderedDict[int, Classifier | Branch] = OrderedDict()
        self._bytes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._loading = {m: threading.Lock() for m in self._numbers}
        self.loads = 0
        self.held_bytes = 0
        self.fits = True

    def __contains__(self, m: object) -> bool:
        return m in self._loading

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, m: int) -> Classifier | Branch:
        with self._loading[m]:  # two threads that need the same one wait for one loading
            with self._lock:
                if m in self._loaded:
                    self._loaded.move_to_end(m)
                    return self._loaded[m]
            specialist = self._load(m)
            size = own_bytes(self._generalist, specialist)
            with self._lock:
                self.loads += 1
                self._loaded[m] = specialist
                self._bytes[m] = size
                self.held_bytes += size
                self._let_go()
            return specialist

    def _let_go(self) -> None:
        """Drop specialists, least recently used first, until the rest is within the bound."""
        while len(self._loaded) > 1 and self._is_full():
            oldest, _ = self._loaded.popitem(last=False)
            self.held_bytes -= self._bytes.pop(oldest)
            self.fits = False

    def _is_full(self) -> bool:
        if self._cache is not None:
            return len(self._loaded) > self._cache
        return self.held_bytes > self._most_bytes


def specialist_folder(root: Path, m: int) -> Path:
    return root / "specialists" / f"{m:03d}"


_building = threading.Lock()


# A caller under inference_mode gets networks like any other: their tensors can be shared.
@torch.inference_mode(False)
def load_specialist(
    folder: Path,
    generalist: Classifier,
    shared: Sequence[str],
    device: str | torch.device,
    builders: Builders | None,
) -> Classifier | Branch:
    """One specialist, its tensors that equal the generalist's being the generalist's own.

    shared: names of tensors that the folder leaves out because they are the generalist's (a bundle
    does so).
    """
    spec = ModelSpec.load(folder / "model.json")
    tensors = read_weights(folder, owned=True)
    if shared:
        tensors |= _shared_tensors(folder, generalist, shared)
    if is_like(generalist, spec, builders):
        specialist = made_like(generalist, spec, folder, tensors)
    else:
        build = build_branch if spec.head["kind"] == "branch" else build_classifier
        # torch's generators are set aside while a network is built: by one thread at a time.
        with _building:
            specialist = built_for(spec, folder, tensors, build, builders)
        specialist = specialist.to(device).eval()
        if isinstance(specialist, Classifier):
            share_storage(generalist, specialist)
    specialist.spec = named_by(specialist.spec, generalist.spec)
    return specialist


def _shared_tensors(
    folder: Path, generalist: Classifier, names: Sequence[str]
) -> dict[str, Tensor]:
    common = generalist.state_dict()
    if unknown := sorted(set(names) - common.keys()):
        raise ValueError(
            f"{folder}: ensemble.json shares {unknown[0]}, which the generalist has not"
        )
    return {name: common[name] for name in names}
