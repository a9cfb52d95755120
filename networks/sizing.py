"""Scale a network's widths until it takes a given number of multiplications."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .builders import Builders, builtin_options
from .classifier import build_classifier
from .counting import multiplications
from .spec import ModelSpec

# The options of each built-in network that make it wider. Of other builders those of OTHERS.
SCALED = {
    "mlp": ("width", "embedding"),
    "convnet": ("width", "channels", "embedding"),
    "resnet": ("width", "embedding"),
    "wideresnet": ("base", "embedding"),
    "embedding_bag": ("embedding",),
}
OTHERS = ("width", "channels", "embedding")
HALVINGS = 24  # of an interval of factors: widths are whole numbers long before


def count_multiplications(spec: ModelSpec, builders: Builders | None = None) -> int:
    """Multiplications of the network that `spec` describes, for one example."""
    with torch.random.fork_rng(devices=[]):  # the weights are nobody's
        network = build_classifier(spec, builders)
    return multiplications(network, network.zero_input())


def scale(spec: ModelSpec, factor: float) -> ModelSpec:
    """`spec` with its widths, channels and embedding times `factor`, rounded to whole numbers.

    Raises ValueError for a network whose options name none of these.
    """
    options = builtin_options(spec.builder) | spec.options
    wider = {
        name: _scaled(options[name], factor)
        for name in SCALED.get(spec.builder, OTHERS)
        if options.get(name)
    }
    if not wider:
        raise ValueError(
            f"{spec.builder} has none of the options {', '.join(OTHERS)}, by which it could be "
            "made wider"
        )
    return replace(spec, options=spec.options | wider)


def widened_to(
    spec: ModelSpec, target: float, count: Callable[[ModelSpec], int] | None = None
) -> ModelSpec:
    """The spec, scaled up, whose multiplications are nearest to `target`.

    Parameters
    ----------
    spec : ModelSpec
        Returned as it is if `target` is not above its own multiplications.
    target : float
        Multiplications of one example.
    count : callable, optional
        Spec -> multiplications. By default the network is built and run once.

    Returns
    -------
    ModelSpec

    Raises
    ------
    ValueError
        For a network whose options name no width, and for one that they do not make larger.
    """
    count = count or count_multiplications
    own = count(spec)
    if target <= own:
        return spec
    low, high = 1.0, max(1.25, target / own)  # some layer grows in proportion, the rest faster
    while count(scale(spec, high)) < target:
        if high > 64 * target / own:
            raise ValueError(f"{spec.builder}: its widths hardly change its multiplications")
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if scale(spec, middle) in (scale(spec, low), scale(spec, high)) and high - low < 1e-3:
            break
        if count(scale(spec, middle)) < target:
            low = middle
        else:
            high = middle
    candidates = [scale(spec, low), scale(spec, high)]
    return min(candidates, key=lambda each: abs(count(each) - target))


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return [round(each * factor) for each in value]
    return round(value * factor)
