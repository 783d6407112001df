"""The scripted engine and the scripted front end, talking to each other."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import pytest

from ipc.lifecycle import CAESURA_ABORT, CAESURA_REQUESTS, AbortReceipt, LiveRequests
from ipc.output import FinishReason
from tests.support.auto_answers import AutoAnswers, mock_tokens
from tests.support.mock_engine import MockEngine
from tests.support.scripted_frontend import REPOSITORY, ScriptedFrontend, UtilityError


@contextlib.asynccontextmanager
async def peers(num_engines: int = 1) -> AsyncIterator[tuple[ScriptedFrontend, list[MockEngine]]]:
    async with ScriptedFrontend() as frontend:
        engines = [MockEngine(frontend.handshake_address, rank=rank) for rank in range(num_engines)]
        try:
            await asyncio.gather(
                frontend.accept(num_engines, 5), *(engine.start() for engine in engines)
            )
            yield frontend, engines
        finally:
            for engine in engines:
                await engine.vanish()


async def test_the_handshake_brings_up_engines_that_register_in_any_order() -> None:
    async with peers(3) as (frontend, _):
        assert {rank: reg.data_parallel_rank for rank, reg in frontend.registrations.items()} == {
            0: 0,
            1: 1,
            2: 2,
        }
        assert frontend.registrations[0].caesura_protocol == 1


async def test_requests_aborts_and_calls_reach_the_engine_in_order() -> None:
    async with peers(2) as (frontend, [_, engine]):
        await frontend.add("a", [1, 2, 3], rank=1, max_tokens=5, temperature=0.0)
        request = await engine.next_add()
        assert (request.request_id, request.prompt_token_ids) == ("a", [1, 2, 3])
        assert request.sampling_params is not None
        assert request.sampling_params.max_tokens == 5
        await frontend.abort(["a", "b"], rank=1)
        assert await engine.next_abort() == ["a", "b"]
        calling = asyncio.create_task(frontend.utility("echo", 1, "two", rank=1))
        call = await engine.next_utility()
        assert (call.method, call.args) == ("echo", (1, "two"))
        await engine.reply(call, {"answer": 42})
        assert await calling == {"answer": 42}
        await engine.expect_silence(0.05)
        times_s = [frame.time_s for frame in engine.received]
        assert times_s == sorted(times_s)
        assert len(times_s) == 3


async def test_a_failed_call_raises_the_engines_words() -> None:
    async with peers() as (frontend, [engine]):
        calling = asyncio.create_task(frontend.utility("nonsense"))
        await engine.reply(await engine.next_utility(), failure="no attribute 'nonsense'")
        with pytest.raises(UtilityError, match="nonsense"):
            await calling


async def test_outputs_are_kept_by_request_and_collected_to_their_terminal() -> None:
    async with peers() as (frontend, [engine]):
        await engine.send_tokens("a", [1, 2])
        await engine.send_tokens("b", [9], finish=FinishReason.STOP, stop_reason=9)
        await engine.send_tokens("a", [3], finish=FinishReason.LENGTH)
        assert (await frontend.next_output("a")).new_token_ids == [1, 2]
        end = await frontend.collect("a")
        assert (end.new_token_ids, end.finish_reason) == ([3], FinishReason.LENGTH)
        assert (await frontend.collect("b")).stop_reason == 9
        assert frontend.unread("a") == []


async def test_a_status_is_answered_without_a_script() -> None:
    async with peers() as (frontend, [engine]):
        assert (await frontend.status()).state == "running"
        await engine.expect_silence(0.05)


async def test_silence_is_broken_by_any_frame_that_nobody_read() -> None:
    async with peers() as (frontend, [engine]):
        await frontend.abort(["x"])
        with pytest.raises(AssertionError, match="expected silence"):
            await engine.expect_silence(0.1)
        await frontend.send_raw([b"\x07", b"\x90"])
        with pytest.raises(AssertionError, match="expected silence"):
            await engine.expect_silence(0.1)


async def test_a_death_notice_is_seen_as_one() -> None:
    async with peers() as (frontend, [engine]):
        await engine.die()
        await engine.send_tokens("a", [1], finish=FinishReason.STOP)
        await frontend.collect("a")
        assert [frame.outputs is None for frame in frontend.frames] == [True, False]


async def test_automatic_answers_finish_abort_and_account_for_requests() -> None:
    async with peers() as (frontend, [engine]), AutoAnswers(engine, step_time_ms=2):
        await frontend.add("short", [5, 6], max_tokens=4)
        end = await frontend.collect("short")
        assert (end.new_token_ids, end.finish_reason) == (
            mock_tokens([5, 6], 4),
            FinishReason.LENGTH,
        )
        for name in ("silent", "told"):
            await frontend.add(name, [1], max_tokens=100_000)
            await frontend.next_output(name)
        await frontend.abort(["silent", "unheard-of"])
        answer = await frontend.utility(CAESURA_ABORT, ["told", "silent"], "test")
        receipt = AbortReceipt.from_wire(answer)
        assert {name: entry.status for name, entry in receipt.requests.items()} == {
            "told": "aborted",
            "silent": "unknown",
        }
        told = await frontend.collect("told")
        assert told.finish_reason is FinishReason.ABORT
        assert receipt.requests["told"].num_output_tokens == 1 + len(told.new_token_ids)
        assert all(output.finish_reason is None for output in frontend.unread("silent"))
        assert (await frontend.status()).num_running == 0


async def test_L11_a_scripted_engine_confirms_each_end_and_every_abort() -> None:
    async with peers() as (frontend, [engine]):
        for name in ("silent", "told"):
            await frontend.add(name, [1])
            await engine.next_add()
        await frontend.abort(["silent", "unheard-of"])
        await frontend.abort(["silent"])
        for _ in range(2):
            await engine.next_abort()
        await engine.send_tokens("told", [1])
        await engine.send_tokens("told", [2], finish=FinishReason.STOP)
        await frontend.collect("told")
        assert confirmed(frontend) == [["silent", "unheard-of"], ["silent"], None, ["told"]]


async def test_L11_a_scripted_engine_may_be_slow_to_confirm_and_a_foreign_one_never_does() -> None:
    async with ScriptedFrontend() as frontend:
        address = frontend.handshake_address
        slow = MockEngine(address, rank=0, confirms_aborts=False)
        foreign = MockEngine(address, rank=1, caesura=False)
        try:
            await asyncio.gather(frontend.accept(2, 5), slow.start(), foreign.start())
            for rank, engine in enumerate((slow, foreign)):
                await frontend.add(f"r{rank}", [1], rank=rank)
                await frontend.abort([f"r{rank}"], rank=rank)
                await engine.next_abort()
            await foreign.send_tokens("other", [1], finish=FinishReason.STOP)
            await frontend.collect("other")
            assert confirmed(frontend) == [None]
            await slow.confirm(["r0"])
            await slow.send_tokens("last", [1], finish=FinishReason.STOP)
            await frontend.collect("last")
            assert confirmed(frontend) == [None, ["r0"], None]
        finally:
            await slow.vanish()
            await foreign.vanish()


async def test_L11_automatic_answers_confirm_each_end_and_abort_and_list_who_is_live() -> None:
    async with peers() as (frontend, [engine]), AutoAnswers(engine, step_time_ms=2):
        for name in ("silent", "told", "live"):
            await frontend.add(name, [1], max_tokens=100_000)
            await frontend.next_output(name)
        await frontend.abort(["silent", "unheard-of"])
        await frontend.utility(CAESURA_ABORT, ["told", "silent"], "test")
        live = LiveRequests.from_wire(await frontend.utility(CAESURA_REQUESTS))
        assert list(live.requests) == ["live"]
        assert live.requests["live"].num_output_tokens > 0
        told = [ids for ids in confirmed(frontend) if ids is not None]
        assert told == [["silent", "unheard-of"], ["told"]]


def confirmed(frontend: ScriptedFrontend) -> list[list[str] | None]:
    """The ended requests that each frame names, replies left out."""
    frames = [frame.outputs for frame in frontend.frames if frame.outputs is not None]
    return [
        None if outputs.finished_requests is None else list(outputs.finished_requests)
        for outputs in frames
        if outputs.utility_output is None
    ]


async def test_the_scripted_engine_runs_as_a_process() -> None:
    async with ScriptedFrontend() as frontend:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.auto_answers", "--rank", "3"),
            *("--handshake", frontend.handshake_address, "--step-time-ms", "1"),
            cwd=REPOSITORY,
        )
        try:
            await frontend.accept(1, 20)
            await frontend.add("a", [7], rank=3, max_tokens=3)
            assert (await frontend.collect("a")).new_token_ids == mock_tokens([7], 3)
        finally:
            process.kill()
            await process.wait()
