"""A small transformer, as users bring them: model.name = "attention:tiny"."""

from torch import nn

from benchmarks.shapes import ViT


def tiny(shape) -> nn.Module:
    return ViT(shape, features=16, layers=2, heads=2, patch=4)
