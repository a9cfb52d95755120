"""`referral predict`: the most probable classes of files.

They are predicted by the ensemble of a run or of an export, or by one of its networks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ensemble import SpecialistEnsemble, load_ensemble
from networks import Classifier, InputSpec, ModelSpec, load_classifier
from pipeline.config import UserError
from pipeline.graph import RunDirectory, open_run

from ..data.decoding import (
    Decoder,
    decoder_table,
    find_decoder,
    image,
    import_function,
    rgb,
)
from ..stages.networks import builders_of
from .export import Probabilities, as_user_errors, check_done

if TYPE_CHECKING:
    from ensemble.ranking import Prediction

# Below a directory these lie beside the inputs; a file that is named is read whatever it is.
NOTES = ("txt", "json")
BATCH = 64


class Example(NamedTuple):
    """One raw input [*shape], its file, and its index in a file that holds several."""

    file: str
    index: int | None
    raw: np.ndarray


class Predictor(NamedTuple):
    """An ensemble, or one network.

    predict: (raw inputs, top) -> {classes, names, probabilities, specialists} of each input, as
    SpecialistEnsemble.predict gives them.
    """

    spec: ModelSpec
    predict: Callable[[Tensor, int], list[Prediction]]
    has_specialists: bool


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1 class is needed")
    run, named = None, {}
    if (args.directory / "config.toml").is_file():
        run = open_run(args.directory)
        named = run.config.data.decoders
    decoders = decoder_table(named)
    files = list(find_files(args.files, decoders))
    predictor = load_predictor(args, run)
    inputs = (read_examples(path, predictor.spec.input, decoders, args.resize) for path in files)
    examples = itertools.chain.from_iterable(inputs)
    if args.json:
        for example, prediction in predictions(predictor, examples, args.top, args.device):
            print_json(example, prediction)
    else:
        table = PredictionTable(predictor.has_specialists)
        for example, prediction in predictions(predictor, examples, args.top, args.device):
            table.add(example, prediction)
        table.print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="referral predict", description=__doc__)
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="a run, or what `referral export` wrote"
    )
    parser.add_argument(
        "files",
        metavar="FILES",
        type=Path,
        nargs="+",
        help="images, .npy arrays (one input, or several along the first axis), "
        "or directories of them",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per file (5)")
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--student", metavar="NAME", help="predict with this student, not with the ensemble"
    )
    network.add_argument(
        "--generalist", action="store_true", help="predict with the generalist alone"
    )
    parser.add_argument("--resize", action="store_true", help="scale images to the network's size")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="predict without the specialists that are missing",
    )
    parser.add_argument(
        "--builder",
        metavar="MODULE:FUNCTION",
        help="what builds the network, where an exported model.json names a function of your own",
    )
    return parser


def predictions(
    predictor: Predictor, examples: Iterator[Example], top: int, device: str
) -> Iterator[tuple[Example, Prediction]]:
    while batch := list(itertools.islice(examples, BATCH)):
        raw = torch.from_numpy(np.stack([example.raw for example in batch])).to(device)
        with as_user_errors():  # a specialist is read when it is first needed
            predicted = predictor.predict(raw, top)
        yield from zip(batch, predicted, strict=True)


# What predicts


def load_predictor(args: argparse.Namespace, run: RunDirectory | None) -> Predictor:
    """The ensemble, or the network that the command line names."""
    check_device(args.device)
    builders = {} if run is None else builders_of(run.config)
    if args.builder:
        builders[args.builder] = import_function(args.builder, "--builder")
    if args.student or args.generalist:
        return load_network(args, builders)
    with as_user_errors():
        ensemble = load_ensemble(
            args.directory, args.device, builders, allow_missing=args.allow_missing
        )
    if ensemble.missing:
        names = ", ".join(map(str, ensemble.missing))
        print(f"without specialists {names}, which are missing", file=sys.stderr)
    # A run without ensemble.json yet would be joined by the defaults.
    if run is not None and not args.allow_missing:
        check_done(run, run.ensemble)
    has_specialists = isinstance(ensemble, SpecialistEnsemble)
    return Predictor(ensemble.generalist.spec, ensemble.predict, has_specialists)


def load_network(args: argparse.Namespace, builders: dict[str, Callable]) -> Predictor:
    """The student or the generalist alone."""
    if args.generalist:
        directory = args.directory / "generalist"
    else:
        directory = args.directory / "students" / args.student
    if not (directory / "model.json").is_file():
        raise UserError(_absent_network(args))
    with as_user_errors():
        network = load_classifier(directory, args.device, builders)

    def predict(raw: Tensor, top: int) -> list[Prediction]:
        return predict_alone(network, raw, top)

    return Predictor(network.spec, predict, has_specialists=False)


def _absent_network(args: argparse.Namespace) -> str:
    if args.generalist:
        return f"{args.directory} has no generalist/model.json; give a run with one, or an export"
    known = sorted(path.parent.name for path in args.directory.glob("students/*/model.json"))
    students = ", ".join(known) or "no finished students"
    return f"--student {args.student}: {args.directory} has {students}"


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def predict_alone(network: Classifier, raw: Tensor, top: int) -> list[Prediction]:
    """What SpecialistEnsemble.predict gives, of one network without specialists."""
    top = min(top, network.spec.num_classes)
    values, indices = Probabilities(network)(raw).topk(top, dim=1)
    names = network.spec.class_names
    return [
        {
            "classes": classes,
            "names": [names[c] for c in classes],
            "probabilities": probabilities,
            "specialists": [],
        }
        for classes, probabilities in zip(indices.tolist(), values.tolist(), strict=True)
    ]


# Files to raw inputs


def find_files(paths: list[Path], decoders: dict[str, Decoder]) -> Iterator[Path]:
    """The files that are named, and those below directories that hold inputs.

    Below a directory these are all that have a decoder, but for text and JSON.
    """
    extensions = decoders.keys() - NOTES
    for path in paths:
        if path.is_dir():
            inputs = [file for file in sorted(path.rglob("*")) if _is_input(file, extensions)]
            if not inputs:
                known = ", ".join(sorted(extensions))
                raise UserError(f"{path} holds no files with an extension of {known}")
            yield from inputs
        elif not path.exists():
            raise UserError(f"{path}: no such file or directory")
        elif _extension(path) not in decoders:
            known = ", ".join(sorted(decoders))
            unknown = path.suffix or "files without an extension"
            raise UserError(f"{path}: no decoder for {unknown} (known: {known})")
        else:
            yield path


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _is_input(path: Path, extensions: set[str]) -> bool:
    return _extension(path) in extensions and path.is_file() and not path.name.startswith(".")


def read_examples(
    path: Path, needed: InputSpec, decoders: dict[str, Decoder], resize: bool
) -> Iterator[Example]:
    """The raw inputs of one file, in the network's channels, size and dtype.

    UserError where they cannot be.
    """
    decoder = find_decoder(decoders, _extension(path))
    is_image = decoder in (image, rgb)
    try:
        array = decoder(path.read_bytes())
    except Exception as error:  # decoders raise what they like about bytes that they do not know
        raise UserError(f"{path}: cannot be decoded: {error}") from None
    if is_image:
        array = fit_image(array, needed, resize, path)
    is_one = array.shape == needed.shape
    are_several = array.shape[1:] == needed.shape
    if not is_one and not are_several:
        remedy = "; --resize scales images" if is_image else ""
        raise UserError(
            f"{path} has shape {list(array.shape)}; the network reads {list(needed.shape)}{remedy}"
        )
    array = with_dtype(array, needed.dtype, path)
    if are_several:
        yield from (Example(str(path), index, raw) for index, raw in enumerate(array))
    else:
        yield Example(str(path), None, array)


def fit_image(pixels: np.ndarray, needed: InputSpec, resize: bool, path: Path) -> np.ndarray:
    """uint8 [1 or 3, H, W] in the network's channels, and in its size where `resize` allows it."""
    if len(needed.shape) != 3 or needed.shape[0] not in (1, 3):
        raise UserError(
            f"{path} is an image; the network reads arrays of shape {list(needed.shape)}"
        )
    channels, height, width = needed.shape
    pixels = with_channels(pixels, channels)
    if pixels.shape != needed.shape and resize:
        return scaled(pixels, height, width)
    return pixels


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [1 or 3, H, W] with 1 channel (luminance, as Pillow has it) or 3."""
    if len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    colour = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(colour.convert("L"))[None]


def scaled(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, with Pillow's filter against aliasing."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in pixels]
    resized = [plane.resize((width, height), Image.Resampling.BILINEAR) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized])


def with_dtype(array: np.ndarray, dtype: str, path: Path) -> np.ndarray:
    """The array in the network's dtype, where that loses nothing that it can read."""
    if array.dtype != dtype:
        if not _can_be_read_as(array, dtype):
            values = ", 0 to 255" if dtype == "uint8" else ""
            raise UserError(f"{path} holds {array.dtype}; the network reads {dtype}{values}")
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds NaN or infinity; the network reads finite numbers")
    return array


def _can_be_read_as(array: np.ndarray, dtype: str) -> bool:
    if dtype == "float32":
        return np.issubdtype(array.dtype, np.number) and not np.iscomplexobj(array)
    is_integer = np.issubdtype(array.dtype, np.integer)
    return is_integer and array.size > 0 and bool(array.min() >= 0 and array.max() <= 255)


# What is printed


def print_json(example: Example, prediction: Prediction) -> None:
    source: dict[str, object] = {"file": example.file}
    if example.index is not None:
        source["index"] = example.index
    try:
        print(json.dumps(source | prediction, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        # Nor shall the interpreter flush at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


class PredictionTable:
    """One table of all files, printed at the end."""

    def __init__(self, with_specialists: bool):
        self.table = Table(box=None, pad_edge=False, header_style="bold")
        self.with_specialists = with_specialists
        self.table.add_column("file", overflow="fold")
        self.table.add_column("class", overflow="fold")
        self.table.add_column("probability", justify="right", overflow="fold")
        if with_specialists:
            self.table.add_column("specialists asked", overflow="fold")

    def add(self, example: Example, prediction: Prediction) -> None:
        file = example.file if example.index is None else f"{example.file}[{example.index}]"
        specialists = ", ".join(map(str, prediction["specialists"])) or "none"
        for name, probability in zip(prediction["names"], prediction["probabilities"], strict=True):
            cells = [file, name, f"{probability:.4f}"]
            if self.with_specialists:
                cells.append(specialists)
            self.table.add_row(*(Text(cell) for cell in cells))
            file = specialists = ""  # once for all classes of a file

    def print(self) -> None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=200)
        console.print(self.table)
