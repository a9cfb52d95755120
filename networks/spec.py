"""The contents of model.json: network, classes and inputs. Imports no torch."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from .choices import MARGINS
from .integrity import blamed_on, read_values
from .pictures import PictureRules
from .regular import parse
from .temporaries import appearing

SCHEMA = 1
MOST_NUMBERS = 2**28  # of one input
MOST_AXES = 16
MOST_MEMBERS = 2**12
MOST_CLASSES = 2**24  # names of more would take gigabytes
DTYPES = ("uint8", "float32", "int32")
HEAD_KINDS = ("linear", "dustbin", "branch")
BRANCH_SIZES = {"embedding": 1, "blocks": 0, "features": 1}  # and the least of each
DUSTBIN_ROWS = ("all", "kept", "fresh")
MEMBER_KEYS = {"heads": ("kind", "count", "blocks"), "batch": ("kind", "count")}
COSINE_KEYS = ("scale", "learned", "margin", "margin_kind")
REQUIRED_KEYS = ("builder", "num_classes", "input", "shape")


@dataclass(frozen=True)
class InputSpec:
    """One raw input, and the map to what the trunk reads: (raw * scale - mean) / std.

    Inputs of int32 are indices, say of n-grams: the trunk reads them as they are.

    Parameters
    ----------
    shape : tuple of int
        Of one example, [C, H, W] for images.
    dtype : str
        As decoded: "uint8", "float32" or "int32".
    scale : float, optional
        By default 1/255 for uint8 and 1 for the others.
    mean, std : tuple of float
        Of scaled inputs: one value, or one per entry of the first axis.
    pictures : PictureRules, optional
        How the training pictures became arrays. None if there were no pictures, or if it was not
        recorded.
    decoders : dict, optional
        {extension: name} of the decoders of other files: a key of networks.texts.TEXTS for txt, or
        the name of a user's own function, which is never imported from here.

    Raises
    ------
    ValueError
        For a value that cannot be, which it names.
    """

    shape: tuple[int, ...]
    dtype: str = "uint8"
    scale: float = cast(float, None)  # __post_init__ puts a number here
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    # Not compared: networks that read the same arrays may share layers however those were made.
    pictures: PictureRules | None = field(default=None, compare=False)
    decoders: dict[str, str] | None = field(default=None, compare=False)

    def __post_init__(self):
        put = object.__setattr__
        if isinstance(self.pictures, dict):
            put(self, "pictures", PictureRules.from_json(self.pictures))
        for name in ("shape", "mean", "std"):
            value = getattr(self, name)
            if not _is_numbers(value):
                raise ValueError(f"input.{name} = {value!r}: a list of numbers is needed")
        put(self, "shape", tuple(int(n) for n in self.shape))
        put(self, "mean", tuple(float(n) for n in self.mean))
        put(self, "std", tuple(float(n) for n in self.std))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"input.shape = {list(self.shape)}: every length must be at least 1")
        if len(self.shape) > MOST_AXES or math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(
                f"input.shape = {list(self.shape)[:MOST_AXES]}: one input of at most {MOST_AXES} "
                f"axes and {MOST_NUMBERS} numbers is read"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"input.dtype = {self.dtype!r}: must be {', '.join(DTYPES)}")
        default_scale = 1 / 255 if self.dtype == "uint8" else 1.0
        put(self, "scale", default_scale if self.scale is None else float(self.scale))
        for name in ("mean", "std"):
            length = len(getattr(self, name))
            if length not in (1, self.shape[0]):
                raise ValueError(
                    f"input.{name} has {length} values; "
                    f"1 or {self.shape[0]} (input.shape[0]) are needed"
                )
        if min(self.std) <= 0 or not all(map(math.isfinite, (*self.mean, *self.std, self.scale))):
            raise ValueError(
                f"input.std = {list(self.std)}: must be positive, and mean, std and scale finite"
            )
        if self.is_indices and (self.mean, self.std, self.scale) != ((0.0,), (1.0,), 1.0):
            raise ValueError(
                f"input.mean = {list(self.mean)}, std = {list(self.std)}, scale = {self.scale}: "
                "inputs of int32 are indices and are not scaled; leave them out"
            )
        if self.decoders is not None and not _is_names(self.decoders):
            raise ValueError(f"input.decoders = {self.decoders!r}: an object of names is needed")
        self._check_pictures()

    @property
    def is_indices(self) -> bool:
        """Whether the numbers of an input are looked up, not calculated with."""
        return self.dtype == "int32"

    def _check_pictures(self) -> None:
        """ValueError where the rules give arrays of another shape."""
        if self.pictures is None:
            return
        channels, size = self.pictures.channels, self.pictures.size
        fits = len(self.shape) == 3 and channels in (None, self.shape[0])
        if not fits or size not in (None, self.shape[1:]):
            raise ValueError(
                f"input.pictures = {self.pictures.as_json()} give other arrays than "
                f"input.shape = {list(self.shape)}"
            )

    def as_json(self) -> dict[str, Any]:
        """The keys of model.json's `input`. What is not set is left out, as older files have it."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.pictures is not None:
            values["pictures"] = self.pictures.as_json()
        return values


