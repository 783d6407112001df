"""The CPU's inner loop: a few rows times some columns of a packed matrix, kept in registers.

Everything that multiplies on a CPU, linear layers and both products of attention, is made of one
operation, `multiply_tile`: out[r, c] = (or +=) the sum over k of x[r, k] * w[k, c], for `rows` rows
and `panels` panels of 16 columns. k goes in *steps* of four bytes a row: two bfloat16, which the
CPU multiplies and adds in one instruction where it has AVX512-BF16, or one float32.

Memory
- w: the numbers of one panel and step lie together, column by column: [16][2] bfloat16 (64 bytes),
  [16] float32 (64 bytes), or [16][2] int8 (32 bytes), which are widened on the way. From step to
  step and from panel to panel there is any distance.
- x: packed, `[steps][rows]` of four bytes each; or row by row, a fixed distance apart.
- out: float32, rows and panels any distance apart.

Invariant: each number of `out` is summed in the order of k, in one chain, whatever the shape of the
tile. So a row's results are the same bits whichever rows are multiplied beside it.

The function is generated as LLVM code rather than written as loops, because its accumulators must
stay in registers. LLVM splits the vectors for CPUs with narrower ones.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.cpu_runtime import emit_prefetch, jit

COLUMNS = 16
"""Columns of a panel."""
STEP_BYTES = 4
"""Of a row's numbers in one step."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES_F32 = ir.VectorType(_F32, COLUMNS)
_LANES_I32 = ir.VectorType(_I32, COLUMNS)
_NUMBA_ELEMENTS = {types.float32: "float32", types.uint16: "bfloat16", types.int8: "int8"}


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * COLUMNS)


def _cpu_features() -> set[str]:
    """Names of the features that numba compiles for."""
    if numba.config.CPU_NAME not in (None, "host"):
        listed: str = numba.config.CPU_FEATURES or ""
        return {name[1:] for name in listed.split(",") if name.startswith("+")}
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


HAS_BF16_DOT = "avx512bf16" in _cpu_features()
HAS_WIDE_VECTORS = "avx512f" in _cpu_features()

