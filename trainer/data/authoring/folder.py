"""Shards from a directory with one subdirectory per class."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from networks.pictures import PictureRules, encode_png, examine_picture, picture_shape
from pipeline.config import UserError

from ..choices import DECODERS, PICTURES
from ..decoding import Decoder, built_in
from ..labels import LabelSet, is_utf8, printable, settle
from ..opening import is_the_machines
from .picture_sizes import suggested_size
from .reporting import Report
from .split_names import split_called
from .splitting import add_missing_splits, write_splits

# What unpacking and synchronising programs leave beside the data.
FOREIGN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
LINKS_OUT = "links out of the directory (--follow-links takes them)"


def from_folder(
    directory: str | Path,
    out: str | Path,
    fractions: Mapping[str, float],
    rules: PictureRules | None = None,
    seed: int = 0,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    report: Report | None = None,
    input_extensions: str = "",
    find_splits: bool = True,
    follow_links: bool = False,
) -> Report:
    """DIRECTORY/CLASS/FILE, or DIRECTORY/SPLIT/CLASS/FILE, into shards.

    Parameters
    ----------
    directory, out : path
    fractions : {split: fraction}
        Of each class for val and test, taken from train where the directory has no such split.
    rules : PictureRules, optional
        Of pictures.  With a size, all are brought to it, and to RGB unless channels is 1. Without
        one they must agree in size, and in having colour unless channels says it.  Those that need
        no change are kept as they are, byte for byte, others as PNG.
    seed : int
        Of the division into splits.
    samples_per_shard : int
    overwrite : bool
    report : Report, optional
        Its `skip` says whether corrupt files are left out. It lists them, and what is passed over.
    input_extensions : str
        Of the files that are inputs, joined by commas. By default pictures where there are any.
    find_splits : bool
        Whether directories called train, val, test and alike are splits.
    follow_links : bool
        Take links that lead out of the directory, too.  Otherwise they are passed over and counted.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        For a layout that cannot be told, and for files that cannot be decoded and are not to be
        skipped. Then nothing is written.
    """
    directory = Path(directory)
    report = report or Report()
    inside = _Inside(directory, follow_links, report)
    roots = _split_roots(directory, inside, report) if find_splits else {}
    listing = _list_files(roots or {"train": directory}, inside, report)
    _keep_inputs(listing, input_extensions, report)
    label_set = _settle_classes(directory, inside, listing, report)
    files = [file for file, _, _ in listing.files]
    labels = label_set.indices([name for _, name, _ in listing.files])
    splits = {
        split: np.flatnonzero([other == split for _, _, other in listing.files])
        for split in roots or ("train",)
    }
    splits = add_missing_splits(splits, labels, fractions, seed)
    command = ["referral", "shards", "folder", str(directory), "--out", str(out)]
    rules, shape = _settle_pictures(files, rules or PictureRules(), shlex.join(command))
    decoders = built_in()

    def sample(index: int) -> dict:
        extension, content = _encoded(files[index], rules, shape, decoders, report)
        return {extension: content, "cls": b"%d" % labels[index]}

    made_by = {"command": "shards folder", "directory": str(directory.resolve()), "seed": seed}
    write_splits(
        out,
        label_set.names,
        splits,
        sample,
        made_by,
        samples_per_shard,
        overwrite,
        report,
        rules if shape else None,
    )
    return report


def labelled_files(
    directory: str | Path, report: Report, input_extensions: str = "", follow_links: bool = False
) -> dict[str, list[tuple[Path, str]]]:
    """{split: (file, the name of its class directory)}, for data that only get predicted.

    A directory without splits is one split called "".  It may hold a single class.  follow_links:
    as in from_folder.

    Raises UserError for a directory without class directories, and where it cannot be told which
    files are inputs.
    """
    directory = Path(directory)
    inside = _Inside(directory, follow_links, report)
    children = inside.directories(directory)
    if not children:
        raise UserError(
            f"{directory} holds no class directory: put the files of a class in its own"
        )
    roots = {split_called(child.name) or "": child for child in children}
    is_split = "" not in roots and all(map(inside.directories, roots.values()))
    if not is_split or len(roots) < len(children):
        roots = {"": directory}
    listing = _list_files(roots, inside, report)
    _keep_inputs(listing, input_extensions, report)
    files: dict[str, list[tuple[Path, str]]] = {split: [] for split in roots}
    for file, name, split in listing.files:
        files[split].append((file, name))
    return files


# Splits and classes


def _split_roots(directory: Path, inside: _Inside, report: Report) -> dict[str, Path]:
    """{split: the directory of its class directories}. Empty where the directory has no splits.

    Raises UserError for a mix of splits and other directories, which could mean either.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    children = inside.directories(directory)
    split_of = {child: split_called(child.name) for child in children}
    splits = [child for child in children if split_of[child]]
    others = [child for child in children if not split_of[child]]
    if not splits:
        _refuse_splits_within(directory, children, inside)
        return {}
    if others:
        raise UserError(
            f"{directory} holds both splits ({_names(splits)}) and other directories "
            f"({_names(others)}): move the others away, or the classes into train/; "
            "--no-splits takes every directory for a class"
        )
    roots: dict[str, Path] = {}
    for child in splits:
        split = split_of[child]
        assert split is not None
        if split in roots:
            raise UserError(
                f"{child} and {roots[split]} are both the split {split}; put them together"
            )
        roots[split] = child
    if "train" not in roots:
        raise UserError(
            f"{directory} has the splits {_names(splits)} and no train; "
            "--no-splits takes every directory for a class"
        )
    for root in roots.values():
        if not inside.directories(root):
            raise UserError(
                f"{root} holds {sum(1 for _ in root.iterdir())} files and no class directory: a "
                "split needs one directory per class; move it away if it has no labels"
            )
    _look_beside(directory, report)
    report.note(f"{root.name}/ is the split {split}" for split, root in roots.items())
    return {split: roots[split] for split in ("train", "val", "test") if split in roots}


