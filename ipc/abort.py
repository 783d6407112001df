"""The ABORT frame: an array of internal request ids.

It keeps vLLM's meaning: no output follows for the requests it names. Unknown and repeated ids are
harmless.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ipc.codec import Frame, pack, unpack
from ipc.errors import mismatch
from ipc.request_type import RequestType


@dataclass(frozen=True, slots=True)
class Abort:
    """Ids to abort, in order of arrival."""

    request_ids: tuple[str, ...]
    num_ignored: int = 0
    """Entries that were neither ids nor empty; the sender has a bug."""


def encode_abort(request_ids: Iterable[str]) -> list[bytes]:
    """Frames of one ABORT, type byte first."""
    return [RequestType.ABORT.frame, pack(list(request_ids))]


def decode_abort(payload: Frame) -> Abort:
    """Parse an ABORT's payload.

    One bad entry must not save the others from being aborted: nil and empty ids are skipped,
    anything else that is not a string is skipped and counted. A bare string is one id, as in vLLM.
    Raises WireError.
    """
    value = unpack(payload)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise mismatch("request_ids", value, "an array of request ids")
    request_ids = tuple(entry for entry in value if isinstance(entry, str) and entry)
    num_ignored = sum(entry is not None and not isinstance(entry, str) for entry in value)
    return Abort(request_ids, num_ignored)
