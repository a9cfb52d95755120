"""The generalist, its specialists and the combiner, as one classifier."""

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from clustering.groups import ClassGroups
from networks import (
    Branch,
    Classifier,
    ModelSpec,
    load_classifier,
    multiplications,
    parameter_count,
    read_inputs,
    top_k,
)
from networks.branches import GeneralOutput
from networks.builders import Builders
from networks.cutting import Cut, cut_at
from networks.integrity import check_file
from networks.reading import Inputs

from .choices import check_combiner, combiner
from .gating import asked_specialists, most_active, rows_of_specialists
from .gating import gate as open_gate
from .host_reads import to_device
from .lazy_specialists import LazySpecialists, load_specialist, specialist_folder
from .listed_ensemble import SPARSE_FROM, ListedAnswers, Wanted, ask_in_blocks
from .predictions import Weights, checked_weights, softmax
from .ranking import Prediction, check_top, listed_predictions, top_predictions
from .rows_on_shortlist import (
    branch_on_shortlist,
    has_every_row,
    logits_on_shortlist,
    places_on,
    rows_asked,
)
from .settings import SETTINGS, EnsembleSettings
from .sharing import blocks, shared_prefix
from .shortlist_kl import Asked, Part, Slots, check_shortlist

GROUPS = "clusters/groups.json"

RawInputs: TypeAlias = Tensor | np.ndarray
Specialist: TypeAlias = Classifier | Branch
# Entry m: (rows, [len(rows), |S_m| + 1]), or None where no row needs specialist m.
SpecialRows: TypeAlias = list[tuple[Tensor, Tensor] | None]


class EnsembleOutput(NamedTuple):
    """The predictions of a batch.

    p_general: [B, C].  q: [B, C], combined.  active: bool [B, M], the specialists that were run.
    """

    p_general: Tensor
    q: Tensor
    active: Tensor


