"""Keys of which a run has one or the other.

A file that sets both is refused (`schedule.py`, `sections.py` and `checks.py` say why), and so is a
command line.  `--set` of one replaces the other of the file.
"""

from __future__ import annotations

# `*` stands for a name, the same one in both: a section, or a student.
EXCLUSIVE = (
    ("*.steps", "*.epochs"),
    ("students.*.steps", "students.*.epochs"),
    ("*.negatives", "*.label_smoothing"),
    ("students.*.negatives", "students.*.label_smoothing"),
    ("students.*.views", "students.*.perturb"),
    ("specialists.dustbin_rows", "specialists.hard_negatives"),
    ("generalist.from", "extend.run"),
    ("clusters.groups_file", "extend.run"),
)
UNSET = ("", "none", 0)  # values by which a key asks for nothing


def replaced_by(key: str) -> list[str]:
    """The keys, section by section, that make way where `key` is set."""
    rivals = []
    for pair in EXCLUSIVE:
        for own, other in (pair, pair[::-1]):
            name = matched(own, key)
            if name is not None:
                rivals.append(other.replace("*", name))
    return rivals


def matched(pattern: str, key: str) -> str | None:
    """What `*` stands for in a key. "" in a pattern without one, None where they differ."""
    words, parts = pattern.split("."), key.split(".")
    if len(words) != len(parts):
        return None
    name = ""
    for word, part in zip(words, parts, strict=True):
        if word == "*":
            name = part
        elif word != part:
            return None
    return name
