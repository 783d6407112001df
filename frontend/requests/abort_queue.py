"""Drains the auto-aborts of dropped streams and matched stop strings into one Abort frame an
engine.

Auto-aborts come in storms: a load balancer restarts and a thousand clients are gone within
milliseconds. Each pushed id therefore waits for company, about a millisecond without a newcomer and
at most ten after the first of its batch, and everything that is ready leaves together, grouped by
engine. So the drops of one turn of the event loop are exactly one frame for each engine, and a lone
drop waits a millisecond.

Where few requests live there is no storm to come, and their steps are so short that a millisecond
is half a token: after a calm, a drop among few leaves at the end of its turn of the loop.

Invariants
- Ids leave in the order in which they were dropped.
- Whether an id is still active is asked when its batch leaves, not when it was pushed.
- No clock and no timer here: the owner asks `due_at` and calls `drain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from frontend.outputs import AbortCause

LINGER_S = 0.001
"""A batch leaves when no id was pushed for so long …"""
MAX_LINGER_S = 0.010
"""… or when its first id has waited so long."""
FEW_REQUESTS = 16
CALM_S = 0.05
MAX_IDS_PER_FRAME = 1024


@dataclass(frozen=True, slots=True)
class AbortFrame:
    """The ids of one Abort frame, for one engine, in drop order."""

    engine_index: int
    request_ids: list[str]


class AbortQueue:
    """Auto-aborts that wait to be sent."""

    def __init__(self) -> None:
        self._pending: list[tuple[str, AbortCause]] = []
        self._first_push_s = 0.0
        self._last_push_s = float("-inf")
        self._linger_s = LINGER_S

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, request_id: str, cause: AbortCause, now: float, *, num_live: int) -> None:
        """`num_live` requests live beside it."""
        if not self._pending:
            self._first_push_s = now
            is_calm = now - self._last_push_s > CALM_S
            self._linger_s = 0.0 if is_calm and num_live < FEW_REQUESTS else LINGER_S
        self._last_push_s = now
        self._pending.append((request_id, cause))

    @property
    def due_at(self) -> float | None:
        """When the batch should leave, on the clock of `push`; None if there is none."""
        if not self._pending:
            return None
        return min(self._last_push_s + self._linger_s, self._first_push_s + MAX_LINGER_S)

    def drain(
        self, claim: Callable[[str], int | None]
    ) -> tuple[list[AbortFrame], dict[AbortCause, int]]:
        """Take the whole batch: its frames, and how many ids each cause brought.

        `claim` names the engine that still runs an id, and gives up the id at the same time; None
        skips it.
        """
        batch, self._pending = self._pending, []
        ids_by_engine: dict[int, list[str]] = {}
        num_by_cause: dict[AbortCause, int] = {}
        for request_id, cause in batch:
            if (engine_index := claim(request_id)) is not None:
                ids_by_engine.setdefault(engine_index, []).append(request_id)
                num_by_cause[cause] = num_by_cause.get(cause, 0) + 1
        frames = [
            AbortFrame(engine_index, request_ids[start : start + MAX_IDS_PER_FRAME])
            for engine_index, request_ids in ids_by_engine.items()
            for start in range(0, len(request_ids), MAX_IDS_PER_FRAME)
        ]
        return frames, num_by_cause
