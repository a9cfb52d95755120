"""Networks of one kind from different seeds, averaged."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from networks import (
    Classifier,
    load_classifier,
    mean_log_probabilities,
    read_inputs,
    save_classifier,
)
from networks.builders import Builders
from networks.reading import Inputs

from .ranking import Prediction, top_predictions
from .settings import EnsembleSettings, member_folder
from .shortlist import ARITHMETIC, check_order, generalised_mean
from .shortlist_ensemble import ShortlistEnsemble
from .specialist_ensemble import (
    RawInputs,
    SpecialistEnsemble,
    finished_words,
    is_finished,
)


class DeepEnsemble:
    """The arithmetic mean of its networks' distributions, or another generalised mean.

    The networks are put into eval mode and not changed otherwise.

    Parameters
    ----------
    networks : sequence of networks.Classifier
        At least one, of one label set.
    order : float
        Of the mean, as `generalised_mean` has it: 1 is arithmetic, 0 geometric.

    Raises
    ------
    ValueError
        For no networks, for label sets of different sizes, and for an order outside [0, 1].

    References
    ----------
    Lakshminarayanan, Pritzel and Blundell 2017, "Simple and scalable predictive uncertainty
    estimation using deep ensembles".
    """

    def __init__(self, networks: Sequence[Classifier], order: float = ARITHMETIC):
        check_order(order)
        if not networks:
            raise ValueError("an ensemble needs at least one network")
        sizes = {network.spec.num_classes for network in networks}
        if len(sizes) > 1:
            raise ValueError(
                f"networks of one ensemble need one label set; these have {sorted(sizes)} classes"
            )
        self.networks = [network.eval() for network in networks]
        self.class_names = list(networks[0].spec.class_names)
        self.device = next(networks[0].parameters()).device
        self.generalist = self.networks[0]
        self.order = order
        self.missing: list[int] = []
        self.finished: bool | None = None
        self.functions: Mapping[str, Callable] = {}

    def __repr__(self) -> str:
        return (
            f"DeepEnsemble({len(self.class_names)} classes, {len(self.networks)} networks, "
            f"{finished_words(self.finished)})"
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        builders: Builders | None = None,
    ) -> "DeepEnsemble":
        """The ensemble of a run directory or of an exported bundle.

        Reads safetensors and JSON; nothing is unpickled.

        Parameters
        ----------
        directory : path
        device : str or torch.device
        builders : dict of callables, optional
            {name: callable} for a model.json that names one.

        Returns
        -------
        DeepEnsemble

        Raises
        ------
        ValueError
            For a missing or corrupt file, and for a directory whose ensemble is of another kind.
        """
        root = Path(directory)
        settings = EnsembleSettings.load(root)
        if settings.kind != "deep":
            raise ValueError(
                f"{root} holds an ensemble of {settings.kind}; load it with load_ensemble"
            )
        folders = [member_folder(root, index) for index in range(settings.members)]
        networks = [load_classifier(folder, device, builders) for folder in folders]
        ensemble = cls(networks, ARITHMETIC if settings.order is None else settings.order)
        ensemble.finished = is_finished(root)
        ensemble.functions = builders or {}
        return ensemble

    def save(self, directory: str | Path) -> None:
        """Write `directory`, laid out as a run is, for DeepEnsemble.load."""
        root = Path(directory)
        for index, network in enumerate(self.networks):
            save_classifier(network, member_folder(root, index))
        settings = EnsembleSettings(kind="deep", members=len(self.networks))
        if self.order != ARITHMETIC:
            settings.order = self.order
        settings.save(root)

    @torch.no_grad()
    def member_log_probabilities(self, inputs: RawInputs) -> Tensor:
        """[M, B, C] for raw inputs [B, ...]; a network with several heads gives its mean."""
        raw = torch.as_tensor(inputs).to(self.device)
        return torch.stack([mean_log_probabilities(network, raw) for network in self.networks])

    def read(self, inputs: Inputs, resize: bool = False, max_pixels: int | None = None) -> Tensor:
        """Raw inputs [B, ...] of what people have, as SpecialistEnsemble.read."""
        spec = self.generalist.spec.input
        return read_inputs(inputs, spec, self.functions, resize, max_pixels).to(self.device)

    def probabilities(self, inputs: Inputs) -> Tensor:
        """[B, C] for inputs that `read` can read."""
        log_p = self.member_log_probabilities(self.read(inputs))
        if self.order == ARITHMETIC:
            return log_p.exp().mean(0)
        return generalised_mean(log_p, self.order).exp()

    def predict(self, inputs: Inputs, top: int = 5) -> list[Prediction]:
        """Per row {classes, names, probabilities, specialists}, as SpecialistEnsemble's.

        There are no specialists.
        """
        return top_predictions(self.probabilities(inputs), self.class_names, top)


def load_ensemble(
    directory: str | Path,
    device: str | torch.device = "cpu",
    builders: Builders | None = None,
    gate: int | None = None,
    max_specialists: int | None = None,
    cache: int | None = None,
    allow_missing: bool = False,
) -> SpecialistEnsemble | DeepEnsemble | ShortlistEnsemble:
    """Whichever ensemble a run directory or an exported bundle holds.

    Parameters
    ----------
    directory, device, builders, gate, max_specialists, cache, allow_missing
        As `SpecialistEnsemble.load` has them.  Other ensembles use the first three alone.

    Returns
    -------
    SpecialistEnsemble, DeepEnsemble or ShortlistEnsemble

    Raises
    ------
    ValueError
        As the `load` of that ensemble does.
    """
    kind = EnsembleSettings.load(Path(directory)).kind
    if kind == "shortlist":
        return ShortlistEnsemble.load(directory, device, builders)
    if kind == "deep":
        return DeepEnsemble.load(directory, device, builders)
    return SpecialistEnsemble.load(
        directory, device, gate, max_specialists, cache, allow_missing, builders
    )
