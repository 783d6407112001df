"""One row of the online softmax on a CPU, in registers, for `kernels.cpu_attention`.

Generated as LLVM code, as the tiles that it goes between are (`kernels.cpu_tiles`), and for the
same reason: as a loop, it takes as long as those.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.cpu_vectors import FLOATS, I32, I64, INTS, LANES, Vectors, constant

KEYS = 64
"""Scores of a row, and weights."""


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
        self._vectors = Vectors(builder)
        self._to_bfloat16 = to_bfloat16

    def weigh(self, scores: Any, seen: Any, highest: Any, weights: Any) -> tuple[Any, Any]:
        b, vectors = self._builder, self._vectors
        starts = range(0, KEYS, LANES)
        limit = vectors.splat(b.trunc(seen, I32), INTS)
        seen_lanes = [
            b.icmp_signed(">", limit, constant(INTS, range(start, start + LANES)))
            for start in starts
        ]
        lowest = constant(FLOATS, [float("-inf")] * LANES)
        masked = [
            b.select(lanes, vectors.load(scores, start * 4), lowest)
            for start, lanes in zip(starts, seen_lanes, strict=True)
        ]
        top = vectors.greater(self._reduce(masked, vectors.greater), highest)
        tops = vectors.splat(top, FLOATS)
        zero = constant(FLOATS, [0.0] * LANES)
        lines = [
            b.select(lanes, vectors.exp2(b.fsub(score, tops)), zero)
            for score, lanes in zip(masked, seen_lanes, strict=True)
        ]
        for start, line in zip(starts, lines, strict=True):
            self._store(line, weights, start)
        return top, self._reduce(lines, b.fadd)

    def _store(self, line: Any, address: Any, first: int) -> None:
        b = self._builder
        size = 4
        if self._to_bfloat16:
            size, line = 2, self._vectors.to_bfloat16(line)
        place = b.add(address, ir.Constant(I64, first * size))
        b.store(line, b.inttoptr(place, line.type.as_pointer()), align=4)

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
                b.shuffle_vector(lanes, lanes, constant(ir.VectorType(I32, size), half))
                for half in (range(size), range(size, 2 * size))
            )
            lanes = combine(low, high)
        return b.extract_element(lanes, ir.Constant(I32, 0))
