"""`referral shards ...`: make, convert and check shards.

Exit codes: 0 done, 1 something is corrupt, 2 the user's mistake.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pipeline.config import Data, UserError
from pipeline.config.base import MODULE_FUNCTION
from pipeline.typer_usage import Command, application, call

if TYPE_CHECKING:
    from networks.pictures import PictureRules

    from ..data.authoring.indexing import Finding
    from ..data.authoring.reporting import Report

HELP = "Make, convert and check shards; exit code 1 if something is corrupt."
EXAMPLES = {
    "folder": "referral shards folder photos/ --out shards/ --size 64",
    "arrays": "referral shards arrays digits.npz --out shards/",
    "table": "referral shards table goods.csv --out shards/ --text title --label category",
    "parquet": "referral shards parquet dataset/ --out shards/ --size 64",
    "from-webdataset": "referral shards from-webdataset tars/ --out shards/ --label json:label",
    "index": "referral shards index shards/",
    "validate": "referral shards validate shards/",
    "glyphs": "referral shards glyphs --out glyphs/ --classes 200 --train 60 --val 20 --test 20",
}
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Directory to write the shards and manifest.json to.")
]
Val = Annotated[
    float,
    typer.Option(
        metavar="SHARE", help="Fraction of each class for the val split, where there is none."
    ),
]
Test = Annotated[
    float,
    typer.Option(
        metavar="SHARE", help="Fraction of each class for the test split, where there is none."
    ),
]
TAKEN = "Fraction of each class for a {} split, where there is none [0.1 of a directory, else 0]."
TakenVal = Annotated[float | None, typer.Option(metavar="SHARE", help=TAKEN.format("val"))]
TakenTest = Annotated[float | None, typer.Option(metavar="SHARE", help=TAKEN.format("test"))]
OWN = "Fraction of each class for the {} split, where there is none; or {} of your own."
Seed = Annotated[int, typer.Option(min=0, help="Seed of the division into splits.")]
PerShard = Annotated[int, typer.Option(min=1, help="Samples per shard.")]
Crop = Annotated[
    str, typer.Option(help="How to get to SIZE: center cuts the middle square, none squeezes.")
]
Background = Annotated[
    str, typer.Option(help="Behind transparent pictures: white, black, gray or #rrggbb.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Scale pictures to SIZE x SIZE.")]
Gray = Annotated[bool, typer.Option("--gray", help="Make pictures gray: one channel.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", "--force", help="Replace shards that are there.")
]
Label = Annotated[str, typer.Option(help='Member that holds the label, or "json:FIELD".')]
FetchDir = Annotated[
    str,
    typer.Option(
        metavar="DIR", help="Where shards behind URLs are kept [~/.cache/referral/shards]."
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text file with one class name per line, in order."),
]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Refuse larger pictures [67108864].")]
Damage = Annotated[
    str,
    typer.Option(
        metavar="strict|skip",
        help="Refuse corrupt inputs, with a list (strict), or leave them out and say so (skip).",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Add all commands, each with its example, to an application."""
    from ..data.authoring.glyph_command import glyphs

    functions = {
        "folder": folder,
        "arrays": arrays,
        "table": table,
        "parquet": parquet,
        "from-webdataset": from_webdataset,
        "index": index,
        "validate": validate,
        "glyphs": glyphs,
    }
    for name, function in functions.items():
        app.command(name, cls=Command, epilog=EXAMPLES[name])(function)


