"""Which classes a data set has, and which one each label means: settled once for the whole set.

The rule, for folders, tables, arrays and tars alike:

1. A label is a text: UTF-8, in Unicode's form NFC, without surrounding blanks and byte order mark.
   Labels that are one text then are one class.  An empty label is corrupt, and so is one that is
   not UTF-8.  Names that differ only in case, inner blanks or the writing of a number stay apart.
2. Labels are class indices where all of them are the numbers 0 .. C - 1, none absent, written
   without leading zeros, or where a manifest or a list of classes says so.  "1.0" counts as 1 where
   every label is written so.
3. Otherwise they are names.  Names that are all whole numbers are sorted as numbers, others as
   texts.  Ids with holes are such names, so there are never more classes than distinct labels.
4. With a list of classes, labels are names if all of them are in it, else indices if all of them
   are numbers below C.

What was changed or looks doubtful is said in notes, once for a whole set.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.config import UserError
from pipeline.redaction import INVISIBLE, JOINERS, printable

from .bounds import abbreviated

# What a set's labels are.  "earlier": a manifest does not say it.  Then they are indices, as every
# command but `index` writes them, or an earlier version indexed them.
Kind = Literal["indices", "names", "earlier"]

NONE = -1  # the index of a label that is no class
# Longer runs of digits are texts: nobody counts so far, and Python refuses to read 4,301 of them.
INTEGER = re.compile(r"0|[1-9][0-9]{0,30}")
DIGITS = re.compile(r"[0-9]{1,31}")
WHOLE = re.compile(r"(0|[1-9][0-9]{0,30})\.0+")
BOM = "\ufeff"
SHOWN = 3  # examples in a note
# What programs write where there is no label, in any case.
ABSENT = frozenset(("nan", "null", "none", "na", "n/a", "#n/a", "<na>", "nat", "undefined"))
JOINTS = ",;|/+&"  # between the labels of an example that has several
LISTED = re.compile(r"[\[({].*[,'\"].*[\])}]", re.DOTALL)


@dataclass
class LabelSet:
    """The classes of a data set, and how its labels are read.

    Attributes
    ----------
    names : list of C str
    kind : "indices" or "names"
        What the labels are.
    notes : list of str
        What a person should know about how they were settled, a line each.
    """

    names: list[str]
    kind: Kind
    notes: list[str] = field(default_factory=list)

    def indices(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n]: the class of each text. NONE where it is none."""
        if self.kind == "indices":
            found = [_number(text, len(self.names)) for text in texts]
        else:
            found = [_named(text, self._class_of) for text in texts]
        return np.array(found, np.int64)

    @cached_property
    def _class_of(self) -> dict[str, int]:
        return _class_table(self.names)

    def read(
        self, raw: Sequence[bytes], label: str, encoding: str = "utf-8"
    ) -> tuple[np.ndarray, dict[int, str]]:
        """(int64 [n], {number: reason}): the class of each raw label, and why it is NONE.

        label: the member that they were read from, "cls" or "json:FIELD".
        """
        texts, reasons = readings(raw, label, encoding)
        if self.kind == "earlier":
            quoted = [":" in label and content.startswith(b'"') for content in raw]
            classes = self._as_earlier(texts, quoted)
        else:
            classes = self.indices(texts)
        for number in np.flatnonzero(classes == NONE).tolist():
            what = f"has label {abbreviated(printable(texts[number]))}"
            reason = f"{what}, which is none of the {len(self.names)} classes"
            reasons.setdefault(number, reason)
        return classes, reasons

    def to_declare(self, raw: Iterable[bytes]) -> Kind | None:
        """What a shard's entry in the manifest must say of these raw labels.

        None where it is plain: a manifest that says nothing means indices.
        """
        if self.kind == "indices" and all(
            INTEGER.fullmatch(text.decode("latin-1")) for text in raw
        ):
            return None
        return self.kind

    def _as_earlier(self, texts: Sequence[str], quoted: Sequence[bool]) -> np.ndarray:
        """int64 [n]: classes by the rule of earlier versions, text by text.

        quoted: whether the label is a JSON string, which is a name.

        Raises UserError where that rule gave some labels another class than the one they name.
        """
        size = len(self.names)
        numbers = [_index(clean(text), size) for text in texts]
        if NONE not in numbers and not any(quoted):
            return np.array(numbers, np.int64)
        classes = np.full(len(texts), NONE, np.int64)
        by_name = False
        doubtful = ""
        for place, (text, index) in enumerate(zip(texts, numbers, strict=True)):
            named = _named(text, self._class_of)
            if quoted[place]:
                classes[place] = named
            elif index != NONE:
                classes[place] = index
                if named not in (NONE, index):
                    doubtful = text
            elif named != NONE:
                classes[place] = named
                by_name = True
            else:
                classes[place] = _number(text, size)
        if by_name and doubtful:
            raise UserError(
                f"label {printable(doubtful)} is both a class index and the name of another class, "
                "and the manifest does not say which is meant; make it anew with "
                "`referral shards index`"
            )
        return classes


