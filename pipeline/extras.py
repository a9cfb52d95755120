"""Which extra of the distribution brings a package that is not installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from .config import UserError

# Extra -> the modules that its packages bring; pyproject.toml has the packages.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "deepspeed",
        "webdataset",
        "sklearn",
        "scipy",
        "safetensors",
        "PIL",
        "jinja2",
        "matplotlib",
        "fontTools",
    ),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "timm": ("timm",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "stores": ("fsspec", "s3fs", "gcsfs", "huggingface_hub"),
}


def remedy(module: str) -> str:
    """The command that installs what a module is in."""
    package = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if package in modules:
            return f"pip install 'referral[{extra}]'"
    return f"pip install {package}"


def missing_package(error: ImportError) -> str:
    """One line for an import that failed because a package of an extra is not there; else ""."""
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
