"""Operations on a finished classifier: make a specialist of it, give it members or classes, freeze or widen it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .builders import builtin_options
from .classifier import Classifier, build_classifier
from .heads import DustbinHead, GrownHead, make_head
from .members import FACTOR_STD, MemberHeads, cut_trunk, member_head, share_weights
from .residual_row import ResidualRow
from .spec import ModelSpec, check_members

WIDTHS = {"width", "channels", "embedding"}
DROPOUTS = {"dropout", "input_dropout"}


def specialise(
    generalist: Classifier,
    members,
    dustbin: str = "preserving",
    kept=None,
    rest: ResidualRow | None = None,
) -> Classifier:
    """A copy of `generalist` whose logits are [B, |members| + 1]: the members in ascending order, the dustbin last.

    dustbin: "preserving" keeps every row, so the specialist starts as the generalist, the classes outside summed;
        "fresh" keeps the members' rows and draws one new row (it loses accuracy: methods.md, section 1).
    kept, rest: of "preserving" keep the rows of these other classes only, and `rest` (fit_residual_row) for all without one.
    Raises ValueError for members that are not distinct classes, and if `generalist` is a specialist itself or has
    members in the other sense, heads or factors.
    """
    if dustbin not in ("preserving", "fresh"):
        raise ValueError(f"dustbin = {dustbin!r}: must be preserving or fresh")
    if generalist.spec.members is not None:
        raise ValueError("a network with members cannot be specialised; specialise a plain one")
    if not isinstance(generalist.head, nn.Linear) or generalist.spec.head["kind"] != "linear":
        raise ValueError(
            "only a classifier with a linear head can be specialised; this one is a specialist already"
        )
    members = check_members(members, generalist.spec.num_classes)
    spec = generalist.spec
    specialist = copy.deepcopy(generalist)
    for parameter in specialist.parameters():
        parameter.grad = None
    old = specialist.head
    rows = "fresh" if dustbin == "fresh" else "all" if kept is None else "kept"
    described = {"kind": "dustbin", "members": members, "rows": rows}
    if rows == "kept":
        described["kept"] = [int(c) for c in kept]
    specialist.spec = replace(spec, head=described)
    head = make_head(specialist.spec, old.in_features).to(old.weight)
    classes = head.row_classes if rows != "fresh" else torch.tensor(members)
    with torch.no_grad():
        classes = classes[classes >= 0].to(old.weight.device)
        head.weight[: len(classes)] = old.weight[classes]
        head.bias[: len(classes)] = old.bias[classes]
        if rows == "kept":
            head.weight[-1], head.bias[-1] = rest.weight, rest.bias
    specialist.head = head.train(old.training)
    return specialist


def match_classes(old_names: Sequence[str], names: Sequence[str]) -> list[int]:
    """For each of `old_names` its place in `names`.

    ValueError for an old class that `names` lacks, and for a name that either holds twice.
    """
    for called in (old_names, names):
        if len(set(called)) < len(called):
            twice = next(name for name in called if list(called).count(name) > 1)
            raise ValueError(
                f"two classes are called {twice!r}; classes are matched by name, so names must differ"
            )
    place = {name: c for c, name in enumerate(names)}
    for name in old_names:
        if name not in place:
            like = ", ".join(map(repr, names[:3]))
            raise ValueError(
                f"class {name!r} is not among the {len(place)} classes now, which are called like {like}"
            )
    return [place[name] for name in old_names]


def add_classes(classifier: Classifier, class_names: Sequence[str]) -> Classifier:
    """A copy of a plain `classifier` that answers with all of `class_names` and can learn the new ones alone.

    Classes are matched by name and come in the order of `class_names`.  Trunk, norms and the old rows stay bit for bit:
    .head is a GrownHead, which merge_grown_head() turns into a plain one.
    A new row is the mean of the old ones, its bias lower by log K for K new classes.  A mean of C logits is at most
    their log-sum-exp less log C (Jensen), so the new classes together hold at most 1 / (C + 1), whatever the input.
    Raises ValueError for a specialist, for members, and where no class is new or an old one is absent.
    """
    spec = classifier.spec
    if spec.members is not None or spec.head["kind"] != "linear":
        raise ValueError(
            "classes are added to a plain classifier, not to a specialist or a network with members"
        )
    places = torch.tensor(match_classes(spec.class_names, class_names))
    new = sorted(set(range(len(class_names))) - set(places.tolist()))
    if not new:
        raise ValueError(
            f"the network knows all {len(class_names)} classes already; there is none to add"
        )
    grown, old = copy.deepcopy(classifier), classifier.head
    grown.spec = replace(spec, num_classes=len(class_names), class_names=tuple(class_names))
    places, new = places.to(old.weight.device), torch.tensor(new, device=old.weight.device)
    linear = make_head(grown.spec, old.in_features).to(old.weight)
    with torch.no_grad():
        linear.weight[places], linear.bias[places] = old.weight, old.bias
        linear.weight[new], linear.bias[new] = (
            old.weight.mean(0),
            old.bias.mean() - math.log(len(new)),
        )
    grown.head = GrownHead(linear, new)
    return set_trainable(grown.train(classifier.training), "head")


def merge_grown_head(classifier: Classifier) -> Classifier:
    """Give a network of add_classes a plain head with the rows that it has learnt.  Changes it and returns it."""
    head = classifier.head
    linear = make_head(classifier.spec, head.in_features).to(head.fixed_weight)
    with torch.no_grad():
        linear.weight.copy_(head.weight), linear.bias.copy_(head.bias)
    classifier.head = linear.train(head.training)
    return set_trainable(classifier, "all")


def remap_specialist(specialist: Classifier, generalist: Classifier) -> Classifier:
    """A specialist that answers among `generalist`'s classes, which are its own and more, found by name.

    A copy: what it says of its members stays, in the order that they have now, and new classes fall into its dustbin.
    If that has a row for every class, the new ones get the generalist's, as a beginning: the specialist's features are
    not the generalist's, and their biases are better fitted (trainer.stages.story.calibrate_new_class_bias); otherwise the row for
    the rest stands for them too.
    Raises ValueError for a network that is no specialist, and where the generalist lacks one of its classes.
    """
    spec, head = specialist.spec, specialist.head
    if spec.head["kind"] != "dustbin":
        raise ValueError("this network is no specialist: it has no dustbin")
    place = match_classes(spec.class_names, generalist.spec.class_names)
    described = spec.head | {
        key: [place[c] for c in spec.head[key]] for key in ("members", "kept") if key in spec.head
    }
    described["members"].sort()
    grown = copy.deepcopy(specialist)
    grown.spec = replace(
        spec,
        num_classes=generalist.spec.num_classes,
        class_names=generalist.spec.class_names,
        head=described,
    )
    rows = make_head(grown.spec, head.in_features).to(head.weight)

    def classes_of(rows: nn.Module, members: list[int]) -> list[int]:
        """The class of each stored row, -1 for one that stands for several."""
        return rows.row_classes.tolist() if isinstance(rows, DustbinHead) else [*members, -1]

    old = {
        c if c < 0 else place[c]: row
        for row, c in enumerate(classes_of(head, spec.head["members"]))
    }
    wanted = list(enumerate(classes_of(rows, described["members"])))
    known = [(row, old[c]) for row, c in wanted if c in old]
    new = [(row, c) for row, c in wanted if c not in old]
    with torch.no_grad():
        for source, pairs in ((head, known), (generalist.head, new)):
            to, origin = (
                torch.tensor(pairs, dtype=torch.int64, device=head.weight.device)
                .view(-1, 2)
                .unbind(1)
            )
            rows.weight[to], rows.bias[to] = source.weight[origin], source.bias[origin]
    grown.head = rows.train(head.training)
    return grown


def hydra(classifier: Classifier, count: int, blocks: int = 0) -> Classifier:
    """`count` heads grown from a plain classifier, each a copy of its last `blocks` blocks and its linear layer.

    Every member starts as the classifier.  Tran et al. 2020, section 3: "the Hinton head" grows into the others.
    A copy, with nothing frozen; the heads share the rest of the trunk.  Raises ValueError for a classifier that is a
    specialist or has members, and for blocks that the trunk has not got.
    """
    spec = _with_members(classifier, {"kind": "heads", "count": count, "blocks": blocks})
    body, end = cut_trunk(copy.deepcopy(classifier.trunk), blocks)
    first = member_head(end, copy.deepcopy(classifier.head))
    heads = MemberHeads([first, *(copy.deepcopy(first) for _ in range(1, count))])
    return _thawed(Classifier(spec, body, heads), classifier)


def batch_ensemble(
    classifier: Classifier,
    count: int,
    std: float = FACTOR_STD,
    generator: torch.Generator | None = None,
) -> Classifier:
    """A BatchEnsemble of `count` members on a plain classifier's weights.  Wen et al. 2020; Nam et al. 2021.

    std: of the factors, drawn from N(1, std): with 0 every member starts as the classifier.
    generator: None takes torch's global one.
    A copy, with nothing frozen.  Raises ValueError for a classifier that is a specialist or has members, and for one
    with a linear layer that is neither Linear nor Conv2d.
    """
    spec = _with_members(classifier, {"kind": "batch", "count": count})
    grown = Classifier(spec, copy.deepcopy(classifier.trunk), copy.deepcopy(classifier.head))
    share_weights(grown, count, std, generator)
    return _thawed(grown, classifier)


def _with_members(classifier: Classifier, members: dict) -> ModelSpec:
    if classifier.spec.members is not None:
        raise ValueError("this network has members already; they grow from a plain one")
    return replace(classifier.spec, members=members)


def _thawed(grown: Classifier, classifier: Classifier) -> Classifier:
    """`grown`, in the mode, type and place of the classifier it comes from, with no gradients and nothing frozen."""
    for parameter in grown.parameters():
        parameter.grad = None
    weight = next(classifier.parameters())
    return grown.requires_grad_(True).to(weight.device, weight.dtype).train(classifier.training)


def trunk_blocks(trunk: nn.Module) -> dict[str, nn.Module]:
    """The ordered blocks that "last-N-blocks" counts: the children of a Sequential.

    Of another module the children that have parameters, with each list of layers among them taken apart.
    """
    if isinstance(trunk, nn.Sequential):
        return dict(trunk.named_children())
    blocks = {}
    for name, child in trunk.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            blocks |= {f"{name}.{inner}": block for inner, block in child.named_children()}
        else:
            blocks[name] = child
    return {name: block for name, block in blocks.items() if any(True for _ in block.parameters())}


def set_trainable(classifier: Classifier, part: str) -> Classifier:
    """Train "all", only the "head", or the head and the "last-N-blocks" of the trunk; freeze the rest.

    The head of a network with several heads is all of them with their blocks; N counts the blocks of their body.
    Batch norm in frozen blocks stays in eval mode.  Changes `classifier` and returns it.
    Raises ValueError for another `part`, and for more blocks than there are.
    """
    match = re.fullmatch(r"all|head|last-([1-9][0-9]*)-blocks?", part)
    if not match:
        raise ValueError(
            f"trainable = {part!r}: must be all, head or last-N-blocks (such as last-2-blocks)"
        )
    blocks = trunk_blocks(classifier.trunk)
    count = int(match[1] or 0)
    if count > len(blocks):
        raise ValueError(
            f"trainable = {part!r}: the trunk has {len(blocks)} blocks ({', '.join(blocks)})"
        )
    classifier.requires_grad_(part == "all")
    open_blocks = [classifier.head, *list(blocks.values())[len(blocks) - count :]]
    for block in open_blocks:
        block.requires_grad_(True)
    open_modules = {module for block in open_blocks for module in block.modules()}
    classifier._frozen_norms = frozenset(
        name
        for name, module in classifier.named_modules()
        if part != "all" and isinstance(module, _BatchNorm) and module not in open_modules
    )
    return classifier.train(classifier.training)


def freeze_norm(classifier: Classifier, fixed: bool = True) -> Classifier:
    """Keep every batch norm's running statistics as they are, also in train mode; its scale and bias still learn."""
    classifier._all_norms_fixed = fixed
    return classifier.train(classifier.training)


