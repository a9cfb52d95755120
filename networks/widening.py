"""Make a finished classifier wider without changing what it computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .builders import builtin_options
from .classifier import Classifier, build_classifier
from .cosine import UnitTrunk
from .heads import DustbinHead
from .spec import ModelSpec

WIDENABLE = ("mlp", "convnet")  # layers in a chain: what one gives, the next alone reads
WIDTHS = {"width", "channels", "embedding"}
DROPOUTS = {"dropout", "input_dropout"}

Layer = nn.Conv2d | nn.Linear | DustbinHead


def widen(
    classifier: Classifier, to: float | ModelSpec, generator: torch.Generator | None = None
) -> Classifier:
    """A wider mlp or convnet that computes the same function.

    A new unit copies a random old one.  The weights that read a copied unit are split among its
    copies in random fractions, entry by entry: their sum, and so the function, stays, and the
    copies do not stay twins.

    Parameters
    ----------
    classifier : Classifier
        An mlp or convnet, perhaps a specialist.  It stays as it is.
    to : float or ModelSpec
        A factor for width, channels and embedding, or a spec that differs from the classifier's in
        these, and perhaps in dropout, alone.
    generator : torch.Generator, optional
        By default torch's global one.

    Returns
    -------
    Classifier
        In the classifier's mode and dtype, on its device.

    Raises
    ------
    ValueError
        For other builders, for a network with members, and where a layer would become narrower.

    References
    ----------
    Chen, Goodfellow & Shlens 2015, Net2Net: Accelerating Learning via Knowledge Transfer
    (Net2WiderNet).
    """
    spec = classifier.spec
    if spec.members is not None:
        raise ValueError(
            "a network with members cannot be widened; widen the plain one, then give it members"
        )
    trunk = classifier.trunk
    net = trunk.net if isinstance(trunk, UnitTrunk) else trunk
    if spec.builder not in WIDENABLE or not isinstance(net, nn.Sequential):
        raise ValueError(f"only mlp and convnet can be widened, not {spec.builder}")
    target = _checked_target(spec, to) if isinstance(to, ModelSpec) else _wider_spec(spec, to)
    with torch.random.fork_rng(devices=[]):
        wider = build_classifier(target)
    wider.to(next(classifier.parameters()))
    pairs = list(zip(_layers(classifier), _layers(wider), strict=True))
    for old, new in pairs:
        if new.weight.shape[0] < old.weight.shape[0]:
            raise ValueError(
                f"a layer of {old.weight.shape[0]} units cannot be widened to {new.weight.shape[0]}"
            )
    if isinstance(trunk, UnitTrunk):
        _keep_norms(trunk, wider.trunk, *pairs[-1])
    # origin: the old unit that each unit of the layer below copies. First the inputs themselves.
    num_units = math.prod(spec.input.shape) if spec.builder == "mlp" else spec.input.shape[0]
    origin = torch.arange(num_units)
    with torch.no_grad():
        for old, new in pairs:
            if isinstance(old, _BatchNorm) or isinstance(new, _BatchNorm):
                _widen_norm(old, new, origin)
            else:
                origin = _widen_layer(old, new, origin, num_units, generator)
                num_units = old.weight.shape[0]
    return wider.train(classifier.training)


def _keep_norms(old: UnitTrunk, new: nn.Module, head: nn.Module, wider_head: nn.Module) -> None:
    """The scale goes on.  ValueError where more features would have other norms."""
    size, wider = (layer.get_parameter("weight").shape[1] for layer in (head, wider_head))
    if size != wider:
        raise ValueError(
            f"{size} features of a cosine head cannot be widened to {wider}, which have another "
            "norm; widen what stands before an embedding of the same size"
        )
    assert isinstance(new, UnitTrunk)
    with torch.no_grad():
        new.unit.scale.copy_(old.unit.scale)


def _widen_norm(old: nn.Module, new: nn.Module, origin: Tensor) -> None:
    for name, tensor in old.named_parameters():
        new.get_parameter(name).copy_(_take(tensor, origin))
    for name in ("running_mean", "running_var"):
        new.get_buffer(name).copy_(_take(old.get_buffer(name), origin))
    new.get_buffer("num_batches_tracked").copy_(old.get_buffer("num_batches_tracked"))


def _widen_layer(
    old: Layer,
    new: Layer,
    origin: Tensor,
    num_units: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Fill `new`. Returns int64 [units], the old unit that each new one copies.

    origin: that of the layer below, which has num_units old units.
    """
    # Where maps were flattened, each unit below is a channel of so many inputs.
    positions = old.weight.shape[1] // num_units
    origin = (origin[:, None] * positions + torch.arange(positions)).flatten()
    copies = _copies(old.weight.shape[0], new.weight.shape[0], generator)
    new.weight.copy_(_split_columns(_take(old.weight, copies), origin, generator))
    if old.bias is not None:
        assert new.bias is not None
        new.bias.copy_(_take(old.bias, copies))
    return copies


def _layers(classifier: Classifier) -> list[Layer | _BatchNorm]:
    kinds = (nn.Conv2d, nn.Linear, _BatchNorm, DustbinHead)
    return [module for module in classifier.modules() if isinstance(module, kinds)]


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor[index.to(tensor.device)]


def _copies(old: int, new: int, generator: torch.Generator | None) -> Tensor:
    """int64 [new]: every old unit once, in order, and then random ones."""
    return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])


def _split_columns(weight: Tensor, origin: Tensor, generator: torch.Generator | None) -> Tensor:
    """[out, old, ...] -> [out, new, ...]: column j is old column origin[j] times a random fraction.

    The fractions of each old column sum to 1.
    """
    size = weight.shape[0], len(origin)
    fractions = torch.rand(*size, generator=generator, dtype=torch.float64) + 0.25
    sums = torch.zeros(weight.shape[:2], dtype=torch.float64).index_add_(1, origin, fractions)
    fractions = (fractions / sums[:, origin]).to(weight)
    return weight[:, origin.to(weight.device)] * fractions.view(*size, *[1] * (weight.dim() - 2))


def _wider_spec(spec: ModelSpec, factor: float) -> ModelSpec:
    options = builtin_options(spec.builder) | spec.options
    for name in WIDTHS & options.keys():
        if isinstance(options[name], list):
            options[name] = [round(channel * factor) for channel in options[name]]
        elif options[name] is not None:
            options[name] = round(options[name] * factor)
    return replace(spec, options=options)


def _checked_target(spec: ModelSpec, target: ModelSpec) -> ModelSpec:
    """`target`, if it is `spec` but for widths and dropout."""
    if _unwidened(spec) != _unwidened(target):
        raise ValueError(
            "widening changes width, channels, embedding and dropout; "
            "the rest of the two models must agree"
        )
    if bool(_option(spec, "embedding")) != bool(_option(target, "embedding")):
        raise ValueError("widening cannot add or remove the embedding")
    if spec.num_classes != target.num_classes:
        raise ValueError(
            f"a model of {spec.num_classes} classes cannot be widened "
            f"to one of {target.num_classes}"
        )
    return target


def _unwidened(spec: ModelSpec) -> tuple:
    """What two specs share if one can be widened to the other."""
    options = builtin_options(spec.builder) | spec.options
    fixed = {name: value for name, value in options.items() if name not in WIDTHS | DROPOUTS}
    return spec.builder, fixed, spec.input, spec.head, spec.members, spec.cosine


def _option(spec: ModelSpec, name: str) -> Any:
    return (builtin_options(spec.builder) | spec.options)[name]
