"""FastDeploy's tests of pause, update and resume over HTTP; `docs/peer_tests.md` lists them all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from engine_core.fake_runner import salt_of
from tests.support.arithmetic_rollouts import LONG, Completion, assert_nothing_left, results, start
from tests.support.rollouts import wait_for_tokens
from tests.support.served_engine import ServedEngine, fake, served_engine


@pytest_asyncio.fixture
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        yield served
        await assert_nothing_left(served)


async def control(served: ServedEngine, path: str, body: object = None) -> Any:
    """A control call of FastDeploy, which has no body unless it needs one."""
    answer = await served.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "success"
    return answer.json()


async def is_paused(served: ServedEngine) -> bool:
    reply = (await served.http.get("/v1/is_paused")).json()
    return bool(reply["result"]["is_paused"])


async def test_L9_L10_a_pause_an_update_and_a_resume_work_and_are_told(
    served: ServedEngine,
) -> None:
    assert not await is_paused(served)
    assert (await Completion(served, "before", 10).result()).ending == "length"
    await control(served, "/v1/pause")
    assert await is_paused(served)
    reply = await control(served, "/v1/update_weights", {"version": "v2", "path": "step-2"})
    assert reply["result"]["version"] == "v2"
    assert await is_paused(served)
    await control(served, "/v1/resume")
    assert not await is_paused(served)
    result = await Completion(served, "after", 10).result(salt=salt_of("step-2"))
    assert result.info["weight_versions"] == [{"version": "v2", "start": 0, "end": 10}]


async def test_L9_pauses_and_resumes_may_be_repeated_and_cycled(served: ServedEngine) -> None:
    for path, paused in (("/v1/pause", True), ("/v1/resume", False)):
        for _ in range(9):
            await control(served, path)
            assert await is_paused(served) is paused
    for cycle in range(9):
        await control(served, "/v1/pause")
        await control(served, "/v1/update_weights", {"version": str(cycle), "path": f"s{cycle}"})
        await control(served, "/v1/resume")
        assert (await Completion(served, "x", 3).result(salt=salt_of(f"s{cycle}"))).token_ids


async def test_L9_a_pause_ends_five_requests_with_what_they_have_and_refuses_the_sixth(
    served: ServedEngine,
) -> None:
    """There both are errors; here those that were accepted are successes, with their tokens."""
    rollouts = start(served, [f"r-{index}" for index in range(5)], LONG, Completion)
    await wait_for_tokens(served.http, 5, at_least=1)
    reply = await control(served, "/v1/pause")
    assert reply["num_aborted"] == 5
    for result in await results(rollouts):
        assert (result.ending, result.info["abort_cause"]) == ("abort", "pause")
        assert result.token_ids
    refusal = await Completion(served, "sixth", 5).answer()
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "engine_paused")
    await control(served, "/v1/resume")
    assert (await Completion(served, "sixth", 5).result()).ending == "length"


async def test_L9_five_pauses_at_once_all_hold_and_one_of_five_resumes_ends_them(
    served: ServedEngine,
) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(5)], LONG, Completion)
    await wait_for_tokens(served.http, 5, at_least=1)
    pausing = [asyncio.create_task(control(served, "/v1/pause")) for _ in range(5)]
    replies = await asyncio.wait_for(asyncio.gather(*pausing), 5)
    assert {reply["state"] for reply in replies} == {"paused"}
    assert sum(reply["num_aborted"] for reply in replies) == 5, "each is counted once"
    assert {result.ending for result in await results(rollouts)} == {"abort"}
    resuming = [asyncio.create_task(control(served, "/v1/resume")) for _ in range(5)]
    replies = await asyncio.wait_for(asyncio.gather(*resuming), 5)
    assert sorted(reply["was"] for reply in replies) == ["paused", *["running"] * 4]