# Texts


def label_text(raw: str | bytes, label: str = "cls", encoding: str = "utf-8") -> str:
    """The text of a raw label.

    Parameters
    ----------
    raw : bytes or str
        As a tar's index, an array or a table has it.
    label : str
        The member that it was read from.  Of "json:FIELD" it is JSON.
    encoding : str
        Of bytes.

    Raises
    ------
    ValueError
        With the reason: the label is not in its encoding, not a finite number, or empty.
    """
    if isinstance(raw, bytes):
        try:
            raw = raw.decode(encoding)
        except UnicodeDecodeError:
            name = encoding.upper()
            raise ValueError(f"has label {raw!r:.60}, which is not {name}") from None
    if ":" in label:
        value = json.loads(raw)
        if isinstance(value, float) and not np.isfinite(value):
            raise ValueError(f"has label {value}, which is no number")
        raw = value if isinstance(value, str) else str(value)
    if not is_utf8(raw):
        raise ValueError(
            f"has label {abbreviated(printable(raw))}, which cannot be written as UTF-8"
        )
    if not clean(raw):
        raise ValueError("has an empty label")
    return raw


def clean(text: str) -> str:
    """The name that a text stands for: NFC, without surrounding blanks and byte order mark."""
    return unicodedata.normalize("NFC", text.strip().lstrip(BOM).strip())


