"""What a command that makes shards took, passed over and left out, and its summary."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from pipeline.config import Data, UserError
from pipeline.redaction import printable, shown

from ..label_files import class_counts
from ..writing import read_manifest

SHOWN = 20  # corrupt inputs that are listed
EXAMPLES = 3


@dataclass
class Report:
    """What became of a command's inputs.

    skip:        --damage skip: corrupt inputs are left out, not refused.
    samples:     {split: number of samples written}.
    notes:       what was decided about the whole set, a line each.
    passed_over: {why: names of files, columns or arrays that are no samples}.
    corrupt:     inputs that should be samples and cannot be, a line each.
    changes:     {what the rules of pictures changed: number of pictures}.
    """

    skip: bool = False
    samples: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    corrupt: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)

    def pass_over(self, why: str, name: str | Path) -> None:
        """Note that something is no sample, and why."""
        self.passed_over.setdefault(why, []).append(str(name))

    def use(self, why: str, name: str) -> None:
        """Take back that something was passed over."""
        self.passed_over[why].remove(name)
        if not self.passed_over[why]:
            del self.passed_over[why]

    def note(self, lines: str | Iterable[str]) -> None:
        """Add lines to the notes, each once."""
        for line in [lines] if isinstance(lines, str) else lines:
            if line not in self.notes:
                self.notes.append(line)

    def refuse_corrupt(self, remedy: str = "") -> None:
        """List corrupt inputs and raise UserError, but not under --damage skip.

        remedy: what else may help.
        """
        if self.skip or not self.corrupt:
            return
        count = len(self.corrupt)
        remedy = f", {remedy}" if remedy else ""
        if count == 1:
            raise UserError(f"{_line(self.corrupt[0])}; --damage skip leaves it out{remedy}")
        list_corrupt("corrupt", self.corrupt)
        raise UserError(
            f"{_line(self.corrupt[0])} (and {count - 1} more); "
            f"--damage skip leaves all {count} out{remedy}"
        )


def list_corrupt(title: str, lines: Sequence[str]) -> None:
    """The first lines on stderr, and how many there are."""
    for line in lines[:SHOWN]:
        say(f"{title}: {_line(line)}", sys.stderr)
    if len(lines) > SHOWN:
        say(f"{title}: {len(lines)} in all; {len(lines) - SHOWN} are not shown", sys.stderr)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line. What the terminal's encoding lacks, or would obey, is escaped."""
    if file is None:
        file = sys.stdout
    assert file is not None
    encoding = file.encoding or "utf-8"
    line = shown(line)
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _line(text: str) -> str:
    return printable(text.replace("\n", " "))


def print_summary(out: str | Path, report: Report, data: Data | None = None) -> None:
    """What a command made of its inputs. The end of every `shards` command.

    data: how the shards are read, to say what an input is.
    """
    counts = ", ".join(f"{count} {split}" for split, count in report.samples.items())
    say(f"{printable(str(out))}: {counts}")
    manifest = read_manifest(out)
    if manifest:
        print_classes(out, manifest)
        inputs = _inputs(out, manifest, data or Data())
        if inputs:
            say(f"  inputs: {inputs}")
    for why, names in report.passed_over.items():
        say(f"  passed over: {len(names)} {why} ({_examples(names)})")
    for change, count in report.changes.most_common():
        say(f"  pictures {change}: {count}")
    for note in report.notes:
        say(f"  note: {printable(note)}")
    if manifest:
        print_repeats(out, manifest, data)
    if report.corrupt:
        say(f"  left out: {len(report.corrupt)} corrupt")
        list_corrupt("left out", report.corrupt)


def print_classes(out: str | Path, manifest: dict) -> None:
    """The classes of the manifest in the directory `out`, and how many examples they have."""
    for line in _class_lines(out, manifest):
        say(f"  {line}")


def print_repeats(out: str | Path, manifest: dict, data: Data | None = None) -> None:
    """Inputs of val and test that train holds, and inputs of train with several labels."""
    from .repeats import repeat_lines

    for line in repeat_lines(out, manifest, data or Data()):
        say(f"  {printable(line)}")


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:EXAMPLES])
    return f"{shown}, ..." if len(names) > EXAMPLES else shown


def _class_lines(out: str | Path, manifest: dict) -> list[str]:
    """Number, names and sizes of the classes, and which are missing where."""
    names = manifest["classes"]
    counts = {split: class_counts(out, manifest, split) for split in manifest["splits"]}
    lines = [f"classes: {len(names)} ({_examples(names)})"]
    first = "train" if "train" in counts else next(iter(counts))
    present = np.flatnonzero(counts[first])
    if len(present):
        sizes = counts[first][present]
        largest, smallest = present[sizes.argmax()], present[sizes.argmin()]
        line = f"examples per class in {first}: {sizes.min()}"
        if sizes.min() < sizes.max():
            line += f" ({printable(names[smallest])}) to {sizes.max()}"
            line += f" ({printable(names[largest])})"
        lines.append(line)
    for split, of_split in counts.items():
        missing = [names[c] for c in np.flatnonzero(of_split == 0)]
        if missing:
            lines.append(
                f"missing from {split}: {len(missing)} of {len(names)} classes "
                f"({_examples(missing)})"
            )
    return lines


def _inputs(out: str | Path, manifest: dict, data: Data) -> str:
    """What one input is: kind of file, type and shape. "" where the shards lie elsewhere."""
    from ..shards import open_shards

    split = "train" if "train" in manifest["splits"] else next(iter(manifest["splits"]))
    names = [shard["name"] for shard in manifest["splits"][split]["shards"]]
    if not all((Path(out) / name).exists() for name in names):
        return ""
    try:
        shards = open_shards(str(out), data, split)
        kind = ", ".join(shards.input_extensions)
        if kind == "txt":
            return "txt, texts of any length"
        return f"{kind}, {shards.input_dtype} {list(shards.input_shape)}"
    except UserError as error:
        return f"not read: {error}"


def not_finite(array: np.ndarray) -> str:
    """Why an input cannot be learned from: NaN, infinity, or beyond float32. "" where it can."""
    if array.dtype.kind != "f":
        return ""
    with np.errstate(over="ignore"):
        computed = np.isfinite(array.astype(np.float32))  # what networks compute in
    if computed.all():
        return ""
    place = np.argwhere(~computed)[0].tolist()
    if np.isfinite(array).all():
        return f"holds numbers beyond float32 (first at {place}); scale them"
    return f"holds NaN or infinity (first at {place})"
