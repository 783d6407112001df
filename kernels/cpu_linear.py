"""Linear layers on the CPU: rows times weights that were packed for it (`kernels.cpu_weights`).

The rows that are multiplied are packed too, in *blocks* of as many rows as a tile takes (see
`kernels.cpu_packing`). An *item* of work is a few panels, which a thread multiplies with one block
after the other while they are in its second-level cache; so each weight is read from memory exactly
once, and meanwhile.

What bounds it: for few rows reading the weights, for many arithmetic, never one after the other.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernels.cpu_elements import COLUMNS, STEP_BYTES
from kernels.cpu_gate import gate_row
from kernels.cpu_packing import numbers_per_step
from kernels.cpu_panels import panel_multiplier
from kernels.cpu_runtime import CACHE_LINE_BYTES, itemsize, jit, pointer, widen
from kernels.cpu_team import claim, num_members
from kernels.cpu_tiles import TILE_PANELS, TILE_ROWS, tile_panels
from kernels.cpu_widening import is_widened, take_item

_ITEM_BYTES = 384 * 1024
"""Weights of an item at most: they stay in the second-level cache for all blocks of rows."""
_ITEMS_PER_MEMBER = 8
"""At least, if there are enough tiles, lest one member computes the last item for long while the
others wait."""
_MOST_SHARES = 8
"""Blocks of rows that bring the next item's weights into the cache, at most: a power of two, so
that each share is whole bytes."""
MAX_TILE_ROWS = TILE_ROWS[-1]
_MOST_PANELS = 8
SCRATCH_COLUMNS = _MOST_PANELS * COLUMNS
_SUMS_BYTES = MAX_TILE_ROWS * SCRATCH_COLUMNS * 4
"""Of a block's results."""

_multiply_panels = panel_multiplier(0, adds=0)


