"""Pauses where engines answer late, wrongly or not at all, or are plain vLLM."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.errors import PauseTimeoutError, ShuttingDownError, UtilityCallError
from frontend.requests import pauses
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.engine_config import EngineConfig
from ipc.output import FinishReason
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME, PauseReceipt
from ipc.utility import UtilityCall
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet, one_stream_each

RECEIPT = PauseReceipt(num_kept=1).to_wire()


async def next_call(engine: MockEngine, method: str) -> UtilityCall:
    call = await engine.next_utility()
    assert call.method == method
    return call


def ask(frontend: AsyncEngine, name: str) -> RequestStream:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    return frontend.generate(prompt_token_ids=[1], request_id=name, sampling_params=params)


async def until_state(frontend: AsyncEngine, state: str) -> None:
    async with asyncio.timeout(5):
        while frontend.pause_state.state != state:  # noqa: ASYNC110  # no event to await
            await asyncio.sleep(0.005)


async def test_L9_a_pause_that_times_out_drains_on_and_a_late_answer_makes_it_paused() -> None:
    async with mock_fleet(2) as (frontend, engines):
        pausing = asyncio.create_task(frontend.pause("keep", timeout_s=0.1))
        calls = [await next_call(engine, CAESURA_PAUSE) for engine in engines]
        await engines[0].reply(calls[0], RECEIPT)
        with pytest.raises(PauseTimeoutError, match="engine 1 did not pause"):
            await pausing
        assert frontend.pause_state.state == "draining"
        held = ask(frontend, "held")
        await engines[1].reply(calls[1], RECEIPT)
        await until_state(frontend, "paused")
        assert frontend.pause_state.num_held == 1
        assert (await frontend.resume(timeout_s=0.05)).engines == {0: "timeout", 1: "timeout"}
        for engine in engines:
            # The resume comes before what it releases.
            assert (await engine.next_utility()).method == CAESURA_RESUME
        async with asyncio.timeout(5):
            adds = [asyncio.create_task(engine.next_add()) for engine in engines]
            done, left = await asyncio.wait(adds, return_when=asyncio.FIRST_COMPLETED)
        request = next(iter(done)).result()
        assert request.external_req_id == "held"
        for task in left:
            task.cancel()
        await engines[adds.index(next(iter(done)))].send_tokens(
            request.request_id, [3], finish=FinishReason.LENGTH
        )
        assert (await asyncio.wait_for(held.result(), 5)).finish_reason == "length"


async def test_L9_outputs_that_come_before_the_answer_are_with_their_streams_when_it_returns() -> (
    None
):
    async with mock_fleet() as (frontend, [engine]):
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        pausing = asyncio.create_task(frontend.pause("abort"))
        call = await next_call(engine, CAESURA_PAUSE)
        await engine.send_tokens(request_id, [9])
        await engine.send_tokens(request_id, [], finish=FinishReason.ABORT)
        await engine.reply(call, PauseReceipt(num_aborted=1).to_wire())
        report = await asyncio.wait_for(pausing, 5)
        assert (report.num_aborted, frontend.num_live_requests) == (1, 0)
        output = stream.take()
        assert output is not None
        assert (output.token_ids, output.finish_reason) == ((9,), "abort")
        assert output.abort_cause == "pause"


async def test_L9_an_engine_that_refuses_to_pause_fails_the_call_and_the_state_stays() -> None:
    async with mock_fleet(2) as (frontend, engines):
        pausing = asyncio.create_task(frontend.pause("keep"))
        calls = [await next_call(engine, CAESURA_PAUSE) for engine in engines]
        await engines[0].reply(calls[0], RECEIPT)
        await engines[1].reply(calls[1], failure="out of order")
        with pytest.raises(UtilityCallError, match="engine 1: out of order"):
            await pausing
        assert frontend.pause_state.state == "draining"
        # Another pause may succeed, a resume ends it all.
        pausing = asyncio.create_task(frontend.pause("keep"))
        for engine in engines:
            await engine.reply(await next_call(engine, CAESURA_PAUSE), RECEIPT)
        assert (await asyncio.wait_for(pausing, 5)).state == "paused"
        assert (await frontend.resume(timeout_s=0.05)).was == "paused"


async def test_L12_an_engine_that_dies_while_draining_counts_as_standing_still() -> None:
    async with mock_fleet(2) as (frontend, engines):
        pausing = asyncio.create_task(frontend.pause("keep"))
        calls = [await next_call(engine, CAESURA_PAUSE) for engine in engines]
        await engines[1].die()
        await engines[0].reply(calls[0], RECEIPT)
        report = await asyncio.wait_for(pausing, 5)
        assert (report.state, report.engines) == ("paused", {0: "ok", 1: "error"})
        assert report.num_kept == 1


async def test_L12_held_requests_end_when_the_last_engine_dies() -> None:
    async with mock_fleet() as (frontend, [engine]):
        pausing = asyncio.create_task(frontend.pause("keep"))
        await engine.reply(await next_call(engine, CAESURA_PAUSE), RECEIPT)
        await pausing
        held = ask(frontend, "held")
        await engine.die()
        result = await asyncio.wait_for(held.result(), 5)
        assert result.finish_reason == "error"
        assert result.error is not None
        assert (result.error.code, result.error.retryable) == ("engine_dead", True)
        assert frontend.pause_state.num_held == 0


async def test_L9_a_hold_that_lasts_too_long_ends_with_a_retryable_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("frontend.requests.pause_gate.MAX_HOLD_S", 0.15)
    monkeypatch.setattr(pauses, "MAX_HOLD_S", 0.15)
    async with mock_fleet() as (frontend, [engine]):
        pausing = asyncio.create_task(frontend.pause("keep"))
        await engine.reply(await next_call(engine, CAESURA_PAUSE), RECEIPT)
        await pausing
        await asyncio.sleep(0.1)
        held = ask(frontend, "held")
        result = await asyncio.wait_for(held.result(), 5)
        assert result.error is not None
        assert (result.error.code, result.error.retryable) == ("engine_paused", True)
        assert frontend.pause_state.num_held == frontend.num_live_requests == 0
        assert frontend.pause_state.state == "paused"


async def test_a_caller_that_gives_up_does_not_undo_its_pause() -> None:
    async with mock_fleet() as (frontend, [engine]):
        pausing = asyncio.create_task(frontend.pause("keep"))
        call = await next_call(engine, CAESURA_PAUSE)
        pausing.cancel()
        await engine.reply(call, RECEIPT)
        await until_state(frontend, "paused")


async def test_a_shutdown_tells_those_that_wait_for_a_pause() -> None:
    async with mock_fleet() as (frontend, [engine]):
        pausing = asyncio.create_task(frontend.pause("keep", lease_s=60))
        await next_call(engine, CAESURA_PAUSE)
        async with asyncio.timeout(5):
            await frontend.shutdown()
            with pytest.raises(ShuttingDownError):
                await pausing
        assert frontend.pause_state.lease_left_s is None
        with pytest.raises(ShuttingDownError):
            await frontend.pause("keep")
        assert (await frontend.resume()).engines == {}


async def test_an_answer_to_an_older_pause_settles_nothing() -> None:
    async with mock_fleet() as (frontend, [engine]):
        first = asyncio.create_task(frontend.pause("wait"))
        old = await next_call(engine, CAESURA_PAUSE)
        second = asyncio.create_task(frontend.pause("keep", pause_id="second"))
        new = await next_call(engine, CAESURA_PAUSE)
        assert new.args == ("keep", False, None, "second")
        await engine.reply(old, RECEIPT)
        await asyncio.sleep(0.05)
        assert frontend.pause_state.state == "draining"
        await engine.reply(new, RECEIPT)
        reports = await asyncio.wait_for(asyncio.gather(first, second), 5)
        assert [report.state for report in reports] == ["paused", "paused"]


async def test_a_plain_vllm_engine_is_paused_by_its_own_calls() -> None:
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        for mode, args in (
            ("keep", ("keep", False)),
            ("retract", ("keep", True)),
            ("wait", ("wait", False)),
        ):
            pausing = asyncio.create_task(frontend.pause(mode))  # type: ignore[arg-type]
            call = await next_call(engine, "pause_scheduler")
            assert call.args == args
            await engine.reply(call)
            assert (await asyncio.wait_for(pausing, 5)).engines == {0: "ok"}
        resuming = asyncio.create_task(frontend.resume())
        await engine.reply(await next_call(engine, "resume_scheduler"))
        assert (await asyncio.wait_for(resuming, 5)).engines == {0: "ok"}


async def test_requests_of_a_plain_vllm_engine_end_here_at_an_abort() -> None:
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        pausing = asyncio.create_task(frontend.pause("abort"))
        assert await engine.next_abort() == [request_id]
        await engine.reply(await next_call(engine, "pause_scheduler"))
        assert (await asyncio.wait_for(pausing, 5)).num_aborted == 1
        assert (await asyncio.wait_for(stream.result(), 5)).abort_cause == "pause"


async def test_L9_a_stopped_process_times_out_and_recovers() -> None:
    config = EngineConfig(model="none", runner="fake", max_model_len=512, fake_step_time_ms=2.0)
    engine = await AsyncEngine.start(FrontendConfig(engine=config))
    try:
        pid = engine._supervisor.pid(0)
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        stream = engine.generate(prompt_token_ids=[1], sampling_params=params)
        await anext(stream)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(PauseTimeoutError, match="engine 0"):
                await engine.pause("keep", timeout_s=0.2)
            assert engine.pause_state.state == "draining"
        finally:
            os.kill(pid, signal.SIGCONT)
        await until_state(engine, "paused")
        assert (await engine.resume()).engines == {0: "ok"}
        result = await asyncio.wait_for(stream.result(), 20)
        assert result.finish_reason == "length"
        # A resume that a stopped engine has not heard yet does not confuse the next pause.
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(PauseTimeoutError):
                await engine.pause("keep", timeout_s=0.1)
            assert (await engine.resume(timeout_s=0.1)).engines == {0: "timeout"}
            again = asyncio.create_task(engine.pause("keep", pause_id="again"))
            await asyncio.sleep(0.05)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await asyncio.wait_for(again, 10)).state == "paused"
        [status] = (await engine.status()).values()
        assert (status.state, status.pause_id) == ("paused", "again")
    finally:
        await engine.shutdown()
