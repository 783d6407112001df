"""Requests that an abort ended: what it found of them, for receipts and for the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from engine_core.request import Stage
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


def aborted(request_id: str) -> EngineCoreOutput:
    """The terminal output of an aborted request; its tokens have been sent before."""
    return EngineCoreOutput(request_id, finish_reason=FinishReason.ABORT)


def describe(ended: Sequence[EndedRequest]) -> str:
    """Ended requests for the log: each by name if they are few, a storm as one number."""
    names = [f"{one.request_id} ({one.stage}, {one.num_output_tokens} tokens)" for one in ended]
    if 0 < len(names) <= NUM_IDS_LOGGED:
        return ", ".join(names)
    logger.debug("ended: %s", names)
    return f"{len(ended)} requests"
