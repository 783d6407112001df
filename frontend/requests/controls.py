"""The methods of `AsyncEngine` that abort, pause and look inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from frontend.ids import new_id
from frontend.outputs import AbortCause, AbortReceipt, LiveRequest
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.explicit_abort import ExplicitAborts, Selector
from frontend.requests.fan_out import FanOut
from frontend.requests.inspection import engine_statuses, list_requests
from frontend.requests.pause_gate import NewcomerRule, PauseOrder
from frontend.requests.pause_reports import PauseReport, PauseState, ResumeReport
from frontend.requests.pauses import Pauses
from ipc.lifecycle import EngineStatus
from ipc.pause import PauseMode

logger = logging.getLogger(__name__)


class RequestControls:
    """Control over all that a dispatcher has accepted."""

    _dispatcher: Dispatcher
    _aborts: ExplicitAborts
    _pauses: Pauses

    def _check_serving(self, remedy: str = "") -> None:
        """Raise EngineDeadError unless engines serve. `remedy`: if they are shutting down."""
        raise NotImplementedError

    async def abort(
        self,
        request_id: str | Sequence[str] | None = None,
        *,
        prefix: str | None = None,
        tag: str | None = None,
        abort_all: bool = False,
        wait: bool = True,
        timeout_s: float = 5.0,
    ) -> AbortReceipt:
        """Abort requests by exact id (or several), id prefix, tag, or all of them.

        Each ends as a success with its partial result and the finish reason `abort`. The receipt
        comes after the effect: blocks have left the requests and terminals are with their streams;
        what is not confirmed within `timeout_s` is `pending`, and still follows. With `wait=False`
        the receipt only says what was asked for. Raises InvalidRequestError unless exactly one
        selector is given.
        """
        names = [request_id] if isinstance(request_id, str) else request_id
        selector = Selector(request_ids=names, prefix=prefix, tag=tag, everything=abort_all)
        pending = self._aborts.start(selector, AbortCause.EXPLICIT)
        return await self._aborts.finish(pending, timeout_s) if wait else pending.receipt

    async def pause(
        self,
        mode: PauseMode = "abort",
        *,
        clear_cache: bool = False,
        newcomers: NewcomerRule = "hold",
        lease_s: float | None = None,
        pause_id: str | None = None,
        timeout_s: float = 60.0,
    ) -> PauseReport:
        """Pause all engines; return when no step is in flight and every output was handed to its
        stream. What becomes of requests:

        - `abort`: all end with what they have, whatever their stage (cause `pause`)
        - `wait`: those that have begun finish; the others wait for the resume
        - `keep`: they freeze with their KV, and go on after the resume; with `clear_cache` as
          `retract`
        - `retract`: their KV is freed, and recomputed after the resume

        `clear_cache` empties the prefix cache. Newcomers are held until the resume (at most 4,096,
        and 300 s each) or refused. After `lease_s` the engines resume by themselves. Pausing while
        paused acts on what the earlier pause holds and takes its place. Plain vLLM engines tell no
        numbers; their requests end here, with what was received, at an `abort`.

        Raises PauseTimeoutError after `timeout_s`: the pause then goes on draining until it holds
        or is resumed, as it does when the caller gives up. PauseInterruptedError: a resume came
        first. Also UtilityCallError, InvalidRequestError and EngineDeadError.
        """
        order = PauseOrder(
            mode=mode,
            pause_id=new_id() if pause_id is None else pause_id,
            clear_cache=clear_cache,
            newcomers=newcomers,
            lease_s=lease_s,
        )
        self._check_serving("it cannot be paused any more; abort what is not to finish")
        return await self._pauses.pause(order, timeout_s)

    async def resume(self, pause_id: str | None = None, *, timeout_s: float = 5.0) -> ResumeReport:
        """End the pause, in whatever state, and send what was held; return when engines run again.

        With a `pause_id` only if the newest pause is that one; else PauseConflictError. Which
        engines did not confirm within `timeout_s` is part of the report. Harmless while running.
        """
        return await self._pauses.resume(pause_id, timeout_s)

    @property
    def pause_state(self) -> PauseState:
        return self._pauses.state

    async def flush_cache(
        self, *, reset_running_requests: bool = False, timeout_s: float = 5.0
    ) -> bool:
        """Empty the prefix cache of all engines. False: requests hold blocks in one of them, and
        its cache is as it was; with `reset_running_requests` they are recomputed instead.

        Raises EngineTimeoutError, UtilityCallError or EngineDeadError.
        """
        calls = FanOut.start(
            self._dispatcher.client,
            self._dispatcher.alive_engines,
            "reset_prefix_cache",
            reset_running_requests,
            False,
        )
        await calls.wait(timeout_s)
        is_flushed = all(calls.answers("the flush of its prefix cache").values())
        logger.info(
            "flush of the prefix cache: %s%s",
            "done" if is_flushed else "refused, for requests hold blocks",
            "; running requests are recomputed" if reset_running_requests else "",
        )
        return is_flushed

    async def status(
        self, timeout_s: float = 5.0, *, check_integrity: bool = True
    ) -> dict[int, EngineStatus]:
        """What each living Caesura engine says of itself; one that does not answer rightly and in
        time is left out. Checking its books holds up its next step, by some milliseconds where it
        is full.
        """
        return await engine_statuses(self._dispatcher, timeout_s, check_integrity=check_integrity)

    async def list_requests(self) -> list[LiveRequest]:
        """Every request that holds something, here or in an engine, in order of acceptance; those
        that have ended here and that their engine has not yet let go come last.
        """
        return await list_requests(self._dispatcher)
