"""The generalist, its specialists and the combiner, as one thing that answers."""

import json
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clustering.groups import ClassGroups
from networks import ModelSpec, build_classifier, load_classifier

from .gating import gate as open_gate
from .pooling import COMBINERS

SCHEMA = 1
SETTINGS = "ensemble.json"
GROUPS = "clusters/groups.json"


class EnsembleOutput(NamedTuple):
    """What became of a batch: p_general [B, C], the combined q [B, C], and which specialists were asked, bool [B,
    M]."""

    p_general: Tensor
    q: Tensor
    active: Tensor


class SpecialistEnsemble:
    """Answers with eq. 5 (or another of COMBINERS); runs only the specialists that some row needs, on only those rows.

    generalist: a networks.Classifier, logits [B, C].  specialists: {m: Classifier with logits [B, |S_m| + 1], dustbin
    last}, a dict or another mapping that loads them when asked.  groups: ClassGroups.
    gate: n, specialists of the n most probable classes are asked; max_specialists: at most so many for one row.
    temperatures, weights: [1 + M], the generalist's first; None is all 1.
    skipped: groups that have no specialist on purpose.  Any other group without one is an error, unless allow_missing.
    The networks are put into eval mode, and are not changed otherwise.  Threads may share an ensemble.
    """

    def __init__(
        self,
        generalist,
        specialists: Mapping[int, nn.Module],
        groups,
        gate: int = 1,
        max_specialists: int | None = None,
        combine: str = "kl",
        temperatures=None,
        weights=None,
        skipped=(),
        allow_missing: bool = False,
        device=None,
    ):
        if combine not in COMBINERS:
            raise ValueError(
                f"combine = {combine!r} is unknown; it must be one of {', '.join(COMBINERS)}"
            )
        count = len(groups.members)
        strange = sorted(m for m in {*specialists, *skipped} if not 0 <= m < count)
        if strange:
            raise ValueError(
                f"there is no group {strange[0]}; the {count} groups are 0 to {count - 1}"
            )
        self.missing = sorted(set(range(count)) - set(specialists) - set(skipped))
        if self.missing and not allow_missing:
            raise ValueError(
                f"specialists {_listed(self.missing)} of {count} are missing; train them, "
                "or go on without them with allow_missing=True"
            )
        for name, values in (("temperatures", temperatures), ("weights", weights)):
            if values is not None and len(values) != 1 + count:
                raise ValueError(
                    f"{name} has {len(values)} entries; it must have {1 + count}: the generalist's and one per group"
                )
        self.temperatures = (
            [1.0] * (1 + count) if temperatures is None else [float(t) for t in temperatures]
        )
        if not all(0 < t < float("inf") for t in self.temperatures):
            raise ValueError(f"temperatures are {self.temperatures}; each must be positive")
        self.generalist = generalist.eval()
        self.device = torch.device(device) if device is not None else _device_of(generalist)
        self.specialists, self.groups = specialists, groups
        self.gate, self.max_specialists, self.combine, self.weights = (
            gate,
            max_specialists,
            combine,
            weights,
        )
        self.skipped, self.available = sorted(skipped), [m in specialists for m in range(count)]
        self.class_names = list(generalist.spec.class_names)
        self._prefixes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # How often what ran: "trunk" is the generalist's, m a specialist, ("trunk", m) the blocks that are its own.
        self.runs: Counter = Counter()

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls,
        directory,
        device="cpu",
        gate: int | None = None,
        max_specialists: int | None = None,
        cache: int | None = None,
        allow_missing: bool = False,
        builders: Mapping[str, Callable] | None = None,
    ) -> "SpecialistEnsemble":
        """The ensemble of a run directory or of an exported bundle: safetensors and JSON, nothing is unpickled.

        gate, max_specialists: None takes what ensemble.json says (else 1, and no limit).  cache: how many specialists
        are held at a time; None is all.  They are loaded when first asked.  builders: {name: callable} for a model.json
        that names one.
        Raises ValueError for a missing specialist (unless allow_missing), a missing or damaged file and another schema.
        """
        root = Path(directory)
        if not (root / "generalist" / "model.json").is_file():
            raise ValueError(
                f"{root} has no generalist/model.json; give a run whose generalist is done, or an exported bundle"
            )
        facts = read_settings(root)
        if facts["kind"] != "specialists":
            raise ValueError(
                f"{root} holds a deep ensemble, which has no specialists; load it with load_ensemble"
            )
        if not (root / GROUPS).is_file():
            raise ValueError(
                f"{root} has no {GROUPS}; give a run whose groups are made, or an exported bundle"
            )
        groups = ClassGroups.load(root / GROUPS)
        generalist = load_classifier(root / "generalist", device, builders)
        folders = {m: specialist_folder(root, m) for m in range(len(groups.members))}
        found = [
            m
            for m, place in folders.items()
            if all((place / n).is_file() for n in ("model.json", "model.safetensors"))
        ]
        shelf = LazySpecialists(
            lambda m: load_specialist(
                folders[m], generalist, facts["shared"].get(str(m), ()), device, builders
            ),
            found,
            cache,
        )
        gate = facts["gate"] if gate is None else gate
        limit = facts["max_specialists"] if max_specialists is None else max_specialists
        return cls(
            generalist,
            shelf,
            groups,
            gate,
            limit,
            facts["combine"],
            facts["temperatures"],
            facts["weights"],
            facts["skipped"],
            allow_missing,
            device,
        )

    @torch.no_grad()
    def predictions(self, inputs) -> tuple[Tensor, list, Tensor]:
        """(p_general [B, C], p_special, active [B, M]) as combine_kl takes them: p_special[m] is (rows, [len(rows),
        |S_m| + 1]) or None.

        inputs: raw, as decoded (uint8 or float), [B, ...]; the networks preprocess.
        """
        logits, active, special = self._logits(inputs)
        p_general = _softmax(logits, self.temperatures[0])
        p_special = [
            None if found is None else (found[0], _softmax(found[1], self.temperatures[1 + m]))
            for m, found in enumerate(special)
        ]
        return p_general, p_special, active

    @torch.no_grad()
    def logits(self, inputs) -> tuple[Tensor, list, Tensor]:
        """(general [B, C], special, active [B, M]) before temperatures, for fitting them: special[m] is (rows, logits)
        or None."""
        logits, active, special = self._logits(inputs)
        return logits, special, active

    def forward_with_details(self, inputs) -> EnsembleOutput:
        p_general, p_special, active = self.predictions(inputs)
        with torch.no_grad():
            q = COMBINERS[self.combine](
                p_general, p_special, self.groups, active=active, weights=self.weights
            )
        return EnsembleOutput(p_general, q, active)

    def probabilities(self, inputs) -> Tensor:
        """q [B, C] for raw inputs [B, ...]."""
        return self.forward_with_details(inputs).q

    def predict(self, inputs, top: int = 5) -> list[dict]:
        """Per row {classes, names, probabilities, specialists}: the `top` most probable classes, and the specialists
        asked."""
        found = self.forward_with_details(inputs)
        values, classes = found.q.topk(min(top, found.q.shape[1]), dim=1)
        return [
            {
                "classes": row,
                "names": [self.class_names[c] for c in row],
                "probabilities": probabilities,
                "specialists": asked.nonzero()[:, 0].tolist(),
            }
            for row, probabilities, asked in zip(
                classes.tolist(), values.tolist(), found.active.cpu(), strict=True
            )
        ]

    def _logits(self, inputs):
        raw = torch.as_tensor(inputs).to(self.device)
        blocks = _blocks(self.generalist.trunk)
        with self._lock:
            wanted = {0, *self._prefixes.values()}
        x = self.generalist.preprocess(raw)
        reached = {
            0: x
        }  # what the generalist has after so many blocks, where a specialist is known to branch off
        for depth, block in enumerate(blocks, 1):
            x = block(x)
            if depth in wanted:
                reached[depth] = x
        reached[len(blocks)] = x
        logits = self.generalist.head(x)
        self._count("trunk")
        p_general = _softmax(logits, 1.0)
        active = open_gate(p_general, self.groups, self.gate, self.max_specialists, self.available)
        special: list = [None] * len(self.groups.members)
        for m in active.any(0).nonzero()[:, 0].tolist():
            specialist = self.specialists[m]
            rows = active[:, m].nonzero()[:, 0]
            shared = self._prefix(m, specialist)
            if shared >= 0:
                nearest = max(depth for depth in reached if depth <= shared)
                x = reached[nearest][rows]
                for block in blocks[nearest:shared]:
                    x = block(x)
            else:
                x = specialist.preprocess(raw[rows])
            own = _blocks(specialist.trunk)[max(shared, 0) :]
            for block in own:
                x = block(x)
            special[m] = rows, specialist.head(x)
            self._count(m, *([("trunk", m)] if own else []))
        return logits, active, special

    def _prefix(self, m: int, specialist) -> int:
        """How many leading blocks are the generalist's, tensor for tensor; -1 where not even the preprocessing is."""
        with self._lock:
            known = self._prefixes.get(specialist)
        if known is not None:
            return known
        members = specialist.spec.head.get("members")
        if members is not None and list(members) != self.groups.members[m].tolist():
            raise ValueError(
                f"specialist {m} was trained for other classes than group {m} has; the groups are not this run's"
            )
        length = shared_prefix(self.generalist, specialist.eval())
        with self._lock:
            self._prefixes[specialist] = length
        return length

    def _count(self, *names) -> None:
        with self._lock:
            self.runs.update(names)


