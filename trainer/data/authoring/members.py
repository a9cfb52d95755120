"""The members of other people's webdatasets: which one is the label, which one the input."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..choices import PICTURES
from ..tars import plain_files, split_name

LABEL_FIELDS = ("label", "labels", "class", "cls", "category", "target", "y")
SCANNED = 10_000  # files of a tar that are looked at for its first sample


def first_sample(path: str | Path) -> dict[str, bytes]:
    """{extension: content} of the first sample in an uncompressed tar. {} where there is none."""
    first_key = None
    files: dict[str, bytes] = {}
    try:
        for number, (name, content) in enumerate(plain_files(path)):
            parts = split_name(name)
            if parts is None and number < SCANNED:
                continue
            if parts is None or first_key not in (None, parts[0]):
                break
            first_key = parts[0]
            files[parts[1]] = content
    except OSError:
        pass  # said by who reads the whole tar
    return files


def some_pictures(path: str | Path, count: int = 1_000) -> Iterator[bytes]:
    """The first pictures in an uncompressed tar."""
    try:
        for name, content in plain_files(path):
            if not count:
                return
            if name.lower().rpartition(".")[2] in PICTURES:
                count -= 1
                yield content
    except OSError:
        return  # as above


def proposed_label(sample: Mapping[str, bytes]) -> str:
    """What --label should say of samples like this one. "" where that cannot be told."""
    if "cls" in sample:
        return "cls"
    try:
        fields = json.loads(sample["json"])
    except (KeyError, ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        single = [name for name in LABEL_FIELDS if isinstance(fields.get(name), str | int)]
        if single:
            return f"json:{single[0]}"
    members = [name for name in LABEL_FIELDS if name in sample]
    return members[0] if members else ""


def label_remedy(sample: Mapping[str, bytes], label: str) -> str:
    """What to say to who named a label member that no sample has."""
    members = ", ".join(sample) or "none"
    proposal = proposed_label(sample)
    remedy = f"--label {proposal} reads it" if proposal else _label_elsewhere(sample)
    member = label.partition(":")[0]
    return f"no sample has the label member .{member}; they have {members}: {remedy}"


def _label_elsewhere(sample: Mapping[str, bytes]) -> str:
    try:
        fields = json.loads(sample["json"])
    except (KeyError, ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict) and fields:
        return f"name the field with --label json:FIELD, of {', '.join(map(str, fields))}"
    return "name the one that holds the label with --label MEMBER, or json:FIELD"


def choose_picture(names: Collection[str]) -> str | None:
    """The input among several members: the only picture, beside which others are sidecars."""
    pictures = [name for name in names if name.rpartition(".")[2] in PICTURES]
    return pictures[0] if len(pictures) == 1 else None
