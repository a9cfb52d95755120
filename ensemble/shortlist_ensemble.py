"""Second opinions: further networks are asked about each row's likeliest classes alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from networks import (
    Classifier,
    lazy_logits,
    mean_log_probabilities,
    multiplications,
    top_k,
)
from networks.builders import Builders
from networks.gathered_rows import head_logits
from networks.reading import Inputs

from .network_ensemble import NetworkEnsemble, load_networks
from .settings import EnsembleSettings
from .shortlist import GEOMETRIC, check_order, check_weights, join_within
from .specialist_ensemble import finished_words


class ShortlistProgram(nn.Module):
    """raw [B, ...] -> q [B, C], as in ShortlistEnsemble.

    The number of rows is free: it can be made a program of torch.export or ONNX.
    """

    def __init__(
        self,
        networks: Sequence[Classifier],
        shortlist: int,
        order: float,
        weights: Sequence[float],
        temperatures: Sequence[float],
    ):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.shortlist = shortlist
        self.order = order
        self.weights = list(weights)
        self.temperatures = list(temperatures)

    def forward(self, raw: Tensor) -> Tensor:
        generalist, *others = cast(list[Classifier], list(self.networks))
        z = at_temperature(whole_logits(generalist, raw), self.temperatures[0])
        if not others:
            return z.softmax(1)
        own, indices = top_k(z, self.shortlist, ordered=False)
        asked = [
            at_temperature(logits_at(network, raw, indices), T)
            for network, T in zip(others, self.temperatures[1:], strict=True)
        ]
        logits = torch.stack([own, *(each.to(own) for each in asked)])
        # As logits the joined ones leave the sum over all classes as it is, so that one softmax
        # gives them and the others.
        joined = join_within(logits, own.logsumexp(1), self.order, self.weights)
        return z.scatter_(1, indices, joined).softmax(1)


class ShortlistEnsemble(NetworkEnsemble):
    """A generalist, and further networks that are asked about its k likeliest classes of each row.

    Within the shortlist the distributions are renormalised and joined by the generalised mean.  The
    shortlist keeps the generalist's mass, and outside of it the generalist's answer stands.  A
    further network costs its trunk and k rows of its head. One with several members (Hydra,
    BatchEnsemble) costs its whole head.  The networks are put into eval mode and not changed
    otherwise.

    Parameters
    ----------
    networks : sequence of networks.Classifier
        The generalist first.  All know the same classes and read the same raw inputs. Sizes may
        differ.
    shortlist : int
        k. All classes where there are no more.
    order : float
        Of the mean, as in `generalised_mean`: 0 is geometric, 1 arithmetic.
    weights, temperatures : sequence of float, optional
        One for each network.  None means all ones.

    Raises
    ------
    ValueError
        For no networks, other classes or inputs, a shortlist below 1, an order outside [0, 1], and
        weights or temperatures that are not one positive number for each network.
    """

    def __init__(
        self,
        networks: Sequence[Classifier],
        shortlist: int,
        order: float = GEOMETRIC,
        weights: Sequence[float] | None = None,
        temperatures: Sequence[float] | None = None,
    ):
        check_alike(networks)
        check_order(order)
        if shortlist < 1:
            raise ValueError(f"shortlist = {shortlist}; at least 1 class has to be on it")
        count = len(networks)
        self.weights = [1.0] * count if weights is None else [float(w) for w in weights]
        self.temperatures = [1.0] * count
        if temperatures is not None:
            self.temperatures = [float(T) for T in temperatures]
        check_weights(self.weights, count)
        check_temperatures(self.temperatures, count)
        super().__init__(networks)
        self.shortlist = min(shortlist, self.generalist.spec.num_classes)
        self.order = order
        self.program = ShortlistProgram(
            self.networks, self.shortlist, order, self.weights, self.temperatures
        ).eval()

    def __repr__(self) -> str:
        return (
            f"ShortlistEnsemble({len(self.class_names)} classes, {len(self.networks)} networks, "
            f"the {self.shortlist} likeliest classes, {finished_words(self.finished)})"
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        builders: Builders | None = None,
    ) -> "ShortlistEnsemble":
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
        ShortlistEnsemble

        Raises
        ------
        ValueError
            For a missing or corrupt file, and for a directory whose ensemble is of another kind.
        """
        root = Path(directory)
        networks, settings = load_networks(root, "shortlist", device, builders)
        if settings.shortlist is None:
            raise ValueError(f"{root}: its ensemble.json does not say how long the shortlist is")
        ensemble = cls(
            networks,
            settings.shortlist,
            GEOMETRIC if settings.order is None else settings.order,
            settings.weights,
            settings.temperatures,
        )
        ensemble._loaded_from(root, builders)
        return ensemble

    def settings(self) -> EnsembleSettings:
        """What ensemble.json says of it."""
        return EnsembleSettings(
            kind="shortlist",
            members=len(self.networks),
            order=self.order,
            shortlist=self.shortlist,
            weights=self.weights,
            temperatures=self.temperatures,
        )

    def multiplications(self) -> float:
        """What the networks multiply for one example: of a further one's head, k rows."""
        generalist, *others = self.networks
        raw = generalist.zero_input()
        counts = [multiplications(generalist, raw)]
        counts += [asked_multiplications(network, raw, self.shortlist) for network in others]
        return float(sum(counts))

    @torch.no_grad()
    def probabilities(self, inputs: Inputs) -> Tensor:
        """[B, C] for inputs that `read` can read."""
        return self.program(self.read(inputs))


