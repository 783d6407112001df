"""What the compiled CPU kernels share: the compiler's settings, raw memory, bfloat16, and exp2.

The kernels are Python functions that numba compiles on first use and keeps in its cache. They take
addresses and strides, as a C function would: turning six tensors into numpy arrays costs about
10 us, more than a small decode step's attention itself.

numba has no bfloat16, so a bfloat16 is a uint16 here: the upper half of a float32. `widen` and
`narrow` convert one element; they, and whole kernels, specialise on the element's type, which a
call passes as a zero of that type (`zero_of`).

numba's cache notices changes of a function's own file, but not of what it calls; so each version of
these files as a whole has a cache of its own.

Results are reproducible bit for bit. The compiler may fuse a product and a sum, which it does for
an element in one way; only in loops that add up (`summing_jit`) may it also reorder, over as many
partial sums as the CPU has lanes. Elsewhere that would not do: a vectorised loop that stores has a
scalar twin for arrays that (seem to) overlap, so an element's rounding would depend on addresses.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types import uint16
from numba.core.types.misc import CPointer
from numba.extending import intrinsic, overload

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

FUSING = {"contract", "nsz"}
SUMMING = FUSING | {"reassoc"}
CACHE_LINE_BYTES = 64
LOG2_E = 1.4426950408889634

_ELEMENTS = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.int8: np.int8(0),
}


def _choose_cache() -> None:
    """In NUMBA_CACHE_DIR if that is set, else beside these files or in the user's folder."""
    here = Path(__file__).parent
    version = hashlib.sha256()
    for path in sorted(here.glob("cpu_*.py")):
        version.update(path.read_bytes())
    beside = here / "__pycache__"
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or beside)
    if base == beside and not os.access(beside if beside.exists() else here, os.W_OK):
        base = Path("~/.cache/caesura").expanduser()
    numba.config.CACHE_DIR = str(base / f"cpu_kernels_{version.hexdigest()[:12]}")


_choose_cache()


def jit(function: F) -> F:
    """Compile a helper or a kernel that runs on the calling thread."""
    return _compile(function, fastmath=FUSING)


def summing_jit(function: F) -> F:
    """Compile a helper whose loops add up, in one order, of the compiler's choice."""
    return _compile(function, fastmath=SUMMING)


def compile_task(function: Callable[..., None], signature: Any) -> Any:
    """Compile a function for callers in compiled code: the result's `address` is its address."""
    options: dict[str, Any] = {"error_model": "numpy"}
    try:
        return numba.cfunc(signature, cache=True, **options)(function)
    except RuntimeError:
        _warn_of_no_cache()
        return numba.cfunc(signature, **options)(function)


def _compile(function: F, **options: Any) -> F:
    try:
        compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no folder to keep the cache in
        _warn_of_no_cache()
        compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    return compiled


@functools.cache  # once is enough
def _warn_of_no_cache() -> None:
    logger.warning(
        "no folder to keep compiled kernels in, so every start compiles them anew; "
        "set NUMBA_CACHE_DIR to one that can be written to"
    )


def zero_of(dtype: torch.dtype) -> Any:
    """The zero that stands for an element type. Raises TypeError for an unsupported one."""
    try:
        return _ELEMENTS[dtype]
    except KeyError:
        raise TypeError(
            f"no CPU kernels for {dtype}: load the model as float32 or bfloat16"
        ) from None


def _pointer(typing_context: Any, address: Any, element: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return CPointer(element)(address, element), generate


def _record_at(typing_context: Any, address: Any, dtype: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return CPointer(dtype.dtype)(address, dtype), generate


def _stack_room(typing_context: Any, element: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        room = context.get_value_type(signature.return_type).pointee
        return cgutils.alloca_once(builder, room, size=count.literal_value)

    return CPointer(element)(element, count), generate


def emit_prefetch(builder: Any, address: Any) -> None:
    """Code that brings the line at an address, which may be anything, into the second-level cache:
    what is brought early must not push out of the first level what is needed now.
    """
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [byte, *[number] * 3])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], function_type)
    for_read, second_level, data_cache = (ir.Constant(number, n) for n in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, byte), for_read, second_level, data_cache])


def _prefetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


pointer: Any = intrinsic(_pointer)
"""pointer(address, element): an address as a pointer to elements of that type, for `carray`."""

stack_room: Any = intrinsic(prefer_literal=True)(_stack_room)
"""stack_room(element, count): room for a constant number of elements, until the function returns,
as a pointer for `carray`."""

record_at: Any = intrinsic(_record_at)
"""record_at(address, dtype): an address as a pointer to records of a numpy dtype, for `carray`."""

prefetch: Any = intrinsic(_prefetch)
"""prefetch(address): see `emit_prefetch`."""


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


def itemsize(element: Any) -> Any:
    """Bytes of an element of this type."""
    raise NotImplementedError("compiled code only")


def _itemsize(element: Any) -> Any:
    size = element.bitwidth // 8

    def size_of_element(element: Any) -> Any:
        return size

    return size_of_element


overload(itemsize)(_itemsize)
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