class LazySpecialists(Mapping):
    """Specialists by number, loaded when first asked; the `cache` last asked are kept.  Threads may share it."""

    def __init__(self, load: Callable[[int], nn.Module], numbers, cache: int | None = None):
        if cache is not None and cache < 1:
            raise ValueError(
                f"cache = {cache}; at least 1 specialist must be held, or None for all"
            )
        self._load, self._numbers, self._cache = load, sorted(numbers), cache
        self._held: OrderedDict[int, nn.Module] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = {m: threading.Lock() for m in self._numbers}
        self.loads = 0

    def __contains__(self, m) -> bool:
        return m in self._loading

    def __iter__(self):
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, m: int) -> nn.Module:
        with self._loading[m]:  # two threads that ask for the same one wait for one loading
            with self._lock:
                if m in self._held:
                    self._held.move_to_end(m)
                    return self._held[m]
            specialist = self._load(m)
            with self._lock:
                self.loads += 1
                self._held[m] = specialist
                while self._cache is not None and len(self._held) > self._cache:
                    self._held.popitem(last=False)
            return specialist


def specialist_folder(root: Path, m: int) -> Path:
    return root / "specialists" / f"{m:03d}"


def read_settings(root: Path) -> dict:
    """What ensemble.json says, with the defaults of a run that has none yet."""
    facts = {
        "kind": "specialists",
        "members": 1,
        "gate": 1,
        "max_specialists": None,
        "combine": "kl",
        "temperatures": None,
        "weights": None,
        "skipped": [],
        "shared": {},
    }
    path = root / SETTINGS
    if not path.is_file():
        return facts
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as mistake:
        raise ValueError(f"{path}: cannot be read: {mistake}") from None
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        schema = said.get("schema") if isinstance(said, dict) else None
        raise ValueError(
            f"{path} has schema {schema!r}; this version reads {SCHEMA}: export it again with this version"
        )
    return facts | {name: value for name, value in said.items() if name in facts}


