"""int8 weights as bfloat16, for tiles of many rows.

Widening a weight takes as long as multiplying it with some rows. Tiles of few rows do it as they
go (`kernels.cpu_tiles`): reading the weights takes longer, and nothing is written. For larger
tiles a thread widens an item of work once, into memory of its own that stays in the second-level
cache, and multiplies all blocks of rows with that.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from kernels.cpu_elements import COLUMNS, STEP_BYTES, Elements
from kernels.cpu_runtime import jit
from kernels.cpu_tiles import MOST_WIDENING_ROWS

_LINE_BYTES = 64
_I64 = ir.IntType(64)


def _widen_lines(typing_context: Any, place: Any, num_lines: Any, out: Any) -> Any:
    """`num_lines` times 64 int8, as bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, num_lines, out = arguments
        with cgutils.for_range(builder, num_lines, intp=_I64) as loop:
            offset = builder.mul(loop.index, ir.Constant(_I64, _LINE_BYTES))
            halves = Elements(builder, "bfloat16", "int8").as_bfloat16(builder.add(place, offset))
            to = builder.add(out, builder.mul(offset, ir.Constant(_I64, 2)))
            for half, numbers in enumerate(halves):
                at = builder.add(to, ir.Constant(_I64, half * _LINE_BYTES))
                builder.store(numbers, builder.inttoptr(at, numbers.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_widen: Any = intrinsic(_widen_lines)


@jit
def is_widened(block_rows: int) -> bool:
    """Whether an item of int8 is widened for blocks of so many rows."""
    return block_rows > MOST_WIDENING_ROWS


def take_item(w_element: Any, numbers: Any, num_steps: Any, block_rows: Any, room: Any) -> Any:
    """The address of an item's packed numbers as tiles of `block_rows` rows take them. They lie at
    `numbers` and have so many steps, of all panels; `room` is where they may be widened to."""
    raise NotImplementedError("compiled code only")


def _take_item(w_element: Any, numbers: Any, num_steps: Any, block_rows: Any, room: Any) -> Any:
    def as_it_is(w_element: Any, numbers: Any, num_steps: Any, block_rows: Any, room: Any) -> Any:
        return numbers

    def widened(w_element: Any, numbers: Any, num_steps: Any, block_rows: Any, room: Any) -> Any:
        if not is_widened(block_rows):
            return numbers
        num_bytes = num_steps * COLUMNS * STEP_BYTES // 2
        _widen(numbers, (num_bytes + _LINE_BYTES - 1) // _LINE_BYTES, room)
        return room

    return widened if w_element == types.int8 else as_it_is


overload(take_item)(_take_item)
