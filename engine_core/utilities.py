"""The utility methods that a client can call on this engine, vLLM's and Caesura's own.

A call that fails is answered with a failure in vLLM's words and harms nothing else. Most are
answered at once; a pause when it holds, and work for another thread when it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_core.jobs import Job, JobDone
from engine_core.pause import PauseOrder
from ipc import expect
from ipc.lifecycle import (
    CAESURA_ABORT,
    CAESURA_REQUESTS,
    CAESURA_STATUS,
    EngineStatus,
    LiveRequest,
    LiveRequests,
)
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME, read_mode
from ipc.utility import UtilityCall, UtilityReply
from ipc.weights import (
    CAESURA_COMMIT_WEIGHTS,
    CAESURA_DISCARD_WEIGHTS,
    CAESURA_JOIN_WEIGHTS_GROUP,
    CAESURA_LEAVE_WEIGHTS_GROUP,
    CAESURA_STAGE_WEIGHTS,
)

if TYPE_CHECKING:
    from engine_core.core import EngineCore
    from engine_core.outbox import Outbox

logger = logging.getLogger(__name__)

LATER = object()
"""A result that will be replied in its own time."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call at which boundary."""

    client_index: int
    call: UtilityCall
    outbox: Outbox
    """What is added here leaves before the reply."""
    now: float