def folder(
    directory: Annotated[
        Path,
        typer.Argument(help="DIR/CLASS/FILE, or DIR/train/CLASS/FILE with val and test beside it."),
    ],
    out: Out,
    val: Val = 0.1,
    test: Test = 0.1,
    size: Size = None,
    gray: Gray = False,
    crop: Crop = "center",
    background: Background = "white",
    max_pixels: MaxPixels = None,
    input: Annotated[
        str, typer.Option(help="Extensions of the inputs, e.g. png,jpg [pictures, if any].")
    ] = "",
    no_splits: Annotated[
        bool, typer.Option("--no-splits", help="Directories called train, test, ... are classes.")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Take links that lead out of DIR, too.")
    ] = False,
    damage: Damage = "strict",
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of a directory with one subdirectory per class."""
    from ..data.authoring.folder import from_folder

    rules = _picture_rules(size, gray, crop, background, max_pixels)
    report = from_folder(
        directory,
        out,
        {"val": val, "test": test},
        rules,
        seed,
        samples_per_shard,
        overwrite,
        _new_report(damage),
        input,
        find_splits=not no_splits,
        follow_links=follow_links,
    )
    _print_summary(out, report)


def arrays(
    out: Out,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="npz (x, y or x_train, y_train, ...), idx or npy files."),
    ] = None,
    x: Annotated[str, typer.Option(help="Name of the array of inputs.")] = "",
    y: Annotated[str, typer.Option(help="Name of the array of labels.")] = "",
    train: Annotated[str, typer.Option(help="Files or arrays of the train split: X,Y.")] = "",
    val: Annotated[
        str, typer.Option(metavar="SHARE|OWN", help=OWN.format("val", "files or arrays X,Y"))
    ] = "0.1",
    test: Annotated[
        str, typer.Option(metavar="SHARE|OWN", help=OWN.format("test", "files or arrays X,Y"))
    ] = "0.1",
    channels: Annotated[
        str, typer.Option(help="Where the channels of pictures are: first or last [by the shape].")
    ] = "",
    encoding: Annotated[str, typer.Option(help="Of byte strings, e.g. latin-1.")] = "utf-8",
    classes: Classes = None,
    damage: Damage = "strict",
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of arrays of inputs and labels."""
    from ..data.authoring.arrays import Channels, Selection, from_arrays

    if channels not in ("", "first", "last"):
        raise UserError(f"--channels {channels}: first or last")
    if not files and not train:
        raise UserError("give npz, idx or npy files, or --train X,Y")
    fractions, own = _own_splits(val, test)
    if train:
        own = {"train": train, **own}
    listed = {split: [word.strip() for word in words.split(",")] for split, words in own.items()}
    report = _new_report(damage)
    from_arrays(
        files or [],
        out,
        fractions,
        seed,
        samples_per_shard,
        overwrite,
        report,
        Selection(x, y, listed),
        cast(Channels, channels),
        encoding,
        _read_class_names(classes, report),
    )
    _print_summary(out, report)


def table(
    file: Annotated[Path, typer.Argument(help="A csv or csv.gz with a header.")],
    out: Out,
    text: Annotated[
        str, typer.Option(help="Column with the input text [the only one beside label and split].")
    ] = "",
    label: Annotated[
        str, typer.Option(help="Column with the class [label, class, category, target, ...].")
    ] = "",
    split_column: Annotated[
        str, typer.Option(help="Column that says train, val or test [split, if there is one].")
    ] = "",
    encoding: Annotated[str, typer.Option(help="The file's encoding, e.g. cp1252.")] = "utf-8-sig",
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave out the rows of this class; may be repeated.")
    ] = None,
    val: Annotated[str, typer.Option(metavar="SHARE|OWN", help=OWN.format("val", "a csv"))] = "0.1",
    test: Annotated[
        str, typer.Option(metavar="SHARE|OWN", help=OWN.format("test", "a csv"))
    ] = "0.1",
    damage: Damage = "strict",
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of the texts in a csv table."""
    from ..data.authoring.tables import Columns, from_table

    fractions, own = _own_splits(val, test)
    report = from_table(
        file,
        out,
        Columns(text, label, split_column),
        fractions,
        seed,
        encoding,
        drop or (),
        samples_per_shard,
        overwrite,
        _new_report(damage),
        own,
    )
    _print_summary(out, report)


def parquet(
    places: Annotated[
        list[Path],
        typer.Argument(help="Directories with .parquet files anywhere below them, or such files."),
    ],
    out: Out,
    input: Annotated[
        str,
        typer.Option(
            help="Column of pictures, texts or lists of numbers; or columns of numbers, a,b,c."
        ),
    ] = "",
    label: Annotated[
        str, typer.Option(help="Column with the class [the only ClassLabel, label, class, ...].")
    ] = "",
    val: Val = 0.1,
    test: Test = 0.1,
    size: Size = None,
    gray: Gray = False,
    crop: Crop = "center",
    background: Background = "white",
    max_pixels: MaxPixels = None,
    classes: Classes = None,
    damage: Damage = "strict",
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of parquet files, such as those of Hugging Face's datasets."""
    from ..data.authoring.parquet import ParquetColumns, from_parquet

    report = _new_report(damage)
    from_parquet(
        places,
        out,
        ParquetColumns(input, label),
        {"val": val, "test": test},
        _picture_rules(size, gray, crop, background, max_pixels),
        seed,
        samples_per_shard,
        overwrite,
        report,
        _read_class_names(classes, report),
    )
    _print_summary(out, report)


def from_webdataset(
    urls: Annotated[
        str,
        typer.Argument(
            help="A directory of tars, with all their splits; or tars of one split: files, URLs, "
            "braces, several joined by ::, as for webdataset."
        ),
    ],
    out: Out,
    val: TakenVal = None,
    test: TakenTest = None,
    size: Size = None,
    gray: Gray = False,
    seed: Seed = 0,
    split: Annotated[
        str, typer.Option(help="The split that they become [as the tars are called, else train].")
    ] = "",
    label: Label = "cls",
    input: Annotated[str, typer.Option(help="Member to keep as the input.")] = "",
    classes: Classes = None,
    encoding: Annotated[str, typer.Option(help="Of the labels, e.g. latin-1.")] = "utf-8",
    max_pixels: MaxPixels = None,
    damage: Damage = "strict",
    fetch_dir: FetchDir = "",
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite any webdataset as shards with a manifest."""
    from ..data.authoring import indexing

    report = _new_report(damage)
    rules = None
    if size or gray:
        rules = _picture_rules(size, gray)
        rules = replace(rules, channels=rules.channels or 3)
    indexing.from_webdataset(
        urls,
        out,
        split or None,
        label,
        input,
        _read_class_names(classes, report),
        report,
        Data(fetch_dir=fetch_dir),
        samples_per_shard,
        overwrite,
        max_pixels,
        None if val is None and test is None else {"val": val or 0.0, "test": test or 0.0},
        seed,
        rules,
        encoding,
    )
    _print_summary(out, report)


def index(
    place: Annotated[
        str, typer.Argument(help="Directory of SPLIT-NUMBER.tar, or URLs of such files.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the manifest, if the shards are URLs.")
    ] = None,
    label: Label = "cls",
    input: Annotated[str, typer.Option(help="Member that holds the input, of several.")] = "",
    classes: Classes = None,
    max_pixels: MaxPixels = None,
    damage: Damage = "strict",
    fetch_dir: FetchDir = "",
) -> None:
    """Give existing shards a manifest."""
    from ..data.authoring.foreign_files import refuse_foreign
    from ..data.authoring.indexing import index_directory, index_urls
    from ..data.patterns import URL

    refuse_foreign(place)
    report = _new_report(damage)
    class_names = _read_class_names(classes, report)
    data = Data(label=label, input=input, fetch_dir=fetch_dir)
    if not place.startswith(URL):
        if out is not None:
            raise UserError("--out is for URLs: the manifest of a directory of shards lies in it")
        index_directory(place, label, class_names, input, report, max_pixels)
        _print_summary(Path(place), report, data)
        return
    if out is None:
        raise UserError(
            f"{place}: nothing can be written there; say with --out where its manifest shall lie"
        )
    index_urls(place, out, data, class_names, report, max_pixels)
    _print_summary(out, report, data)


def validate(
    pattern: Annotated[str, typer.Argument(help="A directory of shards, or a pattern of tars.")],
    split: Annotated[str, typer.Option(help="Which split of a directory [all].")] = "",
    label: Label = "cls",
    input: Annotated[str, typer.Option(help="Member that holds the input.")] = "",
    decoder: Annotated[
        list[str] | None, typer.Option(help="EXTENSION=module:function, as in data.decoders.")
    ] = None,
    fetch_dir: FetchDir = "",
) -> None:
    """Check every file in the shards. Exit code 1 if one is corrupt, with a list."""
    from ..data.authoring.indexing import validate as validate_shards
    from ..data.authoring.reporting import print_classes, print_repeats
    from ..data.writing import read_manifest

    decoders: dict[str, str] = {}
    for item in decoder or []:
        extension, _, function = item.partition("=")
        if not extension or not re.fullmatch(MODULE_FUNCTION, function):
            raise UserError(f"--decoder {item}: write EXTENSION=module:function")
        decoders[extension] = function
    data = Data(label=label, input=input, decoders=decoders, fetch_dir=fetch_dir)
    findings: list[Finding] = []
    for name in _splits_to_validate(pattern, split):
        findings += validate_shards(pattern, data, name)
    _print_findings(findings)
    manifest = read_manifest(pattern) if Path(pattern).is_dir() else None
    if manifest:
        print_classes(pattern, manifest)
        if not any(finding.corruption for finding in findings):
            print_repeats(pattern, manifest, data)
    if any(finding.corruption for finding in findings):
        raise typer.Exit(1)


def _splits_to_validate(pattern: str, split: str) -> list[str]:
    """The splits of a directory's manifest, or what the user named, or any."""
    from ..data.writing import read_manifest

    if split:
        return [split]
    manifest = read_manifest(pattern) if Path(pattern).is_dir() else None
    return list(manifest["splits"]) if manifest else ["*"]


def _print_findings(findings: Sequence[Finding]) -> None:
    from rich.table import Table

    from pipeline.terminal import Console

    shown = Table("shard", "samples", "bytes", "corrupt")
    for finding in findings:
        number = str(len(finding.corruption) or "none")
        shown.add_row(finding.shard, str(finding.samples), str(finding.bytes), number)
    Console().print(shown)
    from ..data.authoring.reporting import say

    corrupt = [finding for finding in findings if finding.corruption]
    for finding in corrupt:
        for item in finding.corruption:
            say(str(item), sys.stderr)
    if corrupt:
        print(f"{len(corrupt)} of {len(findings)} shards are corrupt", file=sys.stderr)


def _picture_rules(
    size: int | None,
    gray: bool,
    crop: str = "center",
    background: str = "white",
    max_pixels: int | None = None,
) -> PictureRules:
    from networks.pictures import MAX_PIXELS, PictureRules

    try:
        return PictureRules(
            size=(size, size) if size else None,
            channels=1 if gray else None,
            crop=crop,
            background=background,
            max_pixels=max_pixels or MAX_PIXELS,
        )
    except ValueError as error:
        option = str(error).removeprefix("pictures.").replace(" = ", " ", 1)
        raise UserError(f"--{option}") from None


def _own_splits(val: str, test: str) -> tuple[dict[str, float], dict[str, str]]:
    """({split: fraction}, {split: the user's own}) of --val and --test."""
    fractions: dict[str, float] = {}
    own: dict[str, str] = {}
    for split, value in (("val", val), ("test", test)):
        try:
            fractions[split] = float(value)
        except ValueError:
            own[split] = value
    return fractions, own


def _new_report(damage: str) -> Report:
    from ..data.authoring.reporting import Report

    if damage not in ("strict", "skip"):
        raise UserError(f"--damage {damage}: strict or skip")
    return Report(skip=damage == "skip")


def _read_class_names(path: Path | None, report: Report) -> list[str] | None:
    from ..data.labels import doubts, read_class_list

    if path is None:
        return None
    names = read_class_list(path)
    report.note(doubts(names))
    return names


MADE: list[Path] = []  # what commands of this process have made, the last one last


def _print_summary(out: Path, report: Report, data: Data | None = None) -> None:
    from ..data.authoring.reporting import print_summary

    print_summary(out, report, data)
    MADE.append(out)


def main(argv: list[str]) -> int:
    """Run one command, and say what comes next of the shards that it made.

    Returns its exit code.  Raises UserError for the user's mistakes, unknown options too.
    """
    MADE.clear()
    code = make(argv)
    if code == 0 and MADE and argv[:1] != ["glyphs"]:  # the demo's, which is on its way
        print(f"next: {shlex.join(['referral', 'init', str(MADE[-1])])}")
    return code


def make(argv: list[str]) -> int:
    """The same, without a word about what comes next."""
    app = application(HELP, EXAMPLES["folder"])
    add_commands(app)
    return call(app, "referral shards", argv)
