"""How `cpu_tiles.multiply_tile` wants a matrix of activations: packed in blocks of a few rows.

A block of `block_rows` rows lies in memory as [steps][block_rows][p], where a step is the p
neighbouring numbers of a row that make up four bytes: two bfloat16, or one float32. Blocks follow
one another. The last block is as large as the others; rows past the matrix's end hold garbage,
which multiplies to garbage in their own rows of the product and nowhere else.

With one row a block, the layout is the plain row by row one.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core.types import uint16
from numba.extending import overload

from kernels.cpu_elements import STEP_BYTES
from kernels.cpu_runtime import jit, narrow, pointer, stack_room

_STEPS_AT_ONCE = 64


def numbers_per_step(element: Any) -> Any:
    """p above, for the element type that this zero stands for."""
    raise NotImplementedError("compiled code only")


def _numbers_per_step(element: Any) -> Any:
    def of_bfloat16(element: Any) -> Any:
        return 2

    def of_float32(element: Any) -> Any:
        return 1

    return of_bfloat16 if element == uint16 else of_float32


def pack_step(element: Any, values: Any, step: Any) -> Any:
    """The four bytes, as a uint32, that step `step` of a row of float32 `values` becomes."""
    raise NotImplementedError("compiled code only")


def _pack_step(element: Any, values: Any, step: Any) -> Any:
    def two_bfloat16(element: Any, values: Any, step: Any) -> Any:
        low = np.uint32(narrow(values[2 * step], element))
        high = np.uint32(narrow(values[2 * step + 1], element))
        return np.uint32(high << np.uint32(16)) | low

    def one_float32(element: Any, values: Any, step: Any) -> Any:
        return np.float32(values[step]).view(np.uint32)

    return two_bfloat16 if element == uint16 else one_float32


overload(numbers_per_step)(_numbers_per_step)
overload(pack_step)(_pack_step)


@jit
def store_packed(
    element: Any,
    address: int,
    block_rows: int,
    num_columns: int,
    row: int,
    first_column: int,
    values: Any,
) -> None:
    """Round the float32s `values` and store them in `row`, from `first_column` on.

    `address` is that of the packed matrix, which has `num_columns` columns; both counts of columns
    and the size of `values` are multiples of p.
    """
    p = numbers_per_step(element)
    block = row // block_rows * block_rows * num_columns
    start = (block + first_column * block_rows) // p + row % block_rows
    scatter_steps(element, address, start, block_rows, values)


@jit
def scatter_steps(element: Any, address: int, start: int, distance: int, values: Any) -> None:
    """Round the float32s `values`, and store their steps `distance` steps apart, from the step
    `start` behind an address on.
    """
    p = numbers_per_step(element)
    num_steps = values.size // p
    place = address + start * STEP_BYTES
    steps = numba.carray(pointer(place, np.uint32(0)), (num_steps * distance,))
    if distance == 1:  # Contiguous, which the compiler makes more of,
        for step in range(num_steps):
            steps[step] = pack_step(element, values, step)
        return
    # and so rounding comes first, and scattering afterwards.
    words = numba.carray(stack_room(np.uint32(0), _STEPS_AT_ONCE), (_STEPS_AT_ONCE,))
    for done in range(0, num_steps, _STEPS_AT_ONCE):
        count = min(_STEPS_AT_ONCE, num_steps - done)
        rest = values[done * p : (done + count) * p]
        for step in range(count):
            words[step] = pack_step(element, rest, step)
        places = steps[done * distance :]
        for step in range(count):
            places[step * distance] = words[step]
