"""Aborts that a caller asks for, by name or by a deadline: effect first, then the
acknowledgement.

The claim phase is one sweep without a suspension point: the selector becomes a list of live
requests, whatever has not reached an engine ends on the spot, and one `caesura_abort` call leaves
for each engine. Only then does anybody wait, so abort-all is atomic: what was accepted before the
call is ended by it, what is accepted afterwards is not touched.

A foreign engine knows no `caesura_abort`: its requests end here, with what was received, and it
gets a plain ABORT.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from frontend.errors import InvalidRequestError, UtilityCallError
from frontend.outputs import AbortCause, AbortedRequest, AbortReceipt, Terminal
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.registry import Entry
from ipc import lifecycle
from ipc.errors import WireError

logger = logging.getLogger(__name__)

NUM_IDS_LOGGED = 4
"""Aborts of so few requests name each of them in the log."""
EXPIRY_TIMEOUT_S = 5.0
"""So long an engine may take to end a request whose deadline passed."""


@dataclass(frozen=True, slots=True)
class Selector:
    """Which requests to abort: exactly one of its fields is set."""

    request_ids: Sequence[str] | None = None
    """Exact names: a request's own id, an alias of it, or the id of its batch."""
    prefix: str | None = None
    tag: str | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        given = [
            self.request_ids is not None,
            self.prefix is not None,
            self.tag is not None,
            self.everything,
        ]
        if sum(given) != 1:
            raise InvalidRequestError(
                "an abort needs exactly one selector: "
                "request_id (one or several), prefix, tag or abort_all=True"
            )
        if self.prefix == "":
            raise InvalidRequestError(
                "prefix='' would abort everything; say abort_all=True if that is meant"
            )


@dataclass(slots=True)
class PendingAbort:
    """An abort that has taken effect here and is on its way to the engines."""

    receipt: AbortReceipt
    entries: dict[int, list[Entry]]
    """By engine."""
    calls: dict[int, asyncio.Future[object]]
    """By engine."""