_building = threading.Lock()


@torch.inference_mode(
    False
)  # a caller under inference_mode gets networks like any other: their tensors can be shared
def load_specialist(folder: Path, generalist, shared, device, builders) -> nn.Module:
    """One specialist, its tensors that equal the generalist's being the generalist's own.

    shared: names of tensors that the folder leaves out because they are the generalist's (a bundle does so).
    """
    from safetensors.torch import load_file

    with _building:  # torch's generators are set aside while a network is built
        if not shared:
            specialist = load_classifier(folder, device, builders)
        else:
            with torch.random.fork_rng(devices=[]):
                specialist = build_classifier(ModelSpec.load(folder / "model.json"), builders)
    common = generalist.state_dict()
    if shared:
        try:
            tensors = load_file(folder / "model.safetensors") | {
                name: common[name].cpu() for name in shared
            }
            specialist.load_state_dict(tensors)
        except Exception as mistake:
            raise ValueError(
                f"{folder / 'model.safetensors'} does not fit its model.json: {mistake}"
            ) from None
        specialist.to(device).eval()
    for name, tensor in [*specialist.named_parameters(), *specialist.named_buffers()]:
        if (
            name in common
            and common[name].shape == tensor.shape
            and torch.equal(common[name], tensor.detach())
        ):
            tensor.data = common[name]
    return specialist


def shared_prefix(generalist, specialist) -> int:
    """How many leading blocks of the trunks do the same, tensor for tensor; -1 where the inputs are preprocessed
    differently."""
    if generalist.spec.input != specialist.spec.input:
        return -1
    same = (generalist.spec.builder, generalist.spec.options) == (
        specialist.spec.builder,
        specialist.spec.options,
    )
    if not same:
        return 0
    length = 0
    for ours, theirs in zip(_blocks(generalist.trunk), _blocks(specialist.trunk), strict=True):
        if not equal_tensors(ours, theirs):
            break
        length += 1
    return length


def equal_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules of one architecture hold the same parameters and buffers (but for batch norm's counter of
    batches)."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        tensor is theirs[name]
        or (
            tensor.shape == theirs[name].shape
            and torch.equal(tensor, theirs[name].to(tensor.device))
        )
        for name, tensor in mine.items()
        if not name.endswith("num_batches_tracked")
    )


def _blocks(trunk: nn.Module) -> list[nn.Module]:
    return list(trunk.children()) if isinstance(trunk, nn.Sequential) else [trunk]


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return torch.softmax(logits if temperature == 1 else logits / temperature, dim=1)


def _device_of(network) -> torch.device:
    return next((tensor.device for tensor in network.parameters()), torch.device("cpu"))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (
        f" and {len(numbers) - 12} more" if len(numbers) > 12 else ""
    )
