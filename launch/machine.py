"""What this machine has to run jobs on.  No torch: the devices are asked of nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from pipeline.config import Config, UserError


@dataclass(frozen=True)
class Machine:
    """devices: what CUDA_VISIBLE_DEVICES calls them. None on a machine without a GPU."""

    cores: int
    devices: tuple[str, ...] = ()

    def pool(self, config: Config) -> int:
        """How many processes run side by side."""
        return config.launch.pool or len(self.devices) or self.cores

    @property
    def ranks(self) -> int:
        """Ranks of each stage that scales, where launch.processes does not say."""
        return len(self.devices) or min(2, self.cores)


def this_machine(config: Config) -> Machine:
    """Raises UserError if launch.processes asks for more ranks than there are GPUs."""
    devices = [] if config.engine.device == "cpu" else visible_devices()
    processes = config.launch.processes
    if devices and processes and processes > len(devices):
        raise UserError(
            f"launch.processes = {processes}: this machine has {len(devices)} GPUs, and each rank "
            f"needs its own; try {len(devices)}"
        )
    return Machine(num_cores(), tuple(devices))


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_devices() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    # uuids, because CUDA's order of the devices is not nvidia-smi's.
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if ended.returncode != 0:
        return []
    return [word for word in ended.stdout.split() if word.startswith("GPU-")]