def is_utf8(text: str) -> bool:
    """Whether the text can be written: it holds no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in INVISIBLE and character not in JOINERS


def _as_integers(texts: Sequence[str]) -> Sequence[str]:
    """The texts. Where all of them are written as 1.0, 2.0, ..., without these zeros."""
    matches = [WHOLE.fullmatch(text.strip()) for text in texts]
    if texts and all(matches):
        return [match.group(1) for match in matches if match]
    return texts


def _number(text: str, num_classes: int) -> int:
    """The class of a text that is an index. NONE where it is none."""
    text = clean(text)
    whole = WHOLE.fullmatch(text)
    if whole:
        text = whole.group(1)
    if DIGITS.fullmatch(text) and int(text) < num_classes:
        return int(text)
    return NONE


def _named(text: str, class_of: Mapping[str, int]) -> int:
    """The class of a text that is a name. NONE where it is none."""
    name = clean(text)
    whole = WHOLE.fullmatch(name)
    for candidate in (text, name, whole.group(1) if whole else name):
        if candidate in class_of:
            return class_of[candidate]
    return NONE


def _class_table(names: Sequence[str]) -> dict[str, int]:
    """{name: class}. The names as they are, and where that leaves no doubt as in `clean`."""
    class_of = {name: number for number, name in enumerate(names)}
    for number, name in enumerate(names):
        class_of.setdefault(clean(name), number)
    return class_of


def readings(
    raw: Iterable[bytes | str], label: str = "cls", encoding: str = "utf-8"
) -> tuple[list[str], dict[int, str]]:
    """(texts, {number: why there is none}) of raw labels. An unreadable one has the text ""."""
    texts: list[str] = []
    reasons: dict[int, str] = {}
    for number, content in enumerate(raw):
        try:
            texts.append(label_text(content, label, encoding))
        except ValueError as reason:
            texts.append("")
            reasons[number] = str(reason)
    return texts, reasons


# Settling


def settle(texts: Iterable[str]) -> LabelSet:
    """The label set of a whole data set, from its labels alone.

    Parameters
    ----------
    texts : iterable of str
        Every label that occurs, as `label_text` gives it, in any order and any number of times.
    """
    distinct = list(dict.fromkeys(texts))
    integers = _as_integers(distinct)
    notes: list[str] = []
    if integers is not distinct:
        notes.append(f"labels like {distinct[0]} are taken as whole numbers")
    notes += _changed(integers)
    names = {clean(text) for text in integers}
    return _label_set(names, notes)


def settle_numbers(values: np.ndarray) -> tuple[LabelSet, np.ndarray]:
    """The label set of an array of numbers, and the class of each: int64 [n].

    NaN is an empty label: its class is NONE.

    Raises
    ------
    UserError
        For numbers that are not whole, are below 0, or too large for their type to hold exactly.
    """
    empty = np.zeros(len(values), bool)
    if values.dtype.kind == "f":
        empty = np.isnan(values)
        _check_whole(values[~empty])
    distinct, inverse = np.unique(values[~empty], return_inverse=True)
    if len(distinct) and distinct[0] < 0:
        raise UserError(
            f"label {int(distinct[0])} is below 0; leave such samples out, or give names: "
            "y.astype(str)"
        )
    integers = [int(value) for value in distinct]
    classes = np.full(len(values), NONE, np.int64)
    classes[~empty] = inverse.reshape(-1)
    return _label_set({str(number) for number in integers}, []), classes


def _check_whole(values: np.ndarray) -> None:
    if not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise UserError(f"labels of type {values.dtype} are neither whole numbers nor names")
    exact = 2 ** (np.finfo(values.dtype).nmant + 1)
    if len(values) and np.abs(values).max() > exact:
        raise UserError(
            f"label {int(np.abs(values).max())} of type {values.dtype} is not exact: above {exact} "
            "several ids are one number; keep ids as integers or texts"
        )


def settle_given(texts: Iterable[str], names: Sequence[str], kind: Kind | None = None) -> LabelSet:
    """How the labels of a whole data set are read with a given list of classes.

    kind: what they are, where that is known.

    Raises UserError where the labels fit neither way and could be read both ways.
    """
    distinct = list(dict.fromkeys(texts))
    if kind:
        return LabelSet(list(names), kind)
    class_of = _class_table(names)
    integers = _as_integers(distinct)
    named = {text: _named(text, class_of) for text in integers}
    numbered = {text: _index(clean(text), len(names)) for text in integers}
    if NONE not in named.values():
        return LabelSet(list(names), "names")
    if NONE not in numbered.values():
        return LabelSet(list(names), "indices")
    for text in integers:
        if NONE not in (named[text], numbered[text]) and named[text] != numbered[text]:
            other = next(text for text, number in named.items() if number == NONE)
            raise UserError(
                f"label {printable(text)} is the name of class {named[text]} and could be a class "
                f"index; label {printable(other)} is no name: give a list of classes that has all "
                f"labels, or labels that are all indices 0 .. {len(names) - 1}"
            )
    some_names = any(number != NONE for number in named.values())
    return LabelSet(list(names), "names" if some_names else "indices")


def _index(text: str, num_classes: int) -> int:
    """Like _number, for texts without leading zeros alone."""
    return _number(text, num_classes) if INTEGER.fullmatch(text) else NONE


def _label_set(names: set[str], notes: list[str]) -> LabelSet:
    ordered = sorted(names, key=_number_order if _all(DIGITS, names) else None)
    if not _all(INTEGER, names):
        return LabelSet(ordered, "names", notes + doubts(ordered))
    complete = bool(ordered) and int(ordered[-1]) == len(ordered) - 1
    if not complete and ordered:
        notes = [
            *notes,
            f"labels are numbers from {ordered[0]} to {ordered[-1]}, not 0 .. C - 1: "
            f"{len(ordered)} classes, named by their labels",
        ]
    return LabelSet(ordered, "indices" if complete else "names", notes)


def _all(pattern: re.Pattern, names: Iterable[str]) -> bool:
    return all(pattern.fullmatch(name) for name in names)


def _number_order(name: str) -> tuple[int, str]:
    return int(name), name


# Notes


def _changed(texts: Sequence[str]) -> list[str]:
    """What `clean` does to the texts: a line about those that become one, and about the others."""
    spellings: dict[str, list[str]] = {}
    for text in texts:
        spellings.setdefault(clean(text), []).append(text)
    rule = "Unicode form NFC, no surrounding blanks or byte order mark"
    notes: list[str] = []
    merged = [group for group in spellings.values() if len(group) > 1]
    if merged:
        shown = ", ".join(" = ".join(map(ascii, group[:SHOWN])) for group in merged[:SHOWN])
        notes.append(f"labels that are one text by the rule ({rule}) are one class: {shown}")
    alone = {name: group[0] for name, group in spellings.items() if len(group) == 1}
    changed = [text for name, text in alone.items() if text != name]
    if changed:
        shown = ", ".join(map(ascii, changed[:SHOWN]))
        notes.append(f"{len(changed)} class names were brought to the rule ({rule}): {shown}")
    return notes


def doubts(names: Sequence[str]) -> list[str]:
    """Lines about names that are easily mistaken, for each other or for something else."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_simplified(name), []).append(name)
    notes: list[str] = []
    groups = [group for group in alike.values() if len(group) > 1]
    if groups:
        shown = ", ".join(" and ".join(map(ascii, group[:SHOWN])) for group in groups[:SHOWN])
        notes.append(f"warning: class names that look alike stay apart: {shown}{_more(groups)}")
    absent = [name for name in names if name.casefold() in ABSENT or name == "-1"]
    if absent:
        shown = ", ".join(map(ascii, absent[:SHOWN]))
        notes.append(
            f"warning: class names usually stand for a label that is missing: {shown}"
            f"{_more(absent)}; leave their rows out if they do"
        )
    several = _joined(names)
    if several:
        shown = ", ".join(map(ascii, several[:SHOWN]))
        notes.append(
            f"warning: class names look like several labels of one example: {shown}"
            f"{_more(several)}; each is a class of its own here, as an example has one class"
        )
    hidden = [name for name in names if any(map(_is_invisible, name))]
    if hidden:
        shown = ", ".join(map(ascii, hidden[:SHOWN]))
        notes.append(
            f"warning: class names hold control or invisible characters: {shown}{_more(hidden)}"
        )
    return notes


