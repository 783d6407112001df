"""NumPy arrays on the wire: `[dtype, shape, data]`.

The data is extension type 3 when it is shorter than 256 bytes, and otherwise the number of the
frame of the same message that holds it (frame 0 is the MessagePack body). Dtypes go by NumPy's
names ("<i4") or, for what vLLM holds as tensors, by torch's ("int32"). Invariant: a decoded array's
bytes are exactly its shape times its item size; objects are refused.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ipc import expect
from ipc.codec import ARRAY_EXT_TYPE, Frame, Frames
from ipc.errors import WireError, mismatch

INLINE_LIMIT_BYTES = 256
"""Arrays of this size and above travel in frames of their own."""
MAX_DIMENSIONS = 8

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
    """The wire form of `array`, with torch's dtype name if `as_tensor`; data too long to be inlined
    is appended to `aux`."""
    name = array.dtype.str
    if name not in _TORCH_NAMES:
        raise WireError(
            f"array: dtype {array.dtype} cannot cross the wire; "
            f"convert it to one of {', '.join(_TORCH_NAMES)}"
        )
    data: object
    if array.nbytes < INLINE_LIMIT_BYTES:
        data = msgpack.ExtType(ARRAY_EXT_TYPE, array.tobytes())
    else:
        aux.append(array.tobytes())
        data = len(aux)
    return [_TORCH_NAMES[name] if as_tensor else name, list(array.shape), data]


def decode_array(value: object, frames: Frames, path: str) -> Array:
    """The array in `value`, read-only and backed by the message's own bytes.

    `frames` is the whole message: frame 0 the body, then the auxiliary frames. Raises WireError.
    """
    name, shape, data = expect.array(value, path, 3)[:3]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise mismatch(f"{path}.dtype", name, f"one of {', '.join(_DTYPES)}")
    dimensions = [
        expect.integer(size, f"{path}.shape[{axis}]", 0, 2**31 - 1)
        for axis, size in enumerate(expect.array(shape, f"{path}.shape"))
    ]
    if len(dimensions) > MAX_DIMENSIONS:
        raise mismatch(f"{path}.shape", dimensions, f"at most {MAX_DIMENSIONS} dimensions")
    buffer = memoryview(_data(data, frames, f"{path}.data"))
    num_bytes = math.prod(dimensions) * dtype.itemsize
    if buffer.nbytes != num_bytes:
        raise WireError(
            f"{path}: shape {dimensions} needs {num_bytes} bytes of data, got {buffer.nbytes}"
        )
    try:
        return (
            np.frombuffer(buffer, dtype).reshape(dimensions)
            if num_bytes
            else np.empty(dimensions, dtype)
        )
    except ValueError as error:  # zero bytes, yet dimensions whose product NumPy cannot hold
        raise WireError(f"{path}.shape: {error}") from None


def _data(value: object, frames: Frames, path: str) -> Frame:
    if isinstance(value, msgpack.ExtType):
        data: bytes = value.data
        return data
    if type(value) is int:
        if not 1 <= value < len(frames):
            raise mismatch(
                path, value, f"the number of an auxiliary frame (the message has {len(frames) - 1})"
            )
        return frames[value]
    raise mismatch(path, value, f"extension type {ARRAY_EXT_TYPE} or a frame number")
