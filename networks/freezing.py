"""Say which parts of a classifier learn."""

from __future__ import annotations

import difflib
import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .classifier import Classifier
from .cosine import UnitTrunk

TRUNK = "trunk."  # begins the names of a network's modules that stand in its trunk
LAST_BLOCKS = r"last-([1-9][0-9]*)-blocks?"


def trunk_parts(trunk: nn.Module) -> dict[str, nn.Module]:
    """The children of a Sequential in order.

    For any other module, the children that have parameters. Lists of layers among them are taken
    apart.
    """
    trunk = _net(trunk)
    if isinstance(trunk, nn.Sequential):
        return dict(trunk.named_children())
    parts: dict[str, nn.Module] = {}
    for name, child in trunk.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            parts |= {f"{name}.{inner}": block for inner, block in child.named_children()}
        else:
            parts[name] = child
    return {name: part for name, part in parts.items() if list(part.parameters())}


def trunk_blocks(trunk: nn.Module) -> dict[str, nn.Module]:
    """The ordered blocks that "last-N-blocks" counts. A norm behind a block is not one.

    For a transformer these are the patch embedding and the blocks. The final norm belongs to the
    last block (see parts_from).
    """
    parts = trunk_parts(trunk)
    if isinstance(_net(trunk), nn.Sequential):
        return parts
    return {name: part for name, part in parts.items() if not _is_norm(part)} or parts


def parts_from(trunk: nn.Module, count: int) -> list[nn.Module]:
    """The last `count` blocks with the norms behind each of them."""
    if not count:
        return []
    parts = trunk_parts(trunk)
    first = list(trunk_blocks(trunk))[-count]
    return list(parts.values())[list(parts).index(first) :]


def _net(trunk: nn.Module) -> nn.Module:
    return trunk.net if isinstance(trunk, UnitTrunk) else trunk


def _is_norm(part: nn.Module) -> bool:
    """Whether a module only scales and shifts: all its parameters are vectors."""
    return all(parameter.ndim <= 1 for parameter in part.parameters())


def set_trainable(classifier: Classifier, part: str) -> Classifier:
    """Train some part of a classifier and freeze the rest.

    Parameters
    ----------
    classifier : Classifier
        Changed in place.
    part : str
        "all", "head", "last-N-blocks", or "trunk.NAME, trunk.NAME".
        "last-N-blocks" are the head and the last N blocks of the trunk, as trunk_blocks counts
        them.  The head of a network with several heads is all of them with their blocks. N counts
        the blocks of their body.  "trunk.NAME, trunk.NAME" are the head and these modules.

    Returns
    -------
    Classifier
        The same one.  Batch norm in frozen blocks stays in eval mode.

    Raises
    ------
    ValueError
        For another `part`, for more blocks than there are, and for a module that is not there.
    """
    opened = [classifier.head, *_opened(classifier, part)]
    classifier.requires_grad_(part == "all")
    for module in opened:
        module.requires_grad_(True)
    frozen: list[str] = []
    if part != "all":
        open_modules = {each for module in opened for each in module.modules()}
        for name, module in classifier.named_modules():
            if isinstance(module, _BatchNorm) and module not in open_modules:
                frozen.append(name)
    classifier._frozen_norms = frozenset(frozen)
    return classifier.train(classifier.training)


def _opened(classifier: Classifier, part: str) -> list[nn.Module]:
    """The modules of the trunk that a name of set_trainable opens, where it is not "all"."""
    if part in ("all", "head"):
        return []
    if part.startswith(TRUNK):
        return [_module(classifier, name.strip()) for name in part.split(",")]
    match = re.fullmatch(LAST_BLOCKS, part)
    if not match:
        raise ValueError(
            f"trainable = {part!r}: must be all, head or last-N-blocks (such as last-2-blocks), or "
            'modules by name ("trunk.norm, trunk.blocks.11")'
        )
    blocks = trunk_blocks(classifier.trunk)
    if int(match[1]) > len(blocks):
        raise ValueError(
            f"trainable = {part!r}: the trunk has {len(blocks)} blocks ({', '.join(blocks)})"
        )
    return parts_from(classifier.trunk, int(match[1]))


def _module(classifier: Classifier, name: str) -> nn.Module:
    modules = dict(classifier.named_modules())
    if name in modules and name.startswith(TRUNK):
        return modules[name]
    names = [each for each in modules if each.startswith(TRUNK)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:3])}, ..."
    raise ValueError(f"trainable: the network has no module {name!r}; {hint}")


def layer_scales(classifier: Classifier, decay: float) -> dict[str, float]:
    """{parameter: decay^i}, what layer-wise decay multiplies the rate of each parameter by.

    i is 0 of the head, 1 of the trunk's last block, 2 of the one before it, ... (see trunk_blocks),
    and of parameters outside any block (a transformer's class token and positions) as of the first
    block.  Clark et al. 2020 (ELECTRA). Bao et al. 2021 (BEiT).
    """
    parts, blocks = trunk_parts(classifier.trunk), trunk_blocks(classifier.trunk)
    depth_of: dict[nn.Parameter, int] = {}
    depth = len(blocks) + 1
    for name, part in parts.items():
        if name in blocks:
            depth -= 1
        depth_of |= dict.fromkeys(part.parameters(), min(depth, len(blocks)))
    for parameter in _net(classifier.trunk).parameters():
        depth_of.setdefault(parameter, len(blocks))
    named = classifier.named_parameters()
    return {name: decay ** depth_of.get(parameter, 0) for name, parameter in named}


def set_layer_decay(classifier: Classifier, decay: float) -> Classifier:
    """Scale each parameter's learning rate by layer_scales. A decay of 1 changes nothing.

    Changed in place, and returned.  Optimizers read it (trainer.core.optim).
    """
    classifier.rate_scales = {} if decay == 1 else layer_scales(classifier, decay)
    return classifier


def freeze_norm(classifier: Classifier, fixed: bool = True) -> Classifier:
    """Keep the running statistics of every batch norm as they are, also in train mode.

    Parameters
    ----------
    classifier : Classifier
        Changed in place.  Scales and biases of its norms still learn.
    fixed : bool
        False lets the statistics move again.

    Returns
    -------
    Classifier
        The same one.
    """
    classifier._all_norms_fixed = fixed
    return classifier.train(classifier.training)
