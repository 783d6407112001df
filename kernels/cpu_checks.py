"""Looking for numbers that are not finite, as fast as memory is read."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cpu_runtime import jit, pointer

_EXPONENTS: dict[torch.dtype, Any] = {
    torch.float32: np.uint32(0x7F800000),
    torch.bfloat16: np.uint16(0x7F80),
    torch.float16: np.uint16(0x7C00),
}
"""All exponent bits are set in infinities and NaN, and in no other number."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a contiguous tensor holds finite numbers alone."""
    exponent = _EXPONENTS[tensor.dtype]
    return bool(_is_finite(tensor.data_ptr(), tensor.numel(), exponent))


@jit
def _is_finite(address: int, count: int, exponent: Any) -> bool:
    numbers = numba.carray(pointer(address, exponent), (count,))
    bad = 0
    for i in range(count):
        bad += (numbers[i] & exponent) == exponent
    return bad == 0