def widen(
    classifier: Classifier, to: float | ModelSpec, generator: torch.Generator | None = None
) -> Classifier:
    """A wider mlp or convnet that computes the same function.  Chen et al. 2015, Net2WiderNet.

    to: a factor for width, channels and embedding; or a spec that differs from the classifier's in these alone.
    A new unit copies a random old one, and the weights that read a copied unit are split among its copies in random
    shares, entry by entry: their sum, and so the function, stays, and the copies do not stay twins.
    generator: None takes torch's global one.
    Raises ValueError for other builders, for a network with members, and where a layer would become narrower.
    """
    spec = classifier.spec
    if spec.members is not None:
        raise ValueError(
            "a network with members cannot be widened; widen the plain one, then give it members"
        )
    if spec.builder not in ("mlp", "convnet") or not isinstance(classifier.trunk, nn.Sequential):
        raise ValueError(f"only mlp and convnet can be widened, not {spec.builder}")
    target = _checked_target(spec, to) if isinstance(to, ModelSpec) else _wider_spec(spec, to)
    with torch.random.fork_rng(devices=[]):
        wider = build_classifier(target)
    for old, new in zip(_layers(classifier), _layers(wider), strict=True):
        if new.weight.shape[0] < old.weight.shape[0]:
            raise ValueError(
                f"a layer of {old.weight.shape[0]} units cannot be widened to {new.weight.shape[0]}"
            )
    wider.to(next(classifier.parameters()))
    # origin: the old unit that each unit of the layer below copies; at the start the inputs themselves.
    num_units = math.prod(spec.input.shape) if spec.builder == "mlp" else spec.input.shape[0]
    origin = torch.arange(num_units)
    with torch.no_grad():
        for old, new in zip(_layers(classifier), _layers(wider), strict=True):
            if isinstance(old, _BatchNorm):
                for name, tensor in old.named_parameters():
                    getattr(new, name).copy_(_take(tensor, origin))
                new.running_mean.copy_(_take(old.running_mean, origin))
                new.running_var.copy_(_take(old.running_var, origin))
                new.num_batches_tracked.copy_(old.num_batches_tracked)
                continue
            positions = (
                old.weight.shape[1] // num_units
            )  # of each channel, where maps were flattened
            origin = (origin[:, None] * positions + torch.arange(positions)).flatten()
            copies = _copies(old.weight.shape[0], new.weight.shape[0], generator)
            new.weight.copy_(_share_out(_take(old.weight, copies), origin, generator))
            if old.bias is not None:
                new.bias.copy_(_take(old.bias, copies))
            origin, num_units = copies, old.weight.shape[0]
    return wider.train(classifier.training)


