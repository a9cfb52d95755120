"""A pretended accelerator: tensors that say "pretend:0", compute on the CPU, and are strict.

What a GPU refuses it refuses: operators over tensors of the device and the host, and collectives
of host tensors (as NCCL does).  What makes the host wait for a GPU it counts, by operator and by
the line of ours that asked.  Such are values that are read, shapes that depend on values, and
copies to the device that do not say non_blocking.

torch's Python device backend gives it a name, a guard and a place in autograd. A wrapper subclass
and a dispatch mode do the rest.  Register it before the first backward pass of a process: autograd
counts devices once.  So tests run it in processes of their own (tests/trainer/devices).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
ROOT = str(Path(__file__).parents[2])
aten = torch.ops.aten
# Answers, or shapes of answers, that the host must read before it goes on.
READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten._linalg_check_errors,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv2d")
NO_DATA = {"c10d::barrier", "c10d::monitored_barrier_"}  # collectives of no tensor of ours


class Mismatch(RuntimeError):
    """Tensors of the device and the host in one operator."""


class HostCollective(RuntimeError):
    """A collective of host tensors, in a group that NCCL would have."""


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


class DeviceTensor(torch.Tensor):
    """A tensor of the device. `host` is where its numbers are."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor):
        # A view of a plain tensor is a plain one, in inference mode too.
        with torch.inference_mode(host.is_inference()):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                layout=host.layout,
                device=torch.device(NAME, 0),
            )

    def __init__(self, host: Tensor):
        self.host = host

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self, **_) -> str:
        return f"DeviceTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert Pretended.active is not None, "the device is not there any more"
        return Pretended.active.run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """The device, while this is entered.

    waits: how often the host waited, by (kind, "file:line OPERATOR"). kind is "read" or "copy".
    """

    active: Pretended | None = None
    registered = False
    libraries: list[torch.library.Library] = []

    def __init__(self):
        super().__init__()
        register()
        self.device = torch.device(NAME, 0)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.exchanged: set[int] = set()  # memory of the device that gloo's answers lie in
        self.lifts = False
        self.depth = 0  # how often it is entered: an operator made of others enters it again

    def __enter__(self):
        if self.depth == 0:
            assert Pretended.active is None
            Pretended.active = self
            self.lifts = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(device=) is not seen
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.depth -= 1
        if self.depth == 0:
            torch._C._set_only_lift_cpu_tensors(self.lifts)
            Pretended.active = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def count(self, kind: str) -> int:
        return sum(times for (each, _), times in self.waits.items() if each == kind)

    def run(self, func, args, kwargs):
        packet = func.overloadpacket
        if torch.is_inference_mode_enabled() and is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if packet is aten._to_copy:
            return self._to_copy(func, args, kwargs)
        if packet is aten.copy_:
            return self._copy(func, args, kwargs)
        if packet in READS:
            self._wait("read", func)
        if packet in INDEXING:
            args = self._indices(func, args)
        tensors = tensors_of((args, kwargs))
        on_device = any(isinstance(each, DeviceTensor) for each in tensors)
        made_on = kwargs.get("device")
        if on_device or is_ours(made_on):
            self._check(func, tensors, kwargs)
        if made_on is not None and is_ours(made_on):
            kwargs = kwargs | {"device": torch.device("cpu")}
        elif made_on is not None:
            on_device = False
        if packet is aten._local_scalar_dense or packet is aten.equal:
            return func(*pytree.tree_map(unwrapped, args))
        return self._run(func, args, kwargs, on_device or is_ours(made_on))

    def _run(self, func, args, kwargs, on_device: bool):
        wrappers = {
            id(each.host): each
            for each in tensors_of((args, kwargs))
            if isinstance(each, DeviceTensor)
        }
        result = func(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs))

        def wrap(value):
            if not isinstance(value, Tensor) or not on_device:
                return value
            known = wrappers.get(id(value))
            return DeviceTensor(value) if known is None else known

        wrapped = pytree.tree_map(wrap, result)
        if on_device and is_view(func):
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped

    def _to_copy(self, func, args, kwargs):
        source, goal = args[0], kwargs.get("device")
        if goal is not None:
            self._moved(func, isinstance(source, DeviceTensor), is_ours(goal), kwargs)
        stays = isinstance(source, DeviceTensor) if goal is None else is_ours(goal)
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        copied = func(unwrapped(source), **kwargs)
        return DeviceTensor(copied) if stays else copied

    def _copy(self, func, args, kwargs):
        into, source = args[:2]
        same = unwrapped(source).untyped_storage().data_ptr() in self.exchanged
        if not isinstance(source, DeviceTensor) and source.ndim and not same:
            non_blocking = {"non_blocking": len(args) > 2 and args[2]} | kwargs
            self._moved(func, False, isinstance(into, DeviceTensor), non_blocking)
        elif isinstance(source, DeviceTensor) and not isinstance(into, DeviceTensor):
            self._moved(func, True, False, {})
        func(*map(unwrapped, args), **kwargs)
        return into

    def _moved(self, func, was_here: bool, comes_here: bool, kwargs) -> None:
        if was_here and not comes_here:
            self._wait("read", func)
        elif comes_here and not was_here and not kwargs.get("non_blocking"):
            self._wait("copy", func)

    def _indices(self, func, args):
        """Indices of the host are copied, and those of truth values are counted."""
        into, indices = args[:2]
        if not isinstance(into, DeviceTensor):
            return args
        given = [each for each in indices if each is not None]
        masks = [each for each in given if each.dtype in (torch.bool, torch.uint8)]
        filled = func.overloadpacket is not aten.index and args[2].numel() == 1
        if masks and not (filled and len(given) == 1):
            self._wait("read", func)
        if any(not isinstance(each, DeviceTensor) for each in given):
            self._wait("copy", func)
        kept = [each if each is None else DeviceTensor(unwrapped(each)) for each in indices]
        return (into, kept, *args[2:])

    def _check(self, func, tensors, kwargs) -> None:
        """Raise where a GPU would."""
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise Mismatch(f"{func} on {NAME} with a generator of the CPU, at {place()}")
        for each in tensors:
            if isinstance(each, DeviceTensor):
                continue
            if each.ndim == 0 and each.device.type == "cpu" and takes_scalars(func):
                continue
            raise Mismatch(f"{func} of {NAME} and {each.device} {list(each.shape)}, at {place()}")

    def _collective(self, func, args, kwargs):
        tensors = tensors_of((args, kwargs))
        if func._schema.name in NO_DATA:
            return func(*pytree.tree_map(unwrapped, args), **kwargs)
        if of_the_default_group(args):
            for each in tensors:
                if not isinstance(each, DeviceTensor):
                    raise HostCollective(f"{func} of a host tensor {list(each.shape)}: {place()}")
        self.exchanged |= {unwrapped(each).untyped_storage().data_ptr() for each in tensors}
        return self._run(func, args, kwargs, any(isinstance(t, DeviceTensor) for t in tensors))

    def _wait(self, kind: str, func) -> None:
        self.waits[kind, f"{place()} {func}"] += 1


