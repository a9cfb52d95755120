"""`referral predict`: the most probable classes of files, by the ensemble of a run or an export, or by one network."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ensemble import DeepEnsemble, load_ensemble
from networks import InputSpec, load_classifier
from pipeline.config import UserError
from pipeline.graph import RunDirectory, open_run

from ..data.decoding import (
    BUILT_IN,
    Decoder,
    decoder_table,
    find_decoder,
    image,
    import_function,
    rgb,
)
from ..stages.networks import builders_of
from .export import Answer, check_done, users_mistakes

IMAGES = ("jpg", "jpeg", "png", "webp")
BATCH = 64


class Example(NamedTuple):
    """One raw input, [*shape], and what it is called: its file, and its place in it where the file holds several."""

    file: str
    index: int | None
    raw: np.ndarray


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="referral predict", description=__doc__)
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="a run, or what `referral export` wrote"
    )
    parser.add_argument(
        "files",
        metavar="FILES",
        type=Path,
        nargs="+",
        help="images, .npy arrays (one input, or "
        "several along the first axis), or directories of them",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per file (5)")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--student", metavar="NAME", help="ask this student, not the ensemble")
    network.add_argument("--generalist", action="store_true", help="ask the generalist alone")
    parser.add_argument("--resize", action="store_true", help="scale images to the network's size")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument(
        "--allow-missing", action="store_true", help="answer without specialists that are missing"
    )
    parser.add_argument(
        "--builder",
        metavar="MODULE:FUNCTION",
        help="what builds the network, where an exported model.json names a function of your own",
    )
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1 class is needed")

    run = open_run(args.directory) if (args.directory / "config.toml").is_file() else None
    decoders = BUILT_IN if run is None else decoder_table(run.config.data.decoders)
    files = list(found_files(args.files, decoders))
    spec, answer, asks = answerer(args, run)
    examples = (
        example
        for path in files
        for example in read_examples(path, spec.input, decoders, args.resize)
    )
    show = print_json if args.json else TablePrinter(specialists=asks)
    for batch in batches(examples, BATCH):
        raw = torch.from_numpy(np.stack([example.raw for example in batch])).to(args.device)
        with users_mistakes():  # a specialist is read when it is first asked
            said = answer(raw, args.top)
        for example, row in zip(batch, said, strict=True):
            show(example, row)
    if not args.json:
        show.close()
    return 0


def answerer(
    args, run: RunDirectory | None
) -> tuple[object, Callable[[torch.Tensor, int], list[dict]], bool]:
    """(ModelSpec, raw inputs -> rows as SpecialistEnsemble.predict gives them, whether it asks specialists) of what the
    command line names."""
    check_device(args.device)
    builders = {} if run is None else builders_of(run.config)
    if args.builder:
        builders[args.builder] = import_function(args.builder, "--builder")
    if not (args.student or args.generalist):
        with users_mistakes():
            ensemble = load_ensemble(
                args.directory, args.device, builders, allow_missing=args.allow_missing
            )
        if ensemble.missing:
            print(
                f"without specialists {', '.join(map(str, ensemble.missing))}, which are missing",
                file=sys.stderr,
            )
        if (
            run is not None and not args.allow_missing
        ):  # else there is no ensemble.json yet, and the defaults hold
            check_done(run, run.ensemble)
        return ensemble.generalist.spec, ensemble.predict, not isinstance(ensemble, DeepEnsemble)

    place = args.directory / ("generalist" if args.generalist else f"students/{args.student}")
    if args.student and not (place / "model.json").is_file():
        known = sorted(path.parent.name for path in args.directory.glob("students/*/model.json"))
        raise UserError(
            f"--student {args.student}: {args.directory} has {', '.join(known) or 'no finished students'}"
        )
    if args.generalist and not (place / "model.json").is_file():
        raise UserError(
            f"{args.directory} has no generalist/model.json; give a run with one, or an export"
        )
    with users_mistakes():
        network = load_classifier(place, args.device, builders)
    return network.spec, lambda raw, top: alone(network, raw, top), False


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as mistake:  # torch without CUDA asserts
        raise UserError(f"--device {name}: {str(mistake).splitlines()[0]}") from None


@torch.no_grad()
def alone(network, raw: torch.Tensor, top: int) -> list[dict]:
    """What SpecialistEnsemble.predict says, of one network that asks nobody."""
    found = Answer(network)(raw).topk(min(top, network.spec.num_classes), dim=1)
    names = network.spec.class_names
    return [
        {
            "classes": classes,
            "names": [names[c] for c in classes],
            "probabilities": probabilities,
            "specialists": [],
        }
        for classes, probabilities in zip(
            found.indices.tolist(), found.values.tolist(), strict=True
        )
    ]


# Files to raw inputs


def found_files(given: list[Path], decoders: dict[str, Decoder]) -> Iterator[Path]:
    """The files that are named, and those below directories that hold images, arrays or what the config decodes."""
    inside = {*IMAGES, "npy", *(decoders.keys() - BUILT_IN.keys())}
    for path in given:
        if path.is_dir():
            below = path.rglob("*")
            found = sorted(
                p
                for p in below
                if p.suffix[1:].lower() in inside and p.is_file() and p.name[0] != "."
            )
            if not found:
                raise UserError(
                    f"{path} holds no files with an extension of {', '.join(sorted(inside))}"
                )
            yield from found
        elif not path.exists():
            raise UserError(f"{path}: no such file or directory")
        elif path.suffix[1:].lower() not in decoders:
            known = ", ".join(sorted(decoders))
            raise UserError(
                f"{path}: no decoder for {path.suffix or 'files without an extension'} (known: {known})"
            )
        else:
            yield path


def read_examples(
    path: Path, needed: InputSpec, decoders: dict[str, Decoder], resize: bool
) -> Iterator[Example]:
    """The raw inputs of one file, in the network's channels, size and dtype.  UserError where they cannot be."""
    decoder = find_decoder(decoders, path.suffix[1:].lower())
    try:
        array = decoder(path.read_bytes())
    except Exception as mistake:  # decoders raise what they like about bytes that they do not know
        raise UserError(f"{path}: cannot be decoded: {mistake}") from None
    if decoder in (image, rgb):
        if len(needed.shape) != 3 or needed.shape[0] not in (1, 3):
            raise UserError(
                f"{path} is an image; the network reads arrays of shape {list(needed.shape)}"
            )
        array = with_channels(array, needed.shape[0])
        if array.shape != needed.shape and resize:
            array = scaled(array, *needed.shape[1:])
    several = array.shape[1:] == needed.shape
    if not several and array.shape != needed.shape:
        remedy = "; --resize scales images" if decoder in (image, rgb) else ""
        raise UserError(
            f"{path} has shape {list(array.shape)}; the network reads {list(needed.shape)}{remedy}"
        )
    array = with_dtype(array, needed.dtype, path)
    if not several:
        yield Example(str(path), None, array)
    else:
        yield from (Example(str(path), index, raw) for index, raw in enumerate(array))


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [1 or 3, H, W] with 1 (luminance, as Pillow has it) or 3 channels."""
    from PIL import Image

    if len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    )[None]


def scaled(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, with Pillow's filter against aliasing."""
    from PIL import Image

    planes = [
        Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), Image.BILINEAR)
        for plane in pixels
    ]
    return np.stack([np.asarray(plane) for plane in planes])


