"""`referral predict`: the most probable classes of files.

They are predicted by the ensemble of a run or of an export, or by one of its networks.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeVar

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ensemble import SpecialistEnsemble, load_ensemble, prediction_columns
from networks import Classifier, InputSpec, ModelSpec, load_classifier
from networks.reading import InputReader
from pipeline.config import UserError
from pipeline.files import json_text
from pipeline.graph import RunDirectory, open_run
from pipeline.redaction import shown
from pipeline.terminal import wide_console
from pipeline.trust import FUNCTION, HELP, check_trusted
from pipeline.usage import Parser

from ..core.dense_logits import ListedPredictor
from ..data.authoring.folder import LINKS_OUT, leads_out
from ..data.authoring.reporting import Report
from ..data.decoding import Decoder, decoder_table, image, import_function, npy, rgb, text
from ..data.labels import printable
from ..data.sources import Options, Source, is_parquet, is_shards, is_table, open_source
from ..distributed.numerics import numerics
from ..distributed.ranks import autocast
from ..stages.evaluate import listed_predictor
from ..stages.networks import builders_of
from .export import Probabilities, as_user_errors, check_done
from .prediction_files import ROWS, check_target, table_file, writable

if TYPE_CHECKING:
    from ensemble.ranking import Prediction

# Below a directory these lie beside the inputs. A file that is named is read whatever it is.
NOTES = ("txt", "json")
BATCH = 64
Item = TypeVar("Item")


class Example(NamedTuple):
    """One raw input [*shape], its file, and its index or key in a file that holds several."""

    file: str
    index: int | None
    raw: np.ndarray
    key: str | None = None

    @property
    def name(self) -> str:
        inside = self.key if self.index is None else self.index
        return self.file if inside is None else f"{self.file}[{inside}]"

    @property
    def own_key(self) -> str:
        """The example's key or number in a file of several. A file of one is its own key."""
        inside = self.key if self.index is None else self.index
        return self.file if inside is None else str(inside)


