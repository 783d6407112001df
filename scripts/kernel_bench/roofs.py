"""What the machine can do, measured by PyTorch's own kernels in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from scripts.kernel_bench.clocks import Clock


@dataclass(frozen=True, slots=True)
class Roofs:
    """Bytes and operations in a second."""

    copy_bytes_per_s: float
    """Read and written ones."""
    read_bytes_per_s: float
    """By a sum that writes nothing."""
    gemm_flop_per_s: float
    """bfloat16, square, of random numbers."""


def measure_roofs(clock: Clock, num_bytes: int = 2**32, gemm_size: int = 8192) -> Roofs:
    """`num_bytes`: of a buffer, far more than any cache."""
    source = torch.randn(num_bytes // 4, device=clock.device)
    target = torch.empty_like(source)
    copy_us = clock.time_us([partial(target.copy_, source)] * 4)
    read_us = clock.time_us([source.sum] * 4)
    del source, target
    a, b = (torch.randn((gemm_size, gemm_size), device=clock.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    gemm_us = clock.time_us([partial(torch.mm, a, b, out=out)] * 4)
    return Roofs(
        2 * num_bytes / (copy_us * 1e-6),
        num_bytes / (read_us * 1e-6),
        2 * gemm_size**3 / (gemm_us * 1e-6),
    )
