"""What ensembles of whole networks share, however their answers are joined."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from networks import (
    Classifier,
    load_classifier,
    mean_log_probabilities,
    multiplications,
    parameter_count,
    read_inputs,
    save_classifier,
)
from networks.builders import Builders
from networks.reading import Inputs

from .ranking import Prediction, check_top, top_predictions
from .settings import EnsembleSettings, member_folder
from .specialist_ensemble import RawInputs, is_finished


class NetworkEnsemble:
    """Networks of one label set, the generalist first. A subclass says how they are joined.

    The networks are put into eval mode and not changed otherwise.
    """

    def __init__(self, networks: Sequence[Classifier]):
        self.networks = [network.eval() for network in networks]
        self.generalist = self.networks[0]
        self.class_names = list(self.generalist.spec.class_names)
        self.device = next(self.generalist.parameters()).device
        self.missing: list[int] = []
        self.finished: bool | None = None
        self.functions: Mapping[str, Callable] = {}

    def settings(self) -> EnsembleSettings:
        """What ensemble.json says of it."""
        raise NotImplementedError

    def probabilities(self, inputs: Inputs) -> Tensor:
        """[B, C] for inputs that `read` can read."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write `directory`, laid out as a run is, for `load`."""
        root = Path(directory)
        for index, network in enumerate(self.networks):
            save_classifier(network, member_folder(root, index))
        self.settings().save(root)

    def read(self, inputs: Inputs, resize: bool = False, max_pixels: int | None = None) -> Tensor:
        """Raw inputs [B, ...] of what people have, as SpecialistEnsemble.read."""
        spec = self.generalist.spec.input
        return read_inputs(inputs, spec, self.functions, resize, max_pixels).to(self.device)

    @torch.no_grad()
    def member_log_probabilities(self, inputs: RawInputs) -> Tensor:
        """[M, B, C], each network's own over all classes, at temperature 1, for [B, ...].

        A network with several heads gives its mean.
        """
        raw = torch.as_tensor(inputs).to(self.device)
        return torch.stack([mean_log_probabilities(network, raw) for network in self.networks])

    def multiplications(self) -> float:
        """What the networks multiply for one example, together."""
        raw = self.generalist.zero_input()
        return float(sum(multiplications(network, raw) for network in self.networks))

    def parameters(self) -> int:
        """Parameters of all networks together."""
        return sum(map(parameter_count, self.networks))

    def predict(self, inputs: Inputs, top: int = 5) -> list[Prediction]:
        """Per row {classes, names, probabilities, specialists}, as SpecialistEnsemble's.

        There are no specialists.
        """
        check_top(top)
        return top_predictions(self.probabilities(inputs), self.class_names, top)

    def _loaded_from(self, root: Path, builders: Builders | None) -> None:
        """Note where it comes from, and the user's functions that its files name."""
        self.finished = is_finished(root)
        self.functions = builders or {}


def load_networks(
    root: Path, kind: str, device: str | torch.device, builders: Builders | None
) -> tuple[list[Classifier], EnsembleSettings]:
    """(networks, settings) of a directory whose ensemble is of that kind, else ValueError."""
    settings = EnsembleSettings.load(root)
    if settings.kind != kind:
        raise ValueError(f"{root} holds an ensemble of {settings.kind}; load it with load_ensemble")
    folders = [member_folder(root, index) for index in range(settings.members)]
    return [load_classifier(folder, device, builders) for folder in folders], settings