@dataclass(frozen=True)
class ModelSpec:
    """The contents of model.json, schema 1.

    Parameters
    ----------
    builder : str
        A built-in's name, `timm:NAME`, or a key of the `builders` that the caller passes.
        Never code.
    num_classes : int
        Of the whole label set, also for a specialist.
    input : InputSpec
        One raw input.
    options : dict
        Keyword arguments of the builder. An option that is None takes the builder's default.
    class_names : tuple of str
        Of the whole label set, also for a specialist.  By default "0", "1", .... The file of a
        specialist leaves them to its generalist, and then they are ().
    head : dict
        {"kind": "linear"}, or {"kind": "dustbin", "members": sorted class indices, "rows": rows}.
        The rows say what the dustbin is made of:

        "all"    a row for every class: the dustbin is the log-sum-exp of those outside
                 "members"
        "kept"   rows for the classes in the list "kept" and one row for all others
        "fresh"  one row

        Or {"kind": "branch", "members": ..., "embedding": E, "blocks": N, "features": D} of a
        specialist that corrects the generalist's logits: D numbers in, E between, N blocks of the
        trunk its own.
    members : dict, optional
        None for a plain network, or K members whose logits are [K, B, C]:

        {"kind": "heads", "count": K, "blocks": N}
            K heads on one body, each made of the last N blocks and a linear layer
        {"kind": "batch", "count": K}
            a BatchEnsemble: every layer has rank-one factors of each member
    cosine : dict, optional
        None, or {"scale": s, "learned": bool, "margin": m, "margin_kind": kind} of a network whose
        features have the norm s and whose rows learn with norm 1 (networks.cosine).  A scale that
        is learned starts at s.  The margin is of what learned its classes from labels. kind is a
        key of networks.choices.MARGINS.

    Raises
    ------
    ValueError
        For a value that cannot be, which it names.
    """

    builder: str
    num_classes: int
    input: InputSpec
    options: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "linear"})
    members: dict[str, Any] | None = None
    cosine: dict[str, Any] | None = None

    def __post_init__(self):
        put = object.__setattr__
        if isinstance(self.input, dict):
            put(self, "input", InputSpec(**_checked_keys(self.input, InputSpec, "input.")))
        if not isinstance(self.builder, str) or not self.builder:
            raise ValueError(f"builder = {self.builder!r}: a name is needed")
        if not isinstance(self.options, dict):
            raise ValueError(f"options = {self.options!r}: an object is needed")
        if not _is_int(self.num_classes) or not 1 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(
                f"num_classes = {self.num_classes!r}: must be a whole number from 1 to "
                f"{MOST_CLASSES}"
            )
        put(self, "options", {key: v for key, v in self.options.items() if v is not None})
        put(self, "head", _checked_head(self.head, self.num_classes))
        put(self, "class_names", self._checked_names())
        put(self, "members", _checked_members(self.members, self.head))
        put(self, "cosine", _checked_cosine(self.cosine))

    def _checked_names(self) -> tuple[str, ...]:
        if not self.class_names and self.is_specialist:
            return ()
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        if len(names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(names)} entries for num_classes = {self.num_classes}"
            )
        # One tuple serves all networks that share it: of many classes it is megabytes.
        if isinstance(names, tuple) and all(type(name) is str for name in names):
            return names
        return tuple(map(str, names))

    @property
    def is_specialist(self) -> bool:
        """Whether it answers about some classes and a dustbin."""
        return self.head["kind"] != "linear"

    @property
    def num_outputs(self) -> int:
        """Width of the logits: every class, or a specialist's classes and the dustbin."""
        if not self.is_specialist:
            return self.num_classes
        return len(self.head["members"]) + 1

    def to_json(self) -> str:
        values = {"schema": SCHEMA} | asdict(self)
        values["input"] = self.input.as_json()
        if self.is_specialist:
            del values["class_names"]  # thousands of specialists would repeat the generalist's
        if self.members is None:
            del values["members"]  # a plain network's file is what it was before there were members
        if self.cosine is None:
            del values["cosine"]
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Raises ValueError for what is not JSON, another schema, and unknown or missing keys."""
        try:
            values = parse(text)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: object) -> ModelSpec:
        """Like from_json, from values that are parsed already."""
        if not isinstance(values, dict):
            raise ValueError("a JSON object is needed")
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}; this version reads schema {SCHEMA}")
        return cls(**_checked_keys(values, cls, ""))

    def save(self, path: str | Path) -> None:
        path = Path(path)
        with appearing(path) as unfinished:
            unfinished.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ModelSpec:
        """Raises ValueError, naming the file, where it cannot be read or is not a model.json."""
        values = read_values(path)
        with blamed_on(path):
            try:
                return cls.from_values(values)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


def named_by(specialist: ModelSpec, generalist: ModelSpec) -> ModelSpec:
    """A specialist's spec with the generalist's names of the classes, which are held once.

    Raises ValueError where the two are of label sets of different sizes.
    """
    if specialist.num_classes != generalist.num_classes:
        raise ValueError(
            f"the specialist is of {specialist.num_classes} classes, "
            f"the generalist of {generalist.num_classes}"
        )
    named = copy.copy(specialist)  # the names were checked with the generalist
    object.__setattr__(named, "class_names", generalist.class_names)
    return named


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: the nearest valid one, or all of them."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"valid: {', '.join(valid)}"


def checked_classes(classes: Iterable[int], num_classes: int) -> list[int]:
    """`classes` as a sorted list of distinct class indices.

    Raises ValueError if there is none, one is repeated, or one is out of range.
    """
    ordered = sorted(map(int, classes))
    if not ordered:
        raise ValueError("a dustbin head needs at least one member")
    for c in (ordered[0], ordered[-1]):
        if not 0 <= c < num_classes:
            raise ValueError(f"member {c} is not a class; classes are 0 to {num_classes - 1}")
    if len(set(ordered)) < len(ordered):
        twice = next(c for c, following in pairwise(ordered) if c == following)
        raise ValueError(f"member {twice} is listed twice")
    return ordered


def _checked_head(head: dict[str, Any], num_classes: int) -> dict[str, Any]:
    if not isinstance(head, dict) or head.get("kind") not in HEAD_KINDS:
        raise ValueError(f"head = {head!r}: its kind must be one of {', '.join(HEAD_KINDS)}")
    rows = head.get("rows", "all")
    keys = ["kind"]
    if head["kind"] == "dustbin":
        keys += ["members", "rows"]
    if head["kind"] == "branch":
        keys += ["members", *BRANCH_SIZES]
    if head.get("rows") == "kept":
        keys += ["kept"]
    for key in set(head) - set(keys):
        raise ValueError(f"unknown key head.{key}; {nearest(key, sorted(keys))}")
    if head["kind"] == "linear":
        return {"kind": "linear"}
    if rows not in DUSTBIN_ROWS:
        raise ValueError(f"head.rows = {rows!r}: must be one of {', '.join(DUSTBIN_ROWS)}")
    classes = head.get("members")
    if not isinstance(classes, (list, tuple)) or not all(map(_is_int, classes)):
        raise ValueError("head.members: a list of class indices is needed")
    if head["kind"] == "branch":
        sizes = _checked_sizes(head)
        return {"kind": "branch", "members": checked_classes(classes, num_classes), **sizes}
    checked = {"kind": "dustbin", "members": checked_classes(classes, num_classes), "rows": rows}
    if rows == "kept":
        checked["kept"] = list(head.get("kept", ()))
    # No class has two rows.
    checked_classes([*checked["members"], *checked.get("kept", ())], num_classes)
    return checked


def _checked_sizes(head: dict[str, Any]) -> dict[str, int]:
    """A branch's sizes."""
    for key, least in BRANCH_SIZES.items():
        value: Any = head.get(key)
        if not _is_int(value) or value < least:
            raise ValueError(f"head.{key} = {value!r}: must be a whole number, at least {least}")
    return {key: head[key] for key in BRANCH_SIZES}


