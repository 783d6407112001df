"""Memory for what the CPU's kernels read and write: weights, caches, rooms to work in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.cpu_runtime import CACHE_LINE_BYTES


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on a cache line's bound, with a whole line behind its end, because tiles read whole
    lines. Raises MemoryError.

    It comes from numpy, which asks the system for huge pages and for zeroed ones: memory that is
    never touched is never taken, and a first touch costs a fifth of what it does with small pages.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + 2 * CACHE_LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(tuple(shape))