class ExplicitAborts:
    """Carries out aborts over a dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._expired: list[Entry] = []
        self._expiries: set[asyncio.Task[None]] = set()

    def start(self, selector: Selector, cause: AbortCause) -> PendingAbort:
        """The claim phase; never suspends."""
        receipt = AbortReceipt()
        return self._start(self._select(selector, receipt), cause, receipt)

    def _start(
        self, selected: Sequence[Entry], cause: AbortCause, receipt: AbortReceipt
    ) -> PendingAbort:
        by_engine: dict[int, list[Entry]] = {}
        for entry in selected:
            if entry.engine_index is None:
                self._dispatcher.end_unsent(entry, Terminal("abort", abort_cause=cause))
                receipt.requests[entry.request_id] = AbortedRequest("aborted", 0, entry.stage)
                continue
            if entry.abort_cause is None:
                entry.abort_cause, entry.abort_started_s = cause, self._dispatcher.clock()
            by_engine.setdefault(entry.engine_index, []).append(entry)
            receipt.requests[entry.request_id] = AbortedRequest("pending")
        calls = {}
        for engine_index, entries in by_engine.items():
            if engine_index in self._dispatcher.foreign_engines:
                self._dispatcher.end_without_engine(entries, Terminal("abort", abort_cause=cause))
                _settle(receipt, entries)
                receipt.engines[engine_index] = "ok"
                continue
            ids = [entry.internal_id for entry in entries]
            calls[engine_index] = self._dispatcher.client.start_call(
                engine_index, lifecycle.CAESURA_ABORT, ids, cause.value
            )
        if selected:
            names = [entry.request_id for entry in selected]
            logger.info(
                "abort (%s) of %d requests, %d of them on %d engines%s",
                cause.value,
                len(names),
                sum(map(len, by_engine.values())),
                len(by_engine),
                f": {', '.join(names)}" if len(names) <= NUM_IDS_LOGGED else "",
            )
        return PendingAbort(receipt, by_engine, calls)

    async def finish(self, pending: PendingAbort, timeout_s: float) -> AbortReceipt:
        """Wait for the engines' receipts, at most `timeout_s`; an abort not confirmed by then is
        `pending`.
        """
        if pending.calls:
            await asyncio.wait(pending.calls.values(), timeout=timeout_s)
        receipt = pending.receipt
        for engine_index, call in pending.calls.items():
            entries = pending.entries[engine_index]
            if not call.done():
                call.cancel()
                receipt.engines[engine_index] = "timeout"
                _settle(receipt, entries)
                logger.warning(
                    "engine %d did not confirm the abort of %d requests within %g s; the effect "
                    "follows when it answers",
                    engine_index,
                    len(entries),
                    timeout_s,
                )
                continue
            try:
                answer = lifecycle.AbortReceipt.from_wire(call.result())
            except (UtilityCallError, RuntimeError, WireError) as error:
                logger.warning("engine %d did not confirm an abort: %s", engine_index, error)
                receipt.engines[engine_index] = "error"
                for entry in entries:
                    receipt.requests[entry.request_id] = AbortedRequest(
                        "engine_error", entry.num_output_tokens
                    )
                continue
            receipt.engines[engine_index] = "ok"
            receipt.num_blocks_freed += answer.num_blocks_freed
            receipt.num_blocks_cached += answer.num_blocks_cached
            _settle(receipt, entries, answer)
        return receipt

    # -- deadlines -----------------------------------------------------------------------------

    def expire(self, entry: Entry) -> None:
        """A request reached its deadline. Those of one turn of the loop share an engine's call."""
        if not self._expired:
            self._loop.call_soon(self._abort_expired)
        self._expired.append(entry)

    def _abort_expired(self) -> None:
        entries, self._expired = self._expired, []
        live = [entry for entry in entries if entry.terminal is None]
        pending = self._start(live, AbortCause.DEADLINE, AbortReceipt())
        expiry = self._loop.create_task(self._finish_expiry(pending, live))
        self._expiries.add(expiry)
        expiry.add_done_callback(self._expiries.discard)

    async def _finish_expiry(self, pending: PendingAbort, entries: list[Entry]) -> None:
        """A deadline holds also where an engine does not answer."""
        await self.finish(pending, EXPIRY_TIMEOUT_S)
        self._dispatcher.end_without_engine(
            [entry for entry in entries if entry.terminal is None],
            Terminal("abort", abort_cause=AbortCause.DEADLINE),
        )

    def _select(self, selector: Selector, receipt: AbortReceipt) -> list[Entry]:
        registry = self._dispatcher.registry
        if selector.request_ids is not None:
            found = registry.select_names(selector.request_ids)
            for name, entries in found.items():
                if not entries:
                    receipt.requests[name] = AbortedRequest("unknown")
            return list(
                {entry.internal_id: entry for group in found.values() for entry in group}.values()
            )
        if (prefix := selector.prefix) is not None:
            return registry.select(
                lambda entry: any(name.startswith(prefix) for name in entry.names)
            )
        if (tag := selector.tag) is not None:
            return registry.select(lambda entry: tag in entry.tags)
        return registry.select(lambda entry: True)


def _settle(
    receipt: AbortReceipt, entries: list[Entry], answer: lifecycle.AbortReceipt | None = None
) -> None:
    """Write down how each request really ended: by this abort, an earlier one, or on its own."""
    for entry in entries:
        told = answer.requests.get(entry.internal_id) if answer is not None else None
        if entry.terminal is None:
            status = AbortedRequest("pending", entry.num_output_tokens)
        elif entry.terminal.finish_reason == "abort":
            stage = (told.stage if told is not None else None) or ""
            status = AbortedRequest("aborted", entry.num_output_tokens, stage)
        else:
            status = AbortedRequest("finished", entry.num_output_tokens)
        receipt.requests[entry.request_id] = status
