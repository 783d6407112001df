"""Pause and resume of all engines, over a gate that keeps newcomers from them.

Both begin in one sweep without a suspension point: the gate changes, requests that never reached an
engine are ended or sent, and one call leaves for each engine. Only then does anybody wait.

Invariants
- The state is `paused` only when every living engine has said that it stands still. An engine
  answers behind all its outputs, so by then each was handed to its stream.
- A pause that is not answered in time stays `draining`; late answers still make it `paused`.
- One resume ends every pause, from any state, and opens the gate behind its calls to the engines:
  what was held arrives at engines that run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from frontend.errors import (
    ENGINE_PAUSED,
    EngineDeadError,
    PauseConflictError,
    PauseInterruptedError,
    PauseTimeoutError,
    ShuttingDownError,
    UtilityCallError,
)
from frontend.outputs import AbortCause, Terminal
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.fan_out import FanOut, name_engines
from frontend.requests.pause_gate import MAX_HOLD_S, PauseOrder
from frontend.requests.pause_reports import PauseReport, PauseState, ResumeReport
from ipc.errors import WireError
from ipc.output import OutputError
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME, PauseReceipt

logger = logging.getLogger(__name__)

ENGINE_LEASE_SLACK_S = 1.0
"""So much later an engine ends a lease by itself: it is for a front end that is gone."""
LEASE_END_TIMEOUT_S = 5.0
"""So long engines may take to confirm that they run again after a lease; then they are named."""


@dataclass(slots=True)
class _Attempt:
    """A pause on its way."""

    order: PauseOrder
    started_s: float
    num_ended: int
    """Requests that it ended here."""
    fan_out: FanOut
    receipts: dict[int, PauseReceipt] = field(default_factory=dict)

    def read_receipts(self) -> str:
        """Take the engines' answers; returns what is wrong with them, or ""."""
        faults = self.fan_out.failures
        for rank, result in self.fan_out.results.items():
            try:
                # vLLM's answer is nil.
                self.receipts[rank] = PauseReceipt.from_wire({} if result is None else result)
            except WireError as error:
                faults.append(f"engine {rank} told wrongly how it paused: {error}")
        return "; ".join(faults)


