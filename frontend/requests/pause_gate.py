"""The gate between accepted requests and the engines: open, or closed while these are paused.

    running --close--> draining --settle--> paused --open--> running

Knows neither sockets nor an event loop: whoever drives it says what time it is.

Invariants
- While the gate is closed nobody passes. Who would is held, and leaves in order of arrival when it
  opens.
- A held request that ends leaves at once: the gate holds live requests only.
- At most `MAX_NUM_HELD` requests are held, each for at most `MAX_HOLD_S` (see `expired`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from frontend.errors import EnginePausedError, InvalidRequestError
from frontend.requests.registry import Entry
from ipc.pause import EngineState, PauseMode

MAX_NUM_HELD = 4096
MAX_HOLD_S = 300.0
MAX_LEASE_S = 7 * 24 * 3600.0

NewcomerRule = Literal["hold", "reject"]
"""What becomes of a request that comes during a pause: it runs afterwards, or is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseOrder:
    """What a pause asks for. Raises InvalidRequestError for values that make no sense."""

    mode: PauseMode
    pause_id: str
    clear_cache: bool = False
    newcomers: NewcomerRule = "hold"
    lease_s: float | None = None
    """After so long it ends by itself."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(PauseMode):
            raise InvalidRequestError(
                f"mode={self.mode!r} is no pause mode; choose {', '.join(get_args(PauseMode))}"
            )
        if self.newcomers not in get_args(NewcomerRule):
            raise InvalidRequestError(f"newcomers={self.newcomers!r} must be hold or reject")
        if self.lease_s is not None and not 0 < self.lease_s <= MAX_LEASE_S:
            raise InvalidRequestError(
                f"lease_s={self.lease_s!r} must be above 0 and at most {MAX_LEASE_S:g} s, or None"
            )
        if not isinstance(self.pause_id, str) or not self.pause_id.isprintable():
            raise InvalidRequestError(f"pause_id={self.pause_id!a:.80} must be a printable text")


class PauseGate:
    """State of the pause, and the requests that it holds. Times are of the dispatcher's clock."""

    def __init__(self, now: float) -> None:
        self.state: EngineState = "running"
        self.since_s = now
        """When the state last changed."""
        self.closed_s = now
        """When it last ceased to be `running`."""
        self.order: PauseOrder | None = None
        """Of the newest pause; None while running."""
        self._held: dict[str, tuple[Entry, float]] = {}

    def __len__(self) -> int:
        """How many requests are held."""
        return len(self._held)

    @property
    def is_open(self) -> bool:
        return self.state == "running"

    @property
    def pause_id(self) -> str | None:
        return None if self.order is None else self.order.pause_id

    # -- the pause -----------------------------------------------------------------------------

    def close(self, order: PauseOrder, now: float) -> None:
        """A pause begins. An earlier one goes on under the newer order."""
        if self.is_open:
            self.closed_s = now
        self.order = order
        self._enter("draining", now)

    def settle(self, now: float) -> None:
        """The engines stand still."""
        self._enter("paused", now)

    def open(self, now: float) -> list[Entry]:
        """The pause is over; returns what was held, oldest first."""
        self.order = None
        self._enter("running", now)
        released = [entry for entry, _ in self._held.values()]
        self._held.clear()
        return released

    def _enter(self, state: EngineState, now: float) -> None:
        if state != self.state:
            self.state, self.since_s = state, now

    # -- requests ------------------------------------------------------------------------------

    def check_newcomers(self, num_requests: int) -> None:
        """Raise EnginePausedError unless a call of so many requests may come in now."""
        if self.order is not None and self.order.newcomers == "reject":
            raise EnginePausedError(
                f"the engine is paused (pause {self.order.pause_id!r}) and takes no requests; "
                f"send it again after the resume"
            )
        self.check_room(num_requests)

    def check_room(self, num_requests: int) -> None:
        """Raise EnginePausedError unless so many more can pass, or be held."""
        if not self.is_open and len(self._held) + num_requests > MAX_NUM_HELD:
            raise EnginePausedError(
                f"the engine is paused and holds {len(self._held)} requests; {num_requests} more "
                f"would exceed {MAX_NUM_HELD}; send them again after the resume"
            )

    def hold(self, entry: Entry, now: float) -> None:
        """Keep a live request, ready to be sent, until the gate opens."""
        self._held[entry.internal_id] = entry, now

    def forget(self, entry: Entry) -> None:
        """A request ended; harmless if it was not held."""
        self._held.pop(entry.internal_id, None)

    @property
    def held(self) -> list[Entry]:
        """Oldest first."""
        return [entry for entry, _ in self._held.values()]

    def expired(self, now: float) -> list[Entry]:
        """Those that have been held for too long, and that are to be ended."""
        overdue = []
        for entry, held_s in self._held.values():
            if held_s + MAX_HOLD_S > now:
                break
            overdue.append(entry)
        return overdue

    def next_expiry_s(self, now: float) -> float:
        """When to ask for expired ones again: nobody, held already or later, is overdue before."""
        oldest = next(iter(self._held.values()), None)
        return (now if oldest is None else oldest[1]) + MAX_HOLD_S