class Utilities:
    """Dispatches utility calls to methods over one core."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        weights = core.weights
        # Those that need no more than their arguments ...
        self._simple: dict[str, Callable[..., object]] = {
            "get_supported_tasks": lambda: ["generate"],
            "is_scheduler_paused": lambda: core.pauses.state != "running",
            "is_sleeping": lambda: core.pauses.state != "running",
            "reset_mm_cache": lambda: None,
            "reset_encoder_cache": lambda: None,
            "get_weight_version": lambda: weights.version,
            "set_weight_version": weights.label,
            CAESURA_COMMIT_WEIGHTS: weights.commit,
            CAESURA_DISCARD_WEIGHTS: weights.discard,
        }
        # ... those that do their work elsewhere ...
        self._jobs: dict[str, Callable[[int, UtilityCall], Job]] = {
            CAESURA_STAGE_WEIGHTS: weights.stage,
            CAESURA_JOIN_WEIGHTS_GROUP: weights.join_group,
            CAESURA_LEAVE_WEIGHTS_GROUP: weights.leave_group,
        }
        # ... and those that must know who calls, and when.
        self._others: dict[str, Callable[..., object]] = {
            CAESURA_ABORT: self._abort,
            CAESURA_REQUESTS: self._list_requests,
            CAESURA_STATUS: self._status,
            CAESURA_PAUSE: self._pause,
            CAESURA_RESUME: self._resume,
            "pause_scheduler": self._pause_like_vllm,
            "pause_generation": self._pause_like_vllm,
            "resume_scheduler": self._resume_like_vllm,
            "reset_prefix_cache": self._reset_prefix_cache,
        }

    def call(
        self, client_index: int, call: UtilityCall, outbox: Outbox, now: float
    ) -> UtilityReply | None:
        """Run one call; None if its reply comes later. What it adds to `outbox` leaves before the
        reply.
        """
        try:
            if (job := self._jobs.get(call.method)) is not None:
                self._core.jobs.append(job(client_index, call))
                return None
            if (simple := self._simple.get(call.method)) is not None:
                result = simple(*call.args)
            elif (other := self._others.get(call.method)) is not None:
                result = other(Caller(client_index, call, outbox, now), *call.args)
            else:
                raise AttributeError(f"'EngineCore' object has no attribute '{call.method}'")
        except Exception as error:
            return _failure(client_index, call.call_id, call.method, error)
        return None if result is LATER else UtilityReply(call.call_id, None, result)

    def finish(self, done: JobDone, outbox: Outbox) -> None:
        """Reply to a call whose work was done on another thread."""
        job = done.job
        try:
            reply = UtilityReply(job.call_id, None, job.finish(done.outcome))
        except Exception as error:
            reply = _failure(job.client_index, job.call_id, job.method, error)
        outbox.reply(job.client_index, reply)

    # -- pauses --------------------------------------------------------------------------------

    def _pause(
        self,
        caller: Caller,
        mode: object,
        clear_cache: object = False,
        lease_s: object = None,
        pause_id: object = None,
    ) -> object:
        order = PauseOrder(
            mode=read_mode(mode),
            clear_cache=expect.boolean(clear_cache, "clear_cache"),
            lease_s=expect.optional(expect.number, lease_s, "lease_s"),
            pause_id=expect.optional(expect.text, pause_id, "pause_id"),
        )
        return self._begin_pause(caller, order)

    def _pause_like_vllm(
        self, caller: Caller, mode: object = "abort", clear_cache: object = True
    ) -> object:
        """vLLM 0.32's `pause_scheduler`, which holds newcomers, and 0.33's `pause_generation`,
        which refuses them unless running requests are kept.
        """
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"Invalid pause mode: {mode}")
        order = PauseOrder(
            mode=read_mode(mode),
            clear_cache=expect.boolean(clear_cache, "clear_cache"),
            rejects_newcomers=caller.call.method == "pause_generation" and mode != "keep",
            has_receipt=False,
        )
        return self._begin_pause(caller, order)

    def _begin_pause(self, caller: Caller, order: PauseOrder) -> object:
        self._core.pause(caller.client_index, caller.call, order, caller.outbox, caller.now)
        return LATER

    def _resume(self, caller: Caller, pause_id: object = None) -> object:
        pauses = self._core.pauses
        asked = expect.optional(expect.text, pause_id, "pause_id")
        if asked is not None and pauses.state != "running" and asked != pauses.pause_id:
            raise ValueError(f"the pause is {pauses.pause_id!r}, not {asked!r}")
        return pauses.resume(caller.outbox, caller.now, f"as client {caller.client_index} asked")

    def _resume_like_vllm(self, caller: Caller) -> None:
        self._resume(caller)

    def _reset_prefix_cache(
        self, caller: Caller, reset_running: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget cached prefixes. As in vLLM, refused (False) while requests hold blocks, unless
        they are to be recomputed.
        """
        del reset_connector  # there is none
        scheduler = self._core.scheduler
        if reset_running:
            scheduler.retract_running()
        if scheduler.running:
            return False
        scheduler.pool.flush()
        return True

    # -- looking inside ------------------------------------------------------------------------

    def _status(self, caller: Caller, check_integrity: bool = True) -> object:
        return self.status(caller.now, check_integrity=check_integrity).to_wire()

    def status(self, now: float, *, check_integrity: bool = True) -> EngineStatus:
        """The state of the engine; a check of its books takes time for each block that is held."""
        core, scheduler = self._core, self._core.scheduler
        pool = scheduler.pool
        return EngineStatus(
            state=core.pauses.state,
            pause_id=core.pauses.pause_id,
            pause_mode=core.pauses.mode,
            state_for_ms=int(1000 * max(0.0, now - core.pauses.since_s)),
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_steps=core.num_steps,
            weight_version=core.weights.version,
            weight_epoch=scheduler.weight_epoch,
            integrity_errors=tuple(scheduler.check_integrity()) if check_integrity else (),
            counters={
                **core.counters,
                "preemptions": scheduler.num_preemptions,
                "retractions": scheduler.num_retractions,
                "tokens_computed": scheduler.num_computed_tokens,
                "prefix_cache_queried_tokens": scheduler.prefix_cache.num_queried_tokens,
                "prefix_cache_hit_tokens": scheduler.prefix_cache.num_hit_tokens,
            },
        )

    def _list_requests(self, caller: Caller) -> object:
        requests = {
            request.request_id: LiveRequest(
                request.stage.value, request.num_new_tokens, request.num_preemptions
            )
            for request in self._core.live_requests(caller.client_index)
        }
        return LiveRequests(requests).to_wire()

    def _abort(self, caller: Caller, request_ids: object, cause: object) -> object:
        match request_ids, cause:
            case [list() | tuple(), str()] if all(isinstance(one, str) for one in request_ids):
                receipt = self._core.aborts.with_receipt(
                    caller.client_index, request_ids, cause, caller.outbox
                )
                return receipt.to_wire()
        raise TypeError(f"expected [[request id, …], cause], got {str(caller.call.args)[:120]}")


def _failure(client_index: int, call_id: int, method: str, error: Exception) -> UtilityReply:
    message = f"Call to {method} method failed: {error}"
    logger.warning("utility call of client %d: %s", client_index, message)
    return UtilityReply(call_id, message, None)
