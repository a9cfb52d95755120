"""A classifier on disk: model.json, which never names code, and safetensors, never a pickle."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from .builders import Builders
from .checkpoints import first_few, read_safetensors
from .choices import NETWORKS
from .classifier import Classifier, build_classifier
from .heads import DustbinHead, head_rows, make_head
from .integrity import blamed_on
from .refilling import linear_of
from .row_files import RowFiles, index_path, write_index, write_part
from .spec import ModelSpec
from .temporaries import appearing

if TYPE_CHECKING:
    from .branches import Branch

SPEC = "model.json"
WEIGHTS = "model.safetensors"
PREFIX = "model"  # of the files of a network whose head is split, and of their index
SPLIT_HEAD, PLAIN_HEAD = "head.rows.", "head."  # before the names of the head's tensors
SHAPES_KEPT = 1024
Module = TypeVar("Module", bound=nn.Module)

_shapes: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # by what they depend on
_lock = threading.Lock()


def save_classifier(classifier: Classifier | Branch, directory: str | Path) -> None:
    """Write model.safetensors and then model.json, each under a temporary name first.

    Parameters
    ----------
    classifier : Classifier or Branch
        On any device.
    directory : path
        Made if it does not exist.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(unshared(classifier.state_dict()), directory / WEIGHTS)
    classifier.spec.save(directory / SPEC)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous. Tensors that share memory, which cannot be written, become copies.

    Others stay where they are: a whole network beside itself may be more than a machine has.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = Counter(tensor.untyped_storage().data_ptr() for tensor in own.values())
    return {
        name: tensor.clone() if names[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in own.items()
    }


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors that share no memory.  The file appears whole or never."""
    from safetensors.torch import save_file

    with appearing(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata={"format": "pt"})


def load_classifier(
    directory: str | Path,
    device: str | torch.device = "cpu",
    builders: Builders | None = None,
) -> Classifier:
    """The classifier that save_classifier wrote, or ranks that split its head, in eval mode.

    Torch's random generators are left as they were.

    Parameters
    ----------
    directory : path
        With model.json and model.safetensors.
    device : str or torch.device
        Where the classifier goes.
    builders : mapping, optional
        As of build_classifier.

    Returns
    -------
    Classifier

    Raises
    ------
    ValueError
        Naming the file, for one that is absent or corrupt (by its checksum, where a manifest has
        it), another schema, an unknown builder, and missing, unexpected or ill-shaped tensors.
    """
    return load_built(
        ModelSpec.load(Path(directory) / SPEC), directory, device, build_classifier, builders
    )


def load_built(
    spec: ModelSpec,
    directory: str | Path,
    device: str | torch.device,
    build: Callable[[ModelSpec, Builders | None], Module],
    builders: Builders | None,
) -> Module:
    """What `build` makes of a directory's spec, with the directory's weights, in eval mode.

    Raises ValueError, naming the file, as load_classifier does.
    """
    directory = Path(directory)
    tensors = read_weights(directory)
    module = built_for(spec, directory, tensors, build, builders)
    return module.to(device).eval()


def built_for(
    spec: ModelSpec,
    directory: Path,
    tensors: Mapping[str, Tensor],
    build: Callable[[ModelSpec, Builders | None], Module],
    builders: Builders | None,
) -> Module:
    """What `build` makes of a directory's spec, with these tensors.  It may keep the head's.

    Raises ValueError, naming the file, where they do not fit each other.
    """
    path = directory / SPEC
    with torch.random.fork_rng(devices=[]), blamed_on(path):
        try:
            if spec.builder in NETWORKS and spec.builder not in (builders or {}):
                # A damaged spec may ask for a network of any size: one without memory says which.
                check_tensors(tensors, shapes_of(spec, build), directory / WEIGHTS)
            module = _built(spec, tensors, build, builders)
        except ValueError as error:
            words = str(error)
            raise ValueError(words if str(directory) in words else f"{path}: {words}") from None
    own = module.state_dict()
    check_tensors(tensors, own, directory / WEIGHTS)
    # Those of the head are in place already. To copy them to themselves would take their memory.
    others = {n: x for n, x in tensors.items() if x.data_ptr() != own[n].data_ptr()}
    with blamed_on(directory / WEIGHTS):
        module.load_state_dict(others, strict=False)
    return module


def _built(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    build: Callable[[ModelSpec, Builders | None], Module],
    builders: Builders | None,
) -> Module:
    """What `build` makes of a spec. A plain head is made of the tensors themselves.

    Of a huge label set the head is nearly all of a network.  So it is neither drawn first nor
    copied, and where its tensors view a file the ranks of a node share the file's memory.  What
    learns from there on changes pages of its own.
    """
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    if build is not build_classifier or spec.members or weight is None or bias is None:
        return build(spec, builders)
    dtype = torch.get_default_dtype()

    def make(spec: ModelSpec, features: int) -> nn.Linear | DustbinHead:
        rows = head_rows(spec)
        if weight.shape != (rows, features) or bias.shape != (rows,):
            return make_head(spec, features)  # whoever checks the tensors says what is wrong
        return make_head(spec, features, linear_of(weight.to(dtype), bias.to(dtype)))

    return cast(Module, build_classifier(spec, builders, make))  # as `build` is


def shapes_of(
    spec: ModelSpec, build: Callable[[ModelSpec, Builders | None], nn.Module]
) -> dict[str, Tensor]:
    """Tensors without memory that a network of a built-in builder has.

    They are made once for all specs that differ in which classes they are of and not in how many:
    thousands of specialists do.
    """
    head = {key: len(v) if isinstance(v, list) else v for key, v in spec.head.items()}
    key = repr((build, spec.builder, spec.options, spec.num_classes, spec.input.shape))
    key += repr((spec.input.dtype, head, spec.members, spec.cosine))
    with _lock:
        if key in _shapes:
            _shapes.move_to_end(key)
            return _shapes[key]
    with torch.device("meta"):
        shapes = build(spec, None).state_dict()
    with _lock:
        _shapes[key] = shapes
        if len(_shapes) > SHAPES_KEPT:
            _shapes.popitem(last=False)
    return shapes


def read_weights(directory: Path, owned: bool = False) -> dict[str, Tensor]:
    """Every tensor of a saved network, from one file or from several that an index names.

    owned: none of them views a file.

    Raises ValueError, naming the file, for one that is absent, corrupt or cut short.
    """
    if not (directory / WEIGHTS).is_file() and index_path(directory, PREFIX).is_file():
        files = RowFiles.open(directory, PREFIX)
        return {name: files.read(name) for name in files.names}
    return read_safetensors(directory / WEIGHTS, owned)


def save_part(classifier: Classifier, directory: str | Path, part: int, parts: int) -> None:
    """Write one rank's file of a classifier whose head is split. The first has the trunk, too.

    Once all ranks have written, `finish_parts` completes the directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows, whole = {}, {}
    for name, tensor in classifier.state_dict().items():
        if name.startswith(SPLIT_HEAD):
            rows[PLAIN_HEAD + name.removeprefix(SPLIT_HEAD)] = tensor
        elif part == 0:
            whole[name] = tensor
    write_part(directory, PREFIX, part, parts, rows, whole)


def finish_parts(classifier: Classifier, directory: str | Path, bounds: Sequence[int]) -> None:
    """Write the index of all parts and model.json. bounds: the first class of each part, and C."""
    saved = [name for name in classifier.state_dict() if name.startswith(SPLIT_HEAD)]
    names = [PLAIN_HEAD + name.removeprefix(SPLIT_HEAD) for name in saved]
    write_index(Path(directory), PREFIX, dict.fromkeys(names, tuple(bounds)))
    classifier.spec.save(Path(directory) / SPEC)


def check_tensors(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless `tensors` has the names and shapes of `needed`."""
    problems = []
    if missing := sorted(needed.keys() - tensors.keys()):
        problems.append(f"lacks {first_few(missing)}")
    if unexpected := sorted(tensors.keys() - needed.keys()):
        problems.append(f"has unexpected {first_few(unexpected)}")
    if not problems:
        wrong = [
            f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in needed.items()
            if tensors[name].shape != tensor.shape
        ]
        problems = [first_few(wrong)] if wrong else []
    if problems:
        raise ValueError(f"{path} does not fit the network: {'; '.join(problems)}")
