"""Real engine processes that end, one way or another, under a front end that goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.errors import EngineDeadError, EngineStartupError
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.engine_config import EngineConfig

CONFIG = EngineConfig(
    model="fake",
    runner="fake",
    max_model_len=2048,
    max_num_seqs=64,
    block_size=16,
    num_gpu_blocks_override=400,
    fake_step_time_ms=2.0,
)
NUM_REQUESTS = 20


def start_requests(frontend: AsyncEngine, max_tokens: int) -> dict[int, RequestStream]:
    """Streams by the first token of their prompts."""
    return {
        first: frontend.generate(
            prompt_token_ids=[first, 2, 3],
            sampling_params=SamplingParams(max_tokens=max_tokens),
        )
        for first in range(NUM_REQUESTS)
    }


async def end_one_of_two(signal_number: signal.Signals) -> tuple[list[str], list[str]]:
    """Send a signal to engine 0 while both serve; returns all finish reasons and abort causes."""
    async with await AsyncEngine.start(FrontendConfig(engine=CONFIG, data_parallel_size=2)) as fe:
        reading = {
            first: asyncio.create_task(stream.result())
            for first, stream in start_requests(fe, max_tokens=300).items()
        }
        await asyncio.sleep(0.2)
        os.kill(fe._supervisor.pid(0), signal_number)
        signalled_s = time.monotonic()
        done: Sequence[asyncio.Task[object]] = []
        while len(done) < NUM_REQUESTS // 2:
            assert time.monotonic() - signalled_s < 1, "the dead engine's requests did not end"
            await asyncio.sleep(0.01)
            done = [task for task in reading.values() if task.done()]
        results = {first: await asyncio.wait_for(task, 20) for first, task in reading.items()}
        for first, result in results.items():
            # Partial or whole, the tokens are right.
            num_tokens = len(result.token_ids)
            assert list(result.token_ids) == expected_tokens([first, 2, 3], num_tokens)
            assert num_tokens == 300 or result.finish_reason != "length"
        assert fe.is_healthy
        again = fe.generate(
            prompt_token_ids=[9, 2, 3], sampling_params=SamplingParams(max_tokens=5)
        )
        assert (await asyncio.wait_for(again.result(), 5)).finish_reason == "length"
        assert fe.num_live_requests == 0
        return (
            sorted(result.finish_reason for result in results.values()),
            sorted(str(result.abort_cause) for result in results.values()),
        )


async def test_L12_a_killed_engines_requests_end_with_error_and_the_others_are_served() -> None:
    reasons, _ = await end_one_of_two(signal.SIGKILL)
    assert reasons == ["error"] * 10 + ["length"] * 10


async def test_L12_an_engine_that_is_asked_to_end_ends_its_requests_with_abort() -> None:
    reasons, causes = await end_one_of_two(signal.SIGTERM)
    assert reasons == ["abort"] * 10 + ["length"] * 10
    assert causes == ["None"] * 10 + ["engine"] * 10


async def test_L12_when_the_only_engine_is_gone_requests_are_refused_at_once() -> None:
    async with await AsyncEngine.start(FrontendConfig(engine=CONFIG)) as frontend:
        streams = start_requests(frontend, max_tokens=1000)
        os.kill(frontend._supervisor.pid(0), signal.SIGKILL)
        results = [await asyncio.wait_for(stream.result(), 2) for stream in streams.values()]
        assert {result.finish_reason for result in results} == {"error"}
        assert all(result.error is not None and result.error.retryable for result in results)
        assert not frontend.is_healthy
        with pytest.raises(EngineDeadError):
            frontend.generate(prompt_token_ids=[1])
        receipt = await asyncio.wait_for(frontend.abort(abort_all=True), 1)
        assert receipt.requests == {}


async def test_L1_a_shutdown_ends_live_requests_with_what_they_have() -> None:
    frontend = await AsyncEngine.start(FrontendConfig(engine=CONFIG, data_parallel_size=2))
    reading = {
        first: asyncio.create_task(stream.result())
        for first, stream in start_requests(frontend, max_tokens=1500).items()
    }
    await asyncio.sleep(0.2)
    await frontend.shutdown()
    for first, task in reading.items():
        result = await asyncio.wait_for(task, 1)
        assert (result.finish_reason, result.abort_cause) == ("abort", "shutdown")
        assert 0 < len(result.token_ids) < 1500
        assert list(result.token_ids) == expected_tokens([first, 2, 3], len(result.token_ids))


async def test_L12_an_engine_that_cannot_start_is_named_with_its_own_words() -> None:
    config = EngineConfig(model="/nowhere/at/all", runner="model")
    with pytest.raises((EngineStartupError, ValueError), match="/nowhere/at/all"):
        await asyncio.wait_for(AsyncEngine.start(FrontendConfig(engine=config)), 60)
