"""The CPU's inner loop: a few rows times some columns of a packed matrix, kept in registers.

Everything that multiplies on a CPU, linear layers and both products of attention, is made of one
operation, `multiply_tile`: out[r, c] = (or +=) the sum over k of x[r, k] * w[k, c], for `rows` rows
and `panels` panels of 16 columns. k goes in *steps* of four bytes a row: two bfloat16, which the
CPU multiplies and adds in one instruction where it has AVX512-BF16, or one float32.

Memory
- w: the numbers of one panel and step lie together, column by column: [16][2] bfloat16 (64 bytes),
  [16] float32 (64 bytes), or [16][2] int8 (32 bytes), which are widened on the way; but tiles of
  more than MOST_WIDENING_ROWS rows take int8 as bfloat16. From step to step and from panel to
  panel there is any distance.
- x: packed, `[steps][rows]` of four bytes each; or row by row, a fixed distance apart.
- out: float32, rows and panels any distance apart.

Invariant: each number of `out` is summed in the order of k, in one chain, whatever the shape of the
tile. So a row's results are the same bits whichever rows are multiplied beside it.

The function is generated as LLVM code rather than written as loops, because its accumulators must
stay in registers. LLVM splits the vectors for CPUs with narrower ones.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.cpu_elements import COLUMNS, HAS_WIDE_VECTORS, STEP_BYTES, Elements
from kernels.cpu_runtime import emit_prefetch, jit

_I64 = ir.IntType(64)
_LANES_F32 = ir.VectorType(ir.FloatType(), COLUMNS)
_NUMBA_ELEMENTS = {types.float32: "float32", types.uint16: "bfloat16", types.int8: "int8"}


# As many accumulators as there are registers for: 24 of 32 vectors, or 12 of 16 half as long. More
# rows and fewer panels would load more than one number for each that is multiplied.
_TILE_PANELS = {1: 4, 2: 4, 4: 4, 8: 3, 12: 2} if HAS_WIDE_VECTORS else {1: 4, 2: 2, 4: 1, 6: 1}
TILE_ROWS = tuple(_TILE_PANELS)
"""Numbers of rows that there are tiles for."""
TILE_PANELS = 4
"""Of a tile, at most."""
MOST_WIDENING_ROWS = 4
"""Of a tile that widens int8 itself."""
_SHAPES = sorted(
    (rows, panels)
    for rows, most in _TILE_PANELS.items()
    for panels in {1, min(2, most) if rows <= 4 else 1, most}
)
"""(rows, panels) of every tile. With few rows a rest of two panels is a tile too, because one
panel's few chains of sums would leave the CPU waiting."""
_PANELS_BY_ROWS = tuple(_TILE_PANELS.get(rows, 0) for rows in range(TILE_ROWS[-1] + 1))


def _multiply_tile(
    typing_context: Any,
    row_bytes: Any,
    adds: Any,
    x_element: Any,
    w_element: Any,
    rows: Any,
    panels: Any,
    x: Any,
    w: Any,
    w_step: Any,
    w_panel: Any,
    num_steps: Any,
    ahead: Any,
    ahead_step: Any,
    ahead_panel: Any,
    out: Any,
    out_row: Any,
    out_panel: Any,
) -> Any:
    """`row_bytes`, a constant, is the distance of x's rows, or 0 if they are packed. `adds`, one
    too, is 1 to add to what `out` is, and 0 to replace it. The elements are zeros that tell the
    types. `rows` is one of TILE_ROWS, and `panels` as `tile_panels` says. The rest are addresses,
    and distances and counts in bytes and steps. With each step of a panel, another line is brought
    into the cache: that at `ahead` with the first step of the first panel, and so on, from step to
    step and from panel to panel any distance further.
    """
    assert isinstance(row_bytes, types.IntegerLiteral), "not constant"
    assert isinstance(adds, types.IntegerLiteral), "not constant"
    soon = (ahead, ahead_step, ahead_panel)
    places = (x, w, w_step, w_panel, num_steps, *soon, out, out_row, out_panel)
    numbers = (rows, panels, *places)
    elements_given = (x_element, w_element)
    signature = types.void(row_bytes, adds, *elements_given, *(types.int64 for _ in numbers))
    constants = row_bytes.literal_value, adds.literal_value
    elements = _NUMBA_ELEMENTS[x_element], _NUMBA_ELEMENTS[w_element]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        num_rows, num_panels, *places = arguments[4:]
        shape = builder.add(builder.mul(num_rows, _int(TILE_PANELS + 1)), num_panels)
        done = builder.append_basic_block("multiplied")
        choice = builder.switch(shape, done)
        for rows, panels in _SHAPES:
            block = builder.append_basic_block(f"tile_{rows}_{panels}")
            choice.add_case(_int(rows * (TILE_PANELS + 1) + panels), block)
            builder.position_at_end(block)
            taken = _taken_elements(rows, *elements)
            _Tile(builder, rows, panels, *constants, *taken).generate(*places)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, generate


