"""Linear layers on the CPU: weights packed once, in the order in which the tiles read them.

A packed weight [outputs, inputs] is a row of *panels* of 16 outputs. A panel lists its numbers step
by step (see `kernels.cpu_tiles`): 64 bytes for each two inputs in bfloat16, or each one in float32,
and half of that in int8. Outputs are filled up to whole panels with zeros.

int8 is weight-only: an output's weights are integers from -127 to 127 times one float32 scale, and
activations stay bfloat16. Half the bytes are read, which is what bounds small batches.

The rows that are multiplied are packed too, in *blocks* of as many rows as a tile takes (see
`kernels.cpu_packing`). An *item* of work is a few panels, which a thread multiplies with one block
after the other while they are in its second-level cache; so each weight is read from memory exactly
once, and meanwhile.

What bounds it: for few rows reading the weights, for many arithmetic, never one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cpu_memory import zeros
from kernels.cpu_packing import numbers_per_step, store_packed
from kernels.cpu_panels import panel_multiplier
from kernels.cpu_runtime import LOG2_E, exp2, itemsize, jit, pointer, widen
from kernels.cpu_team import claim, num_members
from kernels.cpu_tiles import (
    COLUMNS,
    STEP_BYTES,
    TILE_ROWS,
    tile_panels,
)

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

_LEVELS = 127
"""Greatest int8 weight."""
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
SCRATCH_BYTES = 2 * MAX_TILE_ROWS * SCRATCH_COLUMNS * 4
"""Of scratch that a member needs."""


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

    @classmethod
    def pack(
        cls, weights: Sequence[Tensor], *, num_groups: int = 1, to_int8: bool = False
    ) -> PackedWeight:
        """Pack a matrix [outputs, inputs], given as tensors one below the other, all float32 or all
        bfloat16; int8 is for bfloat16 alone. Each of `num_groups` equal groups of outputs begins
        with a panel of its own.

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
        for weight in weights:
            rows = weight.contiguous()
            while len(rows) > 0:
                group, first = divmod(done, num_outputs)
                piece = rows[: num_outputs - first]
                place = (piece.data_ptr(), first, len(piece), num_inputs, numbers[group].data_ptr())
                if scales is None:
                    _pack_words(*place, per_step)
                else:
                    _pack_int8(*place, scales[group].data_ptr())
                done += len(piece)
                rows = rows[len(piece) :]
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
            self.numbers.shape[2],
        )