def with_dtype(array: np.ndarray, dtype: str, path: Path) -> np.ndarray:
    if array.dtype == dtype:
        good = array
    elif (
        dtype == "float32" and np.issubdtype(array.dtype, np.number) and not np.iscomplexobj(array)
    ):
        good = array.astype(np.float32)
    elif (
        np.issubdtype(array.dtype, np.integer)
        and array.size
        and 0 <= array.min()
        and array.max() <= 255
    ):
        good = array.astype(np.uint8)
    else:
        raise UserError(
            f"{path} holds {array.dtype}; the network reads {dtype}{', 0 to 255' * (dtype == 'uint8')}"
        )
    if not np.isfinite(good).all():
        raise UserError(f"{path} holds NaN or infinity; the network reads finite numbers")
    return good


def batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while batch := list(itertools.islice(examples, size)):
        yield batch


# What is printed


def print_json(example: Example, row: dict) -> None:
    place = (
        {"file": example.file}
        if example.index is None
        else {"file": example.file, "index": example.index}
    )
    try:
        print(json.dumps(place | row, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nor shall the interpreter flush at its exit
        raise SystemExit(0) from None


class TablePrinter:
    """One table of all files, shown at the end."""

    def __init__(self, specialists: bool):
        self.table, self.specialists = (
            Table(box=None, pad_edge=False, header_style="bold"),
            specialists,
        )
        for column in (
            "file",
            "class",
            "probability",
            *(["specialists asked"] if specialists else []),
        ):
            self.table.add_column(
                column, justify="right" if column == "probability" else "left", overflow="fold"
            )

    def __call__(self, example: Example, row: dict) -> None:
        name = example.file if example.index is None else f"{example.file}[{example.index}]"
        asked = ", ".join(map(str, row["specialists"])) or "none"
        for place, (label, probability) in enumerate(
            zip(row["names"], row["probabilities"], strict=True)
        ):
            cells = [
                name if place == 0 else "",
                label,
                f"{probability:.4f}",
                asked if place == 0 else "",
            ]
            self.table.add_row(
                *(Text(cell) for cell in (cells if self.specialists else cells[:-1]))
            )

    def close(self) -> None:
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(self.table)
