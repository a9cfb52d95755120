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
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from ..core.optim import (
    AveragedWeights,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rate,
)
from ..distributed.ranks import Ranks, precision

BUCKET = 2**26  # weights whose gradients are exchanged at once, at most
ALIGNED = 1024  # buckets are multiples of this: DeepSpeed wants even ones
SPLIT_WEIGHTS = 3  # the stage from which on no rank holds the whole network


class _ZeroOptimizer(Protocol):
    """What is used here of DeepSpeed's optimizers of stages 1 to 3, whose classes share no base."""

    optimizer: torch.optim.Optimizer  # torch's, of the flat parts that this rank steps
    single_partition_of_fp32_groups: list[Tensor]  # those parts in stages 1 and 2
    fp32_partitioned_groups_flat: list[Tensor]  # those parts in stage 3
    _hp_optimizer_states_linked: bool  # of stages 1 and 2

    def _lazy_init_hp_params_optimizer_state(self) -> None: ...  # of stages 1 and 2


class _SplitParameter(Protocol):
    """What stage 3 makes of a parameter."""

    ds_tensor: Tensor  # this rank's part, padded


class _Engine(Protocol):
    """What is used here of deepspeed.DeepSpeedEngine, an nn.Module whose optimizer is a union."""

    # torch's in stage 0, a _ZeroOptimizer otherwise.
    optimizer: torch.optim.Optimizer

    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> None: ...
    def destroy(self) -> None: ...


class DeepSpeedEngine:
    """An Engine (see trainer.engines) by DeepSpeed."""

    # From `prepare` on.
    deepspeed: ModuleType
    network: nn.Module  # DeepSpeed's hooks stay on it, and stage 3 takes its parameters apart
    plain: nn.Module  # a copy for exports, its parameters only shapes
    engine: _Engine | None = None

    def __init__(self, config: EngineConfig, ranks: Ranks):
        self.ranks = ranks
        self.stage = config.zero_stage
        self.further = config.deepspeed
        self.precision = precision(config, ranks.device)

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        self.deepspeed = import_deepspeed(self.ranks)
        if state is not None:
            network.load_state_dict(state["network"])
        self.network = network
        self.plain = without_weights(copy.deepcopy(network))
        module, *_ = self.deepspeed.initialize(
            model=network,
            optimizer=build_optimizer(network, schedule),
            dist_init_required=False,
            config=self._config(schedule),
        )
        self.engine = cast(_Engine, module)
        if state is not None:
            self._load_optimizer(state["optimizer"])
        return module

    def _config(self, schedule: ResolvedSchedule) -> dict[str, object]:
        """Precision is torch's autocast as under DDP.

        Weights are float32, so that averages and exports are exact.
        """
        parts = self.ranks.world_size * schedule.accumulation
        # DeepSpeed takes the whole bucket at once, 2 GB by default, however small the network is.
        bucket = min(BUCKET, -(-parameter_count(self.network) // ALIGNED) * ALIGNED)
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
        return torch.autocast(
            self.ranks.device.type, self.precision, enabled=self.precision != torch.float32
        )

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """DeepSpeed itself knows when gradients are exchanged."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._running.backward(loss)

    def step(self, rate: float) -> None:
        set_rate(self._running.optimizer, rate)
        self._running.step()

    def state(self) -> dict:
        """See trainer.engines.

        DeepSpeed's own checkpoints are pickles, for one number of ranks. Its universal ones know
        Adam's state alone.
        """
        return {"network": self.weights(), "optimizer": self._optimizer_state()}

    def _optimizer_state(self) -> dict[str, dict]:
        if self.stage == 0:
            return optimizer_state(self._running.optimizer, self.network)
        self._link()
        flat_state = next(iter(self._zero.optimizer.state.values()), {})
        return {
            name: self._parameter_state(parameter, flat_state)
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    def _parameter_state(self, parameter: nn.Parameter, flat_state: dict) -> dict[str, Tensor]:
        """One parameter's whole state, of the entries that a flat part has. Collective."""
        get = self.deepspeed.utils.safe_get_full_optimizer_state
        state = {}
        for key, value in flat_state.items():
            if _per_weight(value):
                state[key] = get(parameter, key).clone()
            elif value is not None:
                state[key] = value.clone()
        return state

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

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole network's state. Collective."""
        # Each rank has its own running statistics. Rank 0's count, as under DDP.
        for buffer in self.network.buffers():
            dist.broadcast(buffer, src=0)
        gathered: AbstractContextManager[object] = nullcontext()
        if self.stage == SPLIT_WEIGHTS:
            gathered = self.deepspeed.zero.GatheredParameters(list(self.network.parameters()))
        with gathered:
            state = self.network.state_dict()
            return {name: value.detach().clone() for name, value in state.items()}

    @contextmanager
    def eval_model(self, average: AveragedWeights | None) -> Iterator[nn.Module]:
        network = self.export()
        if average:
            average.swap(network)
        try:
            yield network
        finally:
            if average:
                average.swap(network)
            without_weights(network)

    def own_rows(self, network: nn.Module) -> dict[str, slice]:
        return {}

    def remember(self, network: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in network.state_dict().items()}

    def export(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        self.plain.load_state_dict(self.weights(), assign=True)
        self.plain.load_state_dict(weights or {}, strict=False)
        return self.plain

    def close(self) -> None:
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.destroy()


def without_weights(network: nn.Module) -> nn.Module:
    """`network` itself, its parameters only shapes. Its buffers stay."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, shape)
    return network


def _per_weight(value: object) -> TypeGuard[Tensor]:
    """Whether a state has an entry for each weight, as Adam's averages. Its step count has not."""
    return isinstance(value, Tensor) and value.ndim > 0


def _initial_state(value: Tensor, flat: Tensor) -> Tensor:
    """Of a flat part: zeros to be filled, or a copy (each part counts its own steps)."""
    if _per_weight(value):
        return torch.zeros_like(flat)
    return value.to(flat.device, copy=True)


def import_deepspeed(ranks: Ranks) -> ModuleType:
    """DeepSpeed, kept from compiling a shared-memory op at every start.

    That takes a minute, and crashes without a compiler.
    """
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    # Without torchrun it asks for this even where the process group is there.
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
