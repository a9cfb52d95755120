"""Write requirements/*.lock: what constraints.txt pins, with the sha256 of every file of each.

    pip install uv && python requirements/lock.py [WHEEL of torch from another index ...]

One release of each serves every platform and Python that pyproject.toml names.  build.lock is what
distributions without a wheel are built with. torch.lock is torch alone, as PyPI has it, and
torch-cpu.lock as its own index for CPUs has it. cuda.lock is what wheels with CUDA bring along.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
HEAD = "# Written by requirements/lock.py from pyproject.toml and constraints.txt.\n"
EXTRAS = ("train", "deepspeed", "onnx", "test")
BUILD, TORCH = ("setuptools",), ("torch",)
OF_CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")


def compiled() -> list[str]:
    """One text for each release, with its hashes."""
    command = ["uv", "pip", "compile", "pyproject.toml", "-", "-c", "constraints.txt"]
    for extra in EXTRAS:
        command += ["--extra", extra]
    command += ["--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-annotate", "--no-header", "--quiet"]
    text = subprocess.run(
        command, input="setuptools>=77\n", cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE
    ).stdout
    return re.findall(r"^[A-Za-z].*(?:\n +--hash.*)*", text, re.MULTILINE)


def file_of(release: str) -> str:
    name = release.partition("==")[0]
    if name in BUILD:
        return "build.lock"
    if name in TORCH:
        return "torch.lock"
    return "cuda.lock" if OF_CUDA.fullmatch(name) else "base.lock"


def main(wheels: list[str]) -> None:
    files: dict[str, list[str]] = {}
    for release in compiled():
        files.setdefault(file_of(release), []).append(release)
    for wheel in map(Path, wheels):
        version = wheel.name.split("-")[1]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines = files.setdefault("torch-cpu.lock", [f"torch=={version}"])
        lines[0] += f" \\\n    --hash=sha256:{digest}"
    for name, releases in files.items():
        (HERE / name).write_text(HEAD + "\n".join(releases) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
