"""`referral shards ...`: make, convert and check shards.  Exit codes: 0 done, 1 damage found, 2 the user's mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import Data, UserError

Out = Annotated[Path, typer.Option(help="directory to write the shards and manifest.json to")]
Val = Annotated[
    float, typer.Option(help="share of each class that becomes the val split, where there is none")
]
Test = Annotated[
    float, typer.Option(help="share of each class that becomes the test split, where there is none")
]
Seed = Annotated[int, typer.Option(min=0, help="of the division into splits")]
PerShard = Annotated[int, typer.Option(min=1, help="samples per shard")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", "--force", help="replace shards that are there")
]
Label = Annotated[str, typer.Option(help='member that holds the label, or "json:FIELD"')]
FetchDir = Annotated[
    str, typer.Option(help="where shards behind URLs are kept [~/.cache/referral/shards]")
]
Classes = Annotated[
    Path | None, typer.Option(help="text file with one class name per line, in order")
]


def add_commands(app: typer.Typer) -> None:
    """Add folder, arrays, table, from-webdataset, index, validate and glyphs to a typer application."""
    app.command("folder")(folder)
    app.command("arrays")(arrays)
    app.command("table")(table)
    app.command("from-webdataset")(from_webdataset)
    app.command("index")(index)
    app.command("validate")(validate)
    from ..data.authoring.glyph_command import add_glyphs_command

    add_glyphs_command(app)


def folder(
    directory: Annotated[
        Path, typer.Argument(help="DIR/CLASS/FILE, or DIR/train/CLASS/FILE and val, test beside it")
    ],
    out: Out,
    val: Val = 0.1,
    test: Test = 0.1,
    size: Annotated[int | None, typer.Option(min=1, help="scale pictures to SIZE x SIZE")] = None,
    gray: Annotated[bool, typer.Option("--gray", help="one channel")] = False,
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Shards from a directory per class."""
    from ..data.authoring.folder import from_folder

    options = {"samples_per_shard": samples_per_shard, "overwrite": overwrite}
    _say(out, from_folder(directory, out, {"val": val, "test": test}, size, gray, seed, **options))


def arrays(
    files: Annotated[
        list[Path],
        typer.Argument(help="one npz (x, y or x_train, y_train, ...), or idx / npy files"),
    ],
    out: Out,
    val: Val = 0.1,
    test: Test = 0.1,
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Shards from arrays of inputs and labels."""
    from ..data.authoring.arrays import from_arrays

    options = {"samples_per_shard": samples_per_shard, "overwrite": overwrite}
    _say(out, from_arrays(files, out, {"val": val, "test": test}, seed, **options))


def table(
    file: Annotated[Path, typer.Argument(help="csv or csv.gz with a header")],
    out: Out,
    text: Annotated[str, typer.Option(help="column with the input text")],
    label: Annotated[str, typer.Option(help="column with the class")],
    encoding: Annotated[str, typer.Option(help="of the file, e.g. cp1252")] = "utf-8-sig",
    drop: Annotated[
        list[str] | None, typer.Option(help="leave out the rows of this class; may be repeated")
    ] = None,
    val: Val = 0.1,
    test: Test = 0.1,
    seed: Seed = 0,
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Shards of texts from a csv table."""
    from ..data.authoring.arrays import from_table

    options = {"samples_per_shard": samples_per_shard, "overwrite": overwrite}
    _say(
        out,
        from_table(
            file,
            out,
            text,
            label,
            {"val": val, "test": test},
            seed,
            encoding,
            drop or (),
            **options,
        ),
    )


def from_webdataset(
    urls: Annotated[
        str, typer.Argument(help="what webdataset reads: tars, URLs, braces, several joined by ::")
    ],
    out: Out,
    split: Annotated[str, typer.Option(help="the split that they are")] = "train",
    label: Label = "cls",
    input: Annotated[str, typer.Option(help="member to keep as the input")] = "",
    classes: Classes = None,
    damage: Annotated[
        str, typer.Option(help="strict, or skip: leave out what is unreadable, and count it")
    ] = "strict",
    fetch_dir: FetchDir = "",
    samples_per_shard: PerShard = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite any webdataset as shards with a manifest."""
    from ..data.authoring import indexing

    if damage not in ("strict", "skip"):
        raise UserError(f"--damage {damage}: strict or skip")
    number, lost = indexing.from_webdataset(
        urls,
        out,
        split,
        label,
        input,
        _names(classes),
        damage,
        Data(fetch_dir=fetch_dir),
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    _say(out, {split: number})
    for reason in lost:
        print(f"left out: {reason}", file=sys.stderr)


def index(
    place: Annotated[str, typer.Argument(help="directory of SPLIT-NUMBER.tar, or URLs of such")],
    out: Annotated[
        Path | None, typer.Option(help="where the manifest of URLs is written to")
    ] = None,
    label: Label = "cls",
    classes: Classes = None,
    fetch_dir: FetchDir = "",
) -> None:
    """Give existing shards a manifest."""
    from ..data.authoring.indexing import index_directory, index_urls
    from ..data.patterns import URL

    if not place.startswith(URL):
        if out is not None:
            raise UserError("--out is for URLs: the manifest of a directory of shards lies in it")
        _say(Path(place), index_directory(place, label, _names(classes)))
        return
    if out is None:
        raise UserError(
            f"{place}: nothing can be written there; say with --out where its manifest shall lie"
        )
    _say(out, index_urls(place, out, Data(label=label, fetch_dir=fetch_dir), _names(classes)))


def validate(
    pattern: Annotated[str, typer.Argument(help="shards: a directory, or a pattern with braces")],
    split: Annotated[str, typer.Option(help="which split of a directory [all]")] = "",
    label: Label = "cls",
    input: Annotated[str, typer.Option(help="member that holds the input")] = "",
    decoder: Annotated[
        list[str] | None, typer.Option(help="EXTENSION=module:function, as in data.decoders")
    ] = None,
    fetch_dir: FetchDir = "",
) -> None:
    """Check every member; exit code 1 with the list of damaged shards."""
    from rich.console import Console
    from rich.table import Table

    from ..data.authoring.indexing import validate as check
    from ..data.writing import read_manifest

    decoders = dict(item.partition("=")[::2] for item in decoder or [])
    data = Data(label=label, input=input, decoders=decoders, fetch_dir=fetch_dir)
    manifest = read_manifest(pattern) if Path(pattern).is_dir() and not split else None
    findings = [
        finding
        for name in (manifest["splits"] if manifest else [split or "*"])
        for finding in check(pattern, data, name)
    ]
    shown = Table("shard", "samples", "bytes", "damage")
    for finding in findings:
        shown.add_row(
            finding.shard,
            str(finding.samples),
            str(finding.bytes),
            str(len(finding.damage) or "none"),
        )
    Console().print(shown)
    damaged = [finding for finding in findings if finding.damage]
    for finding in damaged:
        for item in finding.damage:
            print(item, file=sys.stderr)
    if damaged:
        print(f"{len(damaged)} of {len(findings)} shards are damaged", file=sys.stderr)
        raise typer.Exit(1)


def _names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as mistake:
        raise UserError(f"--classes {path}: cannot be read: {mistake}") from None
    if not names or len(set(names)) < len(names):
        raise UserError(f"--classes {path}: it needs one name per line, all different")
    return names


def _say(out: Path, samples: dict[str, int]) -> None:
    print(f"{out}: {', '.join(f'{count} {split}' for split, count in samples.items())}")


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code.  Raises UserError for the user's mistakes, unknown options too."""
    app = typer.Typer(
        help=__doc__,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    add_commands(app)
    # typer carries its own copy of click from 0.26 on, so its base class of usage mistakes is found from here.
    mistakes = next(
        base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
    )
    try:
        return int(typer.main.get_command(app)(argv, "referral shards", standalone_mode=False) or 0)
    except mistakes as mistake:
        if type(mistake).__name__ == "NoArgsIsHelpError":
            print(mistake.format_message())
            return 2
        raise UserError(mistake.format_message()) from None