# As many accumulators as there are registers for: 24 of 32 vectors, or 12 of 16 half as long. More
# rows and fewer panels would load more than one number for each that is multiplied.
_TILE_PANELS = {1: 4, 2: 4, 4: 4, 8: 3, 12: 2} if HAS_WIDE_VECTORS else {1: 4, 2: 2, 4: 1, 6: 1}
TILE_ROWS = tuple(_TILE_PANELS)
"""Numbers of rows that there are tiles for."""
_MOST_PANELS = 4
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
    """`row_bytes`, a constant, is the distance of x's rows, or 0 if they are packed; `adds`, another
    one, is 1 to add to what `out` is, and 0 to replace it. The elements are zeros that tell the
    types. `rows` is one of TILE_ROWS, and `panels` as `tile_panels` says.
    The rest are addresses, and distances and counts in bytes and steps. With each step of a panel,
    another line is brought into the cache: that at `ahead` with the first step of the first panel,
    and so on, from step to step and from panel to panel any distance further.
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
        shape = builder.add(builder.mul(num_rows, _int(_MOST_PANELS + 1)), num_panels)
        done = builder.append_basic_block("multiplied")
        choice = builder.switch(shape, done)
        for rows, panels in _SHAPES:
            block = builder.append_basic_block(f"tile_{rows}_{panels}")
            choice.add_case(_int(rows * (_MOST_PANELS + 1) + panels), block)
            builder.position_at_end(block)
            _Tile(builder, rows, panels, *constants, *elements).generate(*places)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, generate


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
        self._x_element = x_element
        self._w_element = w_element
        self._dots = x_element == "bfloat16" and HAS_BF16_DOT

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
        before = b.basic_block
        loop, done = b.append_basic_block("steps"), b.append_basic_block("summed")
        zero = ir.Constant(_LANES_F32, [0.0] * COLUMNS)
        starts = [self._load(place, _LANES_F32) if self._adds else zero for place in places]
        b.cbranch(b.icmp_signed(">", num_steps, _int(0)), loop, done)

        b.position_at_end(loop)
        step, x_now, w_offset, ahead_offset = (b.phi(_I64) for _ in range(4))
        sums = [b.phi(_LANES_F32) for _ in places]
        weights = []
        for panel, panel_ahead in zip(panels, panels_ahead, strict=True):
            emit_prefetch(b, b.add(panel_ahead, ahead_offset))
            weights.append(self._weights(b.add(panel, w_offset)))
        added = []
        for row in range(self._rows):
            pair = self._broadcast(b.add(x_now, _int(row * self._row_bytes)))
            for panel in range(self._panels):
                total = sums[row * self._panels + panel]
                added.append(self._multiply_add(total, pair, weights[panel]))
        next_step = b.add(step, _int(1))
        for phi, start, following in (
            (step, _int(0), next_step),
            (x_now, x, b.add(x_now, _int(self._step_bytes))),
            (w_offset, _int(0), b.add(w_offset, w_step)),
            (ahead_offset, _int(0), b.add(ahead_offset, ahead_step)),
            *zip(sums, starts, added, strict=True),
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", next_step, num_steps), loop, done)

        b.position_at_end(done)
        ends = [b.phi(_LANES_F32) for _ in places]
        for place, start, total, end in zip(places, starts, added, ends, strict=True):
            end.add_incoming(start, before)
            end.add_incoming(total, loop)
            b.store(end, b.inttoptr(place, _LANES_F32.as_pointer()), align=STEP_BYTES)

    def _load(self, address: Any, vector: Any) -> Any:
        return self._builder.load(
            self._builder.inttoptr(address, vector.as_pointer()), align=STEP_BYTES
        )

    def _weights(self, line: Any) -> tuple[Any, ...]:
        """One step of a panel, in the form that `_multiply_add` takes."""
        b = self._builder
        if self._w_element == "int8":
            return self._widened_int8(line)
        lanes = self._load(line, _LANES_I32)
        if self._dots:
            return (b.bitcast(lanes, _PAIRS),)
        if self._w_element == "float32":
            return (b.bitcast(lanes, _LANES_F32),)
        return self._halves(lanes)

    def _widened_int8(self, line: Any) -> tuple[Any, ...]:
        b = self._builder
        pairs = self._load(line, ir.VectorType(ir.IntType(8), 2 * COLUMNS))
        if self._dots:
            numbers = b.sitofp(pairs, ir.VectorType(_F32, 2 * COLUMNS))
            return (b.fptrunc(numbers, _PAIRS),)
        short = ir.VectorType(ir.IntType(16), COLUMNS)
        both = b.bitcast(pairs, short)
        eight = ir.Constant(short, [8] * COLUMNS)
        low, high = b.ashr(b.shl(both, eight), eight), b.ashr(both, eight)
        return b.sitofp(low, _LANES_F32), b.sitofp(high, _LANES_F32)

    def _halves(self, lanes: Any) -> tuple[Any, Any]:
        """Pairs of bfloat16 as two vectors of float32: the first ones, the second ones."""
        b = self._builder
        low = b.shl(lanes, ir.Constant(_LANES_I32, [16] * COLUMNS))
        high = b.and_(lanes, ir.Constant(_LANES_I32, [0xFFFF0000] * COLUMNS))
        return b.bitcast(low, _LANES_F32), b.bitcast(high, _LANES_F32)

    def _broadcast(self, address: Any) -> tuple[Any, ...]:
        """A row's numbers of one step, in all lanes."""
        b = self._builder
        number = b.load(b.inttoptr(address, _I32.as_pointer()), align=STEP_BYTES)
        nothing = ir.Constant(_LANES_I32, ir.Undefined)
        one = b.insert_element(nothing, number, ir.Constant(_I32, 0))
        lanes = b.shuffle_vector(one, nothing, ir.Constant(_LANES_I32, [0] * COLUMNS))
        if self._dots:
            return (b.bitcast(lanes, _PAIRS),)
        if self._x_element == "float32":
            return (b.bitcast(lanes, _LANES_F32),)
        return self._halves(lanes)

    def _multiply_add(self, total: Any, x: tuple[Any, ...], w: tuple[Any, ...]) -> Any:
        b = self._builder
        if self._dots:
            function_type = ir.FunctionType(_LANES_F32, [_LANES_F32, _PAIRS, _PAIRS])
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            return b.call(b.module.declare_intrinsic(name, (), function_type), [total, *x, *w])
        function_type = ir.FunctionType(_LANES_F32, [_LANES_F32] * 3)
        fma = b.module.declare_intrinsic("llvm.fma.v16f32", (), function_type)
        for one, other in zip(x, w, strict=True):
            total = b.call(fma, [one, other, total])
        return total


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)
