"""MessagePack with limits: the only place where bytes become objects and objects bytes.

Invariants: nothing is ever unpickled (extension types 1 and 2, vLLM's pickles, are refused like
every type but 3, which holds raw array bytes); whatever comes in, the outcome is an object or a
`WireError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgpack

from ipc.errors import WireError

Frame = bytes | bytearray | memoryview
"""One frame of a ZeroMQ message."""
Frames = Sequence[Frame]

MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_COLLECTION_LENGTH = 4 * 1024 * 1024
"""Longest array or map: a prompt of four million tokens."""
ARRAY_EXT_TYPE = 3
"""The extension type of raw array bytes."""


def pack(value: object) -> bytes:
    """MessagePack bytes of `value`. Raises WireError for what MessagePack cannot express."""
    try:
        return cast(bytes, msgpack.packb(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"not packable: {error}") from None


def unpack(payload: Frame) -> object:
    """The object in `payload`: lists for arrays, dicts (with keys of any type) for maps.

    Depth is bounded by the C unpacker; fields of unknown shape are bounded further by
    `expect.opaque`. Raises WireError for bad or truncated bytes, trailing bytes, and everything
    beyond the limits.
    """
    num_bytes = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(f"payload: {num_bytes} bytes exceed the limit of {MAX_PAYLOAD_BYTES}")
    # An array's header makes the unpacker allocate for its claimed length, so no claim may exceed
    # the bytes there are.
    limit = min(num_bytes, MAX_COLLECTION_LENGTH)
    try:
        return msgpack.unpackb(
            payload,
            strict_map_key=False,
            ext_hook=refuse_unknown_extension,
            max_array_len=limit,
            max_map_len=limit,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(
            f"payload: not valid MessagePack: {str(error) or type(error).__name__}"
        ) from None


def refuse_unknown_extension(code: int, data: bytes) -> object:
    """The unpacker's hook: lets raw array bytes pass and nothing else.

    (MessagePack's own timestamps never come here; they fail whatever check their field has.)
    """
    if code != ARRAY_EXT_TYPE:
        kind = " (a pickle)" if code in (1, 2) else ""
        raise WireError(
            f"payload: extension type {code}{kind} is refused; "
            f"only type {ARRAY_EXT_TYPE} (array data) is accepted"
        )
    return array_data(data)


def array_data(data: bytes) -> object:
    """Raw array bytes as the codec packs and unpacks them. (`_make` skips the constructor's checks,
    which cost more than the packing.)"""
    return msgpack.ExtType._make((ARRAY_EXT_TYPE, data))
