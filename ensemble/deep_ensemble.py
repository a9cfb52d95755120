"""Networks of one kind from different seeds, averaged."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from networks import (
    Classifier,
)
from networks.builders import Builders
from networks.reading import Inputs

from .network_ensemble import NetworkEnsemble, load_networks
from .settings import EnsembleSettings
from .shortlist import ARITHMETIC, check_order, generalised_mean
from .shortlist_ensemble import ShortlistEnsemble
from .specialist_ensemble import (
    SpecialistEnsemble,
    finished_words,
)


class DeepEnsemble(NetworkEnsemble):
    """The arithmetic mean of its networks' distributions, or another generalised mean.

    The networks are put into eval mode and not changed otherwise.

    Parameters
    ----------
    networks : sequence of networks.Classifier
        At least one, of one label set.
    order : float
        Of the mean, as in `generalised_mean`: 1 is arithmetic, 0 geometric.

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
        super().__init__(networks)
        self.order = order

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

        Reads safetensors and JSON. Nothing is unpickled.

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
        networks, settings = load_networks(root, "deep", device, builders)
        ensemble = cls(networks, ARITHMETIC if settings.order is None else settings.order)
        ensemble._loaded_from(root, builders)
        return ensemble

    def settings(self) -> EnsembleSettings:
        """What ensemble.json says of it. The arithmetic mean is not written."""
        settings = EnsembleSettings(kind="deep", members=len(self.networks))
        if self.order != ARITHMETIC:
            settings.order = self.order
        return settings

    def probabilities(self, inputs: Inputs) -> Tensor:
        """[B, C] for inputs that `read` can read."""
        return self.joined(self.member_log_probabilities(self.read(inputs)))

    def joined(self, log_p: Tensor) -> Tensor:
        """The mean of the networks' distributions, log p [M, B, C] -> p [B, C]."""
        if self.order == ARITHMETIC:
            return log_p.exp().mean(0)
        return generalised_mean(log_p, self.order).exp()


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
        As in `SpecialistEnsemble.load`.  Other ensembles use the first three alone.

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