class SpecialistEnsemble:
    """Combines predictions by eq. 5 (or another of COMBINERS).

    Runs only the specialists that some row needs, on only those rows.  The networks are put into
    eval mode, and are not changed otherwise.  Threads may share an ensemble.

    Parameters
    ----------
    generalist : networks.Classifier
        Its logits are [B, C].
    specialists : mapping of int to networks.Classifier or networks.Branch
        Specialist m's logits are [B, |S_m| + 1], the dustbin last.  A branch corrects this
        generalist's.  A dict, or another mapping that
        loads them when first needed.
    groups : ClassGroups
        The classes of each specialist.
    gate : int
        Specialists of the `gate` most probable classes are run.
    max_specialists : int, optional
        At most this many for one row. None means no limit.
    combine : str
        A name of `COMBINERS`.
    temperatures, weights : [1 + M], optional
        The generalist's first.  None means all ones.
    skipped : collection of int
        Groups that have no specialist on purpose.
    allow_missing : bool
        Otherwise any other group without a specialist is an error.
    shortlist : int, optional
        How many of each row's most probable classes specialists are asked about. Outside them the
        generalist's prediction stands (combine_kl_on_shortlist). None means every class.
    device : str or torch.device, optional
        None is the generalist's.
    sparse : bool, optional
        Whether `predict` and the stages avoid rows of C numbers (`ask_in_blocks`). None: from
        SPARSE_FROM classes on, if eq. 5 joins all classes.

    Attributes
    ----------
    missing : list of int
        Groups without a specialist that were not skipped on purpose.
    runs : Counter
        How often each part ran: "trunk" is the generalist's, m a specialist, ("trunk", m) the
        specialist's own blocks.
    finished : bool, optional
        Whether the run that it was loaded from had its ensemble.json. None for one made in memory.
    functions : dict of callables
        {name: callable} of a user's own decoders, for `read`.

    Raises
    ------
    ValueError
        For an unknown combiner, specialists that are missing or have no group, temperatures or
        weights of another length, and a shortlist with another combiner than eq. 5 or shorter than
        the gate.
    """

    def __init__(
        self,
        generalist: Classifier,
        specialists: Mapping[int, Specialist],
        groups: ClassGroups,
        gate: int = 1,
        max_specialists: int | None = None,
        combine: str = "kl",
        temperatures: Sequence[float] | None = None,
        weights: Weights | None = None,
        skipped: Collection[int] = (),
        allow_missing: bool = False,
        device: str | torch.device | None = None,
        shortlist: int | None = None,
        sparse: bool | None = None,
    ):
        count = len(groups.members)
        missing = sorted(set(range(count)) - set(specialists) - set(skipped))
        check_combiner(combine)
        _check_numbers([*specialists, *skipped], count)
        if missing and not allow_missing:
            raise ValueError(
                f"specialists {_listed(missing)} of {count} are missing; train them, "
                "or go on without them with allow_missing=True"
            )
        _check_length("temperatures", temperatures, 1 + count)
        _check_length("weights", weights, 1 + count)
        checked_weights(weights, count, torch.device("cpu"), combine == "log_ratio")
        if shortlist is not None:
            _check_shortlist(shortlist, gate, combine)
            shortlist = min(shortlist, groups.num_classes)
        self.generalist = generalist.eval()
        self.specialists = specialists
        self.groups = groups
        self.gate = gate
        self.max_specialists = max_specialists
        self.combine = combine
        self.shortlist = shortlist
        can_be_sparse = combine == "kl" and shortlist is None
        if sparse and not can_be_sparse:
            raise ValueError('sparse rows are joined by combine = "kl" over all classes alone')
        if sparse is None:
            sparse = can_be_sparse and groups.num_classes >= SPARSE_FROM
        self.is_sparse = sparse
        self.temperatures = _checked_temperatures(temperatures, 1 + count)
        self.weights = weights
        self.skipped = sorted(skipped)
        self.missing = missing
        self.available = [m in specialists for m in range(count)]
        self.device = _device_of(generalist) if device is None else torch.device(device)
        self.class_names = list(generalist.spec.class_names)
        self.runs: Counter[str | int | tuple[str, int]] = Counter()
        self._prefixes: weakref.WeakKeyDictionary[Classifier, int] = weakref.WeakKeyDictionary()
        self._depths: set[int] = set()  # where copies part from the generalist
        self._cut: Cut | None = None  # where branches part from the generalist
        if isinstance(specialists, dict):
            for specialist in specialists.values():
                self.learn_cut(specialist.spec)
        self._lock = threading.Lock()
        self.finished: bool | None = None
        self.functions: Mapping[str, Callable] = {}

    @property
    def all_weights(self) -> list[float]:
        """The generalist's and each specialist's in eq. 5, [1 + M]: 1 where none is set.

        As `checked_weights` scales them.
        """
        if self.weights is None:
            return [1.0] * (1 + len(self.groups.members))
        scaled = checked_weights(self.weights, len(self.groups.members), torch.device("cpu"))
        assert scaled is not None
        return scaled.tolist()

    def __repr__(self) -> str:
        return (
            f"SpecialistEnsemble({len(self.class_names)} classes, "
            f"{sum(self.available)} of {len(self.groups.members)} specialists, "
            f"{finished_words(self.finished)})"
        )

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        gate: int | None = None,
        max_specialists: int | None = None,
        cache: int | None = None,
        allow_missing: bool = False,
        builders: Builders | None = None,
        shortlist: int | None = None,
        sparse: bool | None = None,
    ) -> "SpecialistEnsemble":
        """The ensemble of a run directory or of an exported bundle.

        Reads safetensors and JSON. Nothing is unpickled.  Specialists are loaded when first needed.

        Parameters
        ----------
        directory : path
        device : str or torch.device
        gate, max_specialists, shortlist : int, optional
            None takes what ensemble.json says (else 1, no limit, and every class).
        sparse : bool, optional
            As in the constructor.
        cache : int, optional
            How many specialists are held at a time.  None is as many as
            `lazy_specialists.BYTES_HELD` hold.
        allow_missing : bool
            Go on without specialists that are missing.
        builders : dict of callables, optional
            {name: callable} for a model.json that names one: of a network, or of a decoder.

        Returns
        -------
        SpecialistEnsemble

        Raises
        ------
        ValueError
            For a missing specialist (unless allow_missing), a missing or corrupt file and another
            schema.

        Warns
        -----
        UserWarning
            For a run that has no ensemble.json yet, whose networks are joined by the defaults.
        """
        root = Path(directory)
        settings = _settings_of(root)
        check_file(root / GROUPS)
        groups = ClassGroups.load(root / GROUPS)
        generalist = load_classifier(root / "generalist", device, builders)
        if generalist.spec.is_specialist:
            raise ValueError(f"{root / 'generalist' / 'model.json'} is of a specialist")
        if groups.num_classes != generalist.spec.num_classes:
            raise ValueError(
                f"{root / GROUPS} is of {groups.num_classes} classes and the generalist of "
                f"{generalist.spec.num_classes}; they are not of one run"
            )

        def load_one(m: int) -> Specialist:
            shared = settings.shared.get(str(m), ())
            return load_specialist(specialist_folder(root, m), generalist, shared, device, builders)

        if gate is None:
            gate = settings.gate
        if max_specialists is None:
            max_specialists = settings.max_specialists
        if shortlist is None:
            shortlist = settings.shortlist
        numbers = [
            m
            for m in range(len(groups.members))
            if m not in settings.skipped and _is_complete(specialist_folder(root, m))
        ]
        try:
            ensemble = cls(
                generalist,
                LazySpecialists(load_one, numbers, cache, generalist),
                groups,
                gate=gate,
                max_specialists=max_specialists,
                combine=settings.combine,
                temperatures=settings.temperatures,
                weights=settings.weights,
                skipped=settings.skipped,
                allow_missing=allow_missing,
                device=device,
                shortlist=shortlist,
                sparse=sparse,
            )
        except ValueError as error:
            raise ValueError(f"{root}: {error}") from None
        ensemble.finished = is_finished(root)
        ensemble.functions = builders or {}
        for m in numbers[:1]:
            ensemble.learn_cut(ModelSpec.load(specialist_folder(root, m) / "model.json"))
        return ensemble

    def read(self, inputs: Inputs, resize: bool = False, max_pixels: int | None = None) -> Tensor:
        """Raw inputs [B, ...], prepared as the training inputs were.

        Parameters
        ----------
        inputs : one input, a batch, or a list of inputs
            Pictures as bytes, paths, PIL images or arrays, texts as str, arrays and tensors:
            networks.read_inputs says by which rules.
        resize : bool
            Resize pictures even where no rule was recorded.
        max_pixels : int, optional
            Overrides the recorded limit on a picture's size.

        Returns
        -------
        Tensor [B, ...]
            On the ensemble's device.

        Raises
        ------
        ValueError
            For input that could only be read by guessing.
        """
        spec = self.generalist.spec.input
        return read_inputs(inputs, spec, self.functions, resize, max_pixels).to(self.device)

    def probabilities(self, inputs: Inputs) -> Tensor:
        """q [B, C] for inputs that `read` can read.

        Parameters
        ----------
        inputs
            As in `read`.

        Returns
        -------
        Tensor [B, C]
        """
        return self.forward_with_details(self.read(inputs)).q

    def predict(self, inputs: Inputs, top: int = 5) -> list[Prediction]:
        """The `top` most probable classes of each row, and the specialists that were active.

        Parameters
        ----------
        inputs
            As in `read`.
        top : int

        Returns
        -------
        list of dicts
            Per row {classes, names, probabilities, specialists}.
        """
        check_top(top)
        raw = self.read(inputs)
        if self.is_sparse:
            return [
                each
                for part in self.ask_in_blocks(raw, Wanted(top))
                for each in self._best(part, top)
            ]
        output = self.forward_with_details(raw)
        return top_predictions(output.q, self.class_names, top, output.active)

    def _best(self, answers: ListedAnswers, top: int) -> list[Prediction]:
        q = answers.join(self.weights)
        return listed_predictions(q, self.class_names, top, answers.active)

    def ask_in_blocks(
        self, inputs: RawInputs, wanted: Wanted, also: Tensor | None = None
    ) -> Iterator[ListedAnswers]:
        """What everybody says about many rows, a part of them after the other.

        It takes no row of C numbers each, and wakes a specialist once for all rows that need it.
        listed_ensemble.ask_in_blocks says what it is given.
        """
        return ask_in_blocks(self, torch.as_tensor(inputs), wanted, also)

    def asked(self, active: Tensor) -> Tensor:
        """The numbers of the specialists that are active in each row, then -1: int32 [B, most]."""
        return asked_specialists(active, most_active(self.groups, self.gate, self.max_specialists))

    @torch.no_grad()
    def gated(self, inputs: RawInputs) -> Tensor:
        """The specialists that each row needs, bool [B, M]. The generalist alone is run."""
        raw = torch.as_tensor(inputs).to(self.device)
        logits = self.generalist.logits_of(self.run_trunk(raw)[0])
        self.count("trunk")
        return self.open_gate(softmax(logits, 1.0))

    @property
    def has_branches(self) -> bool:
        """Whether specialists correct the generalist's logits."""
        return self._cut is not None

    def forward_with_details(self, inputs: RawInputs) -> EnsembleOutput:
        """The generalist's probabilities, the combined ones, and the specialists that were run.

        inputs: [B, ...] as decoded. The networks preprocess them, and nothing is checked here.
        """
        if self.shortlist is not None:
            asked = self.ask_on_shortlist(inputs)
            return EnsembleOutput(asked.p_general, asked.join(self.weights), asked.active)
        p_general, p_special, active = self.predictions(inputs)
        with torch.no_grad():
            q = combiner(self.combine)(
                p_general, p_special, self.groups, active=active, weights=self.weights
            )
        return EnsembleOutput(p_general, q, active)

    @torch.no_grad()
    def ask(self, inputs: RawInputs) -> Callable[[Weights | None], Tensor]:
        """Run the networks once: weights [1 + M] -> q [B, C], for as many weights as are tried."""
        if self.shortlist is not None:
            return self.ask_on_shortlist(inputs).join
        p_general, p_special, active = self.predictions(inputs)
        return lambda weights: combiner(self.combine)(
            p_general, p_special, self.groups, active=active, weights=weights
        )

    @torch.no_grad()
    def predictions(self, inputs: RawInputs) -> tuple[Tensor, SpecialRows, Tensor]:
        """(p_general [B, C], p_special, active [B, M]) as combine_kl takes them.

        p_special[m] is (rows, [len(rows), |S_m| + 1]), or None.
        """
        logits, special, active = self.logits(inputs)
        p_general = softmax(logits, self.temperatures[0])
        p_special: SpecialRows = [None] * len(special)
        for m, entry in enumerate(special):
            if entry is not None:
                rows, own = entry
                p_special[m] = rows, softmax(own, self.temperatures[1 + m])
        return p_general, p_special, active

    @torch.no_grad()
    def logits(self, inputs: RawInputs) -> tuple[Tensor, SpecialRows, Tensor]:
        """(general [B, C], special, active [B, M]) before temperatures, for fitting them.

        special[m] is (rows, logits), or None.
        """
        raw = torch.as_tensor(inputs).to(self.device)
        features, reached, at_cut = self.run_trunk(raw)
        logits = self.generalist.logits_of(features)
        self.count("trunk")
        active = self.open_gate(softmax(logits, 1.0))
        special: SpecialRows = [None] * len(self.groups.members)
        general: GeneralOutput | None = None  # what branches read of it
        for m, rows in rows_of_specialists(active.cpu().numpy(), active.device):
            specialist = self.specialists[m]
            if isinstance(specialist, Branch):
                self.check_group(m, specialist)
                general = general or GeneralOutput.of(logits)
                own_and_rest = general.own_and_rest(specialist.classes, rows)
                special[m] = rows, specialist(at_cut[rows], *own_and_rest)
                self.count(m)
            else:
                features = self.features_of(m, specialist, raw, rows, reached)
                special[m] = rows, specialist.logits_of(features)
        return logits, special, active

    @torch.no_grad()
    def ask_on_shortlist(self, inputs: RawInputs) -> Asked:
        """What everybody says about each row's shortlist, before it is joined.

        inputs: [B, ...] as decoded.  The ensemble has a shortlist.
        """
        assert self.shortlist is not None
        raw = torch.as_tensor(inputs).to(self.device)
        features, reached, at_cut = self.run_trunk(raw)
        logits = self.generalist.logits_of(features)
        self.count("trunk")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = softmax(logits, 1.0)
        active = self.open_gate(p)
        general, indices = top_k(logits, self.shortlist, ordered=False)
        parts: list[Part] = []
        for m, rows in rows_of_specialists(active.cpu().numpy(), active.device):
            specialist, listed = self.specialists[m], indices[rows]
            if isinstance(specialist, Branch):
                self.check_group(m, specialist)
                own, inside = branch_on_shortlist(specialist, at_cut[rows], general[rows], listed)
                self.count(m)
            else:
                x = self.features_of(m, specialist, raw, rows, reached)
                classes = to_device(self.groups.members[m], self.device)
                places = places_on(specialist.head, classes, listed)
                inside = places.inside
                shared = None if has_every_row(specialist.head) else p[rows]
                own = logits_on_shortlist(specialist.head, x, classes, listed, places, shared)
            parts.append(Part(m, rows, softmax(own, self.temperatures[1 + m]), inside))
        p_general = p
        if self.temperatures[0] != 1:
            p_general = softmax(logits, self.temperatures[0])
        return Asked.of(p_general, indices, Slots.of(active), active, parts)

    def open_gate(self, p_general: Tensor) -> Tensor:
        return open_gate(p_general, self.groups, self.gate, self.max_specialists, self.available)

    def multiplications(self, active: Tensor) -> float:
        """What the ensemble multiplies for one example, on average.

        Parameters
        ----------
        active : bool Tensor [B, M]
            The specialists that were run, as `forward_with_details` returns them.

        Returns
        -------
        float
            The generalist's multiplications and those of the specialists that were asked, without
            the blocks that they share with it.
        """
        return self.mean_multiplications(active.sum(0).cpu().numpy(), len(active))

    def mean_multiplications(self, times: np.ndarray, rows: int) -> float:
        """The same, of how many of so many rows asked each specialist, int [M]."""
        raw = self.generalist.zero_input()
        total = float(multiplications(self.generalist, raw))
        for m in np.flatnonzero(times).tolist():
            total += float(np.float32(times[m] / rows)) * self._own_multiplications(m, raw)
        return total

    def parameters(self) -> int:
        """Parameters of the generalist and its specialists. A branch counts its own."""
        return sum(map(parameter_count, [self.generalist, *self.specialists.values()]))

    @torch.no_grad()
    def _own_multiplications(self, m: int, raw: Tensor) -> int:
        """Multiplications of specialist m beside the generalist's."""
        specialist = self.specialists[m]
        _, reached, at_cut = self.run_trunk(raw)
        if isinstance(specialist, Branch):
            own = torch.zeros(1, len(specialist.classes), device=self.device)
            return multiplications(specialist, at_cut, own, own[:, 0])
        shared = max(0, self._prefix(m, specialist))
        x = reached[0]
        for block in blocks(specialist.trunk)[:shared]:
            x = block(x)
        # A fresh container says that it trains, and counting would leave its blocks so.
        end = nn.Sequential(*blocks(specialist.trunk)[shared:]).train(specialist.training)
        features = end(x)
        rows = multiplications_of_rows(specialist.head)
        if self.shortlist is not None:
            rows = rows_asked(specialist.head, self.shortlist)
        return multiplications(end, x) + rows * features.shape[1]

    def run_trunk(self, raw: Tensor) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """The generalist's features, and what it has on the way.

        That is what it has after as many blocks as a copy shares, where one is known to do so, and
        what it has where branches part from it.
        """
        if self._cut is not None:
            x = self.generalist.preprocess(raw)
            at_cut = self._cut.body(x)
            features = self._cut.end(at_cut)
            return features, {0: x, len(blocks(self.generalist.trunk)): features}, at_cut
        trunk = blocks(self.generalist.trunk)
        with self._lock:
            depths = {len(trunk), *self._depths}
        x = self.generalist.preprocess(raw)
        reached = {0: x}
        for depth, block in enumerate(trunk, 1):
            x = block(x)
            if depth in depths:
                reached[depth] = x
        return x, reached, x

    def features_of(
        self,
        m: int,
        specialist: Classifier,
        raw: Tensor,
        rows: Tensor,
        reached: dict[int, Tensor],
    ) -> Tensor:
        """What specialist m's head reads of the rows, from where the generalist's blocks end."""
        shared = self._prefix(m, specialist)
        if shared >= 0:
            nearest = max((depth for depth in reached if depth <= shared), default=0)
            if nearest in reached:
                x = reached[nearest][rows]
            else:
                x = self.generalist.preprocess(raw[rows])
            for block in blocks(self.generalist.trunk)[nearest:shared]:
                x = block(x)
        else:
            x = specialist.preprocess(raw[rows])
        own = blocks(specialist.trunk)[max(shared, 0) :]
        for block in own:
            x = block(x)
        self.count(m)
        if own:
            self.count(("trunk", m))
        return x

    def _prefix(self, m: int, specialist: Classifier) -> int:
        """How many leading blocks are the generalist's. -1 where not even the preprocessing is."""
        with self._lock:
            known = self._prefixes.get(specialist)
        if known is not None:
            return known
        self.check_group(m, specialist)
        length = shared_prefix(self.generalist, specialist.eval())
        with self._lock:
            self._prefixes[specialist] = length
            self._depths.add(length)
        return length

    def check_group(self, m: int, specialist: Specialist) -> None:
        classes = specialist.spec.head.get("members")
        if classes is not None and list(classes) != self.groups.members[m].tolist():
            raise ValueError(
                f"specialist {m} was trained for other classes than group {m} has; "
                "the groups are not this run's"
            )

    def learn_cut(self, spec: ModelSpec) -> None:
        """Note where a specialist, if it is a branch, parts from the generalist."""
        if spec.head["kind"] == "branch" and self._cut is None:
            self._cut = cut_at(self.generalist.trunk, spec.head["blocks"])

    def count(self, name: str | int | tuple[str, int]) -> None:
        with self._lock:
            self.runs[name] += 1


