"""What the compiled CPU kernels share: the compiler's settings, raw memory, bfloat16, and exp2.

The kernels are Python functions that numba compiles on first use and keeps in its cache. They take
addresses and strides, as a C function would: turning six tensors into numpy arrays costs about
10 us, more than a small decode step's attention itself.

numba has no bfloat16, so a bfloat16 is a uint16 here: the upper half of a float32. `widen` and
`narrow` convert one element; they, and whole kernels, specialise on the element's type, which a
call passes as a zero of that type (`element_of`).

The cache (kernels/__pycache__) notices changes of a function's own file only: after a change in
this file, delete it.

Results are reproducible bit for bit. The compiler may fuse a product and a sum, which it does for
an element in one way; only in loops that add up (`summing_jit`) may it also reorder, over as many
partial sums as the CPU has lanes. Elsewhere that would not do: a vectorised loop that stores has a
scalar twin for arrays that (seem to) overlap, so an element's rounding would depend on addresses.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.core.types import uint16, void
from numba.core.types.misc import CPointer
from numba.extending import intrinsic, overload
from torch import Tensor

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

FUSING = {"contract", "nsz"}
SUMMING = FUSING | {"reassoc"}
CACHE_LINE_BYTES = 64
LOG2_E = 1.4426950408889634
MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS
SERIAL_BELOW_FLOP = 1 << 20
"""Work worth less than this (some 30 us on one core) is not worth waking other threads for."""

_ELEMENTS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}


def jit(function: F) -> F:
    """Compile a helper or a kernel that runs on the calling thread."""
    return _compile(function, fastmath=FUSING)


def summing_jit(function: F) -> F:
    """Compile a helper whose loops add up, in one order, of the compiler's choice."""
    return _compile(function, fastmath=SUMMING)


def parallel_jit(function: F) -> F:
    """Compile a kernel whose `prange` loops are spread over threads."""
    return _compile(function, fastmath=FUSING, parallel=True)


def _compile(function: F, **options: Any) -> F:
    try:
        compiled: F = numba.njit(cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no folder to keep the cache in
        _warn_of_no_cache()
        compiled = numba.njit(error_model="numpy", **options)(function)
    return compiled


@functools.cache  # once is enough
def _warn_of_no_cache() -> None:
    logger.warning(
        "no folder to keep compiled kernels in, so every start compiles them anew; "
        "set NUMBA_CACHE_DIR to one that can be written to"
    )


def element_of(tensor: Tensor) -> Any:
    """The zero that stands for a tensor's element type. Raises TypeError for an unsupported one."""
    try:
        return _ELEMENTS[tensor.dtype]
    except KeyError:
        raise TypeError(
            f"no CPU kernels for {tensor.dtype}: load the model as float32 or bfloat16"
        ) from None


def run_each(serial: Any, parallel: Any, count: int, flop: int, *arguments: Any) -> None:
    """Run a kernel for items 0 .. count - 1: `serial(0, count, *arguments)` on this thread, or, if
    the work is worth it, `parallel(count, *arguments)` on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), MAX_THREADS) if flop >= SERIAL_BELOW_FLOP else 1
    if threads == 1:
        serial(0, count, *arguments)
    else:
        numba.set_num_threads(threads)
        parallel(count, *arguments)


def _pointer(typing_context: Any, address: Any, element: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return CPointer(element)(address, element), generate


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], function_type)
        for_read, second_level, data_cache = (ir.Constant(number, n) for n in (0, 2, 1))
        builder.call(function, [place, for_read, second_level, data_cache])
        return context.get_dummy_value()

    return void(array, index), generate


pointer: Any = intrinsic(_pointer)
"""pointer(address, element): an address as a pointer to elements of that type, for `carray`."""

prefetch: Any = intrinsic(_prefetch)
"""prefetch(array, index): ask the CPU to bring an element of a contiguous array into its
second-level cache. The index counts from the array's start, whatever its shape, and may lie past
its end."""


def widen(element: Any) -> Any:
    """A stored element as a float32."""
    raise NotImplementedError("compiled code only")


def narrow(value: Any, element: Any) -> Any:
    """A float32 as a stored element of the type of `element`, rounded to nearest even."""
    raise NotImplementedError("compiled code only")


def _widen(element: Any) -> Any:
    def widen_bfloat16(element: Any) -> Any:
        return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)

    def widen_float32(element: Any) -> Any:
        return element

    return widen_bfloat16 if element == uint16 else widen_float32


def _narrow(value: Any, element: Any) -> Any:
    def narrow_bfloat16(value: Any, element: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    def narrow_float32(value: Any, element: Any) -> Any:
        return np.float32(value)

    return narrow_bfloat16 if element == uint16 else narrow_float32


overload(widen)(_widen)
overload(narrow)(_narrow)


@jit
def exp2(x: Any) -> Any:
    """2**x for a float32, to 3e-7 relative, x clamped to [-126, 127]; unlike libm's, it vectorises.

    The integer part becomes the exponent bits; the rest, in [-1/2, 1/2], goes through the Taylor
    polynomial of 2**f, whose coefficients are ln(2)^k / k!.
    """
    x = min(max(x, np.float32(-126)), np.float32(127))
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    power = np.float32(1.5403530e-4)
    power = power * f + np.float32(1.3333558e-3)
    power = power * f + np.float32(9.6181291e-3)
    power = power * f + np.float32(5.5504109e-2)
    power = power * f + np.float32(2.4022651e-1)
    power = power * f + np.float32(6.9314718e-1)
    power = power * f + np.float32(1)
    exponent = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return power * exponent.view(np.float32)
