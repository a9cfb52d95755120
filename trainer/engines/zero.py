"""DeepSpeed's ZeRO: what is split over the ranks depends on the stage.

stage 1  optimizer states
stage 2  gradients too
stage 3  parameters too
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from networks import parameter_count
from pipeline.config import Engine as EngineConfig
from pipeline.config import ResolvedSchedule, UserError
from pipeline.config.deepspeed import merged_deepspeed
from pipeline.extras import missing_package
from pipeline.scaling import bucket_weights

from ..core.optim import (
    AveragedWeights,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rate,
)
from ..core.split_state import Part
from ..distributed.ranks import Ranks, autocast, gather, precision

SPLIT_WEIGHTS = 3  # the stage from which on no rank holds the whole network


class _ZeroOptimizer(Protocol):
    """What is used here of DeepSpeed's optimizers of stages 1 to 3, whose classes share no base."""

    optimizer: torch.optim.Optimizer  # torch's, of the flat parts that this rank steps
    single_partition_of_fp32_groups: list[Tensor]  # those parts in stages 1 and 2
    fp32_partitioned_groups_flat: list[Tensor]  # those parts in stage 3
    parameter_offload: _Offload  # of stage 3
    _hp_optimizer_states_linked: bool  # of stages 1 and 2

    def _lazy_init_hp_params_optimizer_state(self) -> None: ...  # of stages 1 and 2


class _Coordinator(Protocol):
    """What gathers stage 3's parameters, and remembers in which order they are needed."""

    def is_invalid_trace(self) -> bool: ...
    def _invalidate_trace(self) -> None: ...


class _Offload(Protocol):
    def get_param_coordinator(self) -> _Coordinator: ...


class _SplitParameter(Protocol):
    """What stage 3 makes of a parameter."""

    ds_tensor: Tensor  # this rank's part, padded
    ds_shape: torch.Size


class _Address(Protocol):
    """Where this rank's entries of a flattened parameter begin, and how many they are."""

    start: int
    numel: int


class _Fragment(Protocol):
    """This rank's part of a parameter of stages 1 and 2, and of its optimizer states."""

    lp_fragment_address: _Address

    def get_hp_fragment(self, optim_state_key: str) -> Tensor: ...


class _Engine(Protocol):
    """What is used here of deepspeed.DeepSpeedEngine, an nn.Module whose optimizer is a union."""

    # torch's in stage 0, a _ZeroOptimizer otherwise.
    optimizer: torch.optim.Optimizer

    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> None: ...
    def empty_partition_cache(self) -> None: ...
    def destroy(self) -> None: ...


