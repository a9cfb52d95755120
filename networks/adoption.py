"""Load weights trained elsewhere: match tensor names, find the head, say what is left out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoints import Tensors, first_few, read_checkpoint
from .classifier import Classifier
from .cosine import UnitTrunk
from .layouts import translated

# What torch puts into the names of a network's tensors.  No module is called so by a person.
WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
NEW = "new"  # the head's name that stands for a fresh one
COUNTER = "num_batches_tracked"  # of a batch norm: how often it was updated. Nobody needs it


@dataclass
class Adoption:
    """What adopt_weights did.

    with_head: whether the head was loaded, too. Otherwise it is fresh and has to be trained.
    notes: one sentence for each decision that the file's name does not show.
    """

    with_head: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fit:
    """How well the file's names match the trunk's, each without a prefix."""

    theirs: str
    ours: str
    lacking: list[str]
    unexpected: list[str]


def adopt_weights(
    classifier: Classifier,
    path: str | Path,
    head: str | None = None,
    weights: str | None = None,
    prefix: str = "",
    row_names: Sequence[str] | None = None,
) -> Adoption:
    """Load someone else's weights into `classifier`, in place. Never runs pickled code.

    All tensors of the file except the head's belong to the trunk. Prefixes that they all share
    ("module.", "_orig_mod.", "backbone.", ...) are removed until the names match. Floating-point
    tensors are cast to the network's type. Names that follow a layout of networks.layouts are
    translated to timm's.

    Parameters
    ----------
    classifier : Classifier
        Its trunk receives the weights. Its head is loaded as well, or stays fresh.
    path : path
        A safetensors file, or a state dict that torch.save wrote, alone or in a checkpoint.
    head : str, optional
        Name of the linear classifier in the file, such as "fc" or "model.fc". Its rows must be the
        classes, in the order of the label set. The head stays fresh without a name, with the name
        "new", and if the number of rows is not the number of classes.
    weights : str, optional
        Key of the state dict to load, for a checkpoint that holds several.
    prefix : str
        Load only tensors whose names start with this, and remove it: one part of a larger model.
    row_names : sequence of str, optional
        Names of the classes that the rows of the file's head stand for, if they are known. Rows of
        the same classes in another order are put into the order of the label set.

    Returns
    -------
    Adoption

    Raises
    ------
    ValueError
        If the file, which the message names, cannot be read, does not fit or holds numbers that are
        not finite, or if rows of its head stand for some of our classes in another order.
        `classifier` is then unchanged.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, weights)
    adoption = Adoption(False)
    if checkpoint.others:
        others = first_few(list(checkpoint.others))
        adoption.notes.append(
            f"took {checkpoint.name}, not {others}; generalist.weights chooses another"
        )
    theirs = _part(_unwrapped(checkpoint.tensors), prefix, path)
    adopted: Tensors = {}
    if head == NEW:
        head = None
    if head is not None:
        adopted = _take_head(theirs, head, classifier, path, adoption)
    if adoption.with_head and row_names is not None:
        order = row_order(row_names, classifier.spec.class_names, path, adoption.notes)
        adopted = {name: tensor[order] for name, tensor in adopted.items()}
    net, place = classifier.trunk, "trunk."
    if isinstance(net, UnitTrunk):
        net, place = net.net, "trunk.net."
    trunk = net.state_dict()
    fit = _best_fit(theirs, trunk)
    if fit.lacking:
        renamed, layout = translated(theirs)
        if renamed:
            adoption.notes.append(f"its names are {layout}; they are read as timm's")
            theirs = renamed
            fit = _best_fit(theirs, trunk)
    if head is None:
        fit = _leave_head_out(theirs, fit, adoption)
    _check(fit, theirs, trunk, path, checkpoint.others)
    if fit.theirs:
        adoption.notes.append(f"took the prefix {fit.theirs} off its names")
    for name, tensor in theirs.items():
        own = fit.ours + name.removeprefix(fit.theirs)
        if own in trunk:
            adopted[place + own] = tensor
    _check_numbers(adopted, path)
    result = classifier.load_state_dict(adopted, strict=False)
    assert not result.unexpected_keys, result
    return adoption


