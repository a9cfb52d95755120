"""Checkpoints of Hugging Face's transformers in the names that timm has for the same network.

A layout is a list of (pattern, replacement) for the names of the tensors that a trunk has.  A
prefix in front ("vit.", "resnet.") is part of no pattern: it is taken off here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

VIT = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)",
        r"blocks.\1.attn.\2.\3",
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
)
RESNET = (
    (r"embedder\.embedder\.convolution\.weight", "conv1.weight"),
    (r"embedder\.embedder\.normalization\.(\w+)", r"bn1.\1"),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.weight",
        r"layer{\1}.\2.conv{\3}.weight",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(\w+)",
        r"layer{\1}.\2.bn{\3}.\4",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.weight",
        r"layer{\1}.\2.downsample.0.weight",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
        r"layer{\1}.\2.downsample.1.\3",
    ),
)


def translated(tensors: Mapping[str, Tensor]) -> tuple[Tensors, str]:
    """The tensors in timm's names and the layout that theirs are of. ({}, "") of any other file."""
    for name, (mark, translate) in LAYOUTS.items():
        if any(re.search(mark, key) for key in tensors):
            return translate(tensors), name
    return {}, ""


def _vit(tensors: Mapping[str, Tensor]) -> Tensors:
    """One tensor of queries, keys and values where transformers has three, and no pooler."""
    renamed = _renamed(tensors, VIT)
    joined: Tensors = {}
    for name, tensor in renamed.items():
        if ".attn.query." in name:
            parts = [renamed.get(name.replace("query", part)) for part in ("query", "key", "value")]
            whole = [part for part in parts if part is not None]
            if len(whole) == len(parts):
                joined[name.replace("query", "qkv")] = torch.cat(whole)
        elif not re.search(r"\.attn\.(key|value)\.|(^|\.)pooler\.", name):
            joined[name] = tensor
    return joined


def _resnet(tensors: Mapping[str, Tensor]) -> Tensors:
    """timm counts stages, convolutions and norms from 1."""
    renamed = _renamed(tensors, RESNET)
    return {
        re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), name): tensor
        for name, tensor in renamed.items()
    }


def _renamed(tensors: Mapping[str, Tensor], table: tuple[tuple[str, str], ...]) -> Tensors:
    """A name that no row matches, say the head's, stays as it is."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        own = name
        for pattern, replacement in table:
            match = re.fullmatch(rf"(?:\w+\.)*?{pattern}", name)
            if match:
                own = match.expand(replacement)
                break
        renamed[own] = tensor
    return renamed


# name -> (what a name of such a checkpoint has, the function that renames)
LAYOUTS: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], Tensors]]] = {
    "transformers' ViT": (r"encoder\.layer\.\d+\.attention\.attention\.query\.", _vit),
    "transformers' ResNet": (r"encoder\.stages\.\d+\.layers\.\d+\.layer\.\d+\.", _resnet),
}