def is_finished(root: Path) -> bool:
    """Whether a run or bundle says how its networks are joined.  Warns where it does not."""
    finished = (root / SETTINGS).is_file()
    if not finished:
        warnings.warn(
            f"{root}: the run is not finished, it has no {SETTINGS} yet: temperatures and weights "
            "are the defaults",
            stacklevel=4,  # past load and its decorator
        )
    return finished


def finished_words(finished: bool | None) -> str:
    if finished is None:
        return "made in memory"
    return "of a finished run" if finished else "of a run that is not finished"


def multiplications_of_rows(head: nn.Module) -> int:
    """Rows of a head, each of which multiplies every feature once."""
    return len(head.get_parameter("weight"))


def _settings_of(root: Path) -> EnsembleSettings:
    """What ensemble.json says of a directory that has what an ensemble of specialists needs."""
    if not (root / "generalist" / "model.json").is_file():
        students = sorted((root / "students").glob("*/model.json"))
        if students and not (root / "config.toml").is_file():  # a bundle, and no run
            raise ValueError(
                f"{root} holds students and no ensemble; load one with "
                f'load_classifier("{students[0].parent}")'
            )
        raise ValueError(
            f"{root} has no generalist/model.json; "
            "give a run whose generalist is done, or an exported bundle"
        )
    settings = EnsembleSettings.load(root)
    if settings.kind != "specialists":
        raise ValueError(
            f"{root} holds an ensemble of kind {settings.kind}, which has no specialists; "
            "load it with load_ensemble"
        )
    if not (root / GROUPS).is_file():
        raise ValueError(
            f"{root} has no {GROUPS}; give a run whose groups are made, or an exported bundle"
        )
    return settings


