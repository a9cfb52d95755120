"""`referral evaluate`: how good a finished run is on labelled data that it has not seen."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from networks.reading import InputReader
from networks.temporaries import appearing
from pipeline.config import UserError
from pipeline.failures import cannot_write
from pipeline.files import json_text
from pipeline.graph import RunDirectory, open_run
from pipeline.trust import FUNCTION, check_trusted
from pipeline.usage import Parser

from ..core.dense_logits import Asked, dense_log_probabilities
from ..data.authoring.reporting import Report, list_corrupt, say
from ..data.labels import NONE, printable, readings, settle_given
from ..data.sources import Options, Source, open_source
from ..stages.evaluator import TOP, metrics_of_batch, summary_of
from .export import as_user_errors
from .predict import (
    Predictor,
    add_data_options,
    add_network_options,
    check_kind,
    computing,
    file_reader,
    in_batches,
    load_predictor,
    options_of,
    wide_console,
)

SHOWN = 10  # rows of a printed table
FILES = ("metrics.json", "classes.csv", "confused.csv", "predictions.csv")
Values = dict[str, np.ndarray]


@dataclass
class Labels:
    """What a data set's labels mean to a network.

    classes: int64 [n], NONE where it has no such class.
    unknown: {label: number of inputs} of what is none of the network's classes.
    notes:   what a person should know about how they were read.
    """

    classes: np.ndarray
    unknown: Counter[str]
    notes: list[str]


@dataclass
class Outcome:
    """keys, and arrays over the inputs that were predicted and whose class the network knows."""

    keys: list[str]
    values: Values


def main(argv: list[str]) -> int:
    """Exit codes: 0 all inputs count, 1 some could not be read or have labels of no class."""
    args = _parser().parse_args(argv)
    run = None
    if (args.directory / "config.toml").is_file():
        run = open_run(args.directory)
        check_trusted(run, args.trust, (FUNCTION,))
    _check_out(args.out, args.overwrite)
    predictor = load_predictor(args, run)
    report = Report(skip=True)
    source = open_source(args.data, labelled_options(args, run, predictor), report)
    assert source.labels is not None
    class_names = predictor.spec.class_names
    labels = read_labels(source.labels, class_names)
    report.note(labels.notes)
    if (labels.classes == NONE).all():
        raise UserError(_no_class(labels, class_names))
    named = {} if run is None else run.config.data.decoders
    reader = file_reader(predictor.spec.input, named, args)
    check_kind(source, reader, args.data[0])
    with computing(run, args.device):
        outcome = predict_all(predictor, source, labels.classes, reader, report, args.device)
    if not outcome.keys:
        list_corrupt("not read", report.corrupt)
        raise UserError(f"none of the {len(source.keys)} inputs can be read")
    row = summary_of(outcome.values)
    classes = class_rows(outcome.values, class_names)
    confused = confused_pairs(outcome.values, class_names)
    left_out = {"unreadable": len(report.corrupt), "unknown_labels": labels.unknown.total()}
    metrics = {"of": network_called(args), **row, **left_out}
    if args.out is not None:
        write_files(args.out, metrics, classes, confused, outcome, class_names)
    if args.json:
        print(json_text(metrics, "metrics"))
    else:
        print_outcome(metrics, classes, confused, args.out)
    _say_left_out(report, labels)
    return 1 if any(left_out.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "referral evaluate",
        "Measure a finished run on labelled data: accuracy, classes, mistakes.",
        "referral evaluate runs/mine photos/ --out figures/",
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="a run, or what `referral export` wrote"
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="+",
        help="a directory of class directories, shards, a csv, parquet, or npz, npy or idx files",
    )
    parser.add_argument("--out", metavar="OUT", type=Path, help=f"directory for {', '.join(FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_network_options(parser)
    add_data_options(parser)
    add = parser.add_argument
    add("--label", default="", metavar="NAME", help='column of labels; of shards "json:FIELD"')
    add("--y", default="", metavar="NAME", help="array of labels")
    return parser


def labelled_options(
    args: argparse.Namespace, run: RunDirectory | None, predictor: Predictor
) -> Options:
    """How the data are read: with labels, whose classes are the network's."""
    options = replace(
        options_of(args, run),
        label=args.label,
        y=args.y,
        classes=predictor.spec.num_classes,
        labelled=True,
    )
    if run is None:
        return options
    return replace(options, shards_label=run.config.data.label)


def network_called(args: argparse.Namespace) -> str:
    if args.generalist:
        return "generalist"
    return f"student {args.student}" if args.student else "ensemble"


# Labels


