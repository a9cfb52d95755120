"""How many multiplications a network takes for one example, counted from its modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def multiplications(module: nn.Module, *inputs: Tensor) -> int:
    """Count those of linear layers, convolutions and embedding bags, for one example.

    Parameters
    ----------
    module : nn.Module
        Run once, in eval mode, and left as it was.
    inputs : Tensor [1, ...]
        Of one example.

    Returns
    -------
    int
        A Linear counts the entries of its weight times the positions it is applied to. A
        convolution counts the entries of its kernel times the positions of its output. An
        EmbeddingBag counts the numbers that it adds. Norms, activations and softmaxes are not
        counted.
    """
    counts: list[int] = []
    handles = [
        layer.register_forward_hook(_counter(layer, counts))
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd, nn.EmbeddingBag))
    ]
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(*inputs)
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    return sum(counts)


def _counter(layer: nn.Module, counts: list[int]) -> Callable[..., None]:
    def count(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.EmbeddingBag):
            counts.append(inputs[0].numel() * layer.embedding_dim)
        elif isinstance(layer, nn.Linear):
            counts.append(output.numel() * layer.in_features)
        else:
            weight = layer.get_parameter("weight")
            counts.append(output.numel() * weight[0].numel())

    return count
