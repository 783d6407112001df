"""What vLLM's engine does with aborts, pauses and reused ids, hazards 11 to 19 of
`docs/hazards.md`, and what a server and an engine process of ours do in the same place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from ipc.engine_config import EngineConfig
from ipc.output import EngineCoreOutput, FinishReason
from tests.support.arithmetic_rollouts import (
    LONG,
    Completion,
    assert_nothing_left,
    assert_standing_still,
    results,
    start,
)
from tests.support.mock_fleet import mock_fleet
from tests.support.rollouts import post, wait_for_tokens
from tests.support.scripted_frontend import ScriptedFrontend
from tests.support.served_engine import PROMPT, ServedEngine, fake, reset, served_engine, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=8)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(running: ServedEngine) -> AsyncIterator[ServedEngine]:
    yield running
    await assert_nothing_left(running)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[ScriptedFrontend]:
    """An engine process, and the test in the place of its front end."""
    async with ScriptedFrontend() as frontend:
        await frontend.start(EngineConfig(model="none", runner="fake", fake_step_time_ms=1))
        yield frontend


async def test_vllm_hazard_11_an_abort_at_an_engine_followed_by_its_id_spares_the_new_request(
    engine: ScriptedFrontend,
) -> None:
    for round_number in range(30):
        prompt = [round_number + 1, 3]
        await engine.add("x", [9, 9], max_tokens=LONG)
        await engine.abort(["x"])
        await engine.add("x", prompt, max_tokens=4)
        outputs: list[EngineCoreOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            outputs.append(await engine.next_output("x"))
        token_ids = [token_id for output in outputs for token_id in output.new_token_ids]
        assert token_ids[-4:] == expected_tokens(prompt, 4), "the new one is whole"
        assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert (await engine.status()).num_running == 0


async def test_vllm_hazard_12_a_second_add_of_a_live_id_does_not_end_the_engine(
    engine: ScriptedFrontend,
) -> None:
    before = (await engine.status()).counters["duplicate_ids_ignored"]
    await engine.add("twice", PROMPT, max_tokens=300)
    await engine.add("twice", [9, 9], max_tokens=3)
    output = await engine.collect("twice")
    assert list(output.new_token_ids) == expected_tokens(PROMPT, 300)
    assert (await engine.status()).counters["duplicate_ids_ignored"] == before + 1
    assert engine.processes[0].returncode is None


async def test_vllm_hazard_13_frozen_and_queued_requests_end_at_an_abort_and_are_told(
    served: ServedEngine,
) -> None:
    frozen = start(served, [f"r-{index}" for index in range(8)], kind=Completion)
    await wait_for_tokens(served.http, 8, at_least=1)
    queued = start(served, [f"q-{index}" for index in range(4)], kind=Completion)
    await served.wait_for_live_requests(12)
    await post(served.http, "/pause?mode=keep&clear_cache=false", None)
    held = start(served, ["h-0", "h-1"], kind=Completion)
    await served.wait_for_live_requests(14)
    await post(served.http, "/abort_requests", {})
    for rollout, result in zip(frozen, await results(frozen), strict=True):
        assert (result.ending, bool(result.token_ids)) == ("abort", True), rollout.rid
    for result in await results([*queued, *held]):
        assert (result.ending, result.token_ids) == ("abort", [])
    [status] = (await served.engine.status()).values()
    assert (status.state, status.num_running + status.num_waiting) == ("paused", 0)
    await post(served.http, "/resume", None)


async def test_vllm_hazard_14_an_abort_that_meets_the_last_step_has_one_truth(
    served: ServedEngine,
) -> None:
    num_tokens = 40
    statuses = set()
    for moment in range(0, num_tokens + 12, 4):
        rollout = Completion(served, "last-step", num_tokens)
        await served.wait_for_live_requests(1)
        await asyncio.sleep(moment * 0.001)
        body = {"request_ids": ["last-step"]}
        told = (await post(served.http, "/abort_requests", body))["requests"]["last-step"]
        result = await rollout.result()
        statuses.add(told["status"])
        if told["status"] == "aborted":
            assert result.ending == "abort"
            assert told["num_output_tokens"] == len(result.token_ids) < num_tokens
        else:
            assert told["status"] in ("finished", "unknown")
            assert (result.ending, len(result.token_ids)) == ("length", num_tokens)
    assert "aborted" in statuses


async def test_vllm_hazard_15_outputs_that_were_on_their_way_reach_nobody_after_an_abort() -> None:
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        async with serving(frontend) as served:
            client = await served.connect()
            body = {"prompt": PROMPT, "max_tokens": LONG, "stream": True, "return_token_ids": True}
            await served.post(client, "/v1/completions", body)
            request_id = (await engine.next_add()).request_id
            await engine.send_tokens(request_id, [65])
            await served.receive_until(client, b'"token_ids":[65]')
            await post(served.http, "/abort_requests", {})
            assert await engine.next_abort() == [request_id]
            await engine.send_tokens(request_id, [66])
            await engine.send_tokens(request_id, [67], finish=FinishReason.LENGTH)
            data = await served.receive_until(client, b"[DONE]")
            assert b'"finish_reason":"abort"' in data
            assert not any(token in data for token in (b"[66]", b"[67]", b"length"))
            assert served.engine.num_live_requests == 0
            client.close()


async def test_vllm_hazard_16_no_newcomer_slips_into_a_pause(served: ServedEngine) -> None:
    newcomers = []
    for round_number in range(4):
        pausing = asyncio.create_task(post(served.http, "/pause?mode=keep", None))
        rids = [f"n-{round_number}-{index}" for index in range(6)]
        newcomers += start(served, rids, 20, kind=Completion)
        await asyncio.wait_for(pausing, 5)
        await assert_standing_still(served)
        await post(served.http, "/resume", None)
    for result in await results(newcomers):
        assert (result.ending, len(result.token_ids)) == ("length", 20)


async def test_vllm_hazard_17_resumes_may_be_repeated_while_requests_come(
    served: ServedEngine,
) -> None:
    for round_number in range(3):
        await post(served.http, "/pause?mode=keep&clear_cache=false", None)
        rids = [f"r-{round_number}-{index}" for index in range(6)]
        resuming = [asyncio.create_task(post(served.http, "/resume", None)) for _ in range(5)]
        rollouts = start(served, rids, 20, kind=Completion)
        replies = await asyncio.wait_for(asyncio.gather(*resuming), 5)
        assert sorted(reply["was"] for reply in replies) == ["paused", *["running"] * 4]
        for result in await results(rollouts):
            assert (result.ending, len(result.token_ids)) == ("length", 20)


async def test_vllm_hazard_18_an_abort_that_names_nobody_is_loud_and_can_be_refused(
    served: ServedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    everyone = start(served, ["a", "b"], kind=Completion)
    await served.wait_for_live_requests(2)
    reply = await post(served.http, "/abort_requests", {"request_ids": []})
    assert reply["aborted"] == 2
    assert "every request is aborted" in caplog.text
    assert {result.ending for result in await results(everyone)} == {"abort"}
    async with served_engine(fake(fake_step_time_ms=1), strict_selectors=True) as strict:
        client = await strict.connect()
        await strict.post(client, "/v1/completions", {"prompt": PROMPT, "max_tokens": LONG})
        await strict.wait_for_live_requests(1)
        refusal = await strict.http.post("/abort_requests", json={})
        assert refusal.status_code == 400
        assert strict.engine.num_live_requests == 1
        reset(client)
        await assert_nothing_left(strict)


async def test_vllm_hazard_19_a_pause_whose_mode_is_in_the_body_ends_nobody(
    served: ServedEngine,
) -> None:
    rollout = Completion(served, "spared", 100)
    await served.wait_for_live_requests(1)
    await post(served.http, "/pause", {"mode": "keep", "clear_cache": False})
    assert served.engine.pause_state.mode == "keep"
    assert (await served.http.post("/resume", json={"pause_id": "another"})).status_code == 400
    assert served.engine.pause_state.state == "paused"
    for empty in (b"null", b"{}", b""):
        assert (await served.http.post("/resume", content=empty)).status_code == 200
    assert (await rollout.result()).ending == "length"
