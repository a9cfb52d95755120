"""Data that are no shards yet: which `referral shards` command makes shards of them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from networks.pictures import PictureRules, Source, picture_shape
from pipeline.config import Data, UserError

from ..data.authoring.foreign_files import conversion, refuse_foreign
from ..data.authoring.indexing import expand_locations, unpacked_tar
from ..data.authoring.members import first_sample, proposed_label, some_pictures
from ..data.authoring.picture_sizes import suggested_size
from ..data.authoring.split_names import split_called, split_within
from ..data.authoring.tables import TABLES
from ..data.choices import DECODERS, PICTURES
from ..data.patterns import URL

ARRAYS = (".npz", ".npy", "-ubyte", "-ubyte.gz", ".idx", ".idx.gz")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PARQUET = (".parquet",)
SIDECARS = (
    "manifest.json",
    "dataset_info.json",
    "dataset_infos.json",
    "info.json",
    "metadata.json",
    "package.json",
)


def shards_command(place: str, out: str) -> list[str]:
    """The words behind `referral shards` that make shards of raw data in the directory `out`.

    place: a directory, a file, or a pattern of tars.
    Raises UserError for what is not there or no data of a known kind, with what may help.
    """
    if place.startswith(URL) or "{" in place or "*" in place or "::" in place:
        return _of_tars(place, out)
    path = Path(place)
    if path.is_dir():
        return _of_directory(path, out)
    if not path.exists():
        raise UserError(f"{place}: no such file or directory")
    return _of_files([path], path, out)


def written(command: Sequence[str]) -> str:
    """The command as a shell reads it."""
    return f"referral shards {shlex.join(command)}"


def _of_directory(directory: Path, out: str) -> list[str]:
    """A directory of classes where directories in it hold inputs, else files of one kind."""
    if (directory / "graph.json").exists() and (directory / "config.toml").exists():
        raise UserError(f"{directory} is a run; its data are what its config.toml names")
    children = [path for path in sorted(directory.iterdir()) if _visible(path)]
    files = [path for path in children if path.is_file()]
    directories = [path for path in children if path.is_dir()]
    chosen = [path for path in files if _kind(path)]
    if _are_classes(directories):
        return ["folder", str(directory), "--out", out, *_picture_options(directory)]
    if chosen:
        return _of_files(chosen, directory, out)
    below = [path for child in directories for path in sorted(child.iterdir()) if _kind(path)]
    if below:
        return _of_files_below(below, directory, out)
    if directories:
        return ["folder", str(directory), "--out", out]
    there = ", ".join(_counted(path.suffix or path.name for path in files)) or "nothing"
    raise UserError(
        f"{directory} holds {there}: shards, a directory per class, npz, npy, idx, csv, parquet or "
        "tar files are needed"
    )


def _are_classes(directories: Sequence[Path]) -> bool:
    """Whether they are classes, or splits of classes: one holds pictures, or two other inputs."""
    if any(map(_is_picture, (path for child in directories for path in child.rglob("*")))):
        return True
    holding = [child for child in directories if any(map(_is_input, child.rglob("*")))]
    return len(holding) > 1


def _is_input(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in DECODERS and path.is_file() and _visible(path)


def _of_files_below(files: Sequence[Path], directory: Path, out: str) -> list[str]:
    """Files in the directory's own directories: tars belong together, others are to be named."""
    if {_kind(path) for path in files} == {"tars"}:
        return _of_tars(str(directory), out)
    if {_kind(path) for path in files} == {"parquet"}:
        return ["parquet", str(directory), "--out", out]
    refuse_foreign(files[0])
    command = shlex.join(["referral", "init", str(files[0].parent)])
    raise UserError(f"{directory} holds no data itself; name the directory that does: {command}")


def _of_files(files: Sequence[Path], place: Path, out: str) -> list[str]:
    """Files of one kind: of those in a directory, all that belong together."""
    kinds = {_kind(path) for path in files}
    if len(kinds) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(
            f"{place} holds files of several kinds ({names}); name the one to learn from"
        )
    (kind,) = kinds
    if kind == "table":
        return _of_tables(files, place, out)
    if kind == "arrays":
        return ["arrays", *map(str, _with_siblings(files)), "--out", out]
    if kind == "tars":
        return _of_tars(str(place), out)
    if kind == "parquet":
        return ["parquet", str(place), "--out", out]
    refuse_foreign(files[0])
    raise UserError(
        f"{files[0]}: such files are not read; data are npz, npy, idx, csv, parquet or tar files, "
        "or a directory with one directory per class"
    )


