"""What this machine has to run jobs on.  No torch: the devices are asked of nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from pipeline.config import Config, UserError


@dataclass(frozen=True)
class Machine:
    """devices: what CUDA_VISIBLE_DEVICES calls them; none on a machine without a GPU."""

    cores: int
    devices: tuple[str, ...] = ()

    def pool(self, config: Config) -> int:
        """How many processes run side by side."""
        return config.launch.pool or len(self.devices) or self.cores

    @property
    def ranks(self) -> int:
        """Ranks of the generalist where launch.processes does not say."""
        return len(self.devices) or min(2, self.cores)


def this_machine(config: Config) -> Machine:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    machine = Machine(cores, tuple(_devices()) if config.engine.device != "cpu" else ())
    wanted = config.launch.processes
    if machine.devices and wanted and wanted > len(machine.devices):
        raise UserError(
            f"launch.processes = {wanted}: this machine has {len(machine.devices)} GPUs, and each rank needs its own; "
            f"try {len(machine.devices)}"
        )
    return machine


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    try:  # uuids, because CUDA's order of the devices is not nvidia-smi's
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []
