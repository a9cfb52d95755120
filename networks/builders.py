"""The built-in trunks: from one input's shape and options to a Sequential of named blocks, [B, ...] -> [B, D].

Every block has parameters, so that "the last N blocks" means the same as in the picture of the network.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .spec import nearest

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU}


def mlp(
    shape,
    width: int = 800,
    depth: int = 2,
    embedding: int = 0,
    dropout: float = 0.0,
    norm: str = "none",
    input_dropout: float = 0.0,
):
    """`depth` hidden layers of `width` ReLU units over the flattened input.  embedding > 0 adds a linear layer.

    norm: "none" or "batch" (before each ReLU).  input_dropout: of the preprocessed input's entries, dropout: of units.
    mlp(width=1200, depth=2, dropout=0.5, input_dropout=0.2) is Hinton et al. 2015's MNIST teacher.
    """
    _check(
        width=width, depth=depth, dropout=dropout, embedding=embedding, input_dropout=input_dropout
    )
    _one_of("norm", norm, ("none", "batch"))
    blocks, features = OrderedDict(), 1
    for length in shape:
        features *= length
    for index in range(depth):
        layers = OrderedDict(flatten=nn.Flatten()) if index == 0 else OrderedDict()
        if index == 0 and input_dropout:
            layers["dropout_in"] = nn.Dropout(input_dropout)
        layers["linear"] = nn.Linear(features, width, bias=norm == "none")
        if norm == "batch":
            layers["norm"] = nn.BatchNorm1d(width)
        layers["relu"] = nn.ReLU()
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        blocks[f"hidden{index + 1}"] = nn.Sequential(layers)
        features = width
    if embedding:
        blocks["embedding"] = nn.Sequential(OrderedDict(linear=nn.Linear(features, embedding)))
    return nn.Sequential(blocks)


def convnet(
    shape,
    width: int = 16,
    depth: int = 3,
    embedding: int = 128,
    dropout: float = 0.0,
    channels: list[int] | None = None,
    kernel: int | list[int] = 3,
    stride: int | list[int] = 2,
    downsample: str = "stride",
    padding: str = "same",
    grid: int = 0,
    activation: str = "none",
):
    """A plain conv net: `depth` stages of convolution, batch norm, ReLU, then flatten, dropout and a linear embedding.

    channels: of each stage; without it width, 2 width, 4 width, ...
    kernel, stride: one for all stages, or one per stage.  padding: "same" (kernel // 2) or "valid".
    downsample: what applies the stride: the convolution ("stride"), or pooling after the ReLU ("max", "average").
    grid: the last map is averaged to grid x grid; 0 leaves it as it is.  embedding: 0 leaves it out.
    activation: after the embedding, "none" (a linear bottleneck before many classes) or "relu".
    """
    size = _image(shape, "convnet")
    if channels is None:
        _check(width=width, depth=depth)
        channels = [width * 2**stage for stage in range(depth)]
    channels = _per_stage("channels", channels, None)
    kernels, strides = (
        _per_stage("kernel", kernel, len(channels)),
        _per_stage("stride", stride, len(channels)),
    )
    _check(dropout=dropout, embedding=embedding, grid=grid)
    _one_of("downsample", downsample, ("stride", "max", "average"))
    _one_of("padding", padding, ("same", "valid"))
    _one_of("activation", activation, ACTIVATIONS)
    blocks, features = OrderedDict(), shape[0]
    for index, (out, k, s) in enumerate(zip(channels, kernels, strides, strict=True)):
        conv_stride, pad = s if downsample == "stride" else 1, k // 2 if padding == "same" else 0
        layers = OrderedDict(
            conv=nn.Conv2d(features, out, k, stride=conv_stride, padding=pad, bias=False),
            norm=nn.BatchNorm2d(out),
            relu=nn.ReLU(inplace=True),
        )
        size = tuple((length + 2 * pad - k) // conv_stride + 1 for length in size)
        if downsample != "stride" and s > 1:
            layers["pool"] = nn.MaxPool2d(s) if downsample == "max" else nn.AvgPool2d(s)
            size = tuple(length // s for length in size)
        if min(size) < 1:
            raise ValueError(
                f"convnet: nothing is left of a {shape[1]} x {shape[2]} image after stage {index + 1}"
            )
        blocks[f"stage{index + 1}"] = nn.Sequential(layers)
        features = out
    tail = OrderedDict()
    if grid:
        tail["pool"] = nn.AdaptiveAvgPool2d(grid)
        size = (grid, grid)
    tail["flatten"] = nn.Flatten()
    if dropout:
        tail["dropout"] = nn.Dropout(dropout)
    if not embedding:
        blocks[f"stage{len(channels)}"].extend(tail.values())
        return nn.Sequential(blocks)
    tail["linear"] = nn.Linear(features * size[0] * size[1], embedding)
    if activation != "none":
        tail["activation"] = ACTIVATIONS[activation]()
    blocks["embedding"] = nn.Sequential(tail)
    return nn.Sequential(blocks)


def resnet(shape, width: int = 16, depth: int = 20, embedding: int = 0, dropout: float = 0.0):
    """He et al. 2015, the CIFAR kind: 6n + 2 layers, n basic blocks each of width, 2 width and 4 width channels.

    The last map is averaged.  Shortcuts that change the shape are 1 x 1 convolutions.
    embedding > 0 adds a linear layer of that size.
    """
    _image(shape, "resnet")
    _check(width=width, depth=depth, dropout=dropout, embedding=embedding)
    per_stage = _layers("resnet", depth, 2)
    stem = OrderedDict(
        conv=_conv(shape[0], width, 3, 1), norm=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True)
    )
    blocks, features = OrderedDict(stem=nn.Sequential(stem)), width
    for stage in range(3):
        for index in range(per_stage):
            out, stride = width * 2**stage, 2 if stage > 0 and index == 0 else 1
            blocks[f"stage{stage + 1}_{index + 1}"] = BasicBlock(features, out, stride)
            features = out
    return _with_average(blocks, OrderedDict(), features, embedding, dropout)


def wideresnet(
    shape, width: int = 2, depth: int = 16, embedding: int = 0, dropout: float = 0.0, base: int = 16
):
    """Zagoruyko & Komodakis 2016, WRN-depth-width: 6n + 4 layers, blocks of base * width * (1, 2, 4) channels.

    dropout: between the two convolutions of a block.  embedding > 0 adds a linear layer of that size.
    """
    _image(shape, "wideresnet")
    _check(width=width, depth=depth, dropout=dropout, embedding=embedding, base=base)
    per_stage = _layers("wideresnet", depth, 4)
    blocks, features = OrderedDict(stem=_conv(shape[0], base, 3, 1)), base
    for stage in range(3):
        for index in range(per_stage):
            out, stride = base * width * 2**stage, 2 if stage > 0 and index == 0 else 1
            blocks[f"stage{stage + 1}_{index + 1}"] = WideBlock(features, out, stride, dropout)
            features = out
    last = OrderedDict(norm=nn.BatchNorm2d(features), relu=nn.ReLU(inplace=True))
    return _with_average(blocks, last, features, embedding, 0.0)


class BasicBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, + shortcut, ReLU."""

    def __init__(self, features: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = _conv(features, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = _conv(out, out, 3, 1), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride != 1 or features != out:
            self.shortcut = nn.Sequential(_conv(features, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class WideBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, dropout, conv, + shortcut; one that changes the shape reads the first ReLU."""

    def __init__(self, features: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(features), _conv(features, out, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), _conv(out, out, 3, 1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = _conv(features, out, 1, stride) if stride != 1 or features != out else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        y = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(activated)))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


BUILTIN: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": mlp,
    "convnet": convnet,
    "resnet": resnet,
    "wideresnet": wideresnet,
}


def builtin_options(name: str) -> dict:
    """The options of a built-in builder with their defaults; {} for any other name."""
    if name not in BUILTIN:
        return {}
    parameters = list(inspect.signature(BUILTIN[name]).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def build_trunk(
    name: str, shape: tuple[int, ...], options: dict, builders: dict[str, Callable] | None = None
):
    """The module [B, *shape] -> [B, D] that `name` and `options` describe.

    A name in `builders` wins over a built-in: builders[name](shape, **options).  ValueError for unknown ones.
    """
    if builders and name in builders:
        return builders[name](shape, **options)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), shape, options)
    if name not in BUILTIN:
        valid = [*BUILTIN, *(builders or {}), "timm:NAME"]
        hint = nearest(name, valid)
        raise ValueError(
            f"unknown builder {name!r}; {hint} (a builder of your own is passed as builders={{...}})"
        )
    known = builtin_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; {nearest(option, known)}")
    return BUILTIN[name](shape, **options)


def _timm(name: str, shape: tuple[int, ...], options: dict) -> nn.Module:
    # A prefix such as hf-hub: or local-dir:, and these options, would fetch or unpickle what the file names.
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ValueError(f"timm:{name}: a plain timm model name is needed")
    for option in options:
        if option.startswith(("pretrained", "checkpoint", "cache")) or option in (
            "num_classes",
            "in_chans",
        ):
            raise ValueError(
                f"option {option!r} of timm:{name} cannot be set; weights come from model.safetensors"
            )
    _image(shape, f"timm:{name}")
    try:
        import timm
    except ImportError as missing:
        raise ValueError(
            f"timm:{name} needs timm ({missing}); pip install 'referral[timm]'"
        ) from None
    if not timm.is_model(name):
        raise ValueError(
            f"timm has no model {name!r}; {nearest(name.split('.')[0], timm.list_models())}"
        )
    return timm.create_model(name, pretrained=False, num_classes=0, in_chans=shape[0], **options)


def _with_average(
    blocks: OrderedDict, last: OrderedDict, features: int, embedding: int, dropout: float
):
    """`blocks` with the global average behind the last of them, and an embedding if one is asked for."""
    last |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    if dropout:
        last["dropout"] = nn.Dropout(dropout)
    name, block = blocks.popitem()
    blocks[name] = nn.Sequential(OrderedDict(block=block, **last))
    if embedding:
        blocks["embedding"] = nn.Sequential(OrderedDict(linear=nn.Linear(features, embedding)))
    trunk = nn.Sequential(blocks)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk


def _conv(features: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(features, out, kernel, stride=stride, padding=kernel // 2, bias=False)


def _layers(name: str, depth: int, extra: int) -> int:
    per_stage, rest = divmod(depth - extra, 6)
    if rest or per_stage < 1:
        near = 6 * max(1, round((depth - extra) / 6)) + extra
        raise ValueError(f"{name}: depth {depth} is not 6 n + {extra}; try {near}")
    return per_stage


def _image(shape, name: str) -> tuple[int, int]:
    if len(shape) != 3:
        raise ValueError(
            f"{name} takes images [C, H, W]; the input shape is {list(shape)} (mlp takes any shape)"
        )
    return shape[1:]


def _check(**numbers) -> None:
    for name, value in numbers.items():
        share = name in ("dropout", "input_dropout")
        low = 0 if share or name in ("embedding", "grid") else 1
        right = isinstance(value, (int, float)) and value < 1 if share else isinstance(value, int)
        if not right or isinstance(value, bool) or value < low:
            rule = "a number from 0 to below 1" if share else f"a whole number, at least {low}"
            raise ValueError(f"{name} = {value!r}: must be {rule}")


def _one_of(name: str, value, valid) -> None:
    if value not in list(valid):
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(valid)}")


def _per_stage(name: str, value, stages: int | None) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * (stages or 1)
    if not values or (stages is not None and len(values) != stages):
        raise ValueError(
            f"{name} = {value!r}: one number, or one for each of the {stages or 1} stages"
        )
    for entry in values:
        _check(**{name: entry})
    return values
