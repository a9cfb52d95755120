"""What model.json says: which network, for which classes, fed how.  No torch here."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
HEAD_KINDS = ("linear", "dustbin")
DUSTBIN_ROWS = ("all", "kept", "fresh")
MEMBER_KEYS = {"heads": ("kind", "count", "blocks"), "batch": ("kind", "count")}


@dataclass(frozen=True)
class InputSpec:
    """One raw input, and the map to what the trunk reads: (raw * scale - mean) / std.

    shape: of one example, [C, H, W] for images.  dtype: "uint8" or "float32", as decoded.
    scale: None takes 1/255 for uint8, 1 for float32.
    mean, std: of scaled inputs, one value or one per entry of the first axis.
    """

    shape: tuple[int, ...]
    dtype: str = "uint8"
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        put = object.__setattr__
        for name in ("shape", "mean", "std"):
            value = getattr(self, name)
            if not _is_numbers(value):
                raise ValueError(f"input.{name} = {value!r}: a list of numbers is needed")
        put(self, "shape", tuple(int(n) for n in self.shape))
        put(self, "mean", tuple(float(n) for n in self.mean))
        put(self, "std", tuple(float(n) for n in self.std))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"input.shape = {list(self.shape)}: every length must be at least 1")
        if self.dtype not in ("uint8", "float32"):
            raise ValueError(f"input.dtype = {self.dtype!r}: must be uint8 or float32")
        put(
            self,
            "scale",
            float(self.scale)
            if self.scale is not None
            else (1 / 255 if self.dtype == "uint8" else 1.0),
        )
        for name in ("mean", "std"):
            length = len(getattr(self, name))
            if length not in (1, self.shape[0]):
                raise ValueError(
                    f"input.{name} has {length} values; 1 or {self.shape[0]} (input.shape[0]) are needed"
                )
        if min(self.std) <= 0 or not all(map(math.isfinite, (*self.mean, *self.std, self.scale))):
            raise ValueError(
                f"input.std = {list(self.std)}: must be positive, and mean, std and scale finite"
            )


@dataclass(frozen=True)
class ModelSpec:
    """The contents of model.json, schema 1.

    builder: a built-in's name, `timm:NAME`, or a key of the `builders` that the caller passes.  Never code.
    options: keyword arguments of the builder; an option that is None takes the builder's default.
    num_classes, class_names: of the whole label set, also for a specialist.  No names: "0", "1", ...
    head: {"kind": "linear"}, or {"kind": "dustbin", "members": sorted class indices, "rows": "all" | "kept" | "fresh"}:
        with "all" there is a row for every class and the dustbin is the log-sum-exp of those that are not members,
        with "kept" it is that of the classes "kept" and of one row for all others, with "fresh" it has one row.
    members: None for a plain network, or K of them, whose logits are [K, B, C]:
        {"kind": "heads", "count": K, "blocks": N}: K heads on one body, each the last N blocks and a linear layer;
        {"kind": "batch", "count": K}: a BatchEnsemble, rank-one factors of each member on every layer.
    """

    builder: str
    num_classes: int
    input: InputSpec
    options: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "linear"})
    members: dict[str, Any] | None = None

    def __post_init__(self):
        put = object.__setattr__
        if isinstance(self.input, dict):
            put(self, "input", InputSpec(**_known(self.input, InputSpec, "input.")))
        if not isinstance(self.builder, str) or not self.builder:
            raise ValueError(f"builder = {self.builder!r}: a name is needed")
        if not isinstance(self.options, dict):
            raise ValueError(f"options = {self.options!r}: an object is needed")
        if not _is_int(self.num_classes) or self.num_classes < 1:
            raise ValueError(
                f"num_classes = {self.num_classes!r}: must be a whole number, at least 1"
            )
        put(
            self,
            "options",
            {name: value for name, value in self.options.items() if value is not None},
        )
        put(self, "class_names", tuple(map(str, self.class_names or range(self.num_classes))))
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} entries for num_classes = {self.num_classes}"
            )
        put(self, "head", _checked_head(self.head, self.num_classes))
        put(self, "members", _checked_network_members(self.members, self.head))

    @property
    def num_outputs(self) -> int:
        """Width of the logits: every class, or the members and the dustbin."""
        return self.num_classes if self.head["kind"] == "linear" else len(self.head["members"]) + 1

    def to_json(self) -> str:
        values = {"schema": SCHEMA} | asdict(self)
        if self.members is None:
            del values["members"]  # a plain network's file is what it was before there were members
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Raises ValueError for what is not JSON, another schema, and unknown or missing keys."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as mistake:
            raise ValueError(f"not valid JSON: {mistake}") from None
        if not isinstance(values, dict):
            raise ValueError("a JSON object is needed")
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}; this version reads schema {SCHEMA}")
        return cls(**_known(values, cls, ""))

    def save(self, path: str | Path) -> None:
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(self.to_json(), encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path) -> ModelSpec:
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as mistake:
            raise ValueError(
                f"{path}: cannot be read: {getattr(mistake, 'strerror', None) or mistake}"
            ) from None
        except ValueError as mistake:
            raise ValueError(f"{path}: {mistake}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: the nearest valid one, or all of them."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"


def check_members(members, num_classes: int) -> list[int]:
    """`members` as a sorted list of distinct class indices.  ValueError if empty, repeated or out of range."""
    members = sorted(int(member) for member in members)
    if not members:
        raise ValueError("a dustbin head needs at least one member")
    if members[0] < 0 or members[-1] >= num_classes:
        wrong = members[0] if members[0] < 0 else members[-1]
        raise ValueError(f"member {wrong} is not a class; classes are 0 to {num_classes - 1}")
    repeated = [a for a, b in zip(members, members[1:], strict=False) if a == b]
    if repeated:
        raise ValueError(f"member {repeated[0]} is listed twice")
    return members


def _checked_head(head, num_classes: int) -> dict:
    if not isinstance(head, dict) or head.get("kind") not in HEAD_KINDS:
        raise ValueError(f"head = {head!r}: its kind must be one of {', '.join(HEAD_KINDS)}")
    keys = {"kind"} if head["kind"] == "linear" else {"kind", "members", "rows"}
    keys |= {"kept"} if head.get("rows") == "kept" else set()
    for key in set(head) - keys:
        raise ValueError(f"unknown key head.{key}; {nearest(key, sorted(keys))}")
    if head["kind"] == "linear":
        return {"kind": "linear"}
    rows = head.get("rows", "all")
    if rows not in DUSTBIN_ROWS:
        raise ValueError(f"head.rows = {rows!r}: must be one of {', '.join(DUSTBIN_ROWS)}")
    members = head.get("members")
    if not isinstance(members, (list, tuple)) or not all(map(_is_int, members)):
        raise ValueError("head.members: a list of class indices is needed")
    head = {"kind": "dustbin", "members": check_members(members, num_classes), "rows": rows} | (
        {"kept": list(head.get("kept", ()))} if rows == "kept" else {}
    )
    check_members([*head["members"], *head.get("kept", ())], num_classes)  # no class has two rows
    return head


def _checked_network_members(members, head: dict) -> dict | None:
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
    members = {"kind": members["kind"], "count": members.get("count")} | (
        {"blocks": members.get("blocks", 0)} if "blocks" in keys else {}
    )
    for key, low in (("count", 2), ("blocks", 0)):
        if key in members and (not _is_int(members[key]) or members[key] < low):
            raise ValueError(
                f"members.{key} = {members[key]!r}: must be a whole number, at least {low}"
            )
    return members


def _known(values: dict, cls, prefix: str) -> dict:
    fields = cls.__dataclass_fields__
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {prefix}{name}; {nearest(name, fields)}")
    for name in ("builder", "num_classes", "input", "shape"):
        if name in fields and name not in values:
            raise ValueError(f"the key {prefix}{name} is missing")
    return values


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_numbers(value) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) for n in value
    )