def register() -> None:
    """Give the device its name, and products a low precision. Call it once in a process."""
    if Pretended.registered:
        return
    Pretended.registered = True
    _setup_privateuseone_for_python_backend(NAME, Module())
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    products = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in PRODUCTS:
        products.impl(name, in_low_precision(getattr(aten, name).default))
    Pretended.libraries = [rest, products]  # which end with the last one who knows them


def in_low_precision(func):
    """A product as autocast has it: of entries in the type that it was entered with."""

    def cast(value):
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.get_autocast_dtype(NAME)) if floats else value

    def product(*args, **kwargs):
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return func(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return product


def tensors_of(values) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(values) if isinstance(each, Tensor)]


def unwrapped(value):
    return value.host if isinstance(value, DeviceTensor) else value


def is_ours(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def is_view(func) -> bool:
    return any(
        each.alias_info is not None and not each.alias_info.is_write
        for each in func._schema.arguments
    )


def is_made_of_others(func) -> bool:
    """Whether autograd would have taken it apart, which inference mode leaves out."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def takes_scalars(func) -> bool:
    """Whether a GPU's kernel reads a number of the host: arithmetic does, entry by entry."""
    pointwise = torch.Tag.pointwise in func.tags
    return pointwise or func.overloadpacket in (aten.fill_, aten.masked_fill, aten.masked_fill_)


def of_the_default_group(args) -> bool:
    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(each)
            except (RuntimeError, TypeError):
                continue
            return group.group_name == dist.group.WORLD.group_name
    return True


def place() -> str:
    """The innermost line of the product that this operator comes from."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "/tests/" not in file and "/.venv/" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def pretended() -> Iterator[Pretended]:
    """The device, chosen by every process group inside as a GPU would be."""
    from unittest.mock import patch

    from networks import gathered_rows, linear_logits
    from trainer.core import checkpoints
    from trainer.distributed import ranks

    tables = (
        linear_logits.BLOCK_ENTRIES,
        gathered_rows.DENSE_ENTRIES,
        gathered_rows.GATHERED_ENTRIES,
    )
    with Pretended() as device:
        for table in tables:
            table[NAME] = table["cuda"]
        with (
            patch.object(ranks, "choose_device", lambda engine: device.device),
            patch.object(checkpoints, "in_background", lambda ranks: True),
            patch.object(dist.distributed_c10d, "_get_object_coll_device", lambda group=None: NAME),
        ):
            yield device
        for table in tables:
            del table[NAME]
