"""int8 weights as bfloat16, for tiles of many rows.

Widening a weight takes as long as multiplying it with some rows. Tiles of few rows do it as they
go (`kernels.cpu_elements`): reading the weights takes longer, and nothing is written. For larger
tiles a thread widens an item of work once, into memory of its own that stays in the second-level
cache, and multiplies all blocks of rows with that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from kernels.cpu_elements import COLUMNS, STEP_BYTES, Elements
from kernels.cpu_panels import panel_multiplier
from kernels.cpu_runtime import jit

_MOST_ROWS = 4
"""Of a tile that widens as it goes."""
_LINE_BYTES = 64
_BFLOAT16 = np.uint16(0)
_I64 = ir.IntType(64)

_multiply = panel_multiplier(0, adds=0)


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
    return block_rows > _MOST_ROWS


def take_item(w_element: Any, numbers: Any, num_steps: Any, block_rows: Any, room: Any) -> Any:
    """The address of an item's packed numbers for `multiply_item`: they lie at `numbers` and have
    so many steps, of all panels; `room` is where they may be widened to."""
    raise NotImplementedError("compiled code only")


def multiply_item(
    x_element: Any,
    w_element: Any,
    rows: Any,
    panels: Any,
    x: Any,
    w: Any,
    w_step: Any,
    w_panel: Any,
    steps: Any,
    ahead: Any,
    ahead_step: Any,
    ahead_panel: Any,
    out: Any,
    out_row: Any,
) -> Any:
    """`panel_multiplier(0, adds=0)`, for what `take_item` returned."""
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


def _multiply_item(
    x_element: Any,
    w_element: Any,
    rows: Any,
    panels: Any,
    x: Any,
    w: Any,
    w_step: Any,
    w_panel: Any,
    steps: Any,
    ahead: Any,
    ahead_step: Any,
    ahead_panel: Any,
    out: Any,
    out_row: Any,
) -> Any:
    def as_it_is(
        x_element: Any,
        w_element: Any,
        rows: Any,
        panels: Any,
        x: Any,
        w: Any,
        w_step: Any,
        w_panel: Any,
        steps: Any,
        ahead: Any,
        ahead_step: Any,
        ahead_panel: Any,
        out: Any,
        out_row: Any,
    ) -> Any:
        _multiply(
            x_element,
            w_element,
            rows,
            panels,
            x,
            w,
            w_step,
            w_panel,
            steps,
            ahead,
            ahead_step,
            ahead_panel,
            out,
            out_row,
        )

    def perhaps_widened(
        x_element: Any,
        w_element: Any,
        rows: Any,
        panels: Any,
        x: Any,
        w: Any,
        w_step: Any,
        w_panel: Any,
        steps: Any,
        ahead: Any,
        ahead_step: Any,
        ahead_panel: Any,
        out: Any,
        out_row: Any,
    ) -> Any:
        if is_widened(rows):
            _multiply(
                x_element,
                _BFLOAT16,
                rows,
                panels,
                x,
                w,
                w_step,
                w_panel,
                steps,
                ahead,
                ahead_step,
                ahead_panel,
                out,
                out_row,
            )
        else:
            _multiply(
                x_element,
                w_element,
                rows,
                panels,
                x,
                w,
                w_step,
                w_panel,
                steps,
                ahead,
                ahead_step,
                ahead_panel,
                out,
                out_row,
            )

    return perhaps_widened if w_element == types.int8 else as_it_is


overload(take_item)(_take_item)
overload(multiply_item)(_multiply_item)