def _refuse_splits_within(directory: Path, classes: list[Path], inside: _Inside) -> None:
    """Raises UserError where class directories hold the splits: all would be one split."""
    for child in classes:
        splits = [path for path in inside.directories(child) if split_called(path.name)]
        if len({split_called(path.name) for path in splits}) > 1:
            raise UserError(
                f"{child} holds splits ({_names(splits)}), which belong in front of the classes: "
                f"{directory / splits[0].name / child.name}; --no-splits takes all its files for "
                "one split"
            )


def _names(directories: list[Path]) -> str:
    shown = ", ".join(printable(child.name) for child in directories[:3])
    return f"{shown}, ..." if len(directories) > 3 else shown


def lies_outside(path: Path, root: str) -> bool:
    """Whether a path, its links followed, is none below the real path `root`."""
    return os.path.commonpath([root, os.path.realpath(path)]) != root


def leads_out(path: Path, root: str) -> bool:
    """Whether a path below the directory `root` is a link to something that is not below it.

    root: as in os.path.realpath.
    """
    return path.is_symlink() and lies_outside(path, root)


class _Inside:
    """What lies in a directory: a link out of it is none of its files.

    Whoever filled the directory would otherwise choose which other files become samples.
    """

    def __init__(self, directory: Path, follow_links: bool, report: Report):
        self.root = os.path.realpath(directory)
        self.follow_links = follow_links
        self.report = report
        self.passed_over_links: set[Path] = set()

    def holds(self, path: Path) -> bool:
        """Whether a file or directory counts. The report counts those that do not, each once."""
        if self.follow_links or not leads_out(path, self.root):
            return True
        if path not in self.passed_over_links:
            self.passed_over_links.add(path)
            self.report.pass_over(LINKS_OUT, path)
        return False

    def directories(self, root: Path) -> list[Path]:
        """Visible directories in the order of their names, but for those that programs leave."""
        children = [child for child in root.iterdir() if child.is_dir()]
        visible = [child for child in children if not child.name.startswith(".")]
        own = [child for child in visible if child.name not in FOREIGN]
        return sorted(filter(self.holds, own))