def choose_block_rows(num_rows: int) -> int:
    """Rows of a block, for a number of rows: a shape of tile that leaves few of them empty."""
    enough = (rows for rows in TILE_ROWS if num_rows <= rows)
    return next(enough, min(TILE_ROWS[:-3:-1], key=lambda rows: -(-num_rows // rows) * rows))


def scratch_bytes(most_inputs: int) -> int:
    """Size of the memory that a member needs for layers of at most so many inputs."""
    num_steps = (most_inputs + 1) // 2  # of bfloat16, to which int8 may be widened
    of_item = max(_ITEM_BYTES, TILE_PANELS * num_steps * COLUMNS * STEP_BYTES)
    return 2 * (_SUMS_BYTES + of_item + CACHE_LINE_BYTES)


@jit
def _step_bytes(x_element: Any, w_element: Any) -> int:
    """From one step of a packed panel to the next."""
    return int(COLUMNS * numbers_per_step(x_element) * itemsize(w_element))


@jit
def _multiply_block(
    x_element: Any,
    w_element: Any,
    team: int,
    matrix: Any,
    x: int,
    block_rows: int,
    block: int,
    num_blocks: int,
    panel: int,
    together: int,
    numbers: int,
    out: int,
    out_stride: int,
) -> None:
    """out[r, c] = scale[c] * (x . w) + bias[c], for a block of packed rows and the panels of an
    item, those `together` from `panel` on that there are; `numbers` is what `take_item` said."""
    num_panels = min(together, (matrix.num_outputs + COLUMNS - 1) // COLUMNS - panel)
    w_step = _step_bytes(x_element, w_element)
    w_panel = matrix.num_steps * w_step
    taken_step = _step_bytes(x_element, x_element) if is_widened(block_rows) else w_step
    distance, ahead_step, ahead_panel = _look_ahead(
        w_step, team, matrix, panel, together, block, num_blocks
    )
    _multiply_panels(
        x_element,
        w_element,
        block_rows,
        num_panels,
        x + block * matrix.num_steps * block_rows * STEP_BYTES,
        numbers,
        taken_step,
        matrix.num_steps * taken_step,
        matrix.num_steps,
        matrix.numbers + panel * w_panel + distance,
        ahead_step,
        ahead_panel,
        out,
        out_stride * 4,
    )
    sums = numba.carray(pointer(out, np.float32(0)), (block_rows, out_stride))
    end = min(num_panels * COLUMNS, matrix.num_outputs - panel * COLUMNS)
    if matrix.scales != 0:
        place = matrix.scales + panel * COLUMNS * 4
        scales = numba.carray(pointer(place, np.float32(0)), (end,))
        for row in range(block_rows):
            sums_of_row = sums[row]
            for column in range(end):
                sums_of_row[column] *= scales[column]
    if matrix.bias != 0:
        place = matrix.bias + panel * COLUMNS * itemsize(x_element)
        bias = numba.carray(pointer(place, x_element), (end,))
        for row in range(block_rows):
            sums_of_row = sums[row]
            for column in range(end):
                sums_of_row[column] += widen(bias[column])


@jit
def _take_panels(
    x_element: Any,
    w_element: Any,
    matrix: Any,
    panel: int,
    columns: int,
    block_rows: int,
    room: int,
) -> int:
    """`take_item` for the panels of so many columns, from `panel` on."""
    numbers = matrix.numbers + panel * matrix.num_steps * _step_bytes(x_element, w_element)
    num_steps = (columns + COLUMNS - 1) // COLUMNS * matrix.num_steps
    return int(take_item(w_element, numbers, num_steps, block_rows, room))


@jit
def _item_panels(team: int, matrix: Any, block_rows: int) -> int:
    """Panels of an item of work: several tiles, but enough items for all members."""
    num_panels = (matrix.num_outputs + COLUMNS - 1) // COLUMNS
    tile = tile_panels(block_rows, _MOST_PANELS)
    fitting = _ITEM_BYTES // (matrix.num_steps * COLUMNS * STEP_BYTES)
    share = num_panels // (_ITEMS_PER_MEMBER * num_members(team))
    return int(max(tile, min(_MOST_PANELS, fitting, share) // tile * tile))


@jit
def _look_ahead(
    w_step: int, team: int, matrix: Any, panel: int, together: int, block: int, num_blocks: int
) -> tuple[int, int, int]:
    """What to bring into the cache, for the member's next item to be there when this one is done:
    how far behind the panels it begins, and the distances of its steps and panels. All members
    being equally fast, the next item is the one after those that the others have claimed.

    The blocks of rows share this, so that memory is read as steadily as is computed.
    """
    next_panel = panel + num_members(team) * together
    shares = 1
    while 2 * shares <= min(num_blocks, _MOST_SHARES):
        shares *= 2
    if next_panel * COLUMNS >= matrix.num_outputs or block >= shares:
        return 0, 0, 0
    w_panel = matrix.num_steps * w_step
    distance = (next_panel - panel) * w_panel + block * w_panel // shares
    return distance, w_step // shares, w_panel


@jit
def project(
    x_element: Any,
    w_element: Any,
    team: int,
    matrix: Any,
    x: int,
    block_rows: int,
    num_rows: int,
    out: int,
    out_stride: int,
    adds: bool,
    scratch: int,
) -> None:
    """out[row, output] = (or +=) the layer's outputs, float32; members claim panels."""
    rows = numba.carray(pointer(out, np.float32(0)), (num_rows, out_stride))
    together = _item_panels(team, matrix, block_rows)
    num_blocks = (num_rows + block_rows - 1) // block_rows
    sums = numba.carray(pointer(scratch, np.float32(0)), (block_rows, SCRATCH_COLUMNS))
    while True:
        panel = claim(team) * together
        first = panel * COLUMNS
        if first >= matrix.num_outputs:
            break
        columns = min(together * COLUMNS, matrix.num_outputs - first)
        numbers = _take_panels(
            x_element, w_element, matrix, panel, columns, block_rows, scratch + 2 * _SUMS_BYTES
        )
        for block in range(num_blocks):
            row = block * block_rows
            in_place = not adds and columns % COLUMNS == 0 and row + block_rows <= num_rows
            _multiply_block(
                x_element,
                w_element,
                team,
                matrix,
                x,
                block_rows,
                block,
                num_blocks,
                panel,
                together,
                numbers,
                out + (row * out_stride + first) * 4 if in_place else scratch,
                out_stride if in_place else SCRATCH_COLUMNS,
            )
            for r in range(0 if in_place else min(block_rows, num_rows - row)):
                _put(sums[r], rows[row + r, first : first + columns], adds)


@jit
def project_gated(
    x_element: Any,
    w_element: Any,
    team: int,
    gate: Any,
    up: Any,
    x: int,
    block_rows: int,
    num_rows: int,
    out: int,
    scratch: int,
) -> None:
    """silu(gate) * up, as packed rows for the next layer; members claim panels of both."""
    together = _item_panels(team, gate, block_rows)
    num_blocks = (num_rows + block_rows - 1) // block_rows
    side = scratch + _SUMS_BYTES
    room = side + _SUMS_BYTES
    up_room = room + together * gate.num_steps * COLUMNS * STEP_BYTES
    p = numbers_per_step(x_element)
    while True:
        panel = claim(team) * together
        first = panel * COLUMNS
        if first >= gate.num_outputs:
            break
        columns = min(together * COLUMNS, gate.num_outputs - first)
        item = (panel, columns, block_rows)
        of_gate = _take_panels(x_element, w_element, gate, *item, room)
        of_up = _take_panels(x_element, w_element, up, *item, up_room)
        for block in range(num_blocks):
            for matrix, numbers, sums in ((gate, of_gate, scratch), (up, of_up, side)):
                _multiply_block(
                    x_element,
                    w_element,
                    team,
                    matrix,
                    x,
                    block_rows,
                    block,
                    num_blocks,
                    panel,
                    together,
                    numbers,
                    sums,
                    SCRATCH_COLUMNS,
                )
            row = block * block_rows
            for r in range(min(block_rows, num_rows - row)):
                place = out + (row * gate.num_outputs + first * block_rows) // p * STEP_BYTES
                gate_row(
                    x_element,
                    scratch + r * SCRATCH_COLUMNS * 4,
                    side + r * SCRATCH_COLUMNS * 4,
                    columns // p,
                    place + r * STEP_BYTES,
                    block_rows * STEP_BYTES,
                )


@jit
def _put(numbers: Any, place: Any, adds: bool) -> None:
    if adds:
        for i in range(place.size):
            place[i] += numbers[i]
    else:
        for i in range(place.size):
            place[i] = numbers[i]
