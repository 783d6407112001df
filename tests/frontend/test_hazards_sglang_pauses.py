"""What SGLang's users met in pauses, flushes and weight updates, hazards 9 to 15, 22 and 23
of `docs/hazards.md`, and what a server of ours does in the same place."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens, salt_of
from tests.support.arithmetic_rollouts import (
    Rollout,
    assert_nothing_left,
    assert_standing_still,
    num_steps,
    prompt_of,
    results,
    start,
    until_state,
)
from tests.support.rollouts import post, wait_for_tokens
from tests.support.served_engine import ServedEngine, fake, served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=16)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(running: ServedEngine) -> AsyncIterator[ServedEngine]:
    yield running
    await assert_nothing_left(running)


async def pause(served: ServedEngine, mode: str) -> None:
    await post(served.http, "/pause_generation", {"mode": mode})


async def resume(served: ServedEngine) -> None:
    await post(served.http, "/continue_generation", {})


async def test_sglang_hazard_09_the_cache_is_flushed_under_retracted_requests(
    served: ServedEngine,
) -> None:
    rollouts = start(served, ["a", "b", "c"], 200)
    await wait_for_tokens(served.http, 3, at_least=5)
    await pause(served, "in_place")
    assert (await served.http.get("/flush_cache")).status_code == 400
    await pause(served, "retract")
    for _ in range(2):
        assert (await served.http.get("/flush_cache")).status_code == 200
    [status] = (await served.engine.status()).values()
    assert (status.num_free_blocks, status.num_cached_blocks) == (status.num_blocks, 0)
    await resume(served)
    for result in await results(rollouts):
        assert (result.ending, len(result.token_ids)) == ("length", 200)


async def test_sglang_hazard_10_pauses_in_place_at_any_moment_leak_no_block_and_no_token(
    served: ServedEngine,
) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(20)], 150)  # 16 run.
    for gap in range(20):
        await asyncio.sleep(0.001 * (gap % 7))
        await pause(served, "in_place")
        await resume(served)
    for result in await results(rollouts):
        assert (result.ending, len(result.token_ids)) == ("length", 150)


async def test_sglang_hazard_11_a_pause_and_an_update_that_waits_do_not_block_each_other() -> None:
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        crossing = Rollout(served, "crossing", 800)
        await wait_for_tokens(served.http, 1, at_least=1)
        body = {"model_path": "second", "weight_version": "v1"}
        update = asyncio.create_task(
            served.http.post("/update_weights_from_disk", json=body, timeout=20)
        )
        await until_state(served, "draining")
        async with asyncio.timeout(5):
            await pause(served, "in_place")
            refusal = await update
        assert refusal.status_code == 409
        assert "took the place of this update's own" in refusal.json()["message"]
        assert served.engine.pause_state.state == "paused", "the pause is its caller's to end"
        assert not crossing.is_answered
        # Sent again, it changes the weights under the pause that holds.
        assert (await post(served.http, "/update_weights_from_disk", body))["success"] is True
        await resume(served)
        result = await crossing.result_of_mixed_weights()
        [old, new] = result.info["weight_versions"]
        assert (old["version"], new["version"]) == ("default", "v1")
        before = old["end"]
        assert result.token_ids[:before] == expected_tokens(prompt_of("crossing"), before)
        assert (old["start"], new["start"], new["end"]) == (0, before, 800)
        fresh = await Rollout(served, "fresh", 20).result(salt=salt_of("second"))
        assert fresh.info["weight_versions"] == [{"version": "v1", "start": 0, "end": 20}]
        await assert_nothing_left(served)


async def test_sglang_hazard_12_once_a_pause_in_place_is_answered_no_step_is_in_flight() -> None:
    config = dataclasses.replace(fake(fake_step_time_ms=2), data_parallel_size=2)
    async with served_engine(config) as served:
        rollouts = start(served, [f"r-{index}" for index in range(6)], 150)
        await wait_for_tokens(served.http, 6, at_least=2)
        for _ in range(3):
            before = await num_steps(served)
            await pause(served, "in_place")
            seen = [one.num_output_tokens for one in await served.engine.list_requests()]
            await assert_standing_still(served)
            assert [one.num_output_tokens for one in await served.engine.list_requests()] == seen
            await resume(served)
            assert sum(await num_steps(served)) > sum(before)
        assert {result.ending for result in await results(rollouts)} == {"length"}
        await assert_nothing_left(served)


async def test_sglang_hazard_13_a_new_label_aborts_none_of_sixteen(served: ServedEngine) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(16)], 200)
    await wait_for_tokens(served.http, 16, at_least=1)
    await post(served.http, "/update_weight_version", {"new_version": "v1"})
    for result in await results(rollouts):
        assert (result.ending, len(result.token_ids)) == ("length", 200)
        versions = [span["version"] for span in result.info["weight_versions"]]
        assert versions == ["default", "v1"]
    await post(served.http, "/update_weight_version", {"new_version": "default"})


async def test_sglang_hazard_14_requests_too_old_to_train_on_are_dropped_while_paused(
    served: ServedEngine,
) -> None:
    old = start(served, ["old-0", "old-1"], 300, tags=["began-under-1"])
    young = start(served, ["young-0", "young-1"], 300, tags=["began-under-2"])
    await wait_for_tokens(served.http, 4, at_least=1)
    await pause(served, "in_place")
    receipt = await post(served.http, "/abort_request", {"tag": "began-under-1"})
    assert sorted(receipt["requests"]) == ["old-0", "old-1"]
    for result in await results(old):
        assert result.ending == "abort"
        assert 0 < len(result.token_ids) < 300
    assert not any(rollout.is_answered for rollout in young)
    assert served.engine.pause_state.state == "paused"
    await resume(served)
    for result in await results(young):
        assert (result.ending, len(result.token_ids)) == ("length", 300)


async def test_sglang_hazard_15_a_cold_server_pauses_and_a_full_one_tells_who_is_too_many() -> None:
    config = dataclasses.replace(fake(fake_step_time_ms=1), max_num_queued_requests=4)
    async with served_engine(config) as served:
        async with asyncio.timeout(5):  # It has never served anything.
            await pause(served, "abort")
            await resume(served)
            await pause(served, "in_place")
        held = start(served, [f"held-{index}" for index in range(4)], 20)
        await served.wait_for_live_requests(4)
        refusal = await Rollout(served, "one-too-many", 20).answer()
        assert refusal.status_code == 503
        assert "max_num_queued_requests=4" in refusal.json()["error"]["message"]
        assert int(refusal.headers["retry-after"]) >= 1
        assert served.engine.num_live_requests == 4
        await resume(served)
        for result in await results(held):
            assert (result.ending, len(result.token_ids)) == ("length", 20)
        assert (await Rollout(served, "one-too-many", 20).result()).ending == "length"
        await assert_nothing_left(served)


async def test_sglang_hazard_22_retracted_requests_need_no_place_in_the_queue_again() -> None:
    config = dataclasses.replace(fake(fake_step_time_ms=1), max_num_queued_requests=2)
    async with served_engine(config) as served:
        rollouts = []
        for index in range(6):
            rollouts.append(Rollout(served, f"r-{index}", 150))
            await wait_for_tokens(served.http, index + 1, at_least=1)
        await pause(served, "retract")
        newcomers = start(served, ["n-0", "n-1"], 20)
        await served.wait_for_live_requests(8)
        await resume(served)
        for result in await results([*rollouts, *newcomers]):
            assert result.ending == "length"
        await assert_nothing_left(served)


async def test_sglang_hazard_23_a_paused_server_shuts_down_in_its_grace() -> None:
    async with served_engine(fake(fake_step_time_ms=1), shutdown_timeout_s=0.2) as served:
        frozen = Rollout(served, "frozen", 300)
        await wait_for_tokens(served.http, 1, at_least=1)
        await pause(served, "in_place")
        held = Rollout(served, "held", 20)
        await served.wait_for_live_requests(2)
        served.stop.stop()
        for rollout in (frozen, held):
            answer = await asyncio.wait_for(rollout.answer(), 5)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutdown")
        await asyncio.wait_for(asyncio.shield(served.serving), 5)