def _settle_classes(
    directory: Path, inside: _Inside, listing: _Listing, report: Report
) -> LabelSet:
    """The classes of all class directories."""
    label_set = settle(listing.classes)
    report.note(label_set.notes)
    count = len(label_set.names)
    if count < 2:
        children = inside.directories(directory)
        nested = [child for child in children if inside.directories(child)]
        hint = f"; is it {nested[0]}?" if nested else ""
        left_out = len(inside.passed_over_links)
        if left_out and not nested:
            hint = f"; {left_out} links lead out of it: --follow-links takes them"
        raise UserError(
            f"{directory} has {count} class directories; "
            f"it needs one directory per class, at least 2{hint}"
        )
    return label_set


# Files


@dataclass
class _Listing:
    """files: (file, the class directory's name, split).  classes: all class directories' names."""

    files: list[tuple[Path, str, str]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def _list_files(roots: Mapping[str, Path], inside: _Inside, report: Report) -> _Listing:
    """The files of known kinds in each split's class directories."""
    listing = _Listing()
    for split, root in roots.items():
        if not root.is_dir():
            raise UserError(f"{root} is not a directory")
        _look_beside(root, report)
        for child in inside.directories(root):
            if not is_utf8(child.name):
                raise UserError(
                    f"{printable(str(child))}: the class directory's name is not UTF-8 "
                    f"({ascii(os.fsencode(child.name))[1:]}); rename it, e.g. with "
                    "`convmv -f cp1252 -t utf8 --notest`"
                )
            listing.classes.append(child.name)
            files = list(_known_files(child, inside, report))
            if not files and split == "train":
                raise UserError(
                    f"{child} holds no file of a known kind ({', '.join(sorted(DECODERS))})"
                )
            listing.files += [(file, child.name, split) for file in files]
            _note_nested(child, inside, report)
    return listing


def _look_beside(root: Path, report: Report) -> None:
    for child in sorted(root.iterdir()):
        if child.is_symlink() and not child.exists():
            report.pass_over("links that lead nowhere", child)
        elif child.is_dir() and (child.name.startswith(".") or child.name in FOREIGN):
            report.pass_over("hidden or foreign directories", child)
        elif child.is_file():
            report.pass_over("files outside of class directories", child)


def _known_files(directory: Path, inside: _Inside, report: Report) -> Iterator[Path]:
    """The files that there is a decoder for. The report counts the others."""
    for file in sorted(directory.rglob("*")):
        if file.is_symlink() and not file.exists():
            report.pass_over("links that lead nowhere", file)
        elif file.is_symlink() and file.is_dir():
            report.pass_over("links to directories", file)
        elif not file.is_file() or not inside.holds(file):
            continue
        elif any(part.startswith(".") for part in file.relative_to(directory).parts):
            report.pass_over("hidden files", file)
        elif any(part in FOREIGN for part in file.relative_to(directory).parts):
            report.pass_over("files in foreign directories", file)
        elif _extension(file) in DECODERS:
            yield file
        else:
            extension = _extension(file)
            kind = f".{extension} files" if extension else "files without an extension"
            report.pass_over(kind, file)


def _note_nested(directory: Path, inside: _Inside, report: Report) -> None:
    nested = [child for child in inside.directories(directory) if not child.is_symlink()]
    if nested:
        report.note(
            f"{directory.name}/ has directories of its own ({_names(nested)}): "
            f"their files are of class {directory.name}"
        )


def _keep_inputs(listing: _Listing, chosen: str, report: Report) -> None:
    """Keep the files of one kind: those asked for, or pictures, beside which others are sidecars.

    Raises UserError where it cannot be told which files are inputs.
    """
    wanted = {word.strip().lower().lstrip(".") for word in chosen.split(",") if word.strip()}
    counts = Counter(_extension(file) for file, _, _ in listing.files)
    if wanted - counts.keys():
        raise UserError(
            f"--input {chosen}: there is no file .{min(wanted - counts.keys())}; "
            f"there are {_counted(counts)}"
        )
    if not wanted:
        wanted = _input_kind(listing, counts)
    kept = []
    for file, name, split in listing.files:
        if _extension(file) in wanted:
            kept.append((file, name, split))
        else:
            report.pass_over(f".{_extension(file)} files beside the inputs", file)
    listing.files = kept


def _input_kind(listing: _Listing, counts: Counter[str]) -> set[str]:
    """The extensions of inputs, where the user does not say."""
    pictures = counts.keys() & set(PICTURES)
    others = counts.keys() - pictures
    if not others or len(counts) == 1:
        return set(counts)
    with_pictures = {name for file, name, _ in listing.files if _extension(file) in PICTURES}
    all_have_some = with_pictures == {name for _, name, _ in listing.files}
    if pictures and all_have_some:
        return pictures
    raise UserError(
        f"files of several kinds could be inputs: {_counted(counts)}; "
        f"choose with --input {max(counts, key=counts.__getitem__)}"
    )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} .{extension}" for extension, count in counts.most_common())


