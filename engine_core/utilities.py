"""The utility methods that a client can call on this engine, vLLM's and Caesura's own.

A call that fails is answered with a failure in vLLM's words and harms nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ipc.lifecycle import (
    CAESURA_ABORT,
    CAESURA_REQUESTS,
    CAESURA_STATUS,
    EngineStatus,
    LiveRequest,
    LiveRequests,
)
from ipc.utility import UtilityCall, UtilityReply

if TYPE_CHECKING:
    from engine_core.core import EngineCore
    from engine_core.outbox import Outbox

logger = logging.getLogger(__name__)


class Utilities:
    """Dispatches utility calls to methods over one core."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._methods: dict[str, Callable[..., object]] = {
            "get_supported_tasks": lambda: ["generate"],
            "get_weight_version": lambda: core.weight_version,
            "is_scheduler_paused": lambda: False,
            "is_sleeping": lambda: False,
            "reset_prefix_cache": self._reset_prefix_cache,
            "reset_mm_cache": lambda: None,
            "reset_encoder_cache": lambda: None,
            CAESURA_STATUS: lambda check=True: self.status(check_integrity=check).to_wire(),
        }

    def call(self, client_index: int, call: UtilityCall, outbox: Outbox) -> UtilityReply:
        """Run one call. What it adds to `outbox` leaves before the reply."""
        try:
            if call.method == CAESURA_ABORT:
                result = self._abort(client_index, call.args, outbox)
            elif call.method == CAESURA_REQUESTS:
                result = self._list_requests(client_index, *call.args)
            elif (method := self._methods.get(call.method)) is not None:
                result = method(*call.args)
            else:
                raise AttributeError(f"'EngineCore' object has no attribute '{call.method}'")
        except Exception as error:
            message = f"Call to {call.method} method failed: {error}"
            logger.warning("utility call of client %d: %s", client_index, message)
            return UtilityReply(call.call_id, message, None)
        return UtilityReply(call.call_id, None, result)

    def status(self, *, check_integrity: bool = True) -> EngineStatus:
        """The state of the engine; a check of its books takes time for each block that is held."""
        core, scheduler = self._core, self._core.scheduler
        pool = scheduler.pool
        return EngineStatus(
            state="running",
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_steps=core.num_steps,
            weight_version=core.weight_version,
            integrity_errors=tuple(scheduler.check_integrity()) if check_integrity else (),
            counters={
                **core.counters,
                "preemptions": scheduler.num_preemptions,
                "tokens_computed": scheduler.num_computed_tokens,
                "prefix_cache_queried_tokens": scheduler.prefix_cache.num_queried_tokens,
                "prefix_cache_hit_tokens": scheduler.prefix_cache.num_hit_tokens,
            },
        )

    def _list_requests(self, client_index: int) -> object:
        requests = {
            request.request_id: LiveRequest(
                request.stage.value, request.num_output_tokens, request.num_preemptions
            )
            for request in self._core.live_requests(client_index)
        }
        return LiveRequests(requests).to_wire()

    def _abort(self, client_index: int, args: tuple[object, ...], outbox: Outbox) -> object:
        match args:
            case [list() | tuple() as request_ids, str() as cause] if all(
                isinstance(request_id, str) for request_id in request_ids
            ):
                receipt = self._core.abort_with_receipt(client_index, request_ids, cause, outbox)
                return receipt.to_wire()
        raise TypeError(f"expected [[request id, …], cause], got {str(args)[:120]}")

    def _reset_prefix_cache(
        self, reset_running: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget cached prefixes. As in vLLM, refused (False) while requests hold blocks."""
        if reset_running:
            raise ValueError(
                "reset_running_requests=true is not supported; abort the requests first"
            )
        del reset_connector  # there is none
        if self._core.scheduler.running:
            return False
        self._core.scheduler.pool.flush()
        return True
