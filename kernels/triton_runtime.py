"""What the Triton kernels share: how they are declared, sized, and told to run.

Every kernel has a function that chooses its `Settings` from the model's shapes and the GPU alone,
never from the lengths of a batch: the launcher and the ahead-of-time compiler
(scripts/compile_kernels.py) both use it, so that what is compiled is what will run, and a captured
CUDA graph stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

_RESERVED_SHARED_BYTES = 1024
"""Of a multiprocessor's shared memory, by the system, for each program."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What settings depend on."""

    capability: int
    """Compute capability, as 90 for 9.0."""
    shared_bytes: int
    """Shared memory that one program may have."""
    num_multiprocessors: int


A100 = Gpu(80, 163 * 1024, 108)
H200 = Gpu(90, 227 * 1024, 132)
B200 = Gpu(100, 227 * 1024, 148)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; for the interpreter, which has none, an H200."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        10 * properties.major + properties.minor,
        properties.shared_memory_per_multiprocessor - _RESERVED_SHARED_BYTES,
        properties.multi_processor_count,
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """Compile-time arguments of a kernel, and how it runs."""

    constants: Mapping[str, int | bool]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    """Of a thread. Without it, the assembler keeps to fewer than there are, for the sake of more
    programs at a time, and rather spills some."""

    def keywords(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch."""
        return {**self.constants, **self.options()}

    def options(self) -> dict[str, int | bool]:
        """The part of them that is for the compiler."""
        options: dict[str, int | bool] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


def jit(function: Callable[..., Any]) -> Any:
    """Declare a Triton function; `triton.jit`, typed."""
    return triton.jit(function)


def kernel(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel. For `varying` arguments, numbers and pointers that differ from step to
    step, it isn't compiled anew when one happens to be 1 or a multiple of 16."""

    def declare(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=varying)

    return declare


def padded(size: int, at_least: int = 16) -> int:
    """The power of two that a block of `size` elements takes up; a matrix product needs 16."""
    return max(at_least, int(triton.next_power_of_2(size)))


def cdiv(size: int, step: int) -> int:
    """Quotient, rounded up."""
    return -(-size // step)
