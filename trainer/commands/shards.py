"""`referral shards ...`: make, convert and check shards.

Exit codes: 0 done, 1 something is corrupt, 2 the user's mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from pipeline.config import Data, UserError

if TYPE_CHECKING:
    from ..data.authoring.indexing import Finding

Out = Annotated[Path, typer.Option(help="Directory to write the shards and manifest.json to.")]
Val = Annotated[
    float, typer.Option(help="Fraction of each class for the val split, where there is none.")
]
Test = Annotated[
    float, typer.Option(help="Fraction of each class for the test split, where there is none.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the division into splits.")]
PerShard = Annotated[int, typer.Option(min=1, help="Samples per shard.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", "--force", help="Replace shards that are there.")
]
Label = Annotated[str, typer.Option(help='Member that holds the label, or "json:FIELD".')]
FetchDir = Annotated[
    str, typer.Option(help="Where shards behind URLs are kept [~/.cache/referral/shards].")
]
Classes = Annotated[
    Path | None, typer.Option(help="Text file with one class name per line, in order.")
]


def add_commands(app: typer.Typer) -> None:
    """Add folder, arrays, table, from-webdataset, index, validate and glyphs to an application."""
    from ..data.authoring.glyph_command import add_glyphs_command

    app.command("folder")(folder)
    app.command("arrays")(arrays)
    app.command("table")(table)
    app.command("from-webdataset")(from_webdataset)
    app.command("index")(index)
    app.command("validate")(validate)
    add_glyphs_command(app)


def folder(
    directory: Annotated[
        Path,
        typer.Argument(help="DIR/CLASS/FILE, or DIR/train/CLASS/FILE with val and test beside it."),
    ],
    out: Out,
    val: Val = 0.1,
    test: Test = 0.1,
    size: Annotated[int | None, typer.Option(min=1, help="Scale pictures to SIZE x SIZE.")] = None,
    gray: Annotated[bool, typer.Option("--gray", help="Make pictures gray: one channel.")] = False,
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of a directory with one subdirectory per class."""
    from ..data.authoring.folder import from_folder

    fractions = {"val": val, "test": test}
    samples = from_folder(directory, out, fractions, size, gray, seed, samples_per_shard, overwrite)
    _print_samples(out, samples)


