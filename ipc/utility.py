"""Utility calls: remote procedures of an engine, and their replies.

A call is `[client_index, call_id, method, args]`. Its reply travels in an outputs frame of its own,
in which `[call_id, failure_message, [nil, result]]` holds the result of a success, and nil in place
of the envelope for a failure. Invariant: the call id comes back bit for bit (vLLM's Python front
end fills all 64 bits).
"""

from __future__ import annotations

from dataclasses import dataclass

from ipc import expect
from ipc.codec import Frame, pack, unpack
from ipc.request_type import RequestType


@dataclass(frozen=True, slots=True)
class UtilityCall:
    """A front end asks its engine to run `method(*args)`."""

    client_index: int
    call_id: int
    method: str
    args: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class UtilityReply:
    """What became of a call: a result, or the message of a failure."""

    call_id: int
    failure_message: str | None = None
    result: object = None


def encode_utility(call: UtilityCall) -> list[bytes]:
    """Frames of one UTILITY, type byte first."""
    return [
        RequestType.UTILITY.frame,
        pack((call.client_index, call.call_id, call.method, call.args)),
    ]


def decode_utility(payload: Frame) -> UtilityCall:
    """Parse a UTILITY's payload. Raises WireError."""
    client_index, call_id, method, args = expect.array(unpack(payload), "utility", 4)[:4]
    return UtilityCall(
        expect.count(client_index, "utility.client_index"),
        decode_call_id(call_id, "utility.call_id"),
        expect.text(method, "utility.method"),
        tuple(expect.array(expect.opaque(args, "utility.args"), "utility.args")),
    )


def decode_call_id(value: object, path: str) -> int:
    """Negative ids announce notices that an engine pushes unasked; a front end may know none of
    them."""
    return expect.integer(value, path, expect.INT64_MIN, expect.UINT64_MAX)


def reply_to_wire(reply: UtilityReply) -> list[object]:
    """The three entries of a reply."""
    envelope = [None, reply.result] if reply.failure_message is None else None
    return [reply.call_id, reply.failure_message, envelope]


def reply_from_wire(value: object, path: str) -> UtilityReply:
    """Parse the entries of a reply; an envelope's type information serves insecure serialisation
    only and is ignored."""
    entries = expect.array(value, path, 1)
    call_id, failure_message, envelope = [*entries, None, None][:3]
    result = None
    if envelope is not None:
        result = expect.opaque(expect.array(envelope, f"{path}.result", 2)[1], f"{path}.result")
    return UtilityReply(
        decode_call_id(call_id, f"{path}.call_id"),
        expect.optional(expect.text, failure_message, f"{path}.failure_message"),
        result,
    )
