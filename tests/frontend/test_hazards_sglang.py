"""What SGLang's users met in aborts and hang-ups, hazards 1 to 8 of `docs/hazards.md`, and what a
server of ours does in the same place."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from tests.support.arithmetic_rollouts import (
    LONG,
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
from tests.support.served_engine import ServedEngine, fake, reset, served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=16)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(running: ServedEngine) -> AsyncIterator[ServedEngine]:
    yield running
    await assert_nothing_left(running)


async def send_and_reset(served: ServedEngine, num: int, num_tokens: int, delay_s: float) -> None:
    """So many clients, every other one of a stream, that reset their connections one by one."""
    clients = [await served.connect() for _ in range(num)]
    for index, client in enumerate(clients):
        body = {
            "input_ids": [index, 7],
            "sampling_params": {"max_new_tokens": num_tokens},
            "stream": index % 2 == 0,
        }
        await served.post(client, "/generate", body)
    for client in clients:
        await asyncio.sleep(delay_s)
        reset(client)


@pytest.mark.parametrize("stream", [True, False])
async def test_sglang_hazard_01_a_client_that_goes_leaves_no_zombie_that_decodes_on(
    served: ServedEngine, stream: bool
) -> None:
    [before] = await num_steps(served)
    clients = [await served.connect() for _ in range(8)]
    for index, client in enumerate(clients):
        params = {"max_new_tokens": LONG}
        body = {"rid": f"z-{index}", "input_ids": [index, 7], "sampling_params": params}
        await served.post(client, "/generate", body | {"stream": stream})
    await wait_for_tokens(served.http, 8, at_least=1)
    for client in clients:
        reset(client)
    await served.wait_until_idle()
    await assert_standing_still(served)
    [after] = await num_steps(served)
    assert after - before < LONG / 4
    receipt = await post(served.http, "/abort_request", {"rid": "z-0"})
    assert receipt["requests"]["z-0"]["status"] == "unknown"


async def test_sglang_hazard_02_waves_of_hang_ups_add_up_to_nothing_and_few_lines_of_log(
    served: ServedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    num_waves = 12
    with caplog.at_level(logging.INFO):
        for _ in range(num_waves):
            await send_and_reset(served, 12, LONG, delay_s=0.0)
            await served.wait_for_live_requests(0)
        await served.wait_until_idle()
    ours = [record for record in caplog.records if record.name.startswith("frontend")]
    assert not [record.getMessage() for record in ours if record.levelno > logging.INFO]
    assert len(ours) <= 4 * num_waves, "a line for each flush, not for each request"
    assert (await served.http.get("/requests")).json() == {"requests": []}


async def test_sglang_hazard_03_a_mass_hang_up_among_natural_ends_harms_nobody(
    served: ServedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    faithful = start(served, [f"faithful-{index}" for index in range(6)], 60)
    await asyncio.gather(*(send_and_reset(served, 20, 12, delay_s=0.001) for _ in range(3)))
    for rollout in faithful:
        result = await rollout.result()
        assert (result.ending, len(result.token_ids)) == ("length", 60)
    await served.wait_until_idle()
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


async def test_sglang_hazard_04_an_abort_between_admission_and_dispatch_is_not_lost(
    served: ServedEngine,
) -> None:
    [before] = (await served.engine.status()).values()
    await post(served.http, "/pause_generation", {"mode": "in_place"})
    for _ in range(2):  # The second request of that id is found as well.
        held = Rollout(served, "held", 50)
        await served.wait_for_live_requests(1)
        receipt = await post(served.http, "/abort_request", {"rid": "held"})
        assert receipt["requests"]["held"]["status"] == "aborted"
        assert (await held.result()).ending == "abort"
    group = start(served, ["group-1", "group-2", "other-1"], 50)
    await served.wait_for_live_requests(3)
    receipt = await post(served.http, "/abort_request", {"rid": "group-", "prefix": True})
    assert sorted(receipt["requests"]) == ["group-1", "group-2"]
    await post(served.http, "/continue_generation", {})
    endings = [(result.ending, len(result.token_ids)) for result in await results(group)]
    assert endings == [("abort", 0), ("abort", 0), ("length", 50)]
    [after] = (await served.engine.status()).values()
    num_added = after.counters["requests_added"] - before.counters["requests_added"]
    assert num_added == 1, "an engine hears only of what was not aborted"


async def test_sglang_hazard_05_an_abort_and_a_drain_say_when_they_are_done(
    served: ServedEngine,
) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(20)])  # 16 run.
    await wait_for_tokens(served.http, 16, at_least=2)
    receipt = await post(served.http, "/abort_request", {"abort_all": True})
    loads = (await served.http.get("/v1/loads")).json()
    assert receipt["num_aborted"] == 20
    assert loads["aggregate"]["total_reqs"] == 0, "no polling until it is idle"
    assert {result.ending for result in await results(rollouts)} == {"abort"}

    slow = Rollout(served, "slow", 300)
    await wait_for_tokens(served.http, 1, at_least=1)
    drain = {"mode": "wait", "timeout_s": 0.02}
    refused = await served.http.post("/v1/pause", json=drain)
    assert refused.status_code == 504
    assert served.engine.pause_state.state == "draining"
    drained = await post(served.http, "/v1/pause", {"mode": "wait"})
    assert drained["state"] == "paused"
    assert (await slow.result()).ending == "length"
    await post(served.http, "/v1/resume", {})


async def test_sglang_hazard_06_samples_and_batches_are_aborted_by_the_callers_id(
    served: ServedEngine,
) -> None:
    params = {"max_new_tokens": LONG, "n": 3}
    samples = {"rid": "group", "input_ids": prompt_of("group"), "sampling_params": params}
    batch = {
        "rid": "batch",
        "input_ids": [prompt_of("0"), prompt_of("1")],
        "sampling_params": {"max_new_tokens": LONG},
    }
    calls = [
        asyncio.create_task(served.http.post("/generate", json=body)) for body in (samples, batch)
    ]
    neighbours = start(served, ["group1", "batch-0"])
    await wait_for_tokens(served.http, 7, at_least=1)
    for rid, prompts in (("group", ["group"] * 3), ("batch", ["0", "1"])):
        receipt = await post(served.http, "/abort_request", {"rid": rid})
        assert receipt["num_aborted"] == len(prompts)
        answer = (await asyncio.wait_for(calls.pop(0), 5)).json()
        for prompt, result in zip(prompts, answer, strict=True):
            assert result["meta_info"]["finish_reason"]["type"] == "abort"
            ids = result["output_ids"]
            assert ids == expected_tokens(prompt_of(prompt), len(ids))
            assert ids
    assert not any(neighbour.is_answered for neighbour in neighbours)
    await post(served.http, "/abort_request", {"rid": ["group1", "batch-0"]})
    await results(neighbours)


async def test_sglang_hazard_07_a_retracted_request_that_is_aborted_returns_all_its_tokens(
    served: ServedEngine,
) -> None:
    rollout = Rollout(served, "retracted", LONG)
    await wait_for_tokens(served.http, 1, at_least=7)
    await post(served.http, "/pause_generation", {"mode": "retract"})
    receipt = await post(served.http, "/abort_request", {"rid": "retracted"})
    told = receipt["requests"]["retracted"]
    result = await rollout.result()
    assert (result.ending, told["stage"]) == ("abort", "preempted")
    assert told["num_output_tokens"] == len(result.token_ids) >= 7
    assert served.engine.pause_state.state == "paused"
    await post(served.http, "/continue_generation", {})


async def test_sglang_hazard_08_deadlines_strike_on_all_ranks_by_one_clock_even_while_paused() -> (
    None
):
    config = dataclasses.replace(fake(fake_step_time_ms=1), data_parallel_size=2)
    async with served_engine(config) as served:
        patient = start(served, ["patient-0", "patient-1"])
        hasty = start(served, [f"hasty-{index}" for index in range(8)], timeout_s=0.3)
        await wait_for_tokens(served.http, 10, at_least=1)
        assert {one.engine_index for one in await served.engine.list_requests()} == {0, 1}
        await post(served.http, "/pause_generation", {"mode": "in_place"})
        for result in await results(hasty):
            assert (result.ending, result.info["finish_reason"]["abort_cause"]) == (
                "abort",
                "deadline",
            )
            assert result.token_ids
        assert not any(rollout.is_answered for rollout in patient)
        await post(served.http, "/continue_generation", {})
        await until_state(served, "running")
        await post(served.http, "/abort_request", {"abort_all": True})
        await results(patient)
        await assert_nothing_left(served)