def read_labels(raw: Sequence[str], class_names: Sequence[str]) -> Labels:
    """The network's class of each label.

    Labels are names where one of them is a class's name, else class indices where all are numbers
    below C. See `labels.settle_given`.
    """
    texts, reasons = readings(raw)
    known = [text for number, text in enumerate(texts) if number not in reasons]
    label_set = settle_given(known, class_names)
    classes = label_set.indices(texts)
    classes[list(reasons)] = NONE
    notes = []
    if label_set.kind == "indices" and list(class_names) != list(map(str, range(len(class_names)))):
        first = printable(class_names[0])
        notes.append(f"labels are class indices: 0 is {first}, the network's first class")
    if _counts_from_one(known, class_names):
        notes.append(
            f"warning: labels are 1 to {len(class_names)} and the network's classes 0 to "
            f"{len(class_names) - 1}: are they the same, counted from 1? They are matched by name"
        )
    unknown = Counter(texts[number] for number in np.flatnonzero(classes == NONE).tolist())
    return Labels(classes, unknown, notes)


def _counts_from_one(labels: Sequence[str], class_names: Sequence[str]) -> bool:
    """Whether classes are called 0 .. C - 1, and labels 1 .. C: C among them, and 0 not."""
    count = len(class_names)
    if list(class_names) != list(map(str, range(count))):
        return False
    there = set(labels)
    return str(count) in there and there <= set(map(str, range(1, count + 1)))


def _no_class(labels: Labels, class_names: Sequence[str]) -> str:
    if not labels.unknown:
        return "there is no input to evaluate"
    theirs = ", ".join(_quoted(name) for name, _ in labels.unknown.most_common(3))
    ours = ", ".join(_quoted(name) for name in class_names[:3])
    return f"no label is a class of the network: labels are like {theirs}, its classes like {ours}"


def _quoted(name: str) -> str:
    return f'"{printable(name)}"'


# Predictions