class Predictor(NamedTuple):
    """An ensemble, or one network.

    predict: (raw inputs, top) -> {classes, names, probabilities, specialists} of each input, as
    SpecialistEnsemble.predict gives them.  probabilities: raw inputs -> [B, C].  listed: of a label
    set that is too large for rows of C numbers, else None.  place: where it was read.
    """

    spec: ModelSpec
    predict: Callable[[Tensor, int], list[Prediction]]
    has_specialists: bool
    probabilities: Callable[[Tensor], Tensor]
    listed: ListedPredictor | None = None
    place: Path = Path()


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1 class is needed")
    if args.to:
        check_target(args.to, args.force)
    run, named = None, {}
    if (args.directory / "config.toml").is_file():
        run = open_run(args.directory)
        check_trusted(run, args.trust, (FUNCTION,))
        named = run.config.data.decoders
    predictor = load_predictor(args, run)
    reader = file_reader(predictor.spec.input, named, args)
    unreadable = Unreadable()
    decoders = decoder_table(named) | reader.decoders
    texts = reads_texts(reader)
    files = find_files(args.files, decoders, unreadable, texts, args.follow_links)
    examples = read_files(files, reader, unreadable, options_of(args, run))
    with computing(run, args.device):
        predicted = predictions(predictor, examples, args.top, args.device)
        if args.to:
            write_table(args.to, args.force, predicted)
        elif args.json:
            as_utf8(sys.stdout)
            for example, prediction in predicted:
                print_json(example, prediction)
        else:
            table = PredictionTable(predictor.has_specialists)
            for example, prediction in predicted:
                table.add(example, prediction)
            if table.table.row_count:
                table.print()
                place = shlex.quote(str(args.directory))
                command = f"referral evaluate {place} LABELLED-DATA"
                wide_console().say_next(command, "How good it is, where labels are known")
    return 1 if unreadable.count else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "referral predict",
        "Classify files by the ensemble of a run or an export, or by one of its networks.",
        "referral predict runs/mine photos/ --top 3 --json",
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="a run, or what `referral export` wrote"
    )
    parser.add_argument(
        "files",
        metavar="FILES",
        type=Path,
        nargs="+",
        help="images, .npy arrays (one input, or several along the first axis), directories of "
        "them; csv, parquet, npz, tars or directories of shards, whose keys are printed",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per file (5)")
    add_network_options(parser)
    add_data_options(parser)
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="one JSON object a line")
    printed.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="write a table, .parquet, .csv or .jsonl: file, key, and class, name and probability "
        "of the likeliest classes",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What the data are, where they do not say it. See `sources.Options`."""
    add = parser.add_argument
    add("--split", default="", metavar="NAME", help="which split of data that has several (test)")
    add("--text", default="", metavar="NAME", help="column of texts")
    add("--key", default="", metavar="NAME", help="column that tells rows apart (key, id, index)")
    add("--x", default="", metavar="NAME", help="array of inputs")
    add("--input", default="", metavar="EXT", help="extension of the inputs, e.g. png")
    add("--encoding", default="", metavar="NAME", help="of a csv or of byte strings, e.g. cp1252")
    add("--channels", default="", choices=("first", "last"), help="those of arrays of pictures")
    parser.add_argument(
        "--follow-links", action="store_true", help="also follow links that lead out of a directory"
    )


def options_of(args: argparse.Namespace, run: RunDirectory | None) -> Options:
    """How files of many inputs are read. Shards as the run's own, unless args say more."""
    options = Options(
        text=args.text,
        key=args.key,
        x=args.x,
        input=args.input,
        split=args.split,
        channels=args.channels,
        encoding=args.encoding,
        labelled=False,
        follow_links=args.follow_links,
    )
    if run is None:
        return options
    data = run.config.data
    return replace(options, shards_input=data.input, decoders=data.decoders)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What chooses and loads the network. See `load_predictor`."""
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--student", metavar="NAME", help="predict with this student, not with the ensemble"
    )
    network.add_argument(
        "--generalist", action="store_true", help="predict with the generalist alone"
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="bring images to the network's size (the middle, bicubic) where the run has no rule "
        "for it; runs on `shards folder --size` have one, which is applied unasked",
    )
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="read images of up to N pixels [67108864]"
    )
    parser.add_argument(
        "--device", default="cpu", help="compute on cpu (the default), cuda or cuda:1"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="predict without the specialists that are missing",
    )
    parser.add_argument(
        "--builder",
        metavar="MODULE:FUNCTION",
        action="append",
        help="what builds the network, or decodes files, where an exported model.json names a "
        "function of your own; may be repeated",
    )
    parser.add_argument("--trust", action="store_true", help=HELP)


def predictions(
    predictor: Predictor, examples: Iterator[Example], top: int, device: str
) -> Iterator[tuple[Example, Prediction]]:
    for batch in in_batches(examples):
        raw = torch.from_numpy(np.stack([example.raw for example in batch])).to(device)
        with as_user_errors(predictor.place):  # a specialist is read when it is first needed
            predicted = predictor.predict(raw, top)
        yield from zip(batch, predicted, strict=True)


@contextmanager
def computing(run: RunDirectory | None, device: str) -> Iterator[None]:
    """The precision of the run's own stages, on a GPU. A CPU, and a bundle, answer in float32."""
    kind = torch.device(device)
    if run is None or kind.type == "cpu":
        yield
        return
    with numerics(run.config.engine), autocast(run.config.engine, kind):
        yield


def in_batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


# What predicts


def load_predictor(args: argparse.Namespace, run: RunDirectory | None) -> Predictor:
    """The ensemble, or the network that the command line names."""
    check_device(args.device)
    builders = {} if run is None else builders_of(run.config)
    for name in args.builder or ():
        builders[name] = import_function(name, "--builder")
    if args.student or args.generalist:
        return load_network(args, builders)
    with as_user_errors(args.directory), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said below, in one line
        ensemble = load_ensemble(
            args.directory, args.device, builders, allow_missing=args.allow_missing
        )
    if ensemble.missing:
        names = ", ".join(map(str, ensemble.missing))
        print(f"without specialists {names}, which are missing", file=sys.stderr)
    # A run without ensemble.json yet would be joined by the defaults.
    if run is not None and not args.allow_missing:
        check_done(run, run.ensemble)
    if not ensemble.finished:
        print(
            f"{args.directory} is not finished: temperatures and weights are the defaults",
            file=sys.stderr,
        )
    has_specialists = isinstance(ensemble, SpecialistEnsemble)
    listed = None
    if isinstance(ensemble, SpecialistEnsemble) and ensemble.is_sparse:
        listed = listed_predictor(ensemble)
    return Predictor(
        ensemble.generalist.spec,
        ensemble.predict,
        has_specialists,
        ensemble.probabilities,
        listed,
        args.directory,
    )


