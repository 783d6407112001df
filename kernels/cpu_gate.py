"""The activation between the linear layers of a CPU's feed-forward network, in registers.

Generated as LLVM code, as the tiles that it goes between are (`kernels.cpu_tiles`): as loops over
slices, it takes half as long as the products.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kernels.cpu_runtime import LOG2_E
from kernels.cpu_vectors import FLOATS, I32, I64, INTS, LANES, Vectors, constant


def _gate_row(
    typing_context: Any, element: Any, gates: Any, ups: Any, num_steps: Any, out: Any, distance: Any
) -> Any:
    """silu(gates) * ups (SwiGLU; Shazeer, 2020) of one row, rounded to the element's type.

    gates, ups: addresses of float32, so many that whole vectors can be read. out: that of the first
    of `num_steps` steps of a packed row (`kernels.cpu_packing`), which are `distance` bytes apart.
    """
    signature = types.void(element, *[types.int64] * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, gates, ups, num_steps, out, distance = arguments
        to_bfloat16 = element == types.uint16
        at_once = LANES // 2 if to_bfloat16 else LANES
        with cgutils.for_range_slice(builder, _int(0), num_steps, _int(at_once), intp=I64) as (
            first,
            _,
        ):
            offset = builder.mul(first, _int(LANES * 4 // at_once))
            lanes = _activate(builder, builder.add(gates, offset), builder.add(ups, offset))
            if to_bfloat16:
                words = builder.bitcast(
                    Vectors(builder).to_bfloat16(lanes), ir.VectorType(I32, at_once)
                )
            else:
                words = builder.bitcast(lanes, INTS)
            left = builder.sub(num_steps, first)
            place = builder.add(out, builder.mul(first, distance))
            for step in range(at_once):
                word = builder.extract_element(words, ir.Constant(I32, step))
                with builder.if_then(builder.icmp_signed(">", left, _int(step)), likely=True):
                    builder.store(word, builder.inttoptr(place, I32.as_pointer()))
                place = builder.add(place, distance)
        return context.get_dummy_value()

    return signature, generate


gate_row: Any = intrinsic(_gate_row)


def _activate(builder: Any, gates: Any, ups: Any) -> Any:
    b, vectors = builder, Vectors(builder)
    gate, up = vectors.load(gates, 0), vectors.load(ups, 0)
    exponent = b.fmul(gate, constant(FLOATS, [-LOG2_E] * LANES))
    one = constant(FLOATS, [1.0] * LANES)
    sigmoid = b.fdiv(one, b.fadd(one, vectors.exp2(exponent)))
    return b.fmul(b.fmul(gate, sigmoid), up)


def _int(value: int) -> Any:
    return ir.Constant(I64, value)
