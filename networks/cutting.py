"""Where a trunk is cut in two: what a branch shares with the generalist, and what is its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import fx, nn

from .cosine import UnitTrunk
from .freezing import trunk_blocks, trunk_parts


@dataclass(frozen=True)
class Cut:
    """A trunk in two parts, made of the trunk's own modules: features = end(body(x)).

    body: [B, ...] -> what there is at the cut.
    own: from there to what an embedding reads, [B, ...]. A branch takes a copy of it.
    end: from there to the features that the head reads, [B, D].
    """

    body: nn.Module
    own: nn.Sequential
    end: nn.Module


def cut_at(trunk: nn.Module, blocks: int = 0) -> Cut:
    """The trunk, cut before its last `blocks` blocks.

    An embedding at the end of a Sequential is not counted as a block: a block named "embedding", or
    an nn.Linear.  What stands before its linear layer (pooling, flattening) belongs to the blocks.
    With blocks = 0 the cut is at the input of that linear layer. Without an embedding it is at the
    head's.

    Raises ValueError for more blocks than there are, and for a trunk that is not an nn.Sequential
    and whose forward cannot be split before these blocks.
    """
    if isinstance(trunk, UnitTrunk):
        cut = cut_at(trunk.net, blocks)
        return Cut(cut.body, cut.own, nn.Sequential(cut.end, trunk.unit))
    if isinstance(trunk, nn.Sequential) and type(trunk).forward is nn.Sequential.forward:
        return _cut_sequential(trunk, blocks)
    if blocks == 0:
        return Cut(trunk, nn.Sequential(), nn.Identity())
    return _cut_traced(trunk, blocks)


def _cut_sequential(trunk: nn.Sequential, blocks: int) -> Cut:
    counted = list(trunk.named_children())
    neck, embedding = [], []
    if counted:
        neck, embedding = _split_embedding(*counted[-1])
    if embedding:
        counted = counted[:-1]
    if blocks > len(counted):
        names = ", ".join(name for name, _ in counted)
        raise ValueError(f"blocks = {blocks}: the trunk has {len(counted)} ({names})")
    shared = [module for _, module in counted[: len(counted) - blocks]]
    own = [module for _, module in counted[len(counted) - blocks :]]
    if not blocks:
        shared += neck
        neck = []
    _keep_input(own + neck + embedding)
    return Cut(
        nn.Sequential(*shared),
        nn.Sequential(*own, *neck),
        nn.Sequential(*own, *neck, *embedding),
    )


def _split_embedding(name: str, block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(what stands before its linear layer, that and the rest). Both empty for other blocks."""
    if isinstance(block, nn.Linear):
        return [], [block]
    if name != "embedding" or not isinstance(block, nn.Sequential):
        return [], []
    layers = list(block.children())
    linear = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if len(linear) != 1 or any(list(layer.parameters()) for layer in layers[: linear[0]]):
        return [], []
    return layers[: linear[0]], layers[linear[0] :]


def _keep_input(modules: list[nn.Module]) -> None:
    """Several networks read what there is at the cut, so the first layer must not change it."""
    leaves = (leaf for module in modules for leaf in module.modules() if not list(leaf.children()))
    first = next(leaves, None)
    if first is not None and getattr(first, "inplace", False):
        vars(first)["inplace"] = False


class _Blocks(fx.Tracer):
    """Takes the parts of a trunk as they are, and follows what its forward does with them."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.names or super().is_leaf_module(
            m, module_qualified_name
        )


def _cut_traced(trunk: nn.Module, blocks: int) -> Cut:
    """The cut of a network whose forward is code: before its last blocks with parameters."""
    kind = type(trunk).__name__
    names = list(trunk_blocks(trunk))
    if blocks > len(names):
        raise ValueError(f"blocks = {blocks}: {kind} has {len(names)} ({', '.join(names)})")
    first = names[-blocks]
    remedy = f"take blocks = 0, which cuts {kind} at the input of its head"
    try:
        graph = _Blocks(set(trunk_parts(trunk))).trace(trunk, concrete_args=_options(trunk))
    except Exception as error:  # whatever a forward does that cannot be followed
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"blocks = {blocks}: the forward of {kind} cannot be followed ({reason}); {remedy}"
        ) from None
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == first]
    if len(calls) != 1 or len(calls[0].all_input_nodes) != 1:
        raise ValueError(
            f"blocks = {blocks}: {kind} does not call {first} once, with one input; {remedy}"
        )
    at_cut = calls[0].all_input_nodes[0]
    body, end = _split_graph(trunk, graph, at_cut)
    if end is None:
        raise ValueError(
            f"blocks = {blocks}: {kind} needs more behind the input of {first} than that; {remedy}"
        )
    _keep_input([trunk.get_submodule(first)])
    return Cut(body, nn.Sequential(end), end)


def _options(trunk: nn.Module) -> dict[str, object]:
    """What a forward takes beside its input, at the defaults that it runs with."""
    parameters = list(inspect.signature(trunk.forward).parameters.values())
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {each.name: each.default for each in parameters[1:] if each.kind not in kinds}


def _split_graph(
    trunk: nn.Module, graph: fx.Graph, at_cut: fx.Node
) -> tuple[nn.Module, nn.Module | None]:
    """Two modules, up to a node and from it on. None where one node is not all that passes."""
    nodes = list(graph.nodes)
    before, after = fx.Graph(), fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    place = nodes.index(at_cut)
    for node in nodes[: place + 1]:
        copied[node] = before.node_copy(node, copied.__getitem__)
    before.output(copied[at_cut])
    behind = {at_cut: after.placeholder("at_cut")}
    for node in nodes[place + 1 :]:
        if any(needed not in behind for needed in node.all_input_nodes):
            return trunk, None
        behind[node] = after.node_copy(node, behind.__getitem__)
    return fx.GraphModule(trunk, before), fx.GraphModule(trunk, after)
