"""One row of the online softmax on a CPU, in registers, for `kernels.cpu_attention`.

Generated as LLVM code, as the tiles that it goes between are (`kernels.cpu_tiles`), and for the
same reason: as a loop, it takes as long as those.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 16
KEYS = 64
"""Scores of a row, and weights."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_LEAST_EXPONENT = -126.0
_EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
"""ln(2)^k / k!, k = 6 .. 0: the Taylor polynomial of 2^f, to 3e-7 relative for f in [-1/2, 1/2]."""


def _weigh_scores(
    typing_context: Any, element: Any, scores: Any, seen: Any, highest: Any, weights: Any
) -> Any:
    """(top, total): the maximum of `highest` and the first `seen` scores, and the sum of their
    weights 2^(score - top), which are rounded to the element's type and stored; weights past
    `seen` are zero, whatever the scores are.

    scores, weights: addresses of 64 float32 and of 64 elements. highest: float32. A sum is made in
    one order, and zeros leave it as it is.
    """
    signature = types.containers.UniTuple(types.float32, 2)(
        element, types.int64, types.int64, types.float32, types.int64
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = _Row(builder, element == types.uint16)
        pair = row.weigh(*arguments[1:])
        return context.make_tuple(builder, signature.return_type, pair)

    return signature, generate


weigh_scores: Any = intrinsic(_weigh_scores)


class _Row:
    def __init__(self, builder: Any, to_bfloat16: bool) -> None:
        self._builder = builder
        self._to_bfloat16 = to_bfloat16

    def weigh(self, scores: Any, seen: Any, highest: Any, weights: Any) -> tuple[Any, Any]:
        b = self._builder
        starts = range(0, KEYS, LANES)
        limit = self._splat(b.trunc(seen, _I32), _INTS)
        seen_lanes = [
            b.icmp_signed(">", limit, _constant(_INTS, range(start, start + LANES)))
            for start in starts
        ]
        lowest = _constant(_FLOATS, [float("-inf")] * LANES)
        masked = [
            b.select(lanes, self._load(scores, start * 4), lowest)
            for start, lanes in zip(starts, seen_lanes, strict=True)
        ]
        top = self._greater(self._reduce(masked, self._greater), highest)
        tops = self._splat(top, _FLOATS)
        zero = _constant(_FLOATS, [0.0] * LANES)
        lines = [
            b.select(lanes, self._exp2(b.fsub(score, tops)), zero)
            for score, lanes in zip(masked, seen_lanes, strict=True)
        ]
        for start, line in zip(starts, lines, strict=True):
            self._store(line, weights, start)
        return top, self._reduce(lines, b.fadd)

    def _load(self, address: Any, offset: int) -> Any:
        b = self._builder
        place = b.add(address, ir.Constant(_I64, offset))
        return b.load(b.inttoptr(place, _FLOATS.as_pointer()), align=4)

    def _store(self, line: Any, address: Any, first: int) -> None:
        b = self._builder
        size = 4
        if self._to_bfloat16:
            size = 2
            bits = b.bitcast(line, _INTS)
            sixteen = _constant(_INTS, [16] * LANES)
            odd = b.and_(b.lshr(bits, sixteen), _constant(_INTS, [1] * LANES))
            rounded = b.add(b.add(bits, _constant(_INTS, [0x7FFF] * LANES)), odd)
            line = b.trunc(b.lshr(rounded, sixteen), ir.VectorType(_I16, LANES))
        place = b.add(address, ir.Constant(_I64, first * size))
        b.store(line, b.inttoptr(place, line.type.as_pointer()), align=4)

    def _greater(self, one: Any, other: Any) -> Any:
        return self._builder.select(self._builder.fcmp_ordered(">", one, other), one, other)

    def _reduce(self, vectors: list[Any], combine: Any) -> Any:
        """One number of several vectors' lanes, always paired in the same way."""
        b = self._builder
        while len(vectors) > 1:
            vectors = [combine(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
        (lanes,) = vectors
        size = LANES
        while size > 1:
            size //= 2
            low, high = (
                b.shuffle_vector(lanes, lanes, _constant(ir.VectorType(_I32, size), half))
                for half in (range(size), range(size, 2 * size))
            )
            lanes = combine(low, high)
        return b.extract_element(lanes, ir.Constant(_I32, 0))

    def _splat(self, value: Any, vector: Any) -> Any:
        b = self._builder
        nothing = ir.Constant(vector, ir.Undefined)
        one = b.insert_element(nothing, value, ir.Constant(_I32, 0))
        return b.shuffle_vector(one, nothing, _constant(_INTS, [0] * LANES))

    def _exp2(self, x: Any) -> Any:
        """2^x for x <= 0, with 2^-126 for less than that."""
        b = self._builder
        x = self._greater(x, _constant(_FLOATS, [_LEAST_EXPONENT] * LANES))
        whole = self._call("rint", x)
        f = b.fsub(x, whole)
        first, *others = (_constant(_FLOATS, [factor] * LANES) for factor in _EXP2)
        power = first
        for factor in others:
            power = self._call("fma", power, f, factor)
        bias, shift = _constant(_INTS, [127] * LANES), _constant(_INTS, [23] * LANES)
        exponent = b.shl(b.add(b.fptosi(whole, _INTS), bias), shift)
        return b.fmul(power, b.bitcast(exponent, _FLOATS))

    def _call(self, name: str, *vectors: Any) -> Any:
        b = self._builder
        function_type = ir.FunctionType(_FLOATS, [_FLOATS] * len(vectors))
        return b.call(b.module.declare_intrinsic(f"llvm.{name}.v16f32", (), function_type), vectors)


def _constant(vector: Any, values: Any) -> Any:
    return ir.Constant(vector, list(values))
