"""DeepSpeed's ZeRO: optimizer states (stage 1), gradients (2) and parameters (3) split over the ranks."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import Engine, Schedule, UserError
from ..distributed import Ranks, precision
from ..optimisation import AveragedWeights, build_optimizer

PARTITIONED = 3  # the stage from which on no rank holds the whole network
TAG = "deepspeed"  # the engine's own directory in a checkpoint


class DeepSpeedEngine:
    name = "deepspeed"

    def __init__(self, config: Engine, ranks: Ranks):
        self.ranks, self.stage = ranks, config.zero_stage
        self.precision = precision(config, ranks.device)

    def prepare(self, network: nn.Module, schedule: Schedule) -> nn.Module:
        """Hand the network and its optimizer to DeepSpeed.  Returns the module to call in the forward pass."""
        if schedule.ema and self.stage == PARTITIONED:
            raise UserError(
                f"ema = {schedule.ema}: with engine.zero_stage = 3 no rank holds the weights to average; take "
                "zero_stage 0, 1 or 2, or ema = 0"
            )
        deepspeed = import_deepspeed(self.ranks)
        self.gathered = deepspeed.zero.GatheredParameters
        self.network = network.to(self.ranks.device)
        # DeepSpeed's hooks stay on the network that it trains, and stage 3 takes its parameters apart.
        self.plain = copy.deepcopy(self.network)
        self.driver, *_ = deepspeed.initialize(
            model=self.network, optimizer=build_optimizer(self.network, schedule), dist_init_required=False,
            config=self._config(schedule),
        )  # fmt: skip
        return self.driver

    def _config(self, schedule: Schedule) -> dict:
        """Precision is torch's autocast as under DDP: float32 weights, so that averages and exports are exact."""
        parts = self.ranks.world_size * schedule.accumulation
        low = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(self.precision)
        return {
            "train_micro_batch_size_per_gpu": schedule.batch_size // parts, "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False, "gradient_clipping": schedule.clip_norm,
            "zero_optimization": {"stage": self.stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": sys.maxsize, "wall_clock_breakdown": False,
            **({"torch_autocast": {"enabled": True, "dtype": low}} if low else {}),
        }  # fmt: skip

    def autocast(self):
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def accumulating(self, last: bool):
        """backward only adds up here; DeepSpeed exchanges gradients in step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.driver.backward(loss)

    def step(self, rate: float) -> None:
        """One optimizer step at this learning rate."""
        for group in self.driver.optimizer.param_groups:
            group["lr"] = rate
        self.driver.step()

    def state(self) -> dict:
        """What a checkpoint keeps of rank 0, beside the parts."""
        return {"zero_stage": self.stage, "world_size": self.ranks.world_size}

    def write_part(self, place: Path) -> None:
        """DeepSpeed's own files; collective."""
        self.driver.save_checkpoint(str(place), tag=TAG, save_latest=False)

    def load(self, state: dict, place: Path) -> None:
        """Go on from a checkpoint, of another number of ranks too; the stage must be the same."""
        if state["zero_stage"] != self.stage:
            raise UserError(
                f"{place} was written with engine.zero_stage = {state['zero_stage']}, this is {self.stage}; finish the "
                "stage as it was begun, or start it anew with --force"
            )
        tag = TAG
        if state["world_size"] != self.ranks.world_size and self.stage:
            tag = self._universal(place)
            self.driver._config.load_universal_checkpoint = True
        path, _ = self.driver.load_checkpoint(str(place), tag=tag)
        assert path, f"DeepSpeed found nothing to load in {place}"

    def _universal(self, place: Path) -> str:
        """Convert the parts, once, to the form that any number of ranks reads."""
        tag = f"{TAG}-universal"
        if self.ranks.is_main and not (place / tag).exists():
            temporary = place / f".{tag}.{uuid.uuid4().hex[:8]}"
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                       "--input_folder", str(place / TAG), "--output_folder", str(temporary)]  # fmt: skip
            found = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet(self.ranks))
            assert found.returncode == 0, f"ds_to_universal: {found.stderr[-2000:]}"
            try:
                os.rename(temporary, place / tag)
            except OSError:
                shutil.rmtree(temporary)  # another attempt was first
        dist.barrier()
        return tag

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole network's state; collective."""
        for buffer in self.network.buffers():  # each rank has its own running statistics; rank 0's count, as under DDP
            dist.broadcast(buffer, src=0)
        whole = self.gathered(list(self.network.parameters())) if self.stage == PARTITIONED else nullcontext()
        with whole:
            return {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    @contextmanager
    def judged(self, average: AveragedWeights | None):
        """The network as it would be exported now, with the averaged weights where there are any; collective."""
        network = self.export()
        if average:
            average.swap(network)
        try:
            yield network
        finally:
            if average:
                average.swap(network)

    def export(self) -> nn.Module:
        """The plain network with the trained weights."""
        self.plain.load_state_dict(self.weights())
        return self.plain

    def close(self) -> None:
        driver, self.driver = getattr(self, "driver", None), None
        if driver is not None:
            driver.destroy()


def quiet(ranks: Ranks) -> dict[str, str]:
    return {"DS_ACCELERATOR": "cuda" if ranks.device.type == "cuda" else "cpu", "DEEPSPEED_LOG_LEVEL": "error"}


def import_deepspeed(ranks: Ranks):
    """DeepSpeed, kept from compiling a shared-memory op at every start (a minute, and a crash without a compiler)."""
    os.environ.update(quiet(ranks))
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as mistake:
        raise UserError(f'engine.name = "deepspeed" needs the package deepspeed: {mistake}') from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