@torch.no_grad()
def predict_all(
    predictor: Predictor,
    source: Source,
    classes: np.ndarray,
    reader: InputReader,
    report: Report,
    device: str,
) -> Outcome:
    """Predict every input whose label is a class. The report lists what cannot be read."""
    keys: list[str] = []
    parts: list[Values] = []

    def readable() -> Iterator[tuple[int, np.ndarray]]:
        for number in np.flatnonzero(classes != NONE).tolist():
            try:
                extension, content = source.content(number)
                yield number, reader.one(content, extension)
            except ValueError as error:
                report.corrupt.append(f"{source.keys[number]}: {error}")

    for batch in in_batches(readable()):
        raw = torch.from_numpy(np.stack([array for _, array in batch])).to(device)
        numbers = [number for number, _ in batch]
        labels = torch.from_numpy(classes[numbers]).to(device)
        with as_user_errors(predictor.place):  # a specialist is read when it is first needed
            for values in metrics_in_parts(predictor, raw, labels):
                parts.append({key: value.cpu().numpy() for key, value in values.items()})
        keys += [source.keys[number] for number in numbers]
    if not parts:
        return Outcome([], {})
    return Outcome(keys, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


def metrics_in_parts(
    predictor: Predictor, raw: Tensor, labels: Tensor
) -> Iterator[dict[str, Tensor]]:
    """What the rows contribute to the metrics, part by part."""
    if predictor.listed is None:
        logits = dense_log_probabilities(predictor.probabilities(raw))
        yield metrics_of_batch(logits.summary(TOP, labels), labels)
        return
    for q, _, own in predictor.listed.in_parts(raw, Asked(labels, (1.0,))):
        yield metrics_of_batch(q.summary(TOP, own), own)


# What is reported


def class_rows(values: Values, class_names: Sequence[str]) -> list[dict]:
    """Accuracy, precision and the commonest mistake of each class, the worst first.

    Classes that neither occur nor are predicted have no row.
    """
    size = len(class_names)
    labels, predicted = values["labels"], values["top5"][:, 0]
    correct = labels == predicted
    occurs = np.bincount(labels, minlength=size)
    is_predicted = np.bincount(predicted, minlength=size)
    right = np.bincount(labels[correct], minlength=size)
    commonest = _commonest_mistakes(labels[~correct], predicted[~correct])
    rows = []
    for c in np.flatnonzero(occurs + is_predicted).tolist():
        mistaken, count = commonest.get(c, (None, 0))
        rows.append(
            {
                "class": c,
                "name": class_names[c],
                "examples": int(occurs[c]),
                "correct": int(right[c]),
                "accuracy": _share(right[c], occurs[c]),
                "predicted": int(is_predicted[c]),
                "precision": _share(right[c], is_predicted[c]),
                "mistaken_for": "" if mistaken is None else class_names[mistaken],
                "times": count,
            }
        )
    return sorted(rows, key=lambda row: (_worst_first(row["accuracy"]), -row["examples"]))


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _worst_first(accuracy: float | None) -> float:
    """Classes without examples are last."""
    return 2.0 if accuracy is None else accuracy


def _commonest_mistakes(labels: np.ndarray, predicted: np.ndarray) -> dict[int, tuple[int, int]]:
    """{class: (what it is taken for most often, how often)}"""
    commonest: dict[int, tuple[int, int]] = {}
    for (label, other), count in _counted_pairs(labels, predicted):
        commonest.setdefault(label, (other, count))
    return commonest


def _counted_pairs(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[tuple[int, int], int]]:
    """((true class, predicted class), how often), the commonest first."""
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    return sorted(pairs.items(), key=lambda item: (-item[1], item[0]))


def confused_pairs(values: Values, class_names: Sequence[str]) -> list[dict]:
    """Each pair of a true class and another that was predicted, the commonest first."""
    labels, predicted = values["labels"], values["top5"][:, 0]
    occurs = np.bincount(labels)
    wrong = labels != predicted
    return [
        {
            "true": class_names[label],
            "predicted": class_names[other],
            "count": count,
            "share_of_true": float(count / occurs[label]),
        }
        for (label, other), count in _counted_pairs(labels[wrong], predicted[wrong])
    ]


def prediction_rows(outcome: Outcome, class_names: Sequence[str]) -> Iterator[dict]:
    """One row for each input, under its key."""
    values = outcome.values
    for number, key in enumerate(outcome.keys):
        label, predicted = int(values["labels"][number]), int(values["top5"][number, 0])
        yield {
            "key": key,
            "label": class_names[label],
            "predicted": class_names[predicted],
            "probability": float(values["top5_probability"][number, 0]),
            "label_probability": float(values["label_probability"][number]),
            "correct": int(label == predicted),
        }


def write_files(
    out: Path,
    metrics: dict,
    classes: list[dict],
    confused: list[dict],
    outcome: Outcome,
    class_names: Sequence[str],
) -> None:
    """metrics.json, classes.csv, confused.csv and predictions.csv in `out`: all, or none."""
    columns = ("true", "predicted", "count", "share_of_true")
    rows = list(prediction_rows(outcome, class_names))
    was_there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            path = {name: files.enter_context(appearing(out / name)) for name in FILES}
            path["metrics.json"].write_text(json_text(metrics, "metrics.json", indent=2) + "\n")
            _write_csv(path["classes.csv"], list(classes[0]), classes)
            _write_csv(path["confused.csv"], columns, confused)
            _write_csv(path["predictions.csv"], list(rows[0]), rows)
    except OSError as error:
        if not was_there:
            with suppress(OSError):
                out.rmdir()
        raise cannot_write(out, error, option="--out") from None


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    # Names of files may hold bytes that are not UTF-8. Names of classes cannot.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _check_out(out: Path | None, overwrite: bool) -> None:
    if out is None or overwrite:
        return
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a directory")
    there = [name for name in FILES if (out / name).exists()]
    if there:
        raise UserError(f"--out {out} holds {there[0]} already; --overwrite replaces it")


def print_outcome(
    metrics: dict, classes: list[dict], confused: list[dict], out: Path | None
) -> None:
    console = wide_console()
    say(
        f"{metrics['of']}, {metrics['n']:,} inputs: "
        f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, NLL {metrics['nll']:.4f}, "
        f"Brier {metrics['brier']:.4f}, ECE {metrics['ece']:.4f}, "
        f"macro top-1 {metrics['macro_top1']:.2%}"
    )
    wrong = [row for row in classes if row["examples"] and row["correct"] < row["examples"]]
    if wrong:
        console.print(
            _table("worst classes", ("name", "examples", "accuracy", "mistaken_for"), wrong)
        )
        pairs = ("true", "predicted", "count", "share_of_true")
        console.print(_table("most confused", pairs, confused))
    if out is not None:
        say(f"written to {out}: {', '.join(FILES)}")


def _table(title: str, columns: Sequence[str], rows: list[dict]) -> Table:
    table = Table(
        title=f"{title} ({min(SHOWN, len(rows))} of {len(rows)})",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows[:SHOWN]:
        table.add_row(*(Text(_cell(row[column])) for column in columns))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return printable(str(value))


def _say_left_out(report: Report, labels: Labels) -> None:
    """Print on stderr what the figures leave out, and how the data were read."""
    for note in report.notes:
        say(f"note: {printable(note)}", sys.stderr)
    for why, names in report.passed_over.items():
        say(f"passed over: {len(names)} {why} ({printable(names[0])}, ...)", sys.stderr)
    if labels.unknown:
        commonest = labels.unknown.most_common(3)
        shown = ", ".join(f"{_quoted(name)} ({count})" for name, count in commonest)
        say(
            f"left out: {labels.unknown.total()} inputs of {len(labels.unknown)} labels "
            f"that are no class of the network: {shown}",
            sys.stderr,
        )
    list_corrupt("not read", report.corrupt)
