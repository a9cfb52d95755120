"""GPUs of this machine as its driver shows them, and whether the torch that is here can use them.

Nothing of torch is imported: `referral doctor` asks where torch is missing, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

DEVICES = Path("/dev")
ANSWERS_IN_S = 20  # nvidia-smi, on a machine whose driver was just loaded
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
# Maker -> what a torch for its GPUs is built for.
PLATFORMS = {"NVIDIA": "CUDA", "AMD": "ROCm"}
INSTALLS = {
    "NVIDIA": "pip install --force-reinstall --index-url https://pypi.org/simple torch",
    "AMD": "pip install --force-reinstall torch from the index that "
    "https://pytorch.org/get-started/locally names for your ROCm",
}


class Gpus(NamedTuple):
    """maker: a key of PLATFORMS. text: what was seen, and where."""

    maker: str
    text: str


class TorchBuild(NamedTuple):
    """What torch says of itself.

    cuda, rocm: the version that it is built for, else None. devices: a line for each that it sees.
    error: of a driver that did not answer.
    """

    version: str
    cuda: str | None
    rocm: str | None
    devices: list[str]
    error: str = ""

    @property
    def target(self) -> str:
        if self.rocm:
            return f"ROCm {self.rocm}"
        return f"CUDA {self.cuda}" if self.cuda else "CPUs alone"


def gpus_of_machine() -> Gpus | None:
    """The GPUs whose driver is loaded. None without any."""
    return _nvidia() or _amd()


def _nvidia() -> Gpus | None:
    lines = _nvidia_smi()
    if lines:
        name, _, driver = lines[0].rpartition(", ")
        return Gpus("NVIDIA", f"{len(lines)} x {name}, driver {driver}")
    if (DEVICES / "nvidia0").exists():
        return Gpus("NVIDIA", f"an NVIDIA GPU ({DEVICES / 'nvidia0'})")
    return None


def _nvidia_smi() -> list[str]:
    """One line a GPU, `NAME, DRIVER`. None where it is not installed or finds no driver."""
    if shutil.which(QUERY[0]) is None:
        return []
    try:
        ran = subprocess.run(
            QUERY, capture_output=True, text=True, errors="replace", timeout=ANSWERS_IN_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if ran.returncode:
        return []
    return [line.strip() for line in ran.stdout.splitlines() if ", " in line]


def _amd() -> Gpus | None:
    device = DEVICES / "kfd"
    return Gpus("AMD", f"an AMD GPU ({device})") if device.exists() else None


def judge(build: TorchBuild, gpus: Gpus | None, device: str = "auto") -> list[tuple[bool, str]]:
    """Whether torch can use the GPUs that the machine has, a finding a line.

    device: engine.device of the run, if one is named.
    """
    if build.devices:
        return [(True, f"{text} ({build.target})") for text in build.devices]
    if device == "cpu":
        return [(True, 'engine.device = "cpu": runs go on gloo and the CPU')]
    if gpus is None:
        lacks = 'no GPU, and engine.device = "cuda": "auto" or "cpu" go on the CPU'
        if device == "cuda":
            return [(False, lacks)]
        return [(True, f"no GPU (torch is built for {build.target}): runs go on gloo and the CPU")]
    return [_unused(build, gpus)]


def _unused(build: TorchBuild, gpus: Gpus) -> tuple[bool, str]:
    """The finding about GPUs that torch does not see."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return True, f"{gpus.text}, hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
    here = f"{gpus.text}, but torch {build.version}"
    own = {"NVIDIA": build.cuda, "AMD": build.rocm}[gpus.maker]
    if own is None:
        return False, (
            f'{here} is built for {build.target}; {INSTALLS[gpus.maker]} (or engine.device = "cpu")'
        )
    return False, (
        f"{here}, built for {build.target}, sees none; take a newer driver, or a torch for an "
        f"older {PLATFORMS[gpus.maker]}"
    )