def _kind(path: Path) -> str:
    """table, arrays, tars, parquet, foreign (what can be converted), or "" of what is no data."""
    name = path.name.lower()
    kinds = {"table": TABLES, "arrays": ARRAYS, "tars": TARS, "parquet": PARQUET}
    for kind, ends in kinds.items():
        if name.endswith(ends):
            return kind
    return "foreign" if conversion(path) and name not in SIDECARS else ""


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__"))


def _counted(words: Iterable[str]) -> list[str]:
    counts = Counter(words)
    return [f"{count} {word}" for word, count in counts.most_common(4)]


# Tables and arrays


def _of_tables(files: Sequence[Path], place: Path, out: str) -> list[str]:
    """One csv, or those of the splits: train.csv with val.csv and test.csv."""
    if len(files) == 1:
        return ["table", str(files[0]), "--out", out]
    by_split: dict[str, Path] = {}
    for path in files:
        stem = path.name.split(".")[0]
        split = split_called(stem) or split_within(stem)
        if split is None or split in by_split:
            by_split.clear()
            break
        by_split[split] = path
    if "train" not in by_split:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(
            f"{place} holds several tables ({names}); name one, or call them train.csv, val.csv "
            "and test.csv"
        )
    words = ["table", str(by_split.pop("train")), "--out", out]
    for split, path in by_split.items():
        words += [f"--{split}", str(path)]
    return words


def _with_siblings(files: Sequence[Path]) -> list[Path]:
    """An idx or npy file holds inputs or labels alone: with the others of its directory."""
    if len(files) > 1 or files[0].name.lower().endswith(".npz"):
        return list(files)
    suffix = files[0].name.lower().removesuffix(".gz").rpartition(".")[2][-6:]
    others = [path for path in sorted(files[0].parent.iterdir()) if path.is_file()]
    return [
        path
        for path in others
        if _kind(path) == "arrays" and path.name.lower().removesuffix(".gz").endswith(suffix)
    ]


# Pictures


def _picture_options(directory: Path) -> list[str]:
    """--size where pictures differ in size or colour, --gray where none has colour."""
    pictures = (path for path in sorted(directory.rglob("*")) if _is_picture(path))
    return options_for(shape_of(path) for path in pictures)


def shape_of(picture: Source) -> tuple[int, ...]:
    """[C, H, W] as it is read. () where it cannot be: the `shards` command names it."""
    try:
        return picture_shape(picture, PictureRules())
    except ValueError:
        return ()


def options_for(shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Options of the command line for pictures of these shapes."""
    counts = Counter(shape for shape in shapes if shape)
    if len(counts) < 2:
        return []
    sizes: Counter[tuple[int, int]] = Counter()
    for (_, height, width), count in counts.items():
        sizes[width, height] += count
    is_gray = all(shape[0] == 1 for shape in counts)
    return ["--size", str(suggested_size(sizes)), *(["--gray"] if is_gray else [])]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in PICTURES and _visible(path)


# Tars


def _of_tars(pattern: str, out: str) -> list[str]:
    """`shards from-webdataset`, with the member or field that holds the label."""
    words = ["from-webdataset", pattern, "--out", out]
    if not Path(pattern).is_dir():
        words += ["--val", "0.1", "--test", "0.1"]
    if pattern.startswith(URL):
        return words
    return words + _options_of_tars(expand_locations(pattern))


def _options_of_tars(tars: Sequence[str]) -> list[str]:
    """--label, by the first sample, and --size, by the first pictures of each tar."""
    shapes: list[tuple[int, ...]] = []
    label = ""
    for tar in tars:
        with unpacked_tar(tar, Data()) as (path, _):
            label = label or proposed_label(first_sample(path))
            shapes += map(shape_of, some_pictures(path))
    options = options_for(shapes)
    return [*options, "--label", label] if label not in ("", "cls") else options
