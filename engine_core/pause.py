"""Pause and resume of one engine: whether it steps, whether it begins anything, and who waits to
hear that it stands still.

    running --pause--> draining --nothing in flight--> paused --resume--> running

Between steps nothing is in flight, so only the mode `wait` spends time draining: requests that have
begun go on until they end, those that have not are held with the newcomers.

Invariants
- While paused no step runs. While not running, no request begins.
- A pause is answered behind every output that came of it, when the state is `paused`; one that a
  resume overtakes is answered with a failure.
- One resume ends every pause. A later pause acts on what an earlier one holds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine_core.aborts import EndedRequest
from engine_core.outbox import Outbox
from engine_core.scheduler import Scheduler
from ipc.pause import EngineState, PauseMode, PauseReceipt
from ipc.utility import UtilityReply

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseOrder:
    """What one pause asks for."""

    mode: PauseMode
    clear_cache: bool = False
    """Empty the prefix cache once nothing is in flight; what `keep` holds is then retracted."""
    lease_s: float | None = None
    """After so long the engine resumes by itself."""
    pause_id: str | None = None
    rejects_newcomers: bool = False
    """Refuse what is added meanwhile, retryably, and do not hold it."""
    has_receipt: bool = True
    """Whether its caller awaits a PauseReceipt, or vLLM's nil."""


@dataclass(frozen=True, slots=True)
class _Waiter:
    client_index: int
    call_id: int
    method: str
    receipt: PauseReceipt | None


class Pauses:
    """The pause state of one engine."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiters: list[_Waiter] = []
        self._order: PauseOrder | None = None
        self._clears_cache = False
        self.state: EngineState = "running"
        self.since_s = 0.0
        """When the state last changed."""
        self.lease_ends_s: float | None = None

    @property
    def mode(self) -> PauseMode | None:
        return None if self._order is None else self._order.mode

    @property
    def pause_id(self) -> str | None:
        return None if self._order is None else self._order.pause_id

    @property
    def rejects_newcomers(self) -> bool:
        return self._order is not None and self._order.rejects_newcomers

    def begin(
        self,
        client_index: int,
        call_id: int,
        method: str,
        order: PauseOrder,
        ended: Sequence[EndedRequest],
        now: float,
    ) -> None:
        """Stop what the order says; `settle` answers. `ended` are the requests of an abort."""
        receipt = PauseReceipt(
            num_aborted=len(ended),
            num_blocks_freed=sum(one.num_blocks_freed for one in ended),
            num_blocks_cached=sum(one.num_blocks_cached for one in ended),
        )
        self._scheduler.hold_newcomers()
        if order.mode == "retract" or (order.mode == "keep" and order.clear_cache):
            num_retracted, freed, cached = self._scheduler.retract_running()
            receipt = replace(
                receipt,
                num_retracted=num_retracted,
                num_blocks_freed=freed,
                num_blocks_cached=cached,
            )
        # A pause that was not answered yet is owed an empty cache all the same.
        self._clears_cache = order.clear_cache or (bool(self._waiters) and self._clears_cache)
        self._order = order
        self._enter("draining", now)
        self.lease_ends_s = None if order.lease_s is None else now + order.lease_s
        waiter = _Waiter(client_index, call_id, method, receipt if order.has_receipt else None)
        self._waiters.append(waiter)

    def settle(self, outbox: Outbox, now: float) -> None:
        """Answer, if nothing is in flight any more; called whenever that may have become so."""
        if self.state != "draining" or self._order is None:
            return
        if self._order.mode == "wait" and self._scheduler.has_work:
            return
        if self._clears_cache:
            self._scheduler.pool.flush()
        self._enter("paused", now)
        scheduler = self._scheduler
        for waiter in self._waiters:
            result = None
            if waiter.receipt is not None:
                result = replace(
                    waiter.receipt,
                    num_kept=len(scheduler.running),
                    num_waiting=scheduler.num_waiting,
                ).to_wire()
            outbox.reply(waiter.client_index, UtilityReply(waiter.call_id, None, result))
        self._waiters.clear()
        logger.info(
            "paused (%s): %d requests frozen, %d waiting",
            self._order.mode,
            len(scheduler.running),
            scheduler.num_waiting,
        )

    def resume(self, outbox: Outbox, now: float, why: str) -> EngineState:
        """Step again, and begin what was held. Returns the state that ended; harmless to repeat."""
        ended = self.state
        if ended == "running":
            return ended
        for waiter in self._waiters:
            message = f"Call to {waiter.method} method failed: a resume overtook the pause"
            outbox.reply(waiter.client_index, UtilityReply(waiter.call_id, message))
        logger.info("resumed from %s after %.3f s, %s", ended, now - self.since_s, why)
        self._waiters.clear()
        self._order = self.lease_ends_s = None
        self._enter("running", now)
        self._scheduler.release_newcomers()
        return ended

    def _enter(self, state: EngineState, now: float) -> None:
        if state != self.state:
            self.state = state
            self.since_s = now
