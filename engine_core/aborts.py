"""Ends requests at a boundary, and tells what was found of them.

Nothing is in flight at a boundary, so a request's blocks have left it when its end is told.

Invariants
- A request is found by its exact id, and only by the client it belongs to.
- The ids of one message end in their order; repeating one is harmless.
- Every end is confirmed to the request's own client; all but those of an ABORT frame have a
  terminal output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine_core.outbox import Outbox
from engine_core.request import Request, Stage
from engine_core.scheduler import Scheduler
from ipc.frames import Abort
from ipc.lifecycle import AbortReceipt, RequestReceipt
from ipc.output import EngineCoreOutput, FinishReason

logger = logging.getLogger(__name__)

NUM_IDS_LOGGED = 4
"""Aborts of so few requests name each of them; larger ones do at debug level."""


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What an abort found of a request, and what came of its blocks."""

    request_id: str
    stage: Stage
    num_output_tokens: int
    num_blocks_freed: int
    num_blocks_cached: int


class Aborts:
    """Aborts over the live requests of one engine."""

    def __init__(
        self, requests: dict[str, Request], scheduler: Scheduler, counters: dict[str, int]
    ) -> None:
        """`requests` are the live ones, by id; an end takes them out."""
        self._requests = requests
        self._scheduler = scheduler
        self._counters = counters

    def silent(self, client_index: int, message: Abort, outbox: Outbox) -> None:
        """An ABORT frame: the named requests end without an output; that they hold nothing is
        confirmed, also of those that ended before: the frame that said so may have been lost.
        """
        self._counters["abort_frames"] += 1
        ended = []
        for request_id in dict.fromkeys(message.request_ids):
            request = self._find(client_index, request_id)
            if request is None:
                outbox.confirm_end(client_index, request_id)
            else:
                ended.append(self._end(request, outbox))
        logger.info(
            "abort frame of client %d with %d ids ended %s",
            client_index,
            len(message.request_ids),
            _describe(ended),
        )

    def with_receipt(
        self, client_index: int, request_ids: Iterable[str], cause: str, outbox: Outbox
    ) -> AbortReceipt:
        """`caesura_abort`: ends each live request with a terminal output and tells of its fate."""
        ended: list[EndedRequest] = []
        receipts: dict[str, RequestReceipt] = {}
        for request_id in dict.fromkeys(request_ids):
            request = self._find(client_index, request_id)
            if request is None:
                receipts[request_id] = RequestReceipt("unknown")
                continue
            one = self._end_aloud(request, outbox)
            ended.append(one)
            receipts[request_id] = RequestReceipt("aborted", one.num_output_tokens, one.stage.value)
        receipt = AbortReceipt(
            receipts,
            num_blocks_freed=sum(one.num_blocks_freed for one in ended),
            num_blocks_cached=sum(one.num_blocks_cached for one in ended),
        )
        logger.info(
            "abort call of client %d (%s) with %d ids ended %s; %d blocks freed, %d kept cached",
            client_index,
            cause,
            len(receipts),
            _describe(ended),
            receipt.num_blocks_freed,
            receipt.num_blocks_cached,
        )
        return receipt

    def everything(self, outbox: Outbox) -> list[EndedRequest]:
        """Every client's requests end, each with a terminal output."""
        return [self._end_aloud(request, outbox) for request in list(self._requests.values())]

    def _find(self, client_index: int, request_id: str) -> Request | None:
        """A live request, if it is this client's."""
        request = self._requests.get(request_id)
        return request if request is not None and request.client_index == client_index else None

    def _end_aloud(self, request: Request, outbox: Outbox) -> EndedRequest:
        """With a terminal output; the tokens have been sent before."""
        ended = self._end(request, outbox)
        terminal = EngineCoreOutput(request.request_id, finish_reason=FinishReason.ABORT)
        outbox.add(request.client_index, terminal)
        return ended

    def _end(self, request: Request, outbox: Outbox) -> EndedRequest:
        stage, num_output_tokens = request.stage, request.num_new_tokens
        del self._requests[request.request_id]
        self._counters["requests_aborted"] += 1
        freed, cached = self._scheduler.remove(request)
        outbox.confirm_end(request.client_index, request.request_id)
        return EndedRequest(request.request_id, stage, num_output_tokens, freed, cached)


def _describe(ended: Sequence[EndedRequest]) -> str:
    """Ended requests for the log: each by name if they are few, a storm as one number."""
    names = [f"{one.request_id} ({one.stage}, {one.num_output_tokens} tokens)" for one in ended]
    if 0 < len(names) <= NUM_IDS_LOGGED:
        return ", ".join(names)
    logger.debug("ended: %s", names)
    return f"{len(ended)} requests"