def load_network(args: argparse.Namespace, builders: dict[str, Callable]) -> Predictor:
    """The student or the generalist alone."""
    if args.generalist:
        directory = args.directory / "generalist"
    else:
        directory = args.directory / "students" / args.student
    if not (directory / "model.json").is_file():
        raise UserError(_absent_network(args))
    with as_user_errors(directory):
        network = load_classifier(directory, args.device, builders)

    def predict(raw: Tensor, top: int) -> list[Prediction]:
        return predict_alone(network, raw, top)

    probabilities = Probabilities(network)
    return Predictor(network.spec, predict, False, probabilities, place=directory)


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


class Unreadable:
    """What could not be read, one line each on standard error as it is met."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, reason: str) -> None:
        self.count += 1
        line = printable(" ".join(reason.splitlines()))
        print(f"error: {line}", file=sys.stderr, flush=True)


def file_reader(needed: InputSpec, named: dict[str, str], args: argparse.Namespace) -> InputReader:
    """What reads files for a network: by its model.json, and by the decoders of the run's config.

    named: the config's data.decoders.
    """
    functions = {name: import_function(name, "--builder") for name in args.builder or ()}
    with as_user_errors():
        reader = InputReader(needed, functions, args.resize, args.max_pixels)
    for extension, decoder in decoder_table(named).items():
        # The reader has pictures and .npy itself, and model.json says what reads texts.
        if decoder in (image, rgb, npy, text):
            continue
        reader.decoders[extension] = decoder
    if reader.rules is None:
        reader.decoders.setdefault("txt", text)
    return reader


def reads_texts(reader: InputReader) -> bool:
    """Whether inputs are texts: by model.json, or by a decoder of the config's own."""
    return reader.reads_texts or reader.decoders.get("txt") not in (None, text)


def find_files(
    paths: list[Path],
    decoders: Mapping[str, Decoder],
    unreadable: Unreadable | None = None,
    texts: bool = False,
    follow_links: bool = False,
) -> list[Path]:
    """The files that are named, and those below directories that hold inputs.

    decoders: of the extensions that can be read.  texts: whether inputs are texts.  Below a
    directory the inputs are the texts, or all files but text and JSON.
    follow_links: whether links that lead out of a directory count. Else one line says how many.
    UserError where nothing is left of `paths`. `unreadable` gets what cannot be used.
    """
    known = set(decoders)
    inside = {"txt"} if texts else known - {*NOTES}
    files: list[Path] = []
    mistakes: list[str] = []
    for path in paths:
        # Not pathlib's: that raises for what is too long to be a name, such as a text.
        if os.path.exists(path) and holds_many(path):
            files.append(path)
        elif os.path.isdir(path):
            below = [file for file in sorted(path.rglob("*")) if _is_input(file, inside)]
            inputs = below if follow_links else _own_files(path, below)
            if not inputs:
                extensions = ", ".join(sorted(inside))
                mistakes.append(f"{path} holds no files with an extension of {extensions}")
            files += inputs
        elif not os.path.exists(path):
            mistakes.append(f"{path}: no such file or directory")
        elif _extension(path) not in known:
            unknown = path.suffix or "files without an extension"
            extensions = ", ".join(sorted(known))
            mistakes.append(f"{path}: no decoder for {unknown} (known: {extensions})")
        else:
            files.append(path)
    if not files:
        raise UserError(mistakes[0])
    for mistake in mistakes:
        (unreadable or Unreadable()).add(mistake)
    return files


