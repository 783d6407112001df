"""What the Triton kernels share: how they are declared, sized, and told to run.

Every kernel has a function that chooses its `Settings` from the model's shapes alone, never from
the lengths of a batch: the launcher and the ahead-of-time compiler (scripts/compile_kernels.py)
both use it, so that what is compiled is what will run, and a captured CUDA graph stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True, slots=True)
class Settings:
    """Compile-time arguments of a kernel, and how it runs."""

    constants: Mapping[str, int | bool]
    num_warps: int = 4
    num_stages: int = 2

    def keywords(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch."""
        return {**self.constants, **self.options()}

    def options(self) -> dict[str, int | bool]:
        """The part of them that is for the compiler."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def jit(function: Callable[..., Any]) -> Any:
    """Declare a Triton function; `triton.jit`, typed."""
    return triton.jit(function)


def padded(size: int, at_least: int = 16) -> int:
    """The power of two that a block of `size` elements takes up; a matrix product needs 16."""
    return max(at_least, int(triton.next_power_of_2(size)))


def cdiv(size: int, step: int) -> int:
    """Quotient, rounded up."""
    return -(-size // step)
