"""Vectors of 16 lanes for the CPU kernels that are generated as LLVM code.

LLVM splits them for CPUs with narrower ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir

LANES = 16

I32, I64 = ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)

_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_GREATEST_EXPONENT = 126.0
_EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
"""ln(2)^k / k!, k = 6 .. 0: the Taylor polynomial of 2^f, to 3e-7 relative for f in [-1/2, 1/2]."""


class Vectors:
    """Emits operations on vectors into a builder's block."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def load(self, address: Any, offset: int) -> Any:
        """16 float32 from so many bytes behind an address on."""
        b = self._builder
        place = b.add(address, ir.Constant(I64, offset))
        return b.load(b.inttoptr(place, FLOATS.as_pointer()), align=4)

    def splat(self, value: Any, vector: Any) -> Any:
        """A number in all lanes."""
        b = self._builder
        nothing = ir.Constant(vector, ir.Undefined)
        one = b.insert_element(nothing, value, ir.Constant(I32, 0))
        return b.shuffle_vector(one, nothing, constant(INTS, [0] * LANES))

    def greater(self, one: Any, other: Any) -> Any:
        """The greater one in each lane, and `other` where one of them is NaN."""
        return self._builder.select(self._builder.fcmp_ordered(">", one, other), one, other)

    def to_bfloat16(self, lanes: Any) -> Any:
        """Float32 rounded to nearest even, as 16 short integers."""
        b = self._builder
        bits = b.bitcast(lanes, INTS)
        sixteen = constant(INTS, [16] * LANES)
        odd = b.and_(b.lshr(bits, sixteen), constant(INTS, [1] * LANES))
        rounded = b.add(b.add(bits, constant(INTS, [0x7FFF] * LANES)), odd)
        return b.trunc(b.lshr(rounded, sixteen), _SHORTS)

    def exp2(self, x: Any) -> Any:
        """2^x, with x clamped to [-126, 126]; 2^-126 of NaN."""
        b = self._builder
        limit = constant(FLOATS, [_GREATEST_EXPONENT] * LANES)
        x = self.greater(x, b.fneg(limit))
        x = b.select(b.fcmp_ordered("<", x, limit), x, limit)
        whole = self._call("rint", x)
        f = b.fsub(x, whole)
        first, *others = (constant(FLOATS, [factor] * LANES) for factor in _EXP2)
        power = first
        for factor in others:
            power = self._call("fma", power, f, factor)
        bias, shift = constant(INTS, [127] * LANES), constant(INTS, [23] * LANES)
        exponent = b.shl(b.add(b.fptosi(whole, INTS), bias), shift)
        return b.fmul(power, b.bitcast(exponent, FLOATS))

    def _call(self, name: str, *vectors: Any) -> Any:
        b = self._builder
        function_type = ir.FunctionType(FLOATS, [FLOATS] * len(vectors))
        return b.call(b.module.declare_intrinsic(f"llvm.{name}.v16f32", (), function_type), vectors)


def constant(vector: Any, values: Iterable[float]) -> Any:
    return ir.Constant(vector, list(values))
