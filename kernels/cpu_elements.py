"""How the CPU's tiles take the numbers that they multiply, and multiply them.

Emits LLVM code for vectors of 16 columns. A *step* is four bytes of a row: two bfloat16, which the
CPU multiplies and adds in one instruction where it has AVX512-BF16, or one float32. Where it has
not, bfloat16 and int8 are widened to float32, and a step is two products.

Invariant: whatever the CPU has, a step's products are added to a sum in the order of the row.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir

COLUMNS = 16
"""Columns of a panel."""
STEP_BYTES = 4
"""Of a row's numbers in one step."""

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
_LANES_F32 = ir.VectorType(_F32, COLUMNS)
_LANES_I32 = ir.VectorType(_I32, COLUMNS)
_BYTES = ir.VectorType(_I8, 64)
"""Of a whole register."""


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
_CAN_LOOK_UP = HAS_BF16_DOT and "avx512vbmi" in _cpu_features()


def _bfloat16_bytes() -> tuple[list[int], list[int]]:
    """The lower and the upper bytes of 0, 1, ... 127 as bfloat16."""
    bits = np.arange(128, dtype=np.float32).view(np.uint32) >> 16
    return (bits & 0xFF).tolist(), (bits >> 8).tolist()


class Elements:
    """Emits code for one pair of element types, into a builder's block."""

    def __init__(self, builder: Any, x_element: str, w_element: str) -> None:
        self._builder = builder
        self._x_element = x_element
        self._w_element = w_element
        self._dots = x_element == "bfloat16" and HAS_BF16_DOT
        looks_up = w_element == "int8" and _CAN_LOOK_UP
        self.steps_together = (2, 1) if looks_up else (1,)
        """Numbers of steps that `weights` can load at once, the largest first."""

    def weights(self, place: Any, together: int) -> list[tuple[Any, ...]]:
        """So many steps of a panel, each in the form that `multiply_add` takes."""
        b = self._builder
        if together == 2:
            return [(b.bitcast(step, _PAIRS),) for step in self._looked_up(place)]
        if self._w_element == "int8":
            return [self._widened_int8(place)]
        lanes = self._load(place, _LANES_I32)
        if self._dots:
            return [(b.bitcast(lanes, _PAIRS),)]
        if self._w_element == "float32":
            return [(b.bitcast(lanes, _LANES_F32),)]
        return [self._halves(lanes)]

    def as_bfloat16(self, place: Any) -> list[Any]:
        """Two steps of int8 as integers that are the bits of bfloat16."""
        if _CAN_LOOK_UP:
            return self._looked_up(place)
        b = self._builder
        numbers = b.sitofp(self._load(place, _BYTES), ir.VectorType(_F32, 64))
        bits = b.bitcast(numbers, ir.VectorType(_I32, 64))
        upper = b.lshr(bits, ir.Constant(bits.type, [16] * 64))
        return [b.trunc(upper, ir.VectorType(ir.IntType(16), 64))]

    def _looked_up(self, place: Any) -> list[Any]:
        """Two steps of int8 as bfloat16. Both bytes of a number come from tables, with its
        magnitude as index; converting takes twice as many instructions.
        """
        b = self._builder
        quarters = self._load(place, ir.VectorType(ir.IntType(64), 8))
        # Unpacking takes bytes from the lower, or from the upper half of each 16 bytes.
        order = ir.Constant(ir.VectorType(_I32, 8), [0, 4, 1, 5, 2, 6, 3, 7])
        numbers = b.bitcast(b.shuffle_vector(quarters, quarters, order), _BYTES)
        absolute_type = ir.FunctionType(_BYTES, [_BYTES, ir.IntType(1)])
        absolute = b.module.declare_intrinsic("llvm.abs.v64i8", (), absolute_type)
        magnitudes = b.call(absolute, [numbers, ir.Constant(ir.IntType(1), 0)])
        look_up_type = ir.FunctionType(_BYTES, [_BYTES] * 3)
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        look_up = b.module.declare_intrinsic(name, (), look_up_type)
        lower, upper = (
            b.call(
                look_up,
                [ir.Constant(_BYTES, table[:64]), magnitudes, ir.Constant(_BYTES, table[64:])],
            )
            for table in _bfloat16_bytes()
        )
        upper = b.or_(upper, b.and_(numbers, ir.Constant(_BYTES, [0x80] * 64)))
        steps = []
        for half in (0, 8):
            pairs = [
                index
                for lane in range(0, 64, 16)
                for byte in range(lane + half, lane + half + 8)
                for index in (byte, 64 + byte)
            ]
            mask = ir.Constant(ir.VectorType(_I32, 64), pairs)
            steps.append(b.shuffle_vector(lower, upper, mask))
        return steps

    def _load(self, address: Any, vector: Any) -> Any:
        return self._builder.load(
            self._builder.inttoptr(address, vector.as_pointer()), align=STEP_BYTES
        )

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

    def broadcast(self, address: Any) -> tuple[Any, ...]:
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

    def multiply_add(self, total: Any, x: tuple[Any, ...], w: tuple[Any, ...]) -> Any:
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