def choose_block_rows(num_rows: int) -> int:
    """Rows of a block, for a number of rows: a shape of tile that leaves few of them empty."""
    enough = (rows for rows in TILE_ROWS if num_rows <= rows)
    return next(enough, min(TILE_ROWS[:-3:-1], key=lambda rows: -(-num_rows // rows) * rows))


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


# -- multiplying -------------------------------------------------------------------------------

_multiply_panels = panel_multiplier(0)


@jit
def _step_bytes(x_element: Any, w_element: Any) -> int:
    """From one step of a packed panel to the next."""
    return int(COLUMNS * numbers_per_step(x_element) * itemsize(w_element))


@jit
def _multiply_block(
    x_element: Any,
    w_element: Any,
    matrix: Any,
    x: int,
    block_rows: int,
    panel: int,
    num_panels: int,
    ahead: int,
    ahead_step: int,
    scratch: int,
) -> None:
    """scratch[r, c] = scale[c] * (x . w) + bias[c], for a packed block of rows and some panels."""
    sums = numba.carray(pointer(scratch, np.float32(0)), (block_rows, SCRATCH_COLUMNS))
    for row in range(block_rows):
        sums_of_row = sums[row]
        for column in range(num_panels * COLUMNS):
            sums_of_row[column] = 0
    w_step = _step_bytes(x_element, w_element)
    w_panel = matrix.num_steps * w_step
    _multiply_panels(
        x_element,
        w_element,
        block_rows,
        num_panels,
        x,
        matrix.numbers + panel * w_panel,
        w_step,
        w_panel,
        matrix.num_steps,
        ahead,
        ahead_step,
        scratch,
        SCRATCH_COLUMNS * 4,
    )
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
) -> tuple[int, int]:
    """`ahead` and `ahead_step` of a tile, for the member's next item to be there when this one is
    done. All members being equally fast, that is the one after those that the others have claimed.

    The blocks of rows share this, so that memory is read as steadily as is computed.
    """
    next_panel = panel + num_members(team) * together
    shares = 1
    while 2 * shares <= min(num_blocks, _MOST_SHARES):
        shares *= 2
    if next_panel * COLUMNS >= matrix.num_outputs or block >= shares:
        return 0, 0
    w_panel = matrix.num_steps * w_step
    return (next_panel - panel) * w_panel + block * w_panel // shares, w_step // shares


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
    num_panels = (matrix.num_outputs + COLUMNS - 1) // COLUMNS
    together = _item_panels(team, matrix, block_rows)
    block_bytes = matrix.num_steps * block_rows * STEP_BYTES
    num_blocks = (num_rows + block_rows - 1) // block_rows
    w_step = _step_bytes(x_element, w_element)
    sums = numba.carray(pointer(scratch, np.float32(0)), (block_rows, SCRATCH_COLUMNS))
    while True:
        panel = claim(team) * together
        if panel >= num_panels:
            break
        count = min(together, num_panels - panel)
        first = panel * COLUMNS
        columns = min(count * COLUMNS, matrix.num_outputs - first)
        for block in range(num_blocks):
            row, place = block * block_rows, x + block * block_bytes
            ahead, ahead_step = _look_ahead(
                w_step, team, matrix, panel, together, block, num_blocks
            )
            _multiply_block(
                x_element,
                w_element,
                matrix,
                place,
                block_rows,
                panel,
                count,
                ahead,
                ahead_step,
                scratch,
            )
            for r in range(min(block_rows, num_rows - row)):
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
    num_panels = (gate.num_outputs + COLUMNS - 1) // COLUMNS
    together = _item_panels(team, gate, block_rows)
    block_bytes = gate.num_steps * block_rows * STEP_BYTES
    num_blocks = (num_rows + block_rows - 1) // block_rows
    w_step = _step_bytes(x_element, w_element)
    side = scratch + MAX_TILE_ROWS * SCRATCH_COLUMNS * 4
    gates = numba.carray(pointer(scratch, np.float32(0)), (block_rows, SCRATCH_COLUMNS))
    ups = numba.carray(pointer(side, np.float32(0)), (block_rows, SCRATCH_COLUMNS))
    while True:
        panel = claim(team) * together
        if panel >= num_panels:
            break
        count = min(together, num_panels - panel)
        first = panel * COLUMNS
        columns = min(count * COLUMNS, gate.num_outputs - first)
        for block in range(num_blocks):
            row, place = block * block_rows, x + block * block_bytes
            ahead, ahead_step = _look_ahead(w_step, team, gate, panel, together, block, num_blocks)
            for matrix, sums in ((gate, scratch), (up, side)):
                _multiply_block(
                    x_element,
                    w_element,
                    matrix,
                    place,
                    block_rows,
                    panel,
                    count,
                    ahead,
                    ahead_step,
                    sums,
                )
            for r in range(min(block_rows, num_rows - row)):
                activated = gates[r, :columns]
                _activate(activated, ups[r])
                store_packed(
                    x_element, out, block_rows, gate.num_outputs, row + r, first, activated
                )


@jit
def _put(numbers: Any, place: Any, adds: bool) -> None:
    if adds:
        for i in range(place.size):
            place[i] += numbers[i]
    else:
        for i in range(place.size):
            place[i] = numbers[i]


@jit
def _activate(gates: Any, ups: Any) -> None:
    """gates = silu(gates) * ups (SwiGLU; Shazeer, 2020)."""
    for i in range(gates.size):
        g = gates[i]
        sigmoid = np.float32(1) / (np.float32(1) + exp2(-g * np.float32(LOG2_E)))
        gates[i] = g * sigmoid * ups[i]
