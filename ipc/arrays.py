"""NumPy arrays on the wire: `[dtype, shape, data]`.

The data is extension type 3 when it is shorter than 256 bytes, and otherwise the number of the
frame of the same message that holds it (frame 0 is the MessagePack body). Dtypes go by NumPy's
names ("<i4") or, for what vLLM holds as tensors, by torch's ("int32"). Invariant: a decoded array's
bytes are exactly its shape times its item size; objects are refused.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ipc import expect
from ipc.codec import ARRAY_EXT_TYPE, Frames, array_data
from ipc.errors import WireError, mismatch

INLINE_LIMIT_BYTES = 256
"""Arrays of this size and above travel in frames of their own."""

_TORCH_NAMES = {
    "|b1": "bool",
    "|i1": "int8",
    "|u1": "uint8",
    "<i2": "int16",
    "<i4": "int32",
    "<i8": "int64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
}
_DTYPES = {
    name: np.dtype(numpy_name)
    for numpy_name, torch_name in _TORCH_NAMES.items()
    for name in (numpy_name, torch_name)
}

Array = npt.NDArray[Any]


def encode_array(array: Array, aux: list[bytes], *, as_tensor: bool = False) -> list[object]:
    """The wire form of `array`, with torch's dtype name if `as_tensor`. Data too long to be inlined
    is appended to `aux`."""
    name = array.dtype.str
    if name not in _TORCH_NAMES:
        raise WireError(
            f"array: dtype {array.dtype} cannot cross the wire; "
            f"convert it to one of {', '.join(_TORCH_NAMES)}"
        )
    content = array.tobytes()
    data: object
    if len(content) < INLINE_LIMIT_BYTES:
        data = array_data(content)
    else:
        aux.append(content)
        data = len(aux)
    return [_TORCH_NAMES[name] if as_tensor else name, array.shape, data]


def decode_array(value: object, frames: Frames, path: str) -> Array:
    """The array in `value`, read-only and backed by the message's own bytes.

    `frames` is the whole message: frame 0 the body, then the auxiliary frames. Raises WireError.
    """
    name, shape, data = expect.array(value, path, 3)[:3]
    dtype = _DTYPES.get(name) if type(name) is str else None
    if dtype is None:
        raise mismatch(f"{path}.dtype", name, f"one of {', '.join(_DTYPES)}")
    buffer = _data(data, frames, path)
    if type(shape) is list:
        try:
            # NumPy checks all but that no size is negative and that no bytes are left over.
            array: Array = np.ndarray(shape, dtype, buffer)
            if min(shape, default=0) >= 0 and array.nbytes == buffer.nbytes:
                return array
        except (ValueError, TypeError):
            pass
    raise mismatch(f"{path}.shape", shape, f"the shape of {buffer.nbytes} bytes of {dtype.name}")


def _data(value: object, frames: Frames, path: str) -> memoryview:
    if isinstance(value, msgpack.ExtType):
        return memoryview(value.data)
    if type(value) is int and 1 <= value < len(frames):
        return memoryview(frames[value]).toreadonly()
    expected = f"extension type {ARRAY_EXT_TYPE} or the number of an auxiliary frame"
    raise mismatch(f"{path}.data", value, f"{expected} (the message has {len(frames) - 1})")
