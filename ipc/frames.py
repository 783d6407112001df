"""What an engine receives: one input message of any type, decoded or refused.

Invariant: a bad message harms only its sender. The refusal therefore carries whatever of the
message names the sender and what it waits for, and nothing but `InputError` is ever raised.
"""

from __future__ import annotations

import msgpack

from ipc.abort import Abort as Abort
from ipc.abort import decode_abort
from ipc.codec import MAX_COLLECTION_LENGTH, Frame, Frames, refuse_unknown_extension
from ipc.errors import WireError, mismatch
from ipc.request import EngineCoreRequest, decode_add
from ipc.request_type import RequestType as RequestType
from ipc.utility import UtilityCall, decode_utility

_CLIENT_INDEX_OF_ADD = 11


class InputError(WireError):
    """An input message that cannot be acted upon, with what could still be read of it.

    A `request_id` wants a terminal output with finish reason error, a `call_id` a failed utility
    reply; both go to `client_index`. None: not readable.
    """

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        client_index: int | None = None,
        call_id: int | None = None,
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.client_index = client_index
        self.call_id = call_id


def decode_input(frames: Frames) -> EngineCoreRequest | Abort | UtilityCall:
    """The message in `frames` as an engine's DEALER receives them: type byte, payload, auxiliary
    frames."""
    if len(frames) < 2:
        raise InputError(f"message: expected a type byte and a payload, got {len(frames)} frame(s)")
    kind, payload = bytes(frames[0]), frames[1]
    try:
        if kind == RequestType.ADD.frame:
            return decode_add(frames)
        if kind == RequestType.ABORT.frame:
            return decode_abort(payload)
        if kind == RequestType.UTILITY.frame:
            return decode_utility(payload)
        raise mismatch("message type", kind.hex(), "00 (ADD), 01 (ABORT) or 03 (UTILITY)")
    except WireError as error:
        raise _with_sender(error, kind, payload) from None


def _with_sender(error: WireError, kind: bytes, payload: Frame) -> InputError:
    message = str(error)
    if kind == RequestType.ADD.frame:
        request_id = _peek(payload, 0)
        client_index = _peek(payload, _CLIENT_INDEX_OF_ADD, default=0)
        return InputError(message, request_id=_text(request_id), client_index=_index(client_index))
    if kind == RequestType.UTILITY.frame:
        client_index, call_id = _peek(payload, 0), _peek(payload, 1)
        return InputError(message, client_index=_index(client_index), call_id=_integer(call_id))
    return InputError(message)


def _peek(payload: Frame, position: int, default: object = None) -> object:
    """The entry at `position` of a payload that may be broken elsewhere; `default` where the array
    ends before it."""
    unpacker = msgpack.Unpacker(
        ext_hook=refuse_unknown_extension,
        strict_map_key=False,
        max_buffer_size=0,  # unlimited: the payload may be refused for its very size
        max_array_len=MAX_COLLECTION_LENGTH,
        max_map_len=MAX_COLLECTION_LENGTH,
    )
    try:
        unpacker.feed(payload)
        if unpacker.read_array_header() <= position:
            return default
        for _ in range(position):
            unpacker.skip()
        return unpacker.unpack()
    except (ValueError, TypeError, OverflowError, BufferError, msgpack.UnpackException):
        return None


def _text(value: object) -> str | None:
    return value if type(value) is str and value else None


def _integer(value: object) -> int | None:
    return value if type(value) is int else None


def _index(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
