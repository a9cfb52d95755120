"""Which extra of the distribution brings a package that is not installed, and how it is had."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

from .config import UserError
from .version import DISTRIBUTION

ROOT = Path(__file__).parents[1]  # a clone, or the directory of installed packages
# Extra -> the modules that its packages bring. pyproject.toml has the packages.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "webdataset",
        "sklearn",
        "scipy",
        "safetensors",
        "PIL",
        "jinja2",
        "matplotlib",
        "fontTools",
    ),
    "deepspeed": ("deepspeed",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "timm": ("timm",),
    "vision": ("torchvision",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "parquet": ("pyarrow",),
    "serving": ("fastapi", "uvicorn", "httpx"),
    "stores": ("fsspec", "s3fs", "gcsfs", "huggingface_hub"),
}
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow", "fontTools": "fonttools"}  # else the same


def remedy(module: str) -> str:
    """The command that installs what a module is in."""
    name = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if name in modules:
            return install(extra)
    return f"pip install {PACKAGES.get(name, name)}"


def install(extra: str) -> str:
    """The command that installs an extra beside this copy, wherever the copy came from.

    In a clone it is the clone's own extra.  Elsewhere it names the packages: a wheel may lie
    anywhere, and the name of the distribution on no index.
    """
    if is_clone(ROOT):
        return f"pip install -e {shlex.quote(f'{ROOT}[{extra}]')}"
    return "pip install " + " ".join(shlex.quote(each) for each in requirements(extra))


def is_clone(directory: Path) -> bool:
    """Whether a directory has our own pyproject.toml. A package of others may have left its."""
    try:
        project = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return project.get("project", {}).get("name") == DISTRIBUTION


def requirements(extra: str) -> list[str]:
    """`package>=version` of an extra, as the installed distribution has them.

    Of files that nobody installed: the names alone.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [PACKAGES.get(module, module) for module in EXTRAS[extra]]
    marked = (line.partition(";") for line in lines)
    of_extra = re.compile(rf"""extra == ['"]{extra}['"]""")
    return [requirement.strip() for requirement, _, marker in marked if of_extra.search(marker)]


def missing_package(error: ImportError) -> str:
    """One line for an import that failed because a package of an extra is not there, else ""."""
    package = (error.name or "").partition(".")[0]
    known = {module for modules in EXTRAS.values() for module in modules}
    if package not in known or is_installed(package):
        return ""
    return f"{package} is not installed; {remedy(package)}"


def require(module: str, what: str) -> None:
    """Raise UserError, one line, where a module that `what` needs is not installed."""
    if not is_installed(module):
        raise UserError(f"{what}: {module} is not installed; {remedy(module)}")


def is_installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return find_spec(module) is not None