def _joined(names: Sequence[str]) -> list[str]:
    """Names that are lists, or other names of the same set put together."""
    known = set(names)
    joined = []
    for name in names:
        parts = [part.strip() for mark in JOINTS if mark in name for part in name.split(mark)]
        if LISTED.fullmatch(name) or (parts and known.issuperset(parts)):
            joined.append(name)
    return joined


def _more(items: Sequence) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""


def _simplified(name: str) -> str:
    """One text for all names that look alike."""
    visible = "".join(c for c in name if c.isspace() or not _is_invisible(c))
    simple = " ".join(unicodedata.normalize("NFKC", visible).casefold().split())
    whole = WHOLE.fullmatch(simple)
    if whole:
        simple = whole.group(1)
    return str(int(simple)) if DIGITS.fullmatch(simple) else simple


# Given lists


def read_class_list(path: str | Path) -> list[str]:
    """The class names of a text file, one per line.

    Lines end at \\n or \\r\\n alone.  A byte order mark and empty lines at the end are no part of
    a name.

    Raises UserError if it cannot be read, or a name is empty or occurs twice.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--classes {path}: is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"--classes {path}: cannot be read: {error.strerror}") from None
    names = [clean(line) for line in text.split("\n")]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"--classes {path}: it is empty; it needs one name per line")
    line_of: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise UserError(f"--classes {path}: line {line} is empty; it needs one name per line")
        if name in line_of:
            raise UserError(
                f"--classes {path}: lines {line_of[name]} and {line} are both {name!r}; "
                "it needs one name per line, all different"
            )
        line_of[name] = line
    return names


def check_writable(names: Iterable[str], source: str | Path) -> None:
    """UserError for class names that are empty or cannot be written as UTF-8."""
    for name in names:
        if not is_utf8(name):
            raise UserError(
                f"{source}: class name {ascii(name)} cannot be written as UTF-8; rename it"
            )
