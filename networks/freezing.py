"""Say which parts of a classifier learn."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .classifier import Classifier
from .cosine import UnitTrunk


def trunk_blocks(trunk: nn.Module) -> dict[str, nn.Module]:
    """The ordered blocks that "last-N-blocks" counts: the children of a Sequential.

    Of another module the children that have parameters, with each list of layers among them taken
    apart.
    """
    if isinstance(trunk, UnitTrunk):
        trunk = trunk.net
    if isinstance(trunk, nn.Sequential):
        return dict(trunk.named_children())
    blocks: dict[str, nn.Module] = {}
    for name, child in trunk.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            blocks |= {f"{name}.{inner}": block for inner, block in child.named_children()}
        else:
            blocks[name] = child
    return {name: block for name, block in blocks.items() if list(block.parameters())}


def set_trainable(classifier: Classifier, part: str) -> Classifier:
    """Train some part of a classifier and freeze the rest.

    Parameters
    ----------
    classifier : Classifier
        Changed in place.
    part : {"all", "head", "last-N-blocks"}
        "last-N-blocks" are the head and the last N blocks of the trunk.  The head of a network with
        several heads is all of them with their blocks. N counts the blocks of their body.

    Returns
    -------
    Classifier
        The same one.  Batch norm in frozen blocks stays in eval mode.

    Raises
    ------
    ValueError
        For another `part`, and for more blocks than there are.
    """
    match = re.fullmatch(r"all|head|last-([1-9][0-9]*)-blocks?", part)
    if not match:
        raise ValueError(
            f"trainable = {part!r}: must be all, head or last-N-blocks (such as last-2-blocks)"
        )
    blocks = trunk_blocks(classifier.trunk)
    count = int(match[1] or 0)
    if count > len(blocks):
        raise ValueError(
            f"trainable = {part!r}: the trunk has {len(blocks)} blocks ({', '.join(blocks)})"
        )
    classifier.requires_grad_(part == "all")
    open_blocks = [classifier.head, *list(blocks.values())[len(blocks) - count :]]
    for block in open_blocks:
        block.requires_grad_(True)
    frozen: list[str] = []
    if part != "all":
        open_modules = {module for block in open_blocks for module in block.modules()}
        for name, module in classifier.named_modules():
            if isinstance(module, _BatchNorm) and module not in open_modules:
                frozen.append(name)
    classifier._frozen_norms = frozenset(frozen)
    return classifier.train(classifier.training)


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
