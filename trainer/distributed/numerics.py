"""How this process's torch computes: what [engine] says of products and kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import Engine

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS refuses to be deterministic


@contextmanager
def numerics(engine: Engine) -> Iterator[None]:
    """Inside, torch's settings are the config's. Afterwards, as they were."""
    cudnn = torch.backends.cudnn
    products = torch.get_float32_matmul_precision()
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = cudnn.benchmark, cudnn.deterministic
    try:
        torch.set_float32_matmul_precision(engine.matmul)
        if engine.deterministic:
            os.environ.setdefault(WORKSPACE, ":4096:8")
            # Of an operation that has no such kernel torch says so, once, and goes on.
            torch.use_deterministic_algorithms(True, warn_only=True)
            cudnn.deterministic = True
        if engine.cudnn_benchmark or engine.deterministic:
            cudnn.benchmark = engine.cudnn_benchmark
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = kernels