def _own_files(directory: Path, files: list[Path]) -> list[Path]:
    """The files that are no links out of the directory, by the rule of `shards folder`."""
    root = os.path.realpath(directory)
    own = [file for file in files if not leads_out(file, root)]
    if len(own) < len(files):
        line = f"passed over: {len(files) - len(own)} {LINKS_OUT} in {directory}"
        print(printable(line), file=sys.stderr, flush=True)
    return own


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _is_input(path: Path, extensions: set[str]) -> bool:
    if _extension(path) not in extensions or path.name.startswith("."):
        return False
    # A link that leads nowhere is listed when it is to be read.
    return path.is_file() or not path.exists()


def holds_many(path: Path) -> bool:
    """Whether a place holds inputs under keys: a table, parquet, an npz, tars or shards."""
    place = str(path)
    return is_table(place) or is_parquet(place) or path.suffix == ".npz" or is_shards(place)


def read_files(
    files: Iterable[Path], reader: InputReader, unreadable: Unreadable, options: Options
) -> Iterator[Example]:
    """The examples of all files that can be read."""
    for path in files:
        try:
            if holds_many(path):
                yield from read_many(path, reader, unreadable, options)
            else:
                yield from read_examples(path, reader)
        except (ValueError, UserError) as error:
            unreadable.add(str(error))


def read_many(
    path: Path, reader: InputReader, unreadable: Unreadable, options: Options
) -> Iterator[Example]:
    """The inputs of a table, an npz or shards, under their keys."""
    report = Report(skip=True)
    source = open_source([str(path)], options, report)
    check_kind(source, reader, path)
    for line in report.corrupt:
        unreadable.add(line)
    for number, key in enumerate(source.keys):
        try:
            extension, content = source.content(number)
            yield Example(str(path), None, reader.one(content, extension), key)
        except ValueError as error:
            unreadable.add(f"{path}[{key}]: {error}")


def check_kind(source: Source, reader: InputReader, place: str | Path) -> None:
    """One UserError for a whole set of texts, where the network reads something else."""
    if not source.keys or "txt" in reader.decoders or reader.reads_texts:
        return
    try:
        extension, _ = source.content(0)
    except ValueError:
        return
    if extension == "txt":
        raise UserError(f"{place} holds texts; the network reads {reader.needed}")


def read_examples(path: Path, reader: InputReader) -> Iterator[Example]:
    """The raw inputs of one file.  ValueError, with the file, where it cannot be read."""
    rows, is_one = reader.file(path)
    for index, raw in enumerate(rows):
        yield Example(str(path), None if is_one else index, raw)


# What is printed


def as_utf8(stream: TextIO) -> None:
    """Let a stream write UTF-8 whatever the terminal's encoding, and the rest as escapes.

    A file name that is not UTF-8 has lone surrogates. \\udcff is how JSON writes one.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def print_json(example: Example, prediction: Prediction) -> None:
    source: dict[str, object] = {"file": example.file}
    if example.index is not None:
        source["index"] = example.index
    if example.key is not None:
        source["key"] = example.key
    text = json_text(source | prediction, str(source.get("file", "prediction")), ensure_ascii=False)
    print(text, flush=True)


def write_table(path: Path, force: bool, found: Iterator[tuple[Example, Prediction]]) -> None:
    """Write a table of all predictions, some rows at a time, and say how many."""
    count = 0
    with table_file(path, force) as write:
        while rows := list(itertools.islice(found, ROWS)):
            columns = prediction_columns(
                [prediction for _, prediction in rows], [example.own_key for example, _ in rows]
            )
            write(writable({"file": [example.file for example, _ in rows], **columns}))
            count += len(rows)
        if not count:
            raise UserError(f"--to {path}: no input could be read, so there is nothing to write")
    print(f"{shown(str(path))}: {count} predictions")


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
        file = printable(example.name)
        specialists = ", ".join(map(str, prediction["specialists"])) or "none"
        for name, probability in zip(prediction["names"], prediction["probabilities"], strict=True):
            cells = [file, name, f"{probability:.4f}"]
            if self.with_specialists:
                cells.append(specialists)
            self.table.add_row(*(Text(printable(cell)) for cell in cells))
            file = specialists = ""  # once for all classes of a file

    def print(self) -> None:
        wide_console().print(self.table)
