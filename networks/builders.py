"""The built-in trunks, [B, ...] -> [B, D]: from one input's shape and options to a Sequential.

Every block has parameters, so that "the last N blocks" means what a picture of the network shows.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .choices import NETWORKS
from .spec import nearest
from .user_code import CONTRACT, blame, place_of

Builder = Callable[..., nn.Module]
Builders = Mapping[str, Builder]

INDICES_REMEDY = (
    "embedding_bag and the decoder ngram_bag go together: data.decoders = "
    '{ txt = "trainer.data.decoding:ngram_bag" }'
)

DEEPEST = 2**12  # layers. A damaged file may ask for any number
ACTIVATIONS: dict[str, type[nn.Module]] = {"none": nn.Identity, "relu": nn.ReLU}


def mlp(
    shape: Sequence[int],
    width: int = 800,
    depth: int = 2,
    embedding: int = 0,
    dropout: float = 0.0,
    norm: str = "none",
    input_dropout: float = 0.0,
) -> nn.Sequential:
    """`depth` hidden layers of `width` ReLU units over the flattened input.

    embedding: size of a linear layer behind them, 0 for none.
    norm: "none" or "batch", before each ReLU.
    dropout: of units. input_dropout: of entries of the preprocessed input.

    mlp(width=1200, depth=2, dropout=0.5, input_dropout=0.2) is Hinton et al. 2015's MNIST teacher.
    """
    _check_fractions(dropout=dropout, input_dropout=input_dropout)
    _check_counts(width=width, depth=depth)
    _check_counts(least=0, embedding=embedding)
    _check_choice("norm", norm, ("none", "batch"))
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    features = 1
    for length in shape:
        features *= length
    for index in range(depth):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if index == 0:
            layers["flatten"] = nn.Flatten()
            if input_dropout:
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
        blocks["embedding"] = _embedding(features, embedding)
    return nn.Sequential(blocks)


def convnet(
    shape: Sequence[int],
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
) -> nn.Sequential:
    """`depth` stages of convolution, batch norm and ReLU. Then flatten, dropout, linear embedding.

    channels: of each stage. Without it width, 2 width, 4 width, ...
    kernel, stride: one for all stages, or one per stage.
    padding: "same" (kernel // 2) or "valid".
    downsample: what applies the stride: the convolution ("stride"), or pooling after the ReLU
        ("max", "average").
    grid: the last map is averaged to grid x grid. 0 leaves it as it is.
    embedding: 0 leaves it out.
    activation: after the embedding, "none" (a linear bottleneck before many classes) or "relu".
    """
    _check_image(shape, "convnet")
    if channels is None:
        _check_counts(width=width, depth=depth)
        channels = [width * 2**stage for stage in range(depth)]
    channels = _per_stage("channels", channels, None)
    kernels = _per_stage("kernel", kernel, len(channels))
    strides = _per_stage("stride", stride, len(channels))
    _check_fractions(dropout=dropout)
    _check_counts(least=0, embedding=embedding, grid=grid)
    _check_choice("downsample", downsample, ("stride", "max", "average"))
    _check_choice("padding", padding, ("same", "valid"))
    _check_choice("activation", activation, ACTIVATIONS)
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    features, *size = shape
    for index, (out, k, s) in enumerate(zip(channels, kernels, strides, strict=True)):
        pad = k // 2 if padding == "same" else 0
        stage, size = _conv_stage(features, out, k, s, pad, downsample, size)
        if min(size) < 1:
            raise ValueError(
                f"convnet: nothing is left of a {shape[1]} x {shape[2]} image "
                f"after stage {index + 1}"
            )
        blocks[f"stage{index + 1}"] = stage
        features = out
    tail: OrderedDict[str, nn.Module] = OrderedDict()
    if grid:
        tail["pool"] = nn.AdaptiveAvgPool2d(grid)
        size = [grid, grid]
    tail["flatten"] = nn.Flatten()
    if dropout:
        tail["dropout"] = nn.Dropout(dropout)
    if not embedding:
        last = blocks[f"stage{len(channels)}"]
        assert isinstance(last, nn.Sequential)
        last.extend(tail.values())
        return nn.Sequential(blocks)
    tail["linear"] = nn.Linear(features * size[0] * size[1], embedding)
    if activation != "none":
        tail["activation"] = ACTIVATIONS[activation]()
    blocks["embedding"] = nn.Sequential(tail)
    return nn.Sequential(blocks)


def _conv_stage(
    features: int, out: int, kernel: int, stride: int, pad: int, downsample: str, size: list[int]
) -> tuple[nn.Sequential, list[int]]:
    """One stage of convnet, and the height and width of its map for an input of `size`."""
    conv_stride = stride if downsample == "stride" else 1
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(features, out, kernel, stride=conv_stride, padding=pad, bias=False),
        norm=nn.BatchNorm2d(out),
        relu=nn.ReLU(inplace=True),
    )
    size = [(length + 2 * pad - kernel) // conv_stride + 1 for length in size]
    if downsample != "stride" and stride > 1:
        pooling = nn.MaxPool2d if downsample == "max" else nn.AvgPool2d
        layers["pool"] = pooling(stride)
        size = [length // stride for length in size]
    return nn.Sequential(layers), size


def resnet(
    shape: Sequence[int],
    width: int = 16,
    depth: int = 20,
    embedding: int = 0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """He et al. 2015, the CIFAR kind: 6n + 2 layers, the last map averaged.

    Three stages of n basic blocks, with width, 2 width and 4 width channels.
    Shortcuts that change the shape are 1 x 1 convolutions.
    embedding: size of a linear layer behind it, 0 for none.
    """
    _check_image(shape, "resnet")
    _check_fractions(dropout=dropout)
    _check_counts(width=width, depth=depth)
    _check_counts(least=0, embedding=embedding)
    per_stage = _blocks_per_stage("resnet", depth, 2)
    stem: OrderedDict[str, nn.Module] = OrderedDict(
        conv=_conv(shape[0], width, 3, 1), norm=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True)
    )
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem))
    features = width
    for stage in range(3):
        out = width * 2**stage
        for index in range(per_stage):
            stride = _first_stride(stage, index)
            blocks[f"stage{stage + 1}_{index + 1}"] = BasicBlock(features, out, stride)
            features = out
    return _with_average(blocks, OrderedDict(), features, embedding, dropout)


def wideresnet(
    shape: Sequence[int],
    width: int = 2,
    depth: int = 16,
    embedding: int = 0,
    dropout: float = 0.0,
    base: int = 16,
) -> nn.Sequential:
    """Zagoruyko & Komodakis 2016, WRN-depth-width: 6n + 4 layers, the last map averaged.

    Three stages of n blocks, with base * width * (1, 2, 4) channels.
    dropout: between the two convolutions of a block.
    embedding: size of a linear layer behind it, 0 for none.
    """
    _check_image(shape, "wideresnet")
    _check_fractions(dropout=dropout)
    _check_counts(width=width, depth=depth, base=base)
    _check_counts(least=0, embedding=embedding)
    per_stage = _blocks_per_stage("wideresnet", depth, 4)
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv(shape[0], base, 3, 1))
    features = base
    for stage in range(3):
        out = base * width * 2**stage
        for index in range(per_stage):
            stride = _first_stride(stage, index)
            blocks[f"stage{stage + 1}_{index + 1}"] = WideBlock(features, out, stride, dropout)
            features = out
    last: OrderedDict[str, nn.Module] = OrderedDict(
        norm=nn.BatchNorm2d(features), relu=nn.ReLU(inplace=True)
    )
    return _with_average(blocks, last, features, embedding, 0.0)


class BasicBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, + shortcut, ReLU."""

    def __init__(self, features: int, out: int, stride: int):
        super().__init__()
        self.conv1 = _conv(features, out, 3, stride)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = _conv(out, out, 3, 1)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride != 1 or features != out:
            self.shortcut = nn.Sequential(_conv(features, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class WideBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, dropout, conv, + shortcut.

    A shortcut that changes the shape reads what the first ReLU gives.
    """

    def __init__(self, features: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(features)
        self.conv1 = _conv(features, out, 3, stride)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = _conv(out, out, 3, 1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or features != out:
            self.shortcut = _conv(features, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        y = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(activated)))))
        if self.shortcut is not None:
            x = self.shortcut(activated)
        return y + x


def embedding_bag(
    shape: Sequence[int],
    width: int = 8192,
    depth: int = 0,
    embedding: int = 64,
    dropout: float = 0.0,
) -> nn.Sequential:
    """The sum of the embeddings of an input's indices, over the root of their number.

    width: number of indices, 0 .. width - 1. A negative index is padding.
    embedding: size of each.
    dropout: share of the indices that a training step leaves out.
    depth: further pairs of a ReLU and a linear layer. Without them the network is linear. That
        learns thousands of classes where an mlp over the counts hardly starts to.
    """
    if len(shape) != 1:
        raise ValueError(f"embedding_bag takes indices [L]; the input shape is {list(shape)}")
    _check_fractions(dropout=dropout)
    _check_counts(width=width, embedding=embedding)
    _check_counts(least=0, depth=depth)
    blocks: OrderedDict[str, nn.Module] = OrderedDict(bag=IndexBag(width, embedding, dropout))
    for index in range(depth):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            relu=nn.ReLU(), linear=nn.Linear(embedding, embedding)
        )
        blocks[f"hidden{index + 1}"] = nn.Sequential(layers)
    return nn.Sequential(blocks)


embedding_bag.takes_indices = True


class IndexBag(nn.Module):
    """int [B, L] -> [B, size]: the sum of the rows named, over the root of their number.

    Rows start at unit variance, and so do the sums.  Negative indices are padding.
    ValueError for an index that has no row.
    """

    def __init__(self, rows: int, size: int, dropout: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, size))
        self.dropout = dropout

    def forward(self, bag: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or bag.is_meta:  # of neither a number can be read
            return self._gathered(bag)
        highest = int(bag.max()) if bag.numel() else -1
        if highest >= len(self.weight):
            raise ValueError(
                f"index {highest}; the network has {len(self.weight)} rows: raise model.width"
            )
        kept = bag >= 0
        if self.training and self.dropout:
            kept &= torch.rand(bag.shape, device=bag.device) >= self.dropout
        counts = kept.sum(1)
        # Dense gradients.  At 8,192 x 64 sparse ones save 5 ms a step in the backward pass, but
        # only SparseAdam takes them, whose step takes 17 ms in place of AdamW's 7 (one CPU core).
        first = counts.cumsum(0) - counts
        total = F.embedding_bag(bag[kept].long(), self.weight, first, mode="sum")
        return total / counts.clamp_min(1).sqrt()[:, None].to(total.dtype)

    def _gathered(self, bag: Tensor) -> Tensor:
        """The same with fixed shapes, for programs and ONNX. Training takes six times as long."""
        kept = bag >= 0
        rows = F.embedding(bag.clamp_min(0).long(), self.weight)
        total = (rows * kept[:, :, None].to(rows.dtype)).sum(1)
        return total / kept.sum(1, keepdim=True).clamp_min(1).sqrt().to(total.dtype)

    def extra_repr(self) -> str:
        rows, size = self.weight.shape
        return f"{rows}, {size}, dropout={self.dropout}"


def takes_indices(name: str, builders: Builders | None = None) -> bool:
    """Whether the builder of that name gets int32 inputs as they are."""
    if builders and name in builders:
        return bool(getattr(builders[name], "takes_indices", False))
    return name in NETWORKS and bool(getattr(_builtin(name), "takes_indices", False))


def builtin_options(name: str) -> dict[str, Any]:
    """The options of a built-in network.

    Parameters
    ----------
    name : str
        A key of `networks.choices.NETWORKS`, or any other builder's name.

    Returns
    -------
    dict
        Each option that the builder declares, with its default. {} for any other name.
    """
    if name not in NETWORKS:
        return {}
    parameters = list(inspect.signature(_builtin(name)).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def declared_options(
    name: str,
    generic: Mapping[str, Any],
    explicit: Mapping[str, Any],
    builders: Builders | None = None,
) -> dict[str, Any]:
    """The options to put into a ModelSpec, of those that a config gives for every network.

    Parameters
    ----------
    name : str
        The builder's name.
    generic : mapping
        Options that any built-in may have: width, depth, embedding, dropout.  None and 0 mean
        "not set": such an option is dropped where the builder does not declare it.
    explicit : mapping
        Options for this very network.  They win over generic ones.
    builders : mapping, optional
        The caller's own builders by name.

    Returns
    -------
    dict
        The explicit options, and for a built-in also the generic ones.  An option that is set but
        not declared stays in it: build_classifier then raises an error that names the valid ones.
        A timm model or a builder of the caller's own gets no generic options.
    """
    if name not in NETWORKS or (builders and name in builders):
        return dict(explicit)
    declared = builtin_options(name)
    concerned = {key: value for key, value in generic.items() if key in declared or value}
    return {**concerned, **explicit}


def build_trunk(
    name: str, shape: tuple[int, ...], options: Mapping[str, Any], builders: Builders | None = None
) -> nn.Module:
    """The module [B, *shape] -> [B, D] that `name` and `options` describe.

    A name in `builders` wins over a built-in: builders[name](shape, **options).
    ValueError for an unknown name or option.
    """
    if builders and name in builders:
        return _own_trunk(name, builders[name], shape, options)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), shape, options)
    if name not in NETWORKS:
        hint = nearest(name, [*NETWORKS, *(builders or {}), "timm:NAME"])
        own = "a builder of your own is passed as builders={...}"
        raise ValueError(f"unknown builder {name!r}; {hint} ({own})")
    builder = _builtin(name)
    _check_options(name, builder, options)
    return builder(shape, **options)


def _own_trunk(
    name: str, builder: Builder, shape: tuple[int, ...], options: Mapping[str, Any]
) -> nn.Module:
    """The trunk of a caller's own builder. Whatever that raises becomes a one-line ValueError."""
    if isinstance(builder, nn.Module):
        raise ValueError(f"{name} is a network, not a function that builds one; {CONTRACT}")
    try:
        _check_options(name, builder, options)
        trunk = builder(shape, **options)
    except ValueError as error:  # its own words for a wrong value
        raise ValueError(" ".join(str(error).split()) + place_of(error)) from None
    except (Exception, SystemExit) as error:
        called = "".join(f", {key}={value!r}" for key, value in options.items())
        raise ValueError(f"{name}({shape}{called}) fails: {blame(error)}; {CONTRACT}") from None
    if not isinstance(trunk, nn.Module):
        kind = type(trunk).__name__
        raise ValueError(f"{name}({shape}) gives {kind}, not an nn.Module; {CONTRACT}")
    return trunk


def _check_options(name: str, builder: Builder, options: Iterable[str]) -> None:
    """ValueError, with the nearest one, for an option that the builder does not declare."""
    try:
        parameters = list(inspect.signature(builder).parameters.values())[1:]
    except (TypeError, ValueError):  # some callables of C have none
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    declared = [parameter.name for parameter in parameters]
    for option in options:
        if option not in declared:
            raise ValueError(f"{name} has no option {option!r}; {nearest(option, declared)}")


def _builtin(name: str) -> Builder:
    module, _, function = NETWORKS[name].partition(":")
    return getattr(import_module(module), function)


def _timm(name: str, shape: tuple[int, ...], options: Mapping[str, Any]) -> nn.Module:
    # A prefix such as hf-hub: or local-dir:, and these options, would fetch or unpickle a file.
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ValueError(f"timm:{name}: a plain timm model name is needed")
    for option in options:
        fetches = option.startswith(("pretrained", "checkpoint", "cache"))
        if fetches or option in ("num_classes", "in_chans"):
            raise ValueError(
                f"option {option!r} of timm:{name} cannot be set; "
                "weights come from model.safetensors"
            )
    _check_image(shape, f"timm:{name}")
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise ValueError(f"timm:{name} needs timm ({error}); pip install timm") from None
    if not timm.is_model(name):
        hint = nearest(name.split(".")[0], timm.list_models())
        raise ValueError(f"timm has no model {name!r}; {hint}")
    try:
        return timm.create_model(
            name, pretrained=False, num_classes=0, in_chans=shape[0], **options
        )
    except Exception as error:  # a model raises what it likes about an option
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        raise ValueError(
            f"timm:{name}: create_model({name!r}, in_chans={shape[0]}{given}) fails: "
            f"{blame(error)}; look at model.options"
        ) from None


def _with_average(
    blocks: OrderedDict[str, nn.Module],
    last: OrderedDict[str, nn.Module],
    features: int,
    embedding: int,
    dropout: float,
) -> nn.Sequential:
    """`blocks` with `last` and the global average in the last of them, and perhaps an embedding."""
    last |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    if dropout:
        last["dropout"] = nn.Dropout(dropout)
    name, block = blocks.popitem()
    blocks[name] = nn.Sequential(OrderedDict(block=block, **last))
    if embedding:
        blocks["embedding"] = _embedding(features, embedding)
    trunk = nn.Sequential(blocks)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk


def _embedding(features: int, size: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(linear=nn.Linear(features, size)))


def _conv(features: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(features, out, kernel, stride=stride, padding=kernel // 2, bias=False)


def _first_stride(stage: int, index: int) -> int:
    """The first block of every stage but the first halves the map."""
    return 2 if stage > 0 and index == 0 else 1


def _blocks_per_stage(name: str, depth: int, extra: int) -> int:
    """n of a network of 6 n + extra layers."""
    per_stage, rest = divmod(depth - extra, 6)
    if rest or per_stage < 1:
        near = 6 * max(1, round((depth - extra) / 6)) + extra
        raise ValueError(f"{name}: depth {depth} is not 6 n + {extra}; try {near}")
    return per_stage


def _check_image(shape: Sequence[int], name: str) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"{name} takes images [C, H, W]; the input shape is {list(shape)} (mlp takes any shape)"
        )


def _check_counts(least: int = 1, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} = {value!r}: must be a whole number, at least {least}")
        if name == "depth" and value > DEEPEST:
            raise ValueError(f"depth = {value}: at most {DEEPEST} layers are built")


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < 1:
            raise ValueError(f"{name} = {value!r}: must be a number from 0 to below 1")


def _check_choice(name: str, value: str, valid: Collection[str]) -> None:
    if value not in list(valid):
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(valid)}")


def _per_stage(name: str, value: int | list[int], stages: int | None) -> list[int]:
    """One value for each stage. stages = None takes as many as are given."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * (stages or 1)
    if not values or (stages is not None and len(values) != stages):
        raise ValueError(
            f"{name} = {value!r}: one number, or one for each of the {stages or 1} stages"
        )
    for entry in values:
        _check_counts(**{name: entry})
    return values
