"""The form in which a network trains, which nobody sees who reads what it has learnt.

channels_last    kernels of convolutions in the order that tensor cores read
sync_batchnorm   batch norm counts the global batch
compile          torch.compile of the forward pass, and so of the backward pass

Names of parameters stay as they are, and so do checkpoints.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from networks import Classifier, DustbinHead, RankOne
from networks.choices import NETWORKS
from networks.members import MemberHeads
from pipeline.config import Engine as EngineConfig
from pipeline.config import UserError

# Heads of which the built-in networks are one graph.
ONE_GRAPH = (nn.Linear, DustbinHead, MemberHeads, RankOne)
COMPILERS = ("c++", "g++", "clang++", "gcc")


def check_layers(config: EngineConfig, device: torch.device) -> None:
    """UserError where the machine has not what [engine] asks for."""
    if config.sync_batchnorm and device.type == "cpu":
        raise UserError(
            "engine.sync_batchnorm = true needs GPUs, and this computes on a CPU; set it to false"
        )
    if not config.compile:
        return
    if not (os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        raise UserError(
            "engine.compile = true needs a C++ compiler, and none of "
            f"{', '.join(COMPILERS)} is in PATH; install one, or set it to false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(
            "engine.compile = true needs triton on a GPU, which is not installed; "
            "pip install triton, or set it to false"
        )


def change_layers(
    network: nn.Module, config: EngineConfig, world_size: int
) -> dict[str, nn.Module]:
    """Bring the network, in place, into the form in which it trains.

    Returns the layers that others stand for meanwhile, by name. They share their tensors.
    """
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if not config.sync_batchnorm or world_size == 1:
        return {}
    norms: dict[str, nn.Module] = {}
    for name, each in network.named_modules():
        if isinstance(each, _BatchNorm):
            norms[name] = each
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return norms


def restore_layers(
    network: nn.Module, config: EngineConfig, replaced: dict[str, nn.Module]
) -> None:
    """Bring it back, in place, into the form in which it is saved and exported."""
    for name, layer in replaced.items():
        network.set_submodule(name, layer.train(network.get_submodule(name).training))
    if config.channels_last:
        network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def compiled(network: nn.Module) -> nn.Module:
    """A module that computes as the network, whose parameters it shares, by compiled code.

    Built-in networks have to be one graph. A user's own may break it.
    """
    return cast(nn.Module, torch.compile(network, fullgraph=is_one_graph(network)))


def is_one_graph(network: nn.Module) -> bool:
    if not isinstance(network, Classifier):
        return False
    return network.spec.builder in NETWORKS and isinstance(network.head, ONE_GRAPH)
