"""Teach a finished classifier classes that came later, and let old specialists live among them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .classifier import Classifier, Head
from .freezing import set_trainable
from .heads import DustbinHead, GrownHead, make_head, make_linear


def match_classes(old_names: Sequence[str], names: Sequence[str]) -> list[int]:
    """Where each old class is among the classes now.

    Parameters
    ----------
    old_names : sequence of str
        Names of the old classes, in their order.
    names : sequence of str
        Names of all classes now, in any order.

    Returns
    -------
    list of int
        For each of `old_names` its index in `names`.

    Raises
    ------
    ValueError
        For an old class that `names` lacks, and for a name that either holds twice.
    """
    _check_distinct(old_names)
    _check_distinct(names)
    index = {name: c for c, name in enumerate(names)}
    for name in old_names:
        if name not in index:
            examples = ", ".join(map(repr, names[:3]))
            raise ValueError(
                f"class {name!r} is not among the {len(index)} classes now, "
                f"which are called like {examples}"
            )
    return [index[name] for name in old_names]


def _check_distinct(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"two classes are called {name!r}; "
                "classes are matched by name, so names must differ"
            )
        seen.add(name)


def add_classes(classifier: Classifier, class_names: Sequence[str]) -> Classifier:
    """A copy of a plain classifier that has all of `class_names` and can learn the new ones alone.

    Trunk, norms and the old rows stay bit for bit.  A new row is the mean of the old ones, its bias
    lower by log K for K new classes.  A mean of C logits is at most their log-sum-exp less log C
    (Jensen), so the new classes together hold at most 1 / (C + 1), whatever the input.

    Parameters
    ----------
    classifier : Classifier
        Neither a specialist nor a network with members.
    class_names : sequence of str
        Old and new classes, in the order of the new logits.  Old ones are matched by name.

    Returns
    -------
    Classifier
        Only its head, a GrownHead, learns.  merge_grown_head turns that into a plain one.

    Raises
    ------
    ValueError
        For a specialist, for a network with members, and where no class is new or an old one is
        absent.
    """
    spec = classifier.spec
    if spec.members is not None or spec.head["kind"] != "linear":
        raise ValueError(
            "classes are added to a plain classifier, not to a specialist or a network with members"
        )
    old = classifier.linear_head
    indices = match_classes(spec.class_names, class_names)
    new_indices = sorted(set(range(len(class_names))) - set(indices))
    if not new_indices:
        raise ValueError(
            f"the network knows all {len(class_names)} classes already; there is none to add"
        )
    grown = copy.deepcopy(classifier)
    grown.spec = replace(spec, num_classes=len(class_names), class_names=tuple(class_names))
    linear = make_linear(grown.spec, old.in_features).to(old.weight)
    known = torch.tensor(indices, device=old.weight.device)
    new = torch.tensor(new_indices, device=old.weight.device)
    with torch.no_grad():
        linear.weight[known] = old.weight
        linear.bias[known] = old.bias
        linear.weight[new] = old.weight.mean(0)
        linear.bias[new] = old.bias.mean() - math.log(len(new))
    grown.head = GrownHead(linear, new)
    return set_trainable(grown.train(classifier.training), "head")


def merge_grown_head(classifier: Classifier) -> Classifier:
    """Give a network of add_classes a plain head with the rows that it has learnt.

    Parameters
    ----------
    classifier : Classifier
        With a GrownHead.  Changed in place.

    Returns
    -------
    Classifier
        The same one, with nothing frozen.
    """
    head = classifier.head
    assert isinstance(head, GrownHead)
    linear = make_linear(classifier.spec, head.in_features).to(head.fixed_weight)
    with torch.no_grad():
        linear.weight.copy_(head.weight)
        linear.bias.copy_(head.bias)
    classifier.head = linear.train(head.training)
    return set_trainable(classifier, "all")


def remap_specialist(specialist: Classifier, generalist: Classifier) -> Classifier:
    """A copy of an old specialist among a generalist's classes, which are its own and more.

    What it says of its own classes stays, in the order that they have now.  New classes fall into
    its dustbin.  If that has a row for every class, the new ones begin with the generalist's rows.
    The specialist's features are not the generalist's, so these rows' biases are better fitted on
    val before use.  Otherwise the row for the rest stands for new classes too.

    Parameters
    ----------
    specialist : Classifier
        Its classes are found by name among the generalist's.
    generalist : Classifier
        A plain one that knows all classes.

    Returns
    -------
    Classifier

    Raises
    ------
    ValueError
        For a network that is no specialist, and where the generalist lacks one of its classes.
    """
    spec, head = specialist.spec, specialist.head
    if spec.head["kind"] != "dustbin":
        raise ValueError("this network is no specialist: it has no dustbin")
    if not spec.class_names:
        raise ValueError(
            "the specialist's file leaves the classes' names to its generalist's; give it them: "
            "specialist.spec = named_by(specialist.spec, generalist.spec)"
        )
    assert isinstance(head, (nn.Linear, DustbinHead))
    new_class = match_classes(spec.class_names, generalist.spec.class_names)
    described = dict(spec.head)
    for key in ("members", "kept"):
        if key in described:
            described[key] = [new_class[c] for c in described[key]]
    described["members"].sort()
    grown = copy.deepcopy(specialist)
    grown.spec = replace(
        spec,
        num_classes=generalist.spec.num_classes,
        class_names=generalist.spec.class_names,
        head=described,
    )
    rows = make_head(grown.spec, head.in_features).to(head.weight)
    old_row = {}
    for row, c in enumerate(_row_classes(head, spec.head["members"])):
        old_row[c if c < 0 else new_class[c]] = row
    known, new = [], []
    for row, c in enumerate(_row_classes(rows, described["members"])):
        if c in old_row:
            known.append((row, old_row[c]))
        else:
            new.append((row, c))
    with torch.no_grad():
        _copy_rows(head, rows, known)
        _copy_rows(generalist.linear_head, rows, new)
    grown.head = rows.train(head.training)
    return grown


def _row_classes(head: Head, classes: list[int]) -> list[int]:
    """The class of each row of a specialist's head, -1 for one that stands for several."""
    if isinstance(head, DustbinHead):
        return head.row_classes.tolist()
    return [*classes, -1]


def _copy_rows(
    source: nn.Linear | DustbinHead,
    target: nn.Linear | DustbinHead,
    pairs: list[tuple[int, int]],
) -> None:
    """pairs: (row of the target, row of the source)."""
    device = target.weight.device
    to = torch.tensor([row for row, _ in pairs], dtype=torch.int64, device=device)
    origin = torch.tensor([row for _, row in pairs], dtype=torch.int64, device=device)
    target.weight[to] = source.weight[origin]
    target.bias[to] = source.bias[origin]