def _extension(file: Path) -> str:
    if file.name.startswith("."):
        return ""
    return file.suffix.lower().removeprefix(".")


def _encoded(
    file: Path,
    rules: PictureRules,
    shape: tuple[int, ...] | None,
    decoders: dict[str, Decoder],
    report: Report,
) -> tuple[str, bytes]:
    """(extension, content) as the shard holds it.

    shape: [C, H, W] of every picture.  The report counts what is changed.
    """
    extension, content = _extension(file), file.read_bytes()
    if extension not in PICTURES:
        try:
            decoders[extension](content)
        except Exception as error:  # decoders raise what they like
            if is_the_machines(error):
                raise
            raise UserError(f"{file}: cannot be decoded: {error}") from None
        return extension, content
    return picture_entry(str(file), content, extension, rules, shape, report)


def picture_entry(
    name: str,
    content: bytes,
    extension: str,
    rules: PictureRules,
    shape: tuple[int, ...] | None,
    report: Report,
) -> tuple[str, bytes]:
    """(extension, content) of a picture as the shard holds it: as it is where nothing changes.

    name: for messages.  shape: [C, H, W] of every picture.  The report counts what is changed.
    """
    try:
        pixels, changes = examine_picture(content, rules)
    except ValueError as error:
        raise UserError(f"{name}: cannot be decoded: {error}") from None
    if pixels.shape != shape:
        expected = list(shape or ())
        raise UserError(
            f"{name} is {list(pixels.shape)}, others {expected}; --size N brings all to one"
        )
    report.changes.update(changes or ["kept as they are"])
    return ("png", encode_png(pixels)) if changes else (extension, content)


def _settle_pictures(
    files: list[Path], rules: PictureRules, command: str
) -> tuple[PictureRules, tuple[int, ...] | None]:
    """(the rules with their channels, [C, H, W] of every picture). (rules, None) of no pictures.

    Pictures that are not brought to a size must have one: a batch is one array.
    command: what was called, for the remedy.
    """
    pictures = [file for file in files if _extension(file) in PICTURES]
    if not pictures:
        return rules, None
    if rules.size:
        channels = rules.channels or 3
        return replace(rules, channels=channels), (channels, *rules.size)
    # [C, H, W] -> the first file like that
    seen: dict[tuple[int, ...], Path] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    for file in pictures:
        try:
            channels, height, width = picture_shape(file, rules)
        except ValueError:
            continue  # named among all corrupt files when it is to be written
        seen.setdefault((channels, height, width), file)
        sizes[width, height] += 1
    if len(seen) > 1:
        raise UserError(f"{_unlike(seen)}: {command} --size {suggested_size(sizes)}")
    shape = next(iter(seen), None)
    if shape is None:
        return rules, (rules.channels or 3, 1, 1)  # all are corrupt
    return replace(rules, channels=shape[0]), shape


def _unlike(seen: dict[tuple[int, ...], Path]) -> str:
    """The error about two pictures that cannot be in one batch."""
    (a, first), (b, second) = list(seen.items())[:2]
    if a[1:] != b[1:]:
        said = f"size ({a[2]}x{a[1]}, {b[2]}x{b[1]}); --size N brings all to one"
    else:
        kinds = ", ".join("gray" if shape[0] == 1 else "colour" for shape in (a, b))
        said = f"mode ({kinds}); --gray or --size N brings all to one"
    return f"{first} and {second} differ in {said}"
