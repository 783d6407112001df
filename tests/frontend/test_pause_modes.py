"""Pauses of real engine processes with the arithmetic runner: each mode under load, newcomers held
and released, and nothing lost or invented on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.errors import EnginePausedError, PauseConflictError, PauseInterruptedError
from frontend.outputs import RequestResult
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.engine_config import EngineConfig
from ipc.pause import PauseMode

NUM_TOKENS = 60
STEP_TIME_MS = 2.0


@contextlib.asynccontextmanager
async def running(num_engines: int = 1, **fields: Any) -> AsyncIterator[AsyncEngine]:
    """An engine or several with slow steps; `fields` are of EngineConfig."""
    config = EngineConfig(
        model="none",
        runner="fake",
        **{"max_model_len": 2048, "num_gpu_blocks_override": 512, "block_size": 16}
        | {"fake_step_time_ms": STEP_TIME_MS}
        | fields,
    )
    async with asyncio.timeout(60):
        engine = await AsyncEngine.start(
            FrontendConfig(engine=config, data_parallel_size=num_engines)
        )
        try:
            yield engine
            assert engine.num_live_requests == 0
            for status in (await engine.status()).values():
                assert status.integrity_errors == ()
                assert status.num_running == status.num_waiting == 0
                assert status.num_free_blocks + status.num_cached_blocks == status.num_blocks
        finally:
            await engine.shutdown()


def prompt(index: int) -> list[int]:
    return [index + 1, 7, 9]


def ask(engine: AsyncEngine, index: int, **fields: Any) -> RequestStream:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    name = f"request-{index}"
    return engine.generate(
        prompt_token_ids=prompt(index), request_id=name, sampling_params=params, **fields
    )


async def begun(engine: AsyncEngine, indices: Sequence[int]) -> dict[int, asyncio.Task[Any]]:
    """Requests that have a token, each read to its end by a task."""
    streams = {index: ask(engine, index) for index in indices}

    async def read(index: int, stream: RequestStream) -> list[Any]:
        return [output async for output in stream]

    tasks = {index: asyncio.create_task(read(index, stream)) for index, stream in streams.items()}
    while not all(output_seen(engine, index) for index in indices):  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    return tasks


def output_seen(engine: AsyncEngine, index: int) -> bool:
    [entries] = engine._dispatcher.registry.select_names([f"request-{index}"]).values()
    return not entries or entries[0].num_output_tokens > 0


def check(index: int, outputs: list[Any], reason: str) -> int:
    """Exactly the right tokens and one end; returns how many tokens."""
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == expected_tokens(prompt(index), len(tokens))
    assert [output.finish_reason for output in outputs if output.finish_reason] == [reason]
    assert outputs[-1].finish_reason == reason
    if reason == "length":
        assert len(tokens) == NUM_TOKENS
    return len(tokens)


async def assert_full(stream: RequestStream, index: int) -> RequestResult:
    result = await asyncio.wait_for(stream.result(), 10)
    assert result.finish_reason == "length"
    assert list(result.token_ids) == expected_tokens(prompt(index), NUM_TOKENS)
    return result


@pytest.mark.parametrize("mode", ["keep", "retract"])
async def test_L2_a_frozen_request_goes_on_after_the_resume_as_if_nothing_had_been(
    mode: PauseMode,
) -> None:
    async with running(2) as engine:
        tasks = await begun(engine, range(8))
        report = await engine.pause(mode)
        assert report.state == "paused" == engine.pause_state.state
        assert report.engines == {0: "ok", 1: "ok"}
        frozen = report.num_kept if mode == "keep" else report.num_retracted
        assert (frozen, report.num_aborted, engine.num_live_requests) == (8, 0, 8)
        assert (report.num_blocks_freed > 0) == (mode == "retract")
        before = {rank: status.num_steps for rank, status in (await engine.status()).items()}
        await asyncio.sleep(0.05)
        statuses = await engine.status()
        assert {rank: status.num_steps for rank, status in statuses.items()} == before
        assert {status.state for status in statuses.values()} == {"paused"}
        resumed = await engine.resume()
        assert (resumed.was, resumed.pause_id) == ("paused", report.pause_id)
        for index, task in tasks.items():
            check(index, await asyncio.wait_for(task, 10), "length")


async def test_L9_abort_ends_all_that_was_accepted_with_what_it_has() -> None:
    async with running(2, max_num_seqs=4) as engine:
        tasks = await begun(engine, range(4))
        queued = [ask(engine, index) for index in range(10, 30)]
        report = await engine.pause("abort")
        assert report.num_aborted == 24
        assert engine.num_live_requests == 0, "the answer came before a terminal"
        for index, task in tasks.items():
            outputs = await asyncio.wait_for(task, 1)
            check(index, outputs, "abort")
            assert outputs[-1].abort_cause == "pause"
        for stream in queued:
            assert (await asyncio.wait_for(stream.result(), 1)).abort_cause == "pause"
        await engine.resume()


async def test_L9_wait_lets_what_has_begun_finish_and_holds_the_rest() -> None:
    async with running(max_num_seqs=2) as engine:
        tasks = await begun(engine, range(2))
        queued = {index: ask(engine, index) for index in (10, 11)}
        report = await engine.pause("wait")
        for index, task in tasks.items():
            check(index, await asyncio.wait_for(task, 1), "length")
        assert (report.num_held, report.num_kept, engine.num_live_requests) == (2, 0, 2)
        for stream in queued.values():
            assert stream.num_unread_tokens == 0
        await engine.resume()
        for index, stream in queued.items():
            await assert_full(stream, index)


async def test_L9_keep_with_clear_cache_is_retract_and_empties_the_cache() -> None:
    async with running() as engine:
        tasks = await begun(engine, range(3))
        report = await engine.pause("keep", clear_cache=True)
        assert (report.num_kept, report.num_retracted) == (0, 3)
        [status] = (await engine.status()).values()
        assert status.num_free_blocks == status.num_blocks
        await engine.resume()
        for index, task in tasks.items():
            check(index, await asyncio.wait_for(task, 10), "length")


async def test_L9_a_newcomer_is_held_while_paused_and_runs_after_the_resume_in_order() -> None:
    async with running(max_num_seqs=1) as engine:
        await engine.pause("keep")
        streams = {index: ask(engine, index) for index in range(5)}
        await asyncio.sleep(0.05)
        listed = await engine.list_requests()
        assert [request.request_id for request in listed] == [f"request-{i}" for i in range(5)]
        assert {request.stage for request in listed} == {"held"}
        assert engine.pause_state.num_held == 5
        assert (await engine.status())[0].num_waiting == 0
        assert (await engine.resume()).num_released == 5
        ends = [asyncio.create_task(assert_full(streams[index], index)) for index in streams]
        for index, end in enumerate(ends):
            await end
            assert not any(later.done() for later in ends[index + 2 :])
        assert engine.pause_state.num_held == 0


async def test_L9_newcomers_are_refused_if_the_pause_says_so() -> None:
    async with running() as engine:
        tasks = await begun(engine, [0])
        await engine.pause("keep", newcomers="reject")
        with pytest.raises(EnginePausedError, match="after the resume"):
            ask(engine, 1)
        assert engine.num_live_requests == 1
        assert engine.metrics.num_refused["engine_paused"] == 1
        await engine.resume()
        check(0, await asyncio.wait_for(tasks[0], 10), "length")
        await assert_full(ask(engine, 1), 1)


async def test_L4_abort_finds_requests_wherever_a_pause_holds_them() -> None:
    async with running() as engine:
        tasks = await begun(engine, [0, 1])
        await engine.pause("keep")
        held = {index: ask(engine, index) for index in (2, 3)}
        receipt = await engine.abort(["request-0", "request-2"])
        stages = {name: one.stage for name, one in receipt.requests.items()}
        assert stages == {"request-0": "decode", "request-2": "held"}
        assert {one.status for one in receipt.requests.values()} == {"aborted"}
        check(0, await asyncio.wait_for(tasks[0], 1), "abort")
        assert (await asyncio.wait_for(held[2].result(), 1)).abort_cause == "explicit"
        assert (engine.pause_state.num_held, engine.num_live_requests) == (1, 2)
        assert (await engine.resume()).num_released == 1
        check(1, await asyncio.wait_for(tasks[1], 10), "length")
        await assert_full(held[3], 3)


async def test_L6_abort_all_while_paused_leaves_nothing_behind() -> None:
    async with running(2) as engine:
        tasks = await begun(engine, range(4))
        await engine.pause("keep")
        held = [ask(engine, index) for index in range(4, 8)]
        receipt = await engine.abort(abort_all=True)
        assert receipt.num_aborted == 8
        assert engine.num_live_requests == engine.pause_state.num_held == 0
        for index, task in tasks.items():
            check(index, await asyncio.wait_for(task, 1), "abort")
        for stream in held:
            assert (await asyncio.wait_for(stream.result(), 1)).finish_reason == "abort"
        assert (await engine.resume()).num_released == 0


async def test_L11_a_held_request_that_is_dropped_or_expires_leaves_the_gate() -> None:
    async with running() as engine:
        await engine.pause("keep")
        dropped, expiring = ask(engine, 0), ask(engine, 1, timeout_s=0.05)
        dropped.close()
        assert engine.pause_state.num_held == 1
        assert (await asyncio.wait_for(expiring.result(), 2)).abort_cause == "deadline"
        assert engine.pause_state.num_held == engine.num_live_requests == 0
        await engine.resume()


async def test_L9_a_later_abort_ends_what_an_earlier_keep_holds() -> None:
    async with running() as engine:
        tasks = await begun(engine, range(3))
        first = await engine.pause("keep")
        held = ask(engine, 7)
        second = await engine.pause("abort", pause_id="mine")
        assert (first.num_kept, second.num_aborted) == (3, 4)
        for index, task in tasks.items():
            check(index, await asyncio.wait_for(task, 1), "abort")
        assert (await asyncio.wait_for(held.result(), 1)).abort_cause == "pause"
        with pytest.raises(PauseConflictError, match="'mine'"):
            await engine.resume(first.pause_id)
        assert engine.pause_state.state == "paused"
        assert (await engine.resume("mine")).was == "paused"


async def test_L9_resume_is_harmless_while_running_and_one_ends_every_pause() -> None:
    async with running() as engine:
        assert (await engine.resume()).was == "running"
        assert (await engine.resume("whatever")).was == "running"
        for _ in range(3):
            await engine.pause("keep")
        assert not engine.is_ready
        assert engine.is_healthy
        assert (await engine.resume()).was == "paused"
        assert engine.is_ready
        await assert_full(ask(engine, 0), 0)


async def test_L9_a_resume_ends_a_pause_that_is_still_draining() -> None:
    async with running() as engine:
        tasks = await begun(engine, [0])
        pausing = asyncio.create_task(engine.pause("wait", pause_id="slow"))
        await asyncio.sleep(0.01)
        assert engine.pause_state.state == "draining"
        newcomer = ask(engine, 1)
        assert (await engine.resume()).was == "draining"
        with pytest.raises(PauseInterruptedError, match="'slow'"):
            await pausing
        check(0, await asyncio.wait_for(tasks[0], 10), "length")
        await assert_full(newcomer, 1)


async def test_L9_concurrent_pauses_and_resumes_end_well() -> None:
    async with running(2) as engine:
        tasks = await begun(engine, range(4))
        for _ in range(10):
            reports = await asyncio.gather(*(engine.pause("keep") for _ in range(4)))
            assert {report.state for report in reports} == {"paused"}
            resumes = await asyncio.gather(*(engine.resume() for _ in range(4)))
            assert sorted(report.was for report in resumes) == ["paused", *["running"] * 3]
        done = await asyncio.gather(
            *(engine.pause("retract") if i % 2 else engine.resume() for i in range(9)),
            return_exceptions=True,
        )
        unexpected = [
            one
            for one in done
            if isinstance(one, BaseException) and not isinstance(one, PauseInterruptedError)
        ]
        assert not unexpected
        await engine.resume()
        for index, task in tasks.items():
            check(index, await asyncio.wait_for(task, 10), "length")


async def test_L9_a_lease_resumes_by_itself_and_a_later_pause_replaces_it() -> None:
    async with running() as engine:
        tasks = await begun(engine, [0])
        await engine.pause("keep", lease_s=0.1)
        left_s = engine.pause_state.lease_left_s
        assert left_s is not None
        assert 0 < left_s <= 0.1
        held = ask(engine, 1)
        check(0, await asyncio.wait_for(tasks[0], 10), "length")
        await assert_full(held, 1)
        assert engine.is_ready
        await engine.pause("keep", lease_s=0.05)
        await engine.pause("keep")
        assert engine.pause_state.lease_left_s is None
        await asyncio.sleep(0.15)
        assert engine.pause_state.state == "paused"
        assert (await engine.status())[0].state == "paused"
        await engine.resume()


async def test_L1_a_shutdown_while_paused_ends_held_and_frozen_requests_at_once() -> None:
    async with running() as engine:
        tasks = await begun(engine, [0])
        await engine.pause("keep")
        held = ask(engine, 1)
        async with asyncio.timeout(10):
            await engine.shutdown(grace_s=60)
        outputs = await tasks[0]
        check(0, outputs, "abort")
        assert outputs[-1].abort_cause == "shutdown"
        assert (await held.result()).abort_cause == "shutdown"


async def test_L4_a_long_text_that_was_being_tokenized_is_held_too(tmp_path: Any) -> None:
    config = FrontendConfig()
    engine = await AsyncEngine.start(config)
    try:
        long_text = "def f(x):\n    return x\n" * 600
        stream = engine.generate(long_text, sampling_params=SamplingParams(max_tokens=2))
        await engine.pause("keep")
        async with asyncio.timeout(10):
            while not (engine.pause_state.num_held or stream.num_unread_tokens):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert engine.pause_state.num_held == 1
        await engine.resume()
        assert (await asyncio.wait_for(stream.result(), 30)).finish_reason in ("length", "stop")
    finally:
        await engine.shutdown()


async def test_flush_cache_is_refused_while_requests_hold_blocks_unless_they_are_recomputed() -> (
    None
):
    async with running() as engine:
        tasks = await begun(engine, [0])
        assert await engine.flush_cache() is False
        assert await engine.flush_cache(reset_running_requests=True) is True
        check(0, await asyncio.wait_for(tasks[0], 10), "length")
        assert await engine.flush_cache() is True
        [status] = (await engine.status()).values()
        assert (status.num_cached_blocks, status.num_free_blocks) == (0, status.num_blocks)