def _checked_members(members: dict[str, Any] | None, head: dict[str, Any]) -> dict[str, Any] | None:
    if members is None:
        return None
    if not isinstance(members, dict) or members.get("kind") not in MEMBER_KEYS:
        raise ValueError(
            f"members = {members!r}: their kind must be one of {', '.join(MEMBER_KEYS)}"
        )
    keys = MEMBER_KEYS[members["kind"]]
    for key in set(members) - set(keys):
        raise ValueError(f"unknown key members.{key}; {nearest(key, keys)}")
    if head["kind"] != "linear":
        raise ValueError("a network with members needs a linear head; a specialist has no members")
    checked = {"kind": members["kind"], "count": members.get("count")}
    if "blocks" in keys:
        checked["blocks"] = members.get("blocks", 0)
    for key, least in (("count", 2), ("blocks", 0)):
        if key in checked and (not _is_int(checked[key]) or checked[key] < least):
            raise ValueError(
                f"members.{key} = {checked[key]!r}: must be a whole number, at least {least}"
            )
    if checked["count"] > MOST_MEMBERS:
        raise ValueError(f"members.count = {checked['count']}: at most {MOST_MEMBERS} are built")
    return checked


def _checked_cosine(cosine: dict[str, Any] | None) -> dict[str, Any] | None:
    if cosine is None:
        return None
    if not isinstance(cosine, dict):
        raise ValueError(f"cosine = {cosine!r}: an object is needed")
    for key in cosine:
        if key not in COSINE_KEYS:
            raise ValueError(f"unknown key cosine.{key}; {nearest(key, COSINE_KEYS)}")
    scale, learned = cosine.get("scale"), cosine.get("learned", False)
    margin, kind = cosine.get("margin", 0.0), cosine.get("margin_kind", "cosface")
    if scale is None or not _is_number(scale) or not 0 < scale < math.inf:
        raise ValueError(f"cosine.scale = {scale!r}: must be a number greater than 0")
    if not isinstance(learned, bool):
        raise ValueError(f"cosine.learned = {learned!r}: must be true or false")
    if kind not in MARGINS:
        raise ValueError(f"cosine.margin_kind = {kind!r}: must be one of {', '.join(MARGINS)}")
    if margin is None or not _is_number(margin) or not 0 <= margin < 1:
        raise ValueError(f"cosine.margin = {margin!r}: must be a number from 0 to below 1")
    return {
        "scale": float(scale),
        "learned": learned,
        "margin": float(margin),
        "margin_kind": kind,
    }


def _checked_keys(values: dict[str, Any], cls: type, prefix: str) -> dict[str, Any]:
    """`values`, whose keys are fields of `cls` and hold the required ones, else ValueError."""
    valid = [f.name for f in fields(cls)]
    for name in values:
        if name not in valid:
            raise ValueError(f"unknown key {prefix}{name}; {nearest(name, valid)}")
    for name in REQUIRED_KEYS:
        if name in valid and name not in values:
            raise ValueError(f"the key {prefix}{name} is missing")
    return values


def _is_names(values: object) -> bool:
    if not isinstance(values, dict):
        return False
    return all(isinstance(word, str) for pair in values.items() for word in pair)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_numbers(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(map(_is_number, values))
