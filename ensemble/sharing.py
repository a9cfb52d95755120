"""What a specialist has in common with the generalist that it started as."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from networks import Classifier
from networks.cosine import UnitTrunk
from networks.likening import same_tensor
from networks.refilling import saved_tensors


def shared_names(generalist: nn.Module, specialist: nn.Module) -> list[str]:
    """The names of the specialist's tensors that equal the generalist's."""
    common = generalist.state_dict()
    return [
        name
        for name, tensor in specialist.state_dict().items()
        if name in common and same_tensor(common[name], tensor)
    ]


def share_storage(generalist: nn.Module, specialist: nn.Module) -> None:
    """Let the specialist's tensors that equal the generalist's be the generalist's own."""
    common = generalist.state_dict()
    for name, tensor in [*specialist.named_parameters(), *specialist.named_buffers()]:
        if name in common and same_tensor(common[name], tensor.detach()):
            tensor.data = common[name]


def own_bytes(generalist: nn.Module | None, specialist: nn.Module) -> int:
    """Bytes of the specialist's tensors, without memory that is the generalist's."""
    known = set() if generalist is None else {_address(x) for x in _tensors(generalist)}
    own = {_address(x): x.nbytes for x in _tensors(specialist)}
    return sum(size for address, size in own.items() if address not in known)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    # Of thousands of small modules. parameters() and buffers() take ten times as long.
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor


def _address(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.data_ptr()


def shared_prefix(generalist: Classifier, specialist: Classifier) -> int:
    """How many leading blocks of the trunks do the same, tensor for tensor.

    -1 where the inputs are preprocessed differently.
    """
    one, other = generalist.spec, specialist.spec
    if one.input != other.input:
        return -1
    if (one.builder, one.options, one.cosine) != (other.builder, other.options, other.cosine):
        return 0
    length = 0
    for mine, theirs in zip(blocks(generalist.trunk), blocks(specialist.trunk), strict=True):
        if not _equal_tensors(mine, theirs):
            break
        length += 1
    return length


def blocks(trunk: nn.Module) -> list[nn.Module]:
    if isinstance(trunk, UnitTrunk):
        return [*blocks(trunk.net), trunk.unit]
    return list(trunk.children()) if isinstance(trunk, nn.Sequential) else [trunk]


def _equal_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules of one architecture hold the same parameters and buffers.

    Batch norm's counter of batches aside.
    """
    mine, theirs = saved_tensors(one), saved_tensors(other)
    if mine.keys() != theirs.keys():
        return False
    names = [name for name in mine if not name.endswith("num_batches_tracked")]
    return all(same_tensor(mine[name], theirs[name]) for name in names)