class DeepSpeedEngine:
    """An Engine (see trainer.engines) by DeepSpeed."""

    # From `prepare` on.
    deepspeed: ModuleType
    network: nn.Module  # DeepSpeed's hooks stay on it, and stage 3 takes its parameters apart
    plain: nn.Module  # a copy for exports, its parameters only shapes
    engine: _Engine | None = None
    _bounds: dict[str, tuple[int, ...]]  # of parameters that are split, in entries

    def __init__(self, config: EngineConfig, ranks: Ranks):
        self.ranks = ranks
        self.stage = config.zero_stage
        self.config = config
        self.further = config.deepspeed
        self.precision = precision(config, ranks.device)

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        self.deepspeed = import_deepspeed(self.ranks)
        if state is not None:
            load_one_by_one(network, state["network"])
        self.network = network
        self.plain = shape_of(network)
        module, *_ = self.deepspeed.initialize(
            model=network,
            optimizer=build_optimizer(network, schedule),
            dist_init_required=False,
            config=self._config(schedule),
        )
        self.engine = cast(_Engine, module)
        self._bounds = self._find_bounds()
        if state is not None:
            self._load_optimizer(state["optimizer"])
            if state.get("best") is not None:
                state["best"] = {n: self._cut(n, value) for n, value in state["best"].items()}
        return module

    def _cut(self, name: str, whole: Tensor) -> Tensor | Part:
        """This rank's part of a tensor that is split."""
        bounds = self._bounds.get(name)
        if bounds is None:
            return whole
        first, end = bounds[self.ranks.rank : self.ranks.rank + 2]
        # A copy: a view would keep the whole.
        return Part(whole.flatten()[first:end].clone(), bounds, tuple(whole.shape))

    def _config(self, schedule: ResolvedSchedule) -> dict[str, object]:
        """Precision is torch's autocast as under DDP.

        Weights are float32, so that averages and exports are exact.
        """
        parts = self.ranks.world_size * schedule.accumulation
        # DeepSpeed's own buckets are 2 GB, however small the network is, and its stage 3 keeps a
        # billion gathered weights and flattens a billion gradients at once.
        bucket = bucket_weights(parameter_count(self.network))
        config: dict[str, object] = {
            "train_micro_batch_size_per_gpu": schedule.batch_size // parts,
            "gradient_accumulation_steps": 1,
            # Managed, gradients are exchanged while backward goes on. Unmanaged, in step, after
            # every micro-batch's.
            "managed_gradient_accumulation": schedule.accumulation == 1,
            "gradient_clipping": schedule.clip_norm,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": bucket,
                "stage3_max_reuse_distance": bucket,
                "sub_group_size": bucket,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": sys.maxsize,
            "wall_clock_breakdown": False,
        }
        low_precision = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(self.precision)
        if low_precision:
            config["torch_autocast"] = {"enabled": True, "dtype": low_precision}
        return merged_deepspeed(config, self.further)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.config, self.ranks.device)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """DeepSpeed itself knows when gradients are exchanged."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._running.backward(loss)

    def step(self, rate: float) -> None:
        set_rate(self._running.optimizer, rate)
        self._running.step()

    def state(self) -> dict:
        """See trainer.engines: in stages 1 to 3 each rank has its parts of all tensors.

        DeepSpeed's own checkpoints are pickles, for one number of ranks. Its universal ones know
        Adam's state alone.
        """
        return {"network": self._own_weights(), "optimizer": self._optimizer_state()}

    def _own_weights(self) -> dict[str, Tensor | Part]:
        """This rank's part of each parameter, no copy. Buffers, and what is not split, whole."""
        # Each rank has its own running statistics. Rank 0's count, as under DDP.
        for buffer in self.network.buffers():
            dist.broadcast(buffer, src=0)
        own: dict[str, Tensor | Part] = {}
        for name, value in self.network.state_dict(keep_vars=True).items():
            bounds = self._bounds.get(name)
            own[name] = value.detach()
            if bounds is not None:
                shape = tuple(getattr(value, "ds_shape", value.shape))
                own[name] = Part(self._own_entries(value, bounds), bounds, shape)
        return own

    def _own_entries(self, parameter: nn.Parameter, bounds: tuple[int, ...]) -> Tensor:
        """This rank's entries of a flattened parameter."""
        first, end = bounds[self.ranks.rank : self.ranks.rank + 2]
        if self.stage == SPLIT_WEIGHTS:
            return cast(_SplitParameter, parameter).ds_tensor.detach()[: end - first]
        return parameter.detach().flatten()[first:end]

    def _find_bounds(self) -> dict[str, tuple[int, ...]]:
        """For each split parameter, the first entry of each rank, and their number.

        Collective.
        """
        counts = {}
        for name, value in self.network.state_dict(keep_vars=True).items():
            if hasattr(value, "ds_tensor"):
                whole, size = value.ds_numel, value.ds_tensor.numel()
                counts[name] = max(0, min(size, whole - size * self.ranks.rank))
            elif hasattr(value, "_hp_mapping"):
                fragment = cast("_Fragment | None", value._hp_mapping)
                counts[name] = fragment.lp_fragment_address.numel if fragment else 0
        of_ranks = gather(counts, self.ranks)
        return {name: (0, *accumulate(each[name] for each in of_ranks)) for name in counts}

    def _optimizer_state(self) -> dict[str, dict]:
        if self.stage == 0:
            return optimizer_state(self._running.optimizer, self.network)
        self._link()
        flat_state = next(iter(self._zero.optimizer.state.values()), {})
        return {
            name: self._parameter_state(name, parameter, flat_state)
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    def _parameter_state(
        self, name: str, parameter: nn.Parameter, flat_state: dict
    ) -> dict[str, Tensor | Part]:
        """This rank's part of one parameter's state, of the entries that a flat part has."""
        state: dict[str, Tensor | Part] = {}
        bounds = self._bounds[name]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for key, value in flat_state.items():
            if _per_weight(value):
                state[key] = Part(self._own_state(parameter, key, bounds), bounds, shape)
            elif value is not None:
                state[key] = value.clone()
        return state

    def _own_state(self, parameter: nn.Parameter, key: str, bounds: tuple[int, ...]) -> Tensor:
        first, end = bounds[self.ranks.rank : self.ranks.rank + 2]
        if self.stage == SPLIT_WEIGHTS:
            local = self.deepspeed.utils.safe_get_local_optimizer_state(parameter, key)
            return local.flatten()[: end - first]
        fragment = cast("_Fragment | None", getattr(parameter, "_hp_mapping", None))
        if fragment is None:
            return parameter.new_empty(0)
        return fragment.get_hp_fragment(key)

    def _load_optimizer(self, states: dict[str, dict]) -> None:
        if self.stage == 0:
            return load_optimizer_state(self._running.optimizer, self.network, states)
        shared = next(iter(states.values()), {})
        for flat in self._flat_weights:
            self._zero.optimizer.state[flat] = {
                key: _initial_state(value, flat) for key, value in shared.items()
            }
        self._link()
        for name, parameter in self.network.named_parameters():
            for key, value in states.get(name, {}).items():
                if _per_weight(value):
                    self._set(parameter, key, value.to(self.ranks.device))

    def _link(self) -> None:
        """Tell the parameters where their optimizer states are.

        DeepSpeed does so once, after its first group's first step, when the other groups have none.
        """
        if self.stage < SPLIT_WEIGHTS:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set this rank's part of one parameter's state.

        DeepSpeed's safe_set_full_... cannot set what it had to pad.
        """
        utils = self.deepspeed.utils
        if self.stage < SPLIT_WEIGHTS:
            return utils.safe_set_full_optimizer_state(parameter, value, key)
        size = cast(_SplitParameter, parameter).ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
        own = padded[size * self.ranks.rank :][:size]
        utils.safe_set_local_optimizer_state(parameter, own, key)

    @property
    def _running(self) -> _Engine:
        assert self.engine is not None, "prepare comes first"
        return self.engine

    @property
    def _zero(self) -> _ZeroOptimizer:
        assert self.stage > 0
        return cast(_ZeroOptimizer, self._running.optimizer)

    @property
    def _flat_weights(self) -> list[Tensor]:
        if self.stage < SPLIT_WEIGHTS:
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_partitioned_groups_flat

    @contextmanager
    def eval_model(self, average: AveragedWeights | None) -> Iterator[nn.Module]:
        """The network that is trained: of stage 3 each layer is whole while it computes.

        Its head is whole all the while: it is read row by row.
        """
        for buffer in self.network.buffers():
            dist.broadcast(buffer, src=0)
        if average:
            average.swap(self.network)
        try:
            with self._layer_by_layer() if self.stage == SPLIT_WEIGHTS else nullcontext():
                yield self.network
        finally:
            if average:
                average.swap(self.network)

    @contextmanager
    def _layer_by_layer(self) -> Iterator[None]:
        """Inside, a layer of stage 3 is gathered when it computes, and given back at once.

        With a trace of a whole step DeepSpeed gathers ahead what comes next, and keeps up to a
        billion weights for later.
        """
        coordinator = self._zero.parameter_offload.get_param_coordinator()

        def forget_trace(*_: object) -> None:
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

        forget_trace()
        hook = self.network.register_forward_pre_hook(forget_trace)
        head = list(getattr(self.network, "head", self.network).parameters())
        try:
            _reads_of_others(self.network, True)
            with self.deepspeed.zero.GatheredParameters(head):
                yield
        finally:
            _reads_of_others(self.network, False)
            hook.remove()
            self._running.empty_partition_cache()

    def own_rows(self, network: nn.Module) -> dict[str, slice]:
        return {}

    def remember(self, network: nn.Module) -> dict[str, Tensor | Part]:
        """This rank's parts, and on each rank what is whole there."""
        return {name: value.clone() for name, value in self._own_weights().items()}

    def export(self, weights: Mapping[str, Tensor | Part] | None = None) -> nn.Module:
        if self.stage:
            self._zero.optimizer.state.clear()  # before the whole network comes
        own = self._own_weights() | dict(weights or {})
        whole = {name: self._whole(own.pop(name)) for name in list(own)}
        self.plain.load_state_dict(whole, assign=True)
        return self.plain

    def _whole(self, value: Tensor | Part) -> Tensor:
        """A copy of the whole tensor, on every rank. Collective."""
        if not isinstance(value, Part):
            return value.clone()
        whole = value.own.new_empty(value.bounds[-1])
        for rank, (first, end) in enumerate(pairwise(value.bounds)):
            if rank == self.ranks.rank:
                whole[first:end] = value.own
            if end > first:
                dist.broadcast(whole[first:end], src=rank)
        return whole.view(value.shape)

    def close(self) -> None:
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.destroy()


def _reads_of_others(network: nn.Module, gathered: bool) -> None:
    """Whether a module that reads another one's weights, as attention does, has them gathered."""
    for module in network.modules():
        vars(module._parameters)["_in_forward"] = gathered


def load_one_by_one(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """What load_state_dict does, but it never holds all of `weights`, which may be on the disk."""
    own = network.state_dict()
    if own.keys() != weights.keys():
        raise RuntimeError(f"weights of one side alone: {sorted(own.keys() ^ weights.keys())}")
    for name, value in own.items():
        saved = weights[name]
        if saved.shape != value.shape:
            raise RuntimeError(f"{name}: {list(saved.shape)}, not {list(value.shape)}")
        value.copy_(saved)


def shape_of(network: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are only shapes."""
    memo: dict[int, object] = {}
    for tensor in network.state_dict(keep_vars=True).values():
        memo[id(tensor)] = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
    return copy.deepcopy(network, memo)


def _per_weight(value: object) -> TypeGuard[Tensor]:
    """Whether a state has an entry for each weight, as Adam's averages. Its step count has not."""
    return isinstance(value, Tensor) and value.ndim > 0


def _initial_state(value: Tensor, flat: Tensor) -> Tensor:
    """The state of a flat part: zeros to be filled, or a copy (each part counts its steps)."""
    if _per_weight(value):
        return torch.zeros_like(flat)
    return value.to(flat.device, copy=True)


def import_deepspeed(ranks: Ranks) -> ModuleType:
    """DeepSpeed, kept from compiling a shared-memory op at every start.

    That takes a minute, and crashes without a compiler.
    """
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    # It takes the GPU of this number, and asks for it even where there is no torchrun.  Where each
    # process sees a GPU of its own alone, that is 0 on every rank.
    if ranks.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(ranks.device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        text = missing_package(error) or str(error)
        raise UserError(f'engine.name = "deepspeed": {text}') from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


if TYPE_CHECKING:
    from . import Engine

    _: type[Engine] = DeepSpeedEngine
