"""Looking inside: every request that holds something, and every engine's own account of itself.

The front end knows ids, names and ages; where in an engine a request is, only that engine knows. An
engine that does not answer in time leaves the front end's own view.
"""

from __future__ import annotations

import logging
from typing import cast, get_args

from frontend.outputs import LiveRequest, Stage
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.fan_out import FanOut
from frontend.requests.registry import Entry
from ipc import lifecycle
from ipc.errors import WireError

logger = logging.getLogger(__name__)

ENGINE_TIMEOUT_S = 1.0


async def list_requests(dispatcher: Dispatcher) -> list[LiveRequest]:
    """Live requests in order of acceptance, then those that are ending."""
    told = await _ask_engines(dispatcher)
    now = dispatcher.clock()
    live = [_describe(entry, told.get(entry.internal_id), now) for entry in dispatcher.registry]
    ending = [
        LiveRequest(
            request_id=one.entry.request_id,
            aliases=_aliases(one.entry),
            tags=tuple(sorted(one.entry.tags)),
            stage="ending",
            age_s=now - one.entry.accepted_s,
            num_prompt_tokens=len(one.entry.mailbox.prompt_token_ids),
            num_output_tokens=one.entry.num_output_tokens,
            engine_index=one.engine_index,
            priority=one.entry.priority,
            aborting_cause=one.cause,
            aborting_for_s=now - one.ended_s,
        )
        for one in dispatcher.registry.ending
    ]
    return live + ending


def _describe(entry: Entry, told: lifecycle.LiveRequest | None, now: float) -> LiveRequest:
    stage = entry.stage
    if told is not None and told.stage in get_args(Stage):
        stage = cast(Stage, told.stage)
    is_aborting = entry.abort_cause is not None
    return LiveRequest(
        request_id=entry.request_id,
        aliases=_aliases(entry),
        tags=tuple(sorted(entry.tags)),
        stage=stage,
        age_s=now - entry.accepted_s,
        num_prompt_tokens=len(entry.mailbox.prompt_token_ids),
        num_output_tokens=entry.num_output_tokens,
        engine_index=entry.engine_index,
        priority=entry.priority,
        aborting_cause=entry.abort_cause,
        aborting_for_s=now - entry.abort_started_s if is_aborting else None,
    )


def _aliases(entry: Entry) -> tuple[str, ...]:
    return tuple(name for name in entry.names if name != entry.request_id)


async def _ask_engines(dispatcher: Dispatcher) -> dict[str, lifecycle.LiveRequest]:
    """By internal id."""
    told: dict[str, lifecycle.LiveRequest] = {}
    answers = await _call_all(dispatcher, lifecycle.CAESURA_REQUESTS, ENGINE_TIMEOUT_S)
    for rank, answer in answers.items():
        try:
            told |= lifecycle.LiveRequests.from_wire(answer).requests
        except WireError as error:
            logger.warning("engine %d listed its requests wrongly: %s", rank, error)
    return told


async def engine_statuses(
    dispatcher: Dispatcher, timeout_s: float, *, check_integrity: bool
) -> dict[int, lifecycle.EngineStatus]:
    """By rank, for those that answer rightly and in time."""
    statuses = {}
    answers = await _call_all(dispatcher, lifecycle.CAESURA_STATUS, timeout_s, check_integrity)
    for rank, answer in answers.items():
        try:
            status = statuses[rank] = lifecycle.EngineStatus.from_wire(answer)
        except WireError as error:
            logger.warning("engine %d told its status wrongly: %s", rank, error)
            continue
        if status.weight_version is not None and rank not in dispatcher.weight_versions:
            # Known ones are kept by frames and commits; this answer may be older than those.
            dispatcher.note_weight_version(rank, status.weight_version)
        num_violations = status.counters.get("integrity_violations", 0)
        dispatcher.metrics.on_integrity_violations(rank, num_violations)
    return statuses


async def _call_all(
    dispatcher: Dispatcher, method: str, timeout_s: float, *arguments: object
) -> dict[int, object]:
    """What each living Caesura engine answers in time, by rank."""
    ranks = dispatcher.alive_engines - dispatcher.foreign_engines
    calls = FanOut.start(dispatcher.client, ranks, method, *arguments)
    await calls.wait(timeout_s)
    calls.give_up()
    for failure in calls.failures:
        logger.warning("%s failed: %s", method, failure)
    return calls.results
