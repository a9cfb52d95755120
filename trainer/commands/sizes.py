"""`python -P -m trainer sizes`: how large the networks of a config are, for a plan of its run.

Nothing is trained and no data are read: the networks are built without memory.  Standard input is
one JSON object, {"config", "classes", "shape", "dtype"}. The answer is one line of JSON,

    {"networks": {"generalist": {"weights", "classes", "features", "outputs"}, ...},
     "branch": ...}

of the generalist, each student by its name, and "wider" of controls.model.  "branch" is
{"at_cut", "general", "features", "own"}: the numbers at the cut and those that the head
reads, what a branch's embedding reads, and the weights of its own blocks. Null of a run without.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import cast

import numpy as np
import torch

from networks import Classifier, parameter_count
from networks.cutting import cut_at
from pipeline.config import Config, UserError, load_config
from pipeline.graph import RunDirectory
from pipeline.scaling import Network
from pipeline.usage import Parser

from ..data.shards import ShardSet
from ..distributed.ranks import Ranks
from ..session import Session
from ..stages.networks import fresh_network, student_members


@dataclass(frozen=True)
class DeclaredInputs:
    """What is known of a split without reading it, as in ShardSet."""

    num_classes: int
    input_shape: tuple[int, ...]
    input_dtype: np.dtype
    class_names: tuple[str, ...] = ()
    pictures: None = None
    decoder_names: dict[str, str] = field(default_factory=dict)


class DeclaredSession(Session):
    """A session without data."""

    def __init__(self, config: Config, inputs: DeclaredInputs):
        super().__init__(RunDirectory(os.devnull, config), Ranks(0, 1, torch.device("cpu")))
        self.inputs = inputs

    def shards(self, split: str) -> ShardSet:
        return cast(ShardSet, self.inputs)


def main(argv: list[str]) -> int:
    Parser("python -P -m trainer sizes", "Sizes of a config's networks.").parse_args(argv)
    asked = json.loads(sys.stdin.read())
    shape, dtype = tuple(asked["shape"]), np.dtype(asked["dtype"])
    inputs = DeclaredInputs(asked["classes"], shape, dtype)
    print(json.dumps(network_sizes(load_config(None, [], asked["config"]), inputs)))
    return 0


def network_sizes(config: Config, inputs: DeclaredInputs) -> dict:
    """The answer that the module describes. Raises UserError for an impossible network."""
    with torch.device("meta"):
        return _network_sizes(config, inputs)


def _network_sizes(config: Config, inputs: DeclaredInputs) -> dict:
    session = DeclaredSession(config, inputs)
    generalist = fresh_network(session)
    networks = {"generalist": size_of(generalist)}
    for name, student in config.students.items():
        members = student_members(config, student)
        network = fresh_network(session, student, members=members)
        networks[f"students.{name}"] = size_of(network)
    if config.controls.model:
        networks["wider"] = size_of(fresh_network(session, own_model=config.controls.model))
    branch = None
    if config.has_specialists and config.specialists.is_branch:
        branch = branch_sizes(generalist, config.specialists.blocks)
    sizes = {name: asdict(each) for name, each in networks.items()}
    return {"networks": sizes, "branch": branch}


def size_of(network: Classifier) -> Network:
    head, weights = network.head, parameter_count(network)
    classes = network.spec.num_classes
    if network.spec.members is not None:
        return Network(weights, 0, 0, classes * network.num_members)
    in_head = parameter_count(head)
    features = in_head // classes - 1
    return Network(weights, classes, features, classes)


@torch.no_grad()
def branch_sizes(generalist: Classifier, blocks: int) -> dict[str, int]:
    try:
        cut = cut_at(generalist.trunk, blocks)
    except ValueError as error:
        raise UserError(f"specialists.{error}") from None
    at_cut = cut.body(generalist.eval().preprocess(generalist.zero_input()))
    general = cut.end(at_cut)
    return {
        "at_cut": at_cut[0].numel(),
        "general": 0 if general is at_cut else general[0].numel(),
        "features": cut.own(at_cut).flatten(1).shape[1],
        "own": parameter_count(cut.own),
    }
