"""Weights of linear layers on the CPU, packed once in the order in which the tiles read them.

A packed weight [outputs, inputs] is a row of *panels* of 16 outputs. A panel lists its numbers step
by step (see `kernels.cpu_tiles`): 64 bytes for each two inputs in bfloat16, or each one in float32,
and half of that in int8. Outputs are filled up to whole panels with zeros.

int8 is weight-only: an output's weights are integers from -127 to 127 times one float32 scale, and
activations stay bfloat16. Half the bytes are read, which is what bounds small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cpu_elements import COLUMNS, STEP_BYTES
from kernels.cpu_memory import zeros
from kernels.cpu_packing import numbers_per_step
from kernels.cpu_runtime import jit, pointer, widen

MATRIX = np.dtype(
    [
        ("numbers", np.int64),
        ("scales", np.int64),
        ("bias", np.int64),
        ("num_outputs", np.int64),
        ("num_steps", np.int64),
    ],
    align=True,
)
"""A linear layer as compiled code sees it: addresses (scales and bias 0 if there are none)."""

_PIECE_OUTPUTS = 64 * COLUMNS
"""A thread packs so many at a time."""
_LEVELS = 127
"""Greatest int8 weight."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The weight of a linear layer."""

    numbers: Tensor
    """[groups, panels, steps, 16, numbers of a step]."""
    scales: Tensor | None
    """[groups, panels * 16] float32 of an int8 weight."""
    num_outputs: int
    """Of each group."""
    dtype: torch.dtype
    """Of the activations that it multiplies."""

    @property
    def num_steps(self) -> int:
        """Of a panel."""
        return self.numbers.shape[2]

    @classmethod
    def pack(
        cls,
        weights: Sequence[Tensor],
        *,
        num_groups: int = 1,
        to_int8: bool = False,
        num_threads: int = 1,
    ) -> PackedWeight:
        """Pack a matrix [outputs, inputs], given as tensors one below the other, all float32 or all
        bfloat16; int8 is for bfloat16 alone. Each of `num_groups` equal groups of outputs begins
        with a panel of its own. `num_threads` share the work, most of which is waiting for new
        memory.

        Raises ValueError for an odd number of inputs in bfloat16, and for int8 with float32.
        """
        num_inputs, dtype = weights[0].shape[1], weights[0].dtype
        per_step = STEP_BYTES // dtype.itemsize
        if num_inputs % per_step:
            raise ValueError(f"a bfloat16 weight has {num_inputs} inputs; an even number is needed")
        if to_int8 and dtype is not torch.bfloat16:
            raise ValueError(f"int8 weights multiply bfloat16 activations, not {dtype}")
        num_outputs = sum(map(len, weights)) // num_groups
        num_panels = -(-num_outputs // COLUMNS)
        shape = (num_groups, num_panels, num_inputs // per_step, COLUMNS, per_step)
        numbers = zeros(shape, torch.int8 if to_int8 else dtype)
        scales = torch.zeros(num_groups, num_panels * COLUMNS) if to_int8 else None
        done = 0
        with ThreadPoolExecutor(num_threads) as pool:
            packing = []
            for weight in weights:
                rows = weight.contiguous()
                while len(rows) > 0:
                    group, first = divmod(done, num_outputs)
                    most = _PIECE_OUTPUTS - first % COLUMNS  # No two threads write to one panel.
                    piece = rows[: min(num_outputs - first, most)]
                    place = (piece.data_ptr(), first, len(piece), num_inputs)
                    target = numbers[group].data_ptr()
                    if scales is None:
                        packing.append(pool.submit(_pack_words, *place, target, per_step))
                    else:
                        at = scales[group].data_ptr()
                        packing.append(pool.submit(_pack_int8, *place, target, at))
                    done += len(piece)
                    rows = rows[len(piece) :]
            for part in packing:
                part.result()
        return cls(numbers, scales, num_outputs, dtype)

    def unpack(self) -> Tensor:
        """[outputs, inputs] in the dtype of the activations."""
        rows = self.numbers.transpose(2, 3).flatten(3).flatten(1, 2)
        if self.scales is not None:
            rows = rows * self.scales[:, :, None]
        return rows[:, : self.num_outputs].flatten(0, 1).to(self.dtype)

    def matrix(self, bias: Tensor | None, group: int = 0) -> tuple[int, ...]:
        """A group as a `MATRIX`; `bias` is that of all groups. The tensors must outlive it."""
        return (
            self.numbers[group].data_ptr(),
            0 if self.scales is None else self.scales[group].data_ptr(),
            0 if bias is None else bias[group * self.num_outputs :].data_ptr(),
            self.num_outputs,
            self.num_steps,
        )


@jit
def unpack_output(element: Any, address: int, num_steps: int, output: int, row: Any) -> None:
    """The weights of one output, as float32, from a packed weight of an element's type."""
    p = numbers_per_step(element)
    panel, column = divmod(output, COLUMNS)
    start = (panel * num_steps * COLUMNS + column) * p
    numbers = numba.carray(pointer(address, element), (start + num_steps * COLUMNS * p,))
    for step in range(num_steps):
        for i in range(p):
            row[step * p + i] = widen(numbers[start + step * COLUMNS * p + i])


@jit
def _pack_words(
    weight_address: int, first: int, num_rows: int, num_inputs: int, address: int, per_step: int
) -> None:
    """Outputs `first` and further ones; the numbers of a step and output are one word."""
    num_steps, end = num_inputs // per_step, first + num_rows
    num_panels = (end + COLUMNS - 1) // COLUMNS
    weight = numba.carray(pointer(weight_address, np.int32(0)), (num_rows, num_steps))
    packed = numba.carray(pointer(address, np.int32(0)), (num_panels, num_steps, COLUMNS))
    for panel in range(first // COLUMNS, num_panels):
        start = panel * COLUMNS
        columns = range(max(first - start, 0), min(end - start, COLUMNS))
        if len(columns) == COLUMNS:  # A constant, which the compiler makes more of.
            for step in range(num_steps):
                for column in range(COLUMNS):
                    packed[panel, step, column] = weight[start + column - first, step]
        else:
            for step in range(num_steps):
                for column in columns:
                    packed[panel, step, column] = weight[start + column - first, step]


@jit
def _pack_int8(
    weight_address: int, first: int, num_rows: int, num_inputs: int, address: int, scales: int
) -> None:
    end = first + num_rows
    num_panels = (end + COLUMNS - 1) // COLUMNS
    weight = numba.carray(pointer(weight_address, np.uint16(0)), (num_rows, num_inputs))
    shape = (num_panels, num_inputs // 2, COLUMNS, 2)
    packed = numba.carray(pointer(address, np.int8(0)), shape)
    scale_of = numba.carray(pointer(scales, np.float32(0)), (num_panels * COLUMNS,))
    for output in range(first, end):
        row = weight[output - first]
        largest = np.float32(0)
        for i in range(num_inputs):
            largest = max(largest, abs(widen(row[i])))
        scale_of[output] = largest / np.float32(_LEVELS)
        inverse = np.float32(_LEVELS) / largest if largest > 0 else np.float32(0)
        for i in range(num_inputs):
            level = np.rint(widen(row[i]) * inverse)
            packed[output // COLUMNS, i // 2, output % COLUMNS, i % 2] = np.int8(level)
