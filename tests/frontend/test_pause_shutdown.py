"""A shutdown that meets a pause: what can still finish may, the rest ends at once."""

from __future__ import annotations

import asyncio

from frontend.async_engine import AsyncEngine
from frontend.outputs import AbortCause
from frontend.sampling_params import SamplingParams
from tests.support.served_engine import fake

GRACE_S = 20.0


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


async def test_L9_a_shutdown_of_a_draining_wait_lets_what_has_begun_finish() -> None:
    engine = await AsyncEngine.start(fake(fake_step_time_ms=5.0))
    begun = engine.generate(prompt_token_ids=[1], sampling_params=tokens(60))
    await anext(begun)
    pausing = asyncio.create_task(engine.pause("wait"))
    await asyncio.sleep(0)
    held = engine.generate(prompt_token_ids=[1], sampling_params=tokens(60))
    await asyncio.wait_for(engine.shutdown(GRACE_S), GRACE_S / 2)
    assert (await begun.result()).finish_reason == "length"
    assert (await held.result()).abort_cause is AbortCause.SHUTDOWN
    await asyncio.gather(pausing, return_exceptions=True)


async def test_L9_a_shutdown_while_paused_ends_everything_at_once() -> None:
    engine = await AsyncEngine.start(fake(fake_step_time_ms=5.0))
    begun = engine.generate(prompt_token_ids=[1], sampling_params=tokens(60))
    await anext(begun)
    await engine.pause("keep")
    held = engine.generate(prompt_token_ids=[1], sampling_params=tokens(60))
    await asyncio.wait_for(engine.shutdown(GRACE_S), 10)
    for stream in (begun, held):
        assert (await stream.result()).abort_cause is AbortCause.SHUTDOWN


async def test_L9_a_shutdown_during_a_leased_pause_waits_for_its_end() -> None:
    engine = await AsyncEngine.start(fake(fake_step_time_ms=2.0))
    begun = engine.generate(prompt_token_ids=[1], sampling_params=tokens(60))
    await anext(begun)
    await engine.pause("keep", lease_s=0.3)
    await asyncio.wait_for(engine.shutdown(GRACE_S), 10)
    assert (await begun.result()).finish_reason == "length"
