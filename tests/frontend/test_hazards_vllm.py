"""What vLLM leaves open, hazards 1 to 10 of `docs/hazards.md`, and what a server of ours does in
the same place."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from frontend.http import sockets
from frontend.outputs import AbortCause
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
from tests.support.served_engine import (
    PROMPT,
    ServedEngine,
    fake,
    post_bytes,
    reset,
    served_engine,
    serving,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
COMPLETIONS = "/v1/completions"
NUM_BULK = 200


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=16)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(running: ServedEngine) -> AsyncIterator[ServedEngine]:
    yield running
    await assert_nothing_left(running)


async def test_vllm_hazard_01_an_abort_is_confirmed_after_its_effect(served: ServedEngine) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(20)], kind=Completion)  # 16 run.
    await wait_for_tokens(served.http, 16, at_least=1)
    names = [rollout.rid for rollout in rollouts[:-1]]
    receipt = await post(served.http, "/abort_requests", {"request_ids": names})
    [status] = (await served.engine.status()).values()
    assert (receipt["aborted"], status.num_running + status.num_waiting) == (19, 1)
    for rollout, result in zip(rollouts[:-1], await results(rollouts[:-1]), strict=True):
        told = receipt["requests"][rollout.rid]
        assert (told["status"], told["num_output_tokens"]) == ("aborted", len(result.token_ids))
        assert result.ending == "abort"
    assert not rollouts[-1].is_answered
    await post(served.http, "/abort_requests", {"request_ids": ["r-19"]})


async def test_vllm_hazard_02_a_storm_of_hang_ups_is_a_frame_or_two_for_each_engine() -> None:
    config = dataclasses.replace(fake(fake_step_time_ms=1), data_parallel_size=2)
    async with served_engine(config) as served:
        clients = [await served.connect() for _ in range(300)]
        for client in clients:
            body = {"prompt": PROMPT, "max_tokens": LONG, "stream": True}
            await served.post(client, COMPLETIONS, body)
        await served.wait_for_live_requests(300)
        for client in clients:
            reset(client)
        await served.wait_until_idle()
        for status in (await served.engine.status()).values():
            assert 1 <= status.counters["abort_frames"] <= 3
            assert status.counters["requests_aborted"] == 150
        await assert_nothing_left(served)


async def test_vllm_hazard_03_aborts_act_in_order_and_an_id_is_free_after_its_end(
    served: ServedEngine,
) -> None:
    for _ in range(20):
        client = await served.connect()
        headers = {"X-Request-Id": "again"}
        await served.send(client, post_bytes(COMPLETIONS, {"prompt": PROMPT}, headers))
        await served.wait_for_live_requests(1)
        reset(client)
        await served.wait_for_live_requests(0)
        answer = await served.http.post(
            COMPLETIONS,
            json={"prompt": PROMPT, "max_tokens": 3, "return_token_ids": True},
            headers=headers,
        )
        [choice] = answer.json()["choices"]
        assert choice["token_ids"] == expected_tokens(PROMPT, 3)


async def test_vllm_hazard_04_a_live_id_is_refused_and_nobody_dies_of_it(
    served: ServedEngine,
) -> None:
    first = Completion(served, "twice", 100)
    await served.wait_for_live_requests(1)
    second = await Completion(served, "twice", 100).answer()
    assert second.status_code == 400
    assert "twice" in second.json()["error"]["message"]
    assert (await first.result()).ending == "length"
    assert (await Completion(served, "twice", 5).result()).ending == "length"


async def test_vllm_hazard_05_a_killed_engine_is_noticed_and_told_by_health() -> None:
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        rollout = Completion(served, "victim", LONG)
        await wait_for_tokens(served.http, 1, at_least=1)
        os.kill(served.engine._supervisor.pid(0), signal.SIGKILL)
        answer = await asyncio.wait_for(rollout.answer(), 2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        for path in ("/health", "/ready"):
            assert (await served.http.get(path)).status_code == 503
        refusal = await asyncio.wait_for(Completion(served, "late", 5).answer(), 2)
        assert refusal.status_code == 503


async def test_vllm_hazard_06_a_bulk_abort_leaves_no_tail_of_work_behind() -> None:
    async with served_engine(fake(fake_step_time_ms=5)) as served:
        clients = [await served.connect() for _ in range(NUM_BULK)]
        for index, client in enumerate(clients):
            body = {"prompt": [index, 7], "max_tokens": LONG, "return_token_ids": True}
            await served.post(client, COMPLETIONS, body)
        await served.wait_for_live_requests(NUM_BULK)
        await wait_for_tokens(served.http, NUM_BULK, at_least=2)
        receipt = await post(served.http, "/abort_requests", {})
        assert (receipt["aborted"], receipt["engines"]) == (NUM_BULK, {"0": "ok"})
        assert served.engine.num_live_requests == 0
        for client in clients:
            answer = await served.receive_until(client, b"}")
            assert b" 200 OK" in answer
            client.close()
        await assert_nothing_left(served)


async def test_vllm_hazard_07_a_shutdown_sends_the_aborts_of_live_requests_to_their_engines() -> (
    None
):
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        async with serving(frontend) as served:
            client = await served.connect()
            body = {"prompt": PROMPT, "max_tokens": LONG, "n": 2, "stream": True}
            await served.post(client, COMPLETIONS, body)
            ids = [(await engine.next_add()).request_id for _ in range(2)]
            await engine.send_tokens(ids[0], [65])
            await served.receive_until(client, b"data: ")
            served.stop.stop()
            assert sorted(await engine.next_abort()) == sorted(ids)
            assert b'"shutdown"' in await served.receive_all(client)
            client.close()


async def test_vllm_hazard_08_a_reader_that_never_reads_costs_a_bounded_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "NOT_SENT_LOW_WATER_BYTES", 4096)
    async with served_engine(fake(fake_step_time_ms=1), max_unread_tokens=100) as served:
        client = await served.connect(receive_buffer_bytes=4096)
        body = {"prompt": PROMPT, "max_tokens": LONG, "stream": True, "return_token_ids": True}
        await served.post(client, COMPLETIONS, body)
        await served.wait_for_live_requests(1)
        other = Completion(served, "other", 300)
        await served.wait_until_idle(10)
        assert (await other.result()).ending == "length"
        aborts = served.engine.metrics.num_aborts
        assert sum(aborts[key] for key in aborts if AbortCause.SLOW_READER in key) == 1
        assert b"slow_reader" in await served.receive_all(client)
        client.close()
        await assert_nothing_left(served)


async def test_vllm_hazard_09_a_pause_returns_partial_results_and_a_shutdown_hides_no_token() -> (
    None
):
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=4)) as served:
        rollouts = start(served, [f"r-{index}" for index in range(6)], kind=Completion)
        await wait_for_tokens(served.http, 4, at_least=2)
        reply = await post(served.http, "/pause?mode=abort", None)
        assert reply["num_aborted"] == 6
        for result in await results(rollouts):
            assert (result.ending, result.info["abort_cause"]) == ("abort", "pause")
            assert result.info["resume_from"]["output_token_ids"] == result.token_ids
        await post(served.http, "/resume", None)

        client = await served.connect()
        body = {"prompt": PROMPT, "max_tokens": LONG, "stream": True, "return_token_ids": True}
        await served.post(client, COMPLETIONS, body)
        first = await served.receive_until(client, b"data: ")
        whole = Completion(served, "whole", LONG)
        await wait_for_tokens(served.http, 2, at_least=1)
        served.stop.stop()
        answer = await whole.answer()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutdown")
        assert answer.headers["retry-after"]
        data = first + await served.receive_all(client)
        lists = re.findall(rb'"token_ids":\[([\d,]+)\]', data)
        told = [int(token_id) for each in lists for token_id in each.split(b",")]
        assert told == expected_tokens(PROMPT, len(told))
        assert told
        assert data.index(b'"shutdown"') < data.index(b"data: [DONE]")
        client.close()


@pytest.mark.parametrize("hold_while_paused", [True, False])
async def test_vllm_hazard_10_newcomers_of_a_pause_are_held_or_refused_as_the_server_is_told(
    hold_while_paused: bool,
) -> None:
    async with served_engine(fake(), hold_while_paused=hold_while_paused) as served:
        for mode in ("abort", "wait", "keep"):
            await post(served.http, f"/pause?mode={mode}", None)
            newcomer = Completion(served, f"during-{mode}", 5)
            if hold_while_paused or mode == "keep":
                await served.wait_for_live_requests(1)
                await assert_standing_still(served)
                await post(served.http, "/resume", None)
                assert (await newcomer.result()).ending == "length"
            else:
                answer = await newcomer.answer()
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    503,
                    "engine_paused",
                )
                assert served.engine.num_live_requests == 0
                await post(served.http, "/resume", None)
        await assert_nothing_left(served)
