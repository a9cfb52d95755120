"""ResNet-50 and ViT-B/16 trunks, as users bring them: model.name = "benchmarks.shapes:resnet50"."""

from __future__ import annotations

import torch
from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and width_in == out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(shape) -> nn.Module:
    """He et al. 2015: 3, 4, 6 and 3 bottlenecks. 2,048 features."""
    layers = [
        nn.Conv2d(shape[0], 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    features = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            width = 64 * 2**stage
            layers.append(Bottleneck(features, width, 2 if stage and block == 0 else 1))
            features = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViT(nn.Module):
    """Dosovitskiy et al. 2021, ViT-B/16: 12 layers of 12 heads, 768 features, a class token."""

    def __init__(
        self, shape, features: int = 768, layers: int = 12, heads: int = 12, patch: int = 16
    ):
        super().__init__()
        self.patches = nn.Conv2d(shape[0], features, patch, patch)
        count = (shape[1] // patch) * (shape[2] // patch)
        self.token = nn.Parameter(torch.zeros(1, 1, features))
        self.places = nn.Parameter(torch.randn(1, count + 1, features) * 0.02)
        layer = nn.TransformerEncoderLayer(
            features,
            heads,
            4 * features,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(features), enable_nested_tensor=False
        )

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1)
        return self.layers(tokens + self.places)[:, 0]


def vit_b16(shape) -> nn.Module:
    return ViT(shape)
