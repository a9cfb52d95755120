"""Specialists that are loaded when first needed."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from networks import Branch, Classifier, ModelSpec, build_classifier, load_branch, load_classifier
from networks.builders import Builders

from .sharing import share_storage


class LazySpecialists(Mapping[int, Classifier | Branch]):
    """Specialists by number, loaded when first needed.  Threads may share it.

    load: makes one.  numbers: of those that there are.
    cache: how many of the last used are kept; None is all.
    loads: how often one was loaded.
    """

    def __init__(
        self,
        load: Callable[[int], Classifier | Branch],
        numbers: Iterable[int],
        cache: int | None = None,
    ):
        if cache is not None and cache < 1:
            raise ValueError(
                f"cache = {cache}; at least 1 specialist must be held, or None for all"
            )
        self._load = load
        self._numbers = sorted(numbers)
        self._cache = cache
        self._loaded: OrderedDict[int, Classifier | Branch] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = {m: threading.Lock() for m in self._numbers}
        self.loads = 0

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
            with self._lock:
                self.loads += 1
                self._loaded[m] = specialist
                while self._cache is not None and len(self._loaded) > self._cache:
                    self._loaded.popitem(last=False)
            return specialist


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
    if ModelSpec.load(folder / "model.json").head["kind"] == "branch":
        with _building:
            return load_branch(folder, device, builders)
    if shared:
        specialist = _load_partly(folder, generalist, shared, builders).to(device).eval()
    else:
        with _building:
            specialist = load_classifier(folder, device, builders)
    share_storage(generalist, specialist)
    return specialist


def _load_partly(
    folder: Path,
    generalist: Classifier,
    shared: Sequence[str],
    builders: Builders | None,
) -> Classifier:
    from safetensors.torch import load_file

    # torch's generators are set aside while a network is built, which one thread may do at a time.
    with _building, torch.random.fork_rng(devices=[]):
        specialist = build_classifier(ModelSpec.load(folder / "model.json"), builders)
    weights = folder / "model.safetensors"
    common = generalist.state_dict()
    try:
        tensors = load_file(weights) | {name: common[name].cpu() for name in shared}
        specialist.load_state_dict(tensors)
    except Exception as error:
        raise ValueError(f"{weights} does not fit its model.json: {error}") from None
    return specialist