def _taken_elements(rows: int, x_element: str, w_element: str) -> tuple[str, str]:
    is_widened = w_element == "int8" and rows > MOST_WIDENING_ROWS
    return x_element, "bfloat16" if is_widened else w_element


multiply_tile: Any = intrinsic(prefer_literal=True)(_multiply_tile)


@jit
def tile_panels(rows: int, panels: int) -> int:
    """How many of `panels` panels the next tile takes, for so many rows, one of TILE_ROWS."""
    most = _PANELS_BY_ROWS[rows]
    if panels >= most:
        return most
    return 2 if rows <= 4 and panels >= 2 else 1


class _Tile:
    """Emits the code of one shape and pair of element types."""

    def __init__(
        self,
        builder: Any,
        rows: int,
        panels: int,
        row_bytes: int,
        adds: int,
        x_element: str,
        w_element: str,
    ) -> None:
        self._builder = builder
        self._rows = rows
        self._panels = panels
        self._row_bytes, self._step_bytes = (
            (row_bytes, STEP_BYTES) if row_bytes else (STEP_BYTES, rows * STEP_BYTES)
        )
        self._adds = bool(adds)
        self._elements = Elements(builder, x_element, w_element)

    def generate(
        self,
        x: Any,
        w: Any,
        w_step: Any,
        w_panel: Any,
        num_steps: Any,
        ahead: Any,
        ahead_step: Any,
        ahead_panel: Any,
        out: Any,
        out_row: Any,
        out_panel: Any,
    ) -> None:
        b = self._builder
        places = [
            b.add(out, b.add(b.mul(out_row, _int(row)), b.mul(out_panel, _int(panel))))
            for row in range(self._rows)
            for panel in range(self._panels)
        ]
        panels, panels_ahead = (
            [b.add(first, b.mul(distance, _int(panel))) for panel in range(self._panels)]
            for first, distance in ((w, w_panel), (ahead, ahead_panel))
        )
        zero = ir.Constant(_LANES_F32, [0.0] * COLUMNS)
        sums = [self._load(place) if self._adds else zero for place in places]
        step, offsets = _int(0), [_int(0)] * 3
        for together in self._elements.steps_together:
            distances = (_int(self._step_bytes), w_step, ahead_step)
            step, offsets, sums = self._loop(
                together, num_steps, step, offsets, distances, sums, x, panels, panels_ahead
            )
        for place, total in zip(places, sums, strict=True):
            b.store(total, b.inttoptr(place, _LANES_F32.as_pointer()), align=STEP_BYTES)

    def _loop(
        self,
        together: int,
        num_steps: Any,
        step: Any,
        offsets: list[Any],
        distances: tuple[Any, ...],
        sums: list[Any],
        x: Any,
        panels: list[Any],
        panels_ahead: list[Any],
    ) -> tuple[Any, list[Any], list[Any]]:
        """As long as so many steps are left, add them to the sums. `offsets` in x, w and what is
        ahead grow by `distances` a step.
        """
        b = self._builder
        before = b.basic_block
        loop, done = b.append_basic_block("steps"), b.append_basic_block("summed")
        last = b.sub(num_steps, _int(together))
        b.cbranch(b.icmp_signed("<=", step, last), loop, done)

        b.position_at_end(loop)
        starts = [step, *offsets, *sums]
        now = [b.phi(start.type) for start in starts]
        step_now, (x_offset, w_offset, ahead_offset), added = now[0], now[1:4], now[4:]
        weights = []
        for panel, panel_ahead in zip(panels, panels_ahead, strict=True):
            emit_prefetch(b, b.add(panel_ahead, ahead_offset))
            weights.append(self._elements.weights(b.add(panel, w_offset), together))
        for part in range(together):
            for row in range(self._rows):
                place = row * self._row_bytes + part * self._step_bytes
                number = self._elements.broadcast(b.add(b.add(x, x_offset), _int(place)))
                for panel in range(self._panels):
                    index = row * self._panels + panel
                    added[index] = self._elements.multiply_add(
                        added[index], number, weights[panel][part]
                    )
        following = [
            b.add(step_now, _int(together)),
            *(
                b.add(offset, b.mul(distance, _int(together)))
                for offset, distance in zip(now[1:4], distances, strict=True)
            ),
            *added,
        ]
        for phi, start, value in zip(now, starts, following, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<=", following[0], last), loop, done)

        b.position_at_end(done)
        ends = [b.phi(start.type) for start in starts]
        for end, start, value in zip(ends, starts, following, strict=True):
            end.add_incoming(start, before)
            end.add_incoming(value, loop)
        return ends[0], ends[1:4], ends[4:]

    def _load(self, place: Any) -> Any:
        b = self._builder
        return b.load(b.inttoptr(place, _LANES_F32.as_pointer()), align=STEP_BYTES)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)