def _unwrapped(tensors: Mapping[str, Tensor]) -> Tensors:
    """Their names without what torch's wrappers put into the middle: a part of a network is wrapped
    where it alone is compiled, checkpointed or sharded.
    """
    return {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def _part(theirs: Tensors, prefix: str, path: Path) -> Tensors:
    """What begins with the prefix, less the prefix."""
    if not prefix:
        return theirs
    part = {
        name.removeprefix(prefix): tensor
        for name, tensor in theirs.items()
        if name.startswith(prefix)
    }
    if not part:
        firsts = sorted({name.partition(".")[0] + "." for name in theirs})
        raise ValueError(
            f"{path}: no tensor's name begins with prefix {prefix!r}; they begin with "
            f"{first_few(firsts)}"
        )
    return part


def _take_head(
    theirs: Tensors, head: str, classifier: Classifier, path: Path, adoption: Adoption
) -> Tensors:
    """Take the head's tensors out of `theirs`: those to load, {} where a fresh one has to stand."""
    name = _name_of_head(theirs, head)
    if name is None:
        behind = [each for each in _linear_layers(theirs) if each.endswith(f".{head}")]
        remedy = ""
        if behind:
            part = behind[0].removesuffix(head)
            remedy = f'; generalist.prefix = "{part}" takes what is called so'
        raise ValueError(
            f"{path} has no {head}.weight; its linear layers are {heads(theirs)}{remedy}"
        )
    parts = {key: theirs.pop(key) for key in list(theirs) if key.startswith(f"{name}.")}
    own = classifier.linear_head
    weight, bias = parts.get(f"{name}.weight"), parts.get(f"{name}.bias")
    if weight is not None and weight.shape == own.weight.shape and weight.is_floating_point():
        adoption.with_head = True
        if classifier.spec.cosine is not None:
            if bias is not None:
                raise ValueError(
                    f'{path}: {name} has a bias, which no head of model.head = "cosine" has; '
                    'take "linear", or leave generalist.head out'
                )
            weight = F.normalize(weight)
        if bias is None:
            bias = torch.zeros(len(weight))
        return {"head.weight": weight, "head.bias": bias}
    shape = list(weight.shape) if weight is not None else "several layers"
    adoption.notes.append(
        f"the head is fresh: {name} is {shape}, these classes need {list(own.weight.shape)}"
    )
    return {}


def row_order(
    theirs: Sequence[str], ours: Sequence[str], path: Path, notes: list[str]
) -> list[int]:
    """Which of their rows stands for each of our classes.

    theirs, ours: C names each.  notes: gets a sentence where the order is not plain.
    Raises ValueError where a class of ours has another place in theirs and not all are there.
    """
    same = list(range(len(ours)))
    named, needed = list(map(_plain, theirs)), list(map(_plain, ours))
    place = {name: row for row, name in enumerate(named)}
    common = [row for row, name in enumerate(needed) if name in place]
    other = [row for row in same if named[row : row + 1] != [needed[row]]]
    moved = sorted(set(common) & set(other))
    if moved and len(common) == len(place) == len(same):
        notes.append(
            f"the head's rows were put into the order of the classes: {ours[moved[0]]} is its row "
            f"{place[needed[moved[0]]]} and class {moved[0]}"
        )
        return [place[name] for name in needed]
    if moved:
        row = moved[0]
        raise ValueError(
            f"{path}: its head's row {place[needed[row]]} is called {theirs[place[needed[row]]]}, "
            f"which is class {row} here, and {len(same) - len(common)} classes are not among its "
            'rows; generalist.head = "new" trains a fresh head'
        )
    if other:
        row = other[0]
        notes.append(
            f"{len(other)} rows of the head are called otherwise than the classes that they are "
            f"taken for: row {row} is {theirs[row] if row < len(theirs) else 'nothing'}, class "
            f"{row} is {ours[row]}"
        )
    return same


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _name_of_head(theirs: Mapping[str, Tensor], head: str) -> str | None:
    """The head's whole name in the file: as it is, or behind a prefix that all tensors share."""
    for prefix in _shared_prefixes(theirs):
        for name in (head, prefix + head):
            if any(key.startswith(f"{name}.") for key in theirs):
                return name
    return None


def _leave_head_out(theirs: Tensors, fit: _Fit, adoption: Adoption) -> _Fit:
    """Without a head's name: one linear layer that the trunk has no use for is their head."""
    extra = {name.rpartition(".")[0] for name in fit.unexpected}
    if fit.lacking or len(extra) != 1:
        return fit
    (name,) = extra
    weight = theirs.get(f"{name}.weight")
    surplus = {f"{name}.weight", f"{name}.bias"}
    if weight is None or weight.dim() != 2 or not set(fit.unexpected) <= surplus:
        return fit
    adoption.notes.append(f"the head is fresh: its own, {name} of {len(weight)} rows, is left out")
    for key in surplus:
        theirs.pop(key, None)
    return _Fit(fit.theirs, fit.ours, [], [])


def _best_fit(theirs: Mapping[str, Tensor], trunk: Mapping[str, Tensor]) -> _Fit:
    """The prefixes, theirs and ours, without which most names agree."""
    fits = [
        _compare(theirs, trunk, prefix, own)
        for own in _shared_prefixes(trunk)
        for prefix in _prefixes(theirs)
    ]
    return min(fits, key=lambda fit: (len(fit.lacking), len(fit.unexpected)))


def _compare(
    theirs: Mapping[str, Tensor], trunk: Mapping[str, Tensor], prefix: str, own: str
) -> _Fit:
    names = {own + name.removeprefix(prefix): name for name in theirs if name.startswith(prefix)}
    others = [name for name in theirs if not name.startswith(prefix)]
    lacking = [name for name in trunk if name not in names and not name.endswith(COUNTER)]
    surplus = [names[name] for name in names if name not in trunk and not name.endswith(COUNTER)]
    return _Fit(prefix, own, sorted(lacking), sorted([*surplus, *others]))


def _prefixes(theirs: Mapping[str, Tensor]) -> Iterator[str]:
    """Prefixes that all tensors share, and those of all but one linear layer, their head."""
    yield from _shared_prefixes(theirs)
    for name in _linear_layers(theirs):
        rest = [key for key in theirs if not key.startswith(f"{name}.")]
        yield from _shared_prefixes(rest)


def _shared_prefixes(names: Iterable[str]) -> Iterator[str]:
    """ "", "module.", "module.net.", ...: as long as every name has the same next part."""
    names, prefix = list(names), ""
    yield prefix
    while names:
        parts = {name.removeprefix(prefix).partition(".")[0::2] for name in names}
        firsts = {first for first, _ in parts}
        if len(firsts) != 1 or any(not rest for _, rest in parts):
            return
        prefix += f"{firsts.pop()}."
        yield prefix


def _check(
    fit: _Fit,
    theirs: Mapping[str, Tensor],
    trunk: Mapping[str, Tensor],
    path: Path,
    others: tuple[str, ...],
) -> None:
    """ValueError unless their names, shapes and kinds of number are the trunk's."""
    problems = []
    if fit.lacking:
        problems.append(f"lacks {first_few(fit.lacking)}")
    if fit.unexpected:
        problems.append(f"has unexpected {first_few(fit.unexpected)}")
    if not problems:
        problems = _misfits(fit, theirs, trunk)
    if not problems:
        return
    more = f"; it has weights under {first_few(list(others))}, too" if others else ""
    raise ValueError(
        f"{path} does not fit the network: {'; '.join(problems)}; "
        f"its linear layers are {heads(theirs)}{more}; [model] has to build their trunk, and "
        "generalist.prefix takes the part of a larger model that is meant"
    )


def _misfits(fit: _Fit, theirs: Mapping[str, Tensor], trunk: Mapping[str, Tensor]) -> list[str]:
    """What has another shape than the trunk's, or whole numbers in place of fractions."""
    wrong = []
    for name, tensor in theirs.items():
        needed = trunk.get(fit.ours + name.removeprefix(fit.theirs))
        if needed is None:
            continue
        if tensor.shape != needed.shape:
            wrong.append(f"{name} is {list(tensor.shape)}, not {list(needed.shape)}")
        elif needed.is_floating_point() and not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype}, not floating")
    return [first_few(wrong)] if wrong else []


def _check_numbers(adopted: Mapping[str, Tensor], path: Path) -> None:
    """ValueError for weights that no training can go on from."""
    for name, tensor in adopted.items():
        said = ""
        if tensor.is_meta or tensor.layout != torch.strided:
            said = "is not stored as plain numbers (meta or sparse)"
        elif not torch.isfinite(tensor.float()).all():
            said = "holds NaN, infinity or numbers beyond float32; take an earlier checkpoint"
        elif name.endswith("running_var") and (tensor < 0).any():
            said = "is a variance below 0; take another checkpoint"
        if said:
            raise ValueError(f"{path}: {name} {said}")


def heads(tensors: Mapping[str, Tensor]) -> str:
    """The names of what may be a linear layer, for an error."""
    return first_few(_linear_layers(tensors)) or "none"


def _linear_layers(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(
        name.removesuffix(".weight")
        for name, value in tensors.items()
        if name.endswith(".weight") and value.dim() == 2
    )