def whole_logits(network: Classifier, raw: Tensor) -> Tensor:
    """[B, C] up to a constant of the row. Of a network with members their mean's."""
    if network.num_members > 1:
        return mean_log_probabilities(network, raw)
    if not isinstance(network.head, nn.Linear):
        return network(raw)
    return head_logits(network.head, network.trunk(network.preprocess(raw)))


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in float32 for half precision."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def logits_at(network: Classifier, raw: Tensor, indices: Tensor) -> Tensor:
    """[B, k] up to a constant of the row, at each row's own classes `indices` [B, k]."""
    if network.num_members > 1:
        return mean_log_probabilities(network, raw).gather(1, indices)
    return lazy_logits(network, raw).logits_at(indices)


def asked_multiplications(network: Classifier, raw: Tensor, count: int) -> int:
    """Multiplications of a network asked about `count` classes of one example. raw: [1, ...]."""
    whole = multiplications(network, raw)
    if network.num_members > 1:  # it answers about every class
        return whole
    rows = network.linear_head.weight
    return whole - (len(rows) - count) * rows.shape[1]


def check_alike(networks: Sequence[Classifier]) -> None:
    """ValueError where networks do not know the same classes, or read other inputs."""
    if not networks:
        raise ValueError("an ensemble needs at least one network")
    first = networks[0].spec
    for index, network in enumerate(networks):
        spec = network.spec
        if spec.num_classes != first.num_classes:
            raise ValueError(
                f"network {index} knows {spec.num_classes} classes, the generalist "
                f"{first.num_classes}; networks of one ensemble need one label set"
            )
        unnamed = tuple(map(str, range(spec.num_classes)))
        if spec.class_names not in (first.class_names, unnamed):
            pairs = zip(spec.class_names, first.class_names, strict=True)
            place = next(place for place, (one, other) in enumerate(pairs) if one != other)
            raise ValueError(
                f"class {place} of network {index} is {spec.class_names[place]!r}, the "
                f"generalist's {first.class_names[place]!r}; networks of one ensemble need one "
                "label set"
            )
        if spec.input.shape != first.input.shape or spec.input.dtype != first.input.dtype:
            raise ValueError(
                f"network {index} reads {spec.input.dtype} {list(spec.input.shape)}, the "
                f"generalist {first.input.dtype} {list(first.input.shape)}; give one that reads "
                "the same inputs"
            )


def check_temperatures(temperatures: Sequence[float], count: int) -> None:
    """ValueError for temperatures that are not `count` positive numbers."""
    if len(temperatures) != count or not all(0 < T < float("inf") for T in temperatures):
        raise ValueError(
            f"temperatures = {list(temperatures)}; {count} positive numbers are needed, one for "
            "each network"
        )
