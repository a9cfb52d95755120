"""What people call the splits of a data set."""

from __future__ import annotations

import re

SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "t10k": "test",  # MNIST's
}
# What array names join to a split's without a separator: xtrain, trainlabels.
AFFIXES = "x|y|data|images?|labels?|targets?|inputs?|features?|texts?|set"
_WORD = re.compile(rf"(?:{AFFIXES})?({'|'.join(SPLIT_OF)})(?:{AFFIXES})?")


def split_called(name: str) -> str | None:
    """The split whose name this is, in any case. None where it is none's."""
    return SPLIT_OF.get(name.strip().casefold())


def split_within(name: str) -> str | None:
    """The split that a longer name mentions ("X_train", "imagenet-val-000"). None without one.

    A name of two splits mentions neither.
    """
    found = {SPLIT_OF[match.group(1)] for match in map(_WORD.fullmatch, _words(name)) if match}
    return found.pop() if len(found) == 1 else None


def without_split(name: str) -> str:
    """The name's other words: "x" of "X_train", "fine labels" of "fine_labels_test"."""
    kept = []
    for word in _words(name):
        match = _WORD.fullmatch(word)
        rest = word.replace(match.group(1), "") if match else word
        if rest:
            kept.append(rest)
    return " ".join(kept)


def _words(name: str) -> list[str]:
    """Lower-case words: "xTrain" and "x_train" are x and train."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"t10k|[a-z]+|[0-9]+", apart.lower())
