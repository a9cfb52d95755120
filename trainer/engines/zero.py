"""DeepSpeed's ZeRO: optimizer states (stage 1), gradients (2) and parameters (3) split over the ranks."""

from __future__ import annotations

import copy
import logging
import os
import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from networks import parameter_count
from pipeline.config import Engine, Schedule, UserError

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


class DeepSpeedEngine:
    def __init__(self, config: Engine, ranks: Ranks):
        self.ranks, self.stage = ranks, config.zero_stage
        self.precision = precision(config, ranks.device)

    def prepare(
        self, network: nn.Module, schedule: Schedule, state: dict | None = None
    ) -> nn.Module:
        """Hand network and optimizer to DeepSpeed, going on from a checkpoint's state.  Returns the module to call."""
        self.deepspeed = import_deepspeed(self.ranks)
        if state is not None:
            network.load_state_dict(state["network"])
        # DeepSpeed's hooks stay on the network that it trains, and stage 3 takes its parameters apart.
        self.network, self.plain = network, without_weights(copy.deepcopy(network))
        self.engine, *_ = self.deepspeed.initialize(
            model=network,
            optimizer=build_optimizer(network, schedule),
            dist_init_required=False,
            config=self._config(schedule),
        )
        if state is not None:
            self._load_optimizer(state["optimizer"])
        return self.engine

    def _config(self, schedule: Schedule) -> dict:
        """Precision is torch's autocast as under DDP: float32 weights, so that averages and exports are exact."""
        parts = self.ranks.world_size * schedule.accumulation
        # DeepSpeed takes the whole bucket at once, 2 GB by default, however small the network is.
        bucket = min(BUCKET, -(-parameter_count(self.network) // ALIGNED) * ALIGNED)
        low = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(self.precision)
        return {
            "train_micro_batch_size_per_gpu": schedule.batch_size // parts,
            "gradient_accumulation_steps": 1,
            # Managed, gradients are exchanged while backward goes on; unmanaged, in step, after every micro-batch's.
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
            **({"torch_autocast": {"enabled": True, "dtype": low}} if low else {}),
        }

    def autocast(self):
        return torch.autocast(
            self.ranks.device.type, self.precision, enabled=self.precision != torch.float32
        )

    def accumulating(self, last: bool):
        """DeepSpeed itself knows when gradients are exchanged."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, rate: float) -> None:
        """One optimizer step at this learning rate."""
        set_rate(self.engine.optimizer, rate)
        self.engine.step()

    def state(self) -> dict:
        """What a checkpoint keeps, by the names of the parameters: any engine goes on from it.  Collective.

        DeepSpeed's own checkpoints are pickles, for one number of ranks; its universal ones know Adam's state alone.
        """
        return {"network": self.weights(), "optimizer": self._optimizer_state()}

    def _optimizer_state(self) -> dict[str, dict]:
        if self.stage == 0:
            return optimizer_state(self.engine.optimizer, self.network)
        self._link()
        shared = next(iter(self._optimizer.state.values()), {})
        get = self.deepspeed.utils.safe_get_full_optimizer_state
        found = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                found[name] = {
                    key: get(parameter, key).clone() if _per_weight(value) else value.clone()
                    for key, value in shared.items()
                    if value is not None
                }
        return found

    def _load_optimizer(self, states: dict[str, dict]) -> None:
        if self.stage == 0:
            return load_optimizer_state(self.engine.optimizer, self.network, states)
        shared = next(iter(states.values()), {})
        for flat in self._flat_weights:
            self._optimizer.state[flat] = {
                key: torch.zeros_like(flat)
                if _per_weight(value)
                else value.clone()  # each group counts its own steps
                for key, value in shared.items()
            }
        self._link()
        for name, parameter in self.network.named_parameters():
            for key, value in states.get(name, {}).items():
                if _per_weight(value):
                    self._set(parameter, key, value.to(self.ranks.device))

    def _link(self) -> None:
        """Tell the parameters where their optimizer states are: DeepSpeed does so once, after its first group's first
        step, when the other groups have none."""
        if self.stage < SPLIT_WEIGHTS:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """This rank's share of one parameter's state.  DeepSpeed's safe_set_full_... cannot set what it had to pad."""
        utils = self.deepspeed.utils
        if self.stage < SPLIT_WEIGHTS:
            return utils.safe_set_full_optimizer_state(parameter, value, key)
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
        utils.safe_set_local_optimizer_state(
            parameter, padded[size * self.ranks.rank :][:size], key
        )

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's, of the flat shares that this rank steps."""
        return self.engine.optimizer.optimizer

    @property
    def _flat_weights(self) -> list[Tensor]:
        zero = self.engine.optimizer
        return (
            zero.single_partition_of_fp32_groups
            if self.stage < SPLIT_WEIGHTS
            else zero.fp32_partitioned_groups_flat
        )

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole network's state; collective."""
        for buffer in (
            self.network.buffers()
        ):  # each rank has its own running statistics; rank 0's count, as under DDP
            dist.broadcast(buffer, src=0)
        whole = self.deepspeed.zero.GatheredParameters(list(self.network.parameters()))
        whole = whole if self.stage == SPLIT_WEIGHTS else nullcontext()
        with whole:
            return {
                name: value.detach().clone() for name, value in self.network.state_dict().items()
            }

    @contextmanager
    def eval_model(self, average: AveragedWeights | None):
        """The network as it would be exported now, with the averaged weights where there are any; collective."""
        network = self.export()
        if average:
            average.swap(network)
        try:
            yield network
        finally:
            if average:
                average.swap(network)
            without_weights(network)

    def export(self) -> nn.Module:
        """The plain network with the trained weights."""
        self.plain.load_state_dict(self.weights(), assign=True)
        return self.plain

    def close(self) -> None:
        engine, self.engine = getattr(self, "engine", None), None
        if engine is not None:
            engine.destroy()


def without_weights(network: nn.Module) -> nn.Module:
    """`network` itself, its parameters only shapes; its buffers stay."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(
                module, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            )
    return network


def _per_weight(value) -> bool:
    """Whether a state has an entry for each weight, as Adam's averages; its step count has not."""
    return isinstance(value, Tensor) and value.ndim > 0


def import_deepspeed(ranks: Ranks):
    """DeepSpeed, kept from compiling a shared-memory op at every start (a minute, and a crash without a compiler)."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    os.environ.setdefault(
        "LOCAL_RANK", "0"
    )  # without torchrun; it asks even where the process group is there
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as mistake:
        raise UserError(
            f'engine.name = "deepspeed" needs the package deepspeed: {mistake}'
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