def _is_complete(folder: Path) -> bool:
    return (folder / "model.json").is_file() and (folder / "model.safetensors").is_file()


def _check_numbers(numbers: list[int], count: int) -> None:
    unknown = sorted(m for m in set(numbers) if not 0 <= m < count)
    if unknown:
        raise ValueError(f"there is no group {unknown[0]}; the {count} groups are 0 to {count - 1}")


def _check_shortlist(shortlist: int, gate: int, combine: str) -> None:
    check_shortlist(shortlist)
    if combine != "kl":
        raise ValueError(
            f'shortlist = {shortlist} and combine = "{combine}": only "kl" is solved on a '
            "shortlist; take that, or every class"
        )
    if shortlist < gate:
        raise ValueError(
            f"shortlist = {shortlist} is shorter than gate = {gate}: specialists would be asked "
            f"for classes that are not on it; take at least {gate}"
        )


def _check_length(name: str, values: Weights | None, length: int) -> None:
    if values is not None and len(values) != length:
        raise ValueError(
            f"{name} has {len(values)} entries; "
            f"it must have {length}: the generalist's and one per group"
        )


def _checked_temperatures(temperatures: Sequence[float] | None, length: int) -> list[float]:
    if temperatures is None:
        return [1.0] * length
    checked = [float(t) for t in temperatures]
    if not all(0 < t < float("inf") for t in checked):
        raise ValueError(f"temperatures are {checked}; each must be positive")
    return checked


def _device_of(network: nn.Module) -> torch.device:
    return next((tensor.device for tensor in network.parameters()), torch.device("cpu"))


def _listed(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:12]))
    if len(numbers) > 12:
        text += f" and {len(numbers) - 12} more"
    return text
