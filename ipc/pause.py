"""The payloads of Caesura's own pause and resume utilities.

A pause is answered when it holds: nothing is in flight, and everything that came of it has been
sent before. So the reply may be long in coming, and others are answered meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from ipc import expect
from ipc.errors import mismatch

CAESURA_PAUSE = "caesura_pause"
"""Arguments: mode, clear_cache, lease_s (or nil), pause_id. Result, late: PauseReceipt."""
CAESURA_RESUME = "caesura_resume"
"""Argument: pause_id, or nil for whichever. Result: the state that it ended."""

PauseMode = Literal["abort", "wait", "keep", "retract"]
"""What a pause does with requests that have begun: end them with what they have, let them finish,
freeze them, or free their KV and have them recomputed after the resume."""

EngineState = Literal["running", "draining", "paused"]


def read_mode(value: object, path: str = "mode") -> PauseMode:
    """A pause mode. Raises WireError."""
    if value not in get_args(PauseMode):
        raise mismatch(path, value, f"one of {', '.join(get_args(PauseMode))}")
    return cast(PauseMode, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseReceipt:
    """What a pause found and did in one engine."""

    num_aborted: int = 0
    num_kept: int = 0
    """Requests that are frozen with their KV."""
    num_retracted: int = 0
    """Requests whose KV was freed, and that will be recomputed."""
    num_waiting: int = 0
    """Requests that wait in the engine, the retracted ones among them."""
    num_blocks_freed: int = 0
    num_blocks_cached: int = 0

    def to_wire(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, value: object, path: str = "pause_receipt") -> PauseReceipt:
        fields = expect.mapping(value, path)
        return cls(
            **{name: expect.count(fields.get(name, 0), f"{path}.{name}") for name in cls.__slots__}
        )
