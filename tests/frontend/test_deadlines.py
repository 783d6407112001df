"""Deadlines: at its age a request is aborted, wherever it is, and returns its partial result."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from frontend.errors import InvalidRequestError
from frontend.outputs import AbortCause
from frontend.requests import explicit_abort
from frontend.sampling_params import SamplingParams
from ipc.lifecycle import CAESURA_ABORT
from tests.support.auto_answers import AutoAnswers
from tests.support.mock_fleet import mock_fleet

LONG = SamplingParams(max_tokens=100_000)


def asked(timeout_s: float, **others: Any) -> dict[str, Any]:
    return {"prompt_token_ids": [1, 2], "sampling_params": LONG, "timeout_s": timeout_s} | others


async def test_L2_a_request_that_reaches_its_deadline_returns_what_it_has() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        result = await asyncio.wait_for(frontend.generate(**asked(0.1)).result(), 5)
        assert (result.finish_reason, result.abort_cause) == ("abort", AbortCause.DEADLINE)
        assert 0 < len(result.token_ids) < 1000
        assert engine.aborts == []
        assert [call.method for call in engine.utilities] == [CAESURA_ABORT]


async def test_L7_deadlines_that_pass_together_are_one_call_an_engine() -> None:
    async with (
        mock_fleet(2) as (frontend, engines),
        AutoAnswers(engines[0]),
        AutoAnswers(engines[1]),
    ):
        streams = [frontend.generate(**asked(0.05)) for _ in range(100)]
        time.sleep(0.1)  # noqa: ASYNC251  # So that they pass in one turn of the loop.
        results = await asyncio.wait_for(asyncio.gather(*(one.result() for one in streams)), 5)
        assert {result.abort_cause for result in results} == {AbortCause.DEADLINE}
        assert [len(engine.utilities) for engine in engines] == [1, 1]
        assert frontend.num_live_requests == 0


async def test_a_request_that_ends_in_time_is_never_aborted() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        short = asked(0.1, sampling_params=SamplingParams(max_tokens=3))
        assert (await frontend.generate(**short).result()).finish_reason == "length"
        await asyncio.sleep(0.2)
        assert engine.utilities == []


async def test_L4_a_request_that_still_waits_for_its_first_token_ends_at_its_deadline() -> None:
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(**asked(0.05))
        request = await engine.next_add()
        call = await engine.next_utility()
        assert call.args[0] == [request.request_id]
        assert frontend.num_live_requests == 1, "the engine has the last word"
        stream.close()


async def test_L4_a_request_is_ended_at_its_deadline_also_where_its_engine_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explicit_abort, "EXPIRY_TIMEOUT_S", 0.1)
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(**asked(0.05))
        request = await engine.next_add()
        await engine.send_tokens(request.request_id, [7, 8])
        result = await asyncio.wait_for(stream.result(), 5)
        assert (result.abort_cause, result.token_ids) == (AbortCause.DEADLINE, (7, 8))
        assert await engine.next_abort() == [request.request_id]


async def test_a_foreign_engines_request_ends_at_its_deadline_with_what_was_received() -> None:
    async with mock_fleet(caesura=False) as (frontend, [engine]), AutoAnswers(engine):
        result = await asyncio.wait_for(frontend.generate(**asked(0.1)).result(), 5)
        assert (result.finish_reason, result.abort_cause) == ("abort", AbortCause.DEADLINE)
        assert result.token_ids


async def test_L1_an_abort_before_the_deadline_leaves_nothing_for_it() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        stream = frontend.generate(**asked(0.1, request_id="a"))
        await anext(stream)
        await frontend.abort("a")
        assert (await stream.result()).abort_cause is AbortCause.EXPLICIT
        await asyncio.sleep(0.2)
        assert len(engine.utilities) == 1


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), 1e12])
async def test_a_deadline_that_makes_no_sense_is_refused(timeout_s: float) -> None:
    async with mock_fleet() as (frontend, [engine]):
        with pytest.raises(InvalidRequestError, match=f"timeout_s={timeout_s!r}"):
            frontend.generate(**asked(timeout_s))
        await engine.expect_silence(0.05)
