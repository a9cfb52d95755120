"""Networks of one kind from different seeds, averaged.  Lakshminarayanan, Pritzel & Blundell 2017."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from networks import Classifier, load_classifier, mean_log_probabilities, save_classifier

from .specialist_ensemble import SCHEMA, SETTINGS, SpecialistEnsemble, read_settings


class DeepEnsemble:
    """The arithmetic mean of its networks' distributions; they are put into eval mode and not changed otherwise."""

    def __init__(self, networks: Sequence[Classifier]):
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
        self.generalist, self.missing = self.networks[0], []

    @classmethod
    def load(
        cls, directory, device="cpu", builders: Mapping[str, Callable] | None = None
    ) -> "DeepEnsemble":
        """The ensemble of a run directory or of an exported bundle: safetensors and JSON, nothing is unpickled.

        builders: {name: callable} for a model.json that names one.  Raises ValueError for a missing or damaged file,
        and for a directory whose ensemble is of another kind.
        """
        root = Path(directory)
        facts = read_settings(root)
        if facts["kind"] != "deep":
            raise ValueError(
                f"{root} holds an ensemble of {facts['kind']}; load it with load_ensemble"
            )
        return cls(
            [
                load_classifier(_folder(root, index), device, builders)
                for index in range(facts["members"])
            ]
        )

    def save(self, directory) -> None:
        """Write `directory`, laid out as a run is, for DeepEnsemble.load."""
        root = Path(directory)
        for index, network in enumerate(self.networks):
            save_classifier(network, _folder(root, index))
        facts = {"schema": SCHEMA, "kind": "deep", "members": len(self.networks)}
        unfinished = root / f".{SETTINGS}.{os.getpid()}"
        unfinished.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, root / SETTINGS)

    @torch.no_grad()
    def member_log_probabilities(self, inputs) -> Tensor:
        """[M, B, C] for raw inputs [B, ...]; a network with several members gives its mean."""
        raw = torch.as_tensor(inputs).to(self.device)
        return torch.stack([mean_log_probabilities(network, raw) for network in self.networks])

    def probabilities(self, inputs) -> Tensor:
        """[B, C] for raw inputs [B, ...]."""
        return self.member_log_probabilities(inputs).exp().mean(0)

    def predict(self, inputs, top: int = 5) -> list[dict]:
        """Per row {classes, names, probabilities, specialists}, as SpecialistEnsemble's; nobody was referred."""
        q = self.probabilities(inputs)
        values, classes = q.topk(min(top, q.shape[1]), dim=1)
        return [
            {
                "classes": row,
                "names": [self.class_names[c] for c in row],
                "probabilities": probabilities,
                "specialists": [],
            }
            for row, probabilities in zip(classes.tolist(), values.tolist(), strict=True)
        ]


def _folder(root: Path, index: int) -> Path:
    return root / "members" / f"{index:03d}" if index else root / "generalist"


def load_ensemble(
    directory, device="cpu", builders=None, **options
) -> SpecialistEnsemble | DeepEnsemble:
    """Whichever ensemble a run directory or an exported bundle holds; options are SpecialistEnsemble.load's."""
    if read_settings(Path(directory))["kind"] == "deep":
        return DeepEnsemble.load(directory, device, builders)
    return SpecialistEnsemble.load(directory, device, builders=builders, **options)