def _layers(classifier: Classifier) -> list[nn.Module]:
    kinds = (nn.Conv2d, nn.Linear, _BatchNorm, DustbinHead)
    return [module for module in classifier.modules() if isinstance(module, kinds)]


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor[index.to(tensor.device)]


def _copies(old: int, new: int, generator: torch.Generator | None) -> Tensor:
    """int64 [new]: every old unit once, in order, and then random ones."""
    return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])


def _share_out(weight: Tensor, origin: Tensor, generator: torch.Generator | None) -> Tensor:
    """[out, old, ...] -> [out, new, ...]: column j is old column origin[j] times a random share; shares sum to 1."""
    shares = (
        torch.rand(weight.shape[0], len(origin), generator=generator, dtype=torch.float64) + 0.25
    )
    sums = torch.zeros(weight.shape[:2], dtype=torch.float64).index_add_(1, origin, shares)
    shares = (shares / sums[:, origin]).to(weight)
    return weight[:, origin.to(weight.device)] * shares.view(
        *shares.shape, *[1] * (weight.dim() - 2)
    )


def _wider_spec(spec: ModelSpec, factor: float) -> ModelSpec:
    options = builtin_options(spec.builder) | spec.options
    for name in WIDTHS & options.keys():
        if isinstance(options[name], list):
            options[name] = [round(channel * factor) for channel in options[name]]
        elif options[name] is not None:
            options[name] = round(options[name] * factor)
    return replace(spec, options=options)


def _checked_target(spec: ModelSpec, target: ModelSpec) -> ModelSpec:
    def shape(spec):
        options = builtin_options(spec.builder) | spec.options
        return spec.builder, {
            name: value for name, value in options.items() if name not in WIDTHS | DROPOUTS
        }

    theirs = (target.input, target.head, target.members)
    if shape(spec) != shape(target) or (spec.input, spec.head, spec.members) != theirs:
        raise ValueError(
            "widening changes width, channels, embedding and dropout; the rest of the two models must agree"
        )
    if bool(_option(spec, "embedding")) != bool(_option(target, "embedding")):
        raise ValueError("widening cannot add or remove the embedding")
    if spec.num_classes != target.num_classes:
        raise ValueError(
            f"a model of {spec.num_classes} classes cannot be widened to one of {target.num_classes}"
        )
    return target


def _option(spec: ModelSpec, name: str):
    return (builtin_options(spec.builder) | spec.options)[name]