def arrays(
    files: Annotated[
        list[Path],
        typer.Argument(help="One npz (x, y or x_train, y_train, ...), or idx or npy files."),
    ],
    out: Out,
    val: Val = 0.1,
    test: Test = 0.1,
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of arrays of inputs and labels."""
    from ..data.authoring.arrays import from_arrays

    fractions = {"val": val, "test": test}
    samples = from_arrays(files, out, fractions, seed, samples_per_shard, overwrite)
    _print_samples(out, samples)


def table(
    file: Annotated[Path, typer.Argument(help="A csv or csv.gz with a header.")],
    out: Out,
    text: Annotated[str, typer.Option(help="Column with the input text.")],
    label: Annotated[str, typer.Option(help="Column with the class.")],
    encoding: Annotated[str, typer.Option(help="The file's encoding, e.g. cp1252.")] = "utf-8-sig",
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave out the rows of this class; may be repeated.")
    ] = None,
    val: Val = 0.1,
    test: Test = 0.1,
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of the texts in a csv table."""
    from ..data.authoring.arrays import from_table

    samples = from_table(
        file,
        out,
        text,
        label,
        {"val": val, "test": test},
        seed,
        encoding,
        drop or (),
        samples_per_shard,
        overwrite,
    )
    _print_samples(out, samples)


def from_webdataset(
    urls: Annotated[
        str, typer.Argument(help="Tars, URLs, braces, several joined by ::, as for webdataset.")
    ],
    out: Out,
    split: Annotated[str, typer.Option(help="The split that they become.")] = "train",
    label: Label = "cls",
    input: Annotated[str, typer.Option(help="Member to keep as the input.")] = "",
    classes: Classes = None,
    damage: Annotated[
        str, typer.Option(help="strict: stop at a corrupt sample; skip: leave it out and name it.")
    ] = "strict",
    fetch_dir: FetchDir = "",
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite any webdataset as shards with a manifest."""
    from ..data.authoring import indexing

    if damage not in ("strict", "skip"):
        raise UserError(f"--damage {damage}: strict or skip")
    written, lost = indexing.from_webdataset(
        urls,
        out,
        split,
        label,
        input,
        _read_class_names(classes),
        cast(Literal["strict", "skip"], damage),
        Data(fetch_dir=fetch_dir),
        samples_per_shard,
        overwrite,
    )
    _print_samples(out, {split: written})
    for reason in lost:
        print(f"left out: {reason}", file=sys.stderr)


def index(
    place: Annotated[
        str, typer.Argument(help="Directory of SPLIT-NUMBER.tar, or URLs of such files.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the manifest, if the shards are URLs.")
    ] = None,
    label: Label = "cls",
    classes: Classes = None,
    fetch_dir: FetchDir = "",
) -> None:
    """Give existing shards a manifest."""
    from ..data.authoring.indexing import index_directory, index_urls
    from ..data.patterns import URL

    class_names = _read_class_names(classes)
    if not place.startswith(URL):
        if out is not None:
            raise UserError("--out is for URLs: the manifest of a directory of shards lies in it")
        _print_samples(Path(place), index_directory(place, label, class_names))
        return
    if out is None:
        raise UserError(
            f"{place}: nothing can be written there; say with --out where its manifest shall lie"
        )
    samples = index_urls(place, out, Data(label=label, fetch_dir=fetch_dir), class_names)
    _print_samples(out, samples)


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
    """Check every file in the shards; exit code 1 if one is corrupt, with a list."""
    from ..data.authoring.indexing import validate as validate_shards

    decoders: dict[str, str] = {}
    for item in decoder or []:
        extension, _, function = item.partition("=")
        decoders[extension] = function
    data = Data(label=label, input=input, decoders=decoders, fetch_dir=fetch_dir)
    findings: list[Finding] = []
    for name in _splits_to_validate(pattern, split):
        findings += validate_shards(pattern, data, name)
    _print_findings(findings)
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
    from rich.console import Console
    from rich.table import Table

    shown = Table("shard", "samples", "bytes", "corrupt")
    for finding in findings:
        number = str(len(finding.corruption) or "none")
        shown.add_row(finding.shard, str(finding.samples), str(finding.bytes), number)
    Console().print(shown)
    corrupt = [finding for finding in findings if finding.corruption]
    for finding in corrupt:
        for item in finding.corruption:
            print(item, file=sys.stderr)
    if corrupt:
        print(f"{len(corrupt)} of {len(findings)} shards are corrupt", file=sys.stderr)


def _read_class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read: {error}") from None
    if not names or len(set(names)) < len(names):
        raise UserError(f"--classes {path}: it needs one name per line, all different")
    return names


def _print_samples(out: Path, samples: dict[str, int]) -> None:
    counts = ", ".join(f"{count} {split}" for split, count in samples.items())
    print(f"{out}: {counts}")


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code.

    Raises UserError for the user's mistakes, unknown options too.
    """
    app = typer.Typer(
        help=__doc__,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    add_commands(app)
    command = typer.main.get_command(app)
    try:
        return int(command(argv, "referral shards", standalone_mode=False) or 0)
    except _usage_error() as error:
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
            return 2
        raise UserError(message) from None


def _usage_error() -> type[Exception]:
    """The base class of typer's usage errors, click's ClickException.

    typer carries its own copy of click from 0.26 on, so it is found from here.
    """
    for base in typer.BadParameter.__mro__:
        if base.__name__ == "ClickException":
            return cast(type[Exception], base)
    raise AssertionError("typer.BadParameter is no ClickException")