class Pauses:
    """Carries out pauses and resumes over a dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._gate = dispatcher.gate
        self._loop = asyncio.get_running_loop()
        self._newest: _Attempt | None = None
        self._settled: asyncio.Future[None] = self._loop.create_future()
        """Of the pause that is draining: done when it holds or has failed."""
        self._lease: asyncio.TimerHandle | None = None
        self._hold_timer: asyncio.TimerHandle | None = None
        self._lease_ends: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> PauseState:
        gate, lease = self._gate, self._lease
        order = gate.order
        return PauseState(
            state=gate.state,
            mode=None if order is None else order.mode,
            pause_id=gate.pause_id,
            for_s=self._dispatcher.clock() - gate.since_s,
            newcomers=None if order is None else order.newcomers,
            num_held=len(gate),
            lease_left_s=None if lease is None else max(0.0, lease.when() - self._loop.time()),
        )

    # -- pause ---------------------------------------------------------------------------------

    async def pause(self, order: PauseOrder, timeout_s: float) -> PauseReport:
        """Pause, and return when the engines stand still. Giving up the wait undoes nothing.

        Raises EngineDeadError, PauseTimeoutError, PauseInterruptedError, or UtilityCallError if an
        engine refused.
        """
        if not self._dispatcher.alive_engines:
            raise EngineDeadError("no engine is alive; restart the server")
        attempt = self._start(order)
        await self.wait_until_paused(timeout_s)
        return self._report(attempt)

    async def wait_until_paused(self, timeout_s: float) -> None:
        """Return when the pause that is under way holds; raises as `pause` does."""
        settled = self._settled
        await asyncio.wait([settled], timeout=timeout_s)
        if not settled.done():
            assert self._newest is not None
            late = name_engines(self._newest.fan_out.unanswered)
            logger.warning("%s did not pause within %g s; still draining", late, timeout_s)
            raise PauseTimeoutError(
                f"{late} did not pause within timeout_s={timeout_s:g}; the state stays draining "
                f"until then, or until a resume"
            )
        settled.result()

    def _start(self, order: PauseOrder) -> _Attempt:
        """The claim phase; never suspends."""
        dispatcher, now = self._dispatcher, self._dispatcher.clock()
        self._gate.close(order, now)
        if self._settled.done():
            self._settled = self._loop.create_future()
        num_ended = self._end_everything() if order.mode == "abort" else 0
        fan_out = FanOut({rank: self._call(rank, order) for rank in dispatcher.alive_engines})
        attempt = self._newest = _Attempt(order, now, num_ended, fan_out)
        for call in fan_out.calls.values():
            call.add_done_callback(lambda _: self._note_answer(attempt))
        self._set_timers(order.lease_s)
        if order.mode == "wait":  # The other modes hold within a step.
            num_live = len(dispatcher.registry) - len(self._gate)
            logger.info("pausing (wait, pause_id %s): %d requests live", order.pause_id, num_live)
        return attempt

    def _end_everything(self) -> int:
        """End what no engine of ours has; those end the rest. Returns how many ended here."""
        dispatcher, now = self._dispatcher, self._dispatcher.clock()
        terminal = Terminal("abort", abort_cause=AbortCause.PAUSE)
        unsent, foreign = [], []
        for entry in dispatcher.registry:
            if entry.engine_index is None:
                unsent.append(entry)
            elif entry.engine_index in dispatcher.foreign_engines:
                foreign.append(entry)
            elif entry.abort_cause is None:
                entry.abort_cause, entry.abort_started_s = AbortCause.PAUSE, now
        for entry in unsent:
            dispatcher.end_unsent(entry, terminal)
        dispatcher.end_without_engine(foreign, terminal)
        return len(unsent) + len(foreign)

    def _call(self, rank: int, order: PauseOrder) -> asyncio.Future[object]:
        call, mode, clear_cache = self._dispatcher.client.start_call, order.mode, order.clear_cache
        if rank not in self._dispatcher.foreign_engines:
            lease_s = None if order.lease_s is None else order.lease_s + ENGINE_LEASE_SLACK_S
            return call(rank, CAESURA_PAUSE, mode, clear_cache, lease_s, order.pause_id)
        if mode == "retract":
            mode, clear_cache = "keep", True  # vLLM's way to have requests recomputed.
        return call(rank, "pause_scheduler", mode, clear_cache)

    def _note_answer(self, attempt: _Attempt) -> None:
        """An engine has answered, or died."""
        if attempt is not self._newest or attempt.fan_out.unanswered or self._settled.done():
            return
        order, now = attempt.order, self._dispatcher.clock()
        if fault := attempt.read_receipts():
            logger.error("pause %s failed, still draining: %s", order.pause_id, fault)
            self._fail(UtilityCallError(f"pause {order.pause_id!r} failed: {fault}"))
            return
        if not attempt.fan_out.results:
            self._fail(EngineDeadError(f"no engine lived to hold pause {order.pause_id!r}"))
            return
        self._gate.settle(now)
        self._settled.set_result(None)
        report = self._report(attempt)
        self._dispatcher.metrics.on_paused(report.duration_s)
        logger.info(
            "paused (%s, pause_id %s) after %.3f s: %d requests aborted, %d kept, %d retracted, "
            "%d held",
            order.mode,
            order.pause_id,
            report.duration_s,
            report.num_aborted,
            report.num_kept,
            report.num_retracted,
            report.num_held,
        )

    def _report(self, attempt: _Attempt) -> PauseReport:
        if not attempt.receipts:
            attempt.read_receipts()  # A later pause, which the engines answered after it, settled.
        receipts = attempt.receipts.values()
        num_retracted = sum(receipt.num_retracted for receipt in receipts)
        num_waiting = sum(receipt.num_waiting for receipt in receipts)
        return PauseReport(
            pause_id=attempt.order.pause_id,
            state="paused",
            duration_s=self._dispatcher.clock() - attempt.started_s,
            num_aborted=attempt.num_ended + sum(receipt.num_aborted for receipt in receipts),
            num_kept=sum(receipt.num_kept for receipt in receipts),
            num_retracted=num_retracted,
            num_held=len(self._gate) + max(0, num_waiting - num_retracted),
            num_blocks_freed=sum(receipt.num_blocks_freed for receipt in receipts),
            num_blocks_cached=sum(receipt.num_blocks_cached for receipt in receipts),
            engines=attempt.fan_out.outcomes,
        )

    def _fail(self, error: Exception) -> None:
        if not self._settled.done():
            self._settled.set_exception(error)
            self._settled.exception()  # Nobody may be waiting for it.

    # -- resume --------------------------------------------------------------------------------

    async def resume(self, pause_id: str | None, timeout_s: float) -> ResumeReport:
        """Open the gate, and return when the engines run, or after `timeout_s`: what is said of
        them then is part of the report. Raises PauseConflictError.
        """
        gate = self._gate
        if not gate.is_open and pause_id not in (None, gate.pause_id):
            raise PauseConflictError(
                f"the engine is paused by pause_id={gate.pause_id!r}, not {pause_id!r}; give that "
                f"id, or none to end it whoever began it"
            )
        report, fan_out = self._start_resume("as asked")
        await self._finish_resume(fan_out, timeout_s)
        return replace(report, engines=fan_out.outcomes)

    def _start_resume(self, why: str) -> tuple[ResumeReport, FanOut]:
        """Never suspends. Engines are told even when nothing is paused here: should one be, that
        heals it.
        """
        dispatcher, gate, now = self._dispatcher, self._gate, self._dispatcher.clock()
        self._cancel_timers()
        fan_out = FanOut({rank: self._resume_call(rank) for rank in dispatcher.alive_engines})
        was, pause_id = gate.state, gate.pause_id
        paused_for_s = 0.0 if gate.is_open else now - gate.closed_s
        self._newest = None
        if was == "draining":
            self._fail(PauseInterruptedError(f"a resume ended pause {pause_id!r} before it held"))
        num_released = dispatcher.open_gate()
        if was != "running":
            logger.info(
                "resumed from %s (pause_id %s), %s, after %.3f s without running: %d held requests "
                "released",
                was,
                pause_id,
                why,
                paused_for_s,
                num_released,
            )
        return ResumeReport(
            was=was, pause_id=pause_id, paused_for_s=paused_for_s, num_released=num_released
        ), fan_out

    def _resume_call(self, rank: int) -> asyncio.Future[object]:
        if rank in self._dispatcher.foreign_engines:
            return self._dispatcher.client.start_call(rank, "resume_scheduler")
        return self._dispatcher.client.start_call(rank, CAESURA_RESUME, None)

    async def _finish_resume(self, fan_out: FanOut, timeout_s: float) -> None:
        await fan_out.wait(timeout_s)
        if late := fan_out.unanswered:
            logger.warning("%s did not confirm a resume in %g s", name_engines(late), timeout_s)
        for failure in fan_out.failures:
            logger.warning("a resume failed: %s", failure)

    # -- time ----------------------------------------------------------------------------------

    def _set_timers(self, lease_s: float | None) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
        if lease_s is not None:
            self._lease = self._loop.call_later(lease_s, self._end_lease)
        if self._hold_timer is None:
            self._hold_timer = self._loop.call_later(MAX_HOLD_S, self._end_overdue)

    def _cancel_timers(self) -> None:
        for timer in (self._lease, self._hold_timer):
            if timer is not None:
                timer.cancel()
        self._lease = self._hold_timer = None

    def _end_lease(self) -> None:
        _, fan_out = self._start_resume("its lease is over")
        task = self._loop.create_task(self._finish_resume(fan_out, LEASE_END_TIMEOUT_S))
        self._lease_ends.add(task)
        task.add_done_callback(self._lease_ends.discard)

    def _end_overdue(self) -> None:
        gate, now = self._gate, self._dispatcher.clock()
        message = f"the engine is paused, and the request was held for {MAX_HOLD_S:g} s"
        terminal = Terminal("error", error=OutputError(ENGINE_PAUSED, message, True))
        for entry in gate.expired(now):
            self._dispatcher.end_unsent(entry, terminal)
        delay_s = max(0.0, gate.next_expiry_s(now) - now)
        self._hold_timer = self._loop.call_later(delay_s, self._end_overdue)

    def call_when_paused(self, callback: Callable[[], object]) -> None:
        """When the pause that is draining holds; never if a resume ends it before."""
        self._settled.add_done_callback(
            lambda settled: None if settled.exception() is not None else callback()
        )

    def close(self) -> None:
        """The front end shuts down: whoever waits for a pause is told."""
        self._cancel_timers()
        self._newest = None
        self._fail(ShuttingDownError("the server is shutting down"))
