"""Requests of RL frameworks that speak SGLang's dialect, as they send and read them, against a
running server with the bundled model: slime, miles, AReaL, verl and ROLL.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.support.rollouts import (
    LONG,
    NUM_PLACES,
    PROMPT_IDS,
    Sample,
    assert_alive_and_idle,
    assert_scored_by_the_model,
    check_interrupted_rollout,
    post,
    rollout_server,
    wait_for_tokens,
)
from tests.support.served_engine import ServedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[ServedEngine]:
    async with rollout_server() as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def http(server: ServedEngine) -> AsyncIterator[httpx.AsyncClient]:
    yield server.http
    await assert_alive_and_idle(server)


def slime_body(sample: Sample) -> dict[str, Any]:
    return {
        "input_ids": sample.prompt_ids + sample.ids,
        "sampling_params": {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "max_new_tokens": sample.num_tokens_left,
            "stop": None,
            "stop_token_ids": None,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "ignore_eos": True,
        },
        "return_logprob": True,
    }


async def slime_generate(http: httpx.AsyncClient, sample: Sample) -> None:
    headers = {"X-SMG-Routing-Key": "session"}
    sample.add_sglang(await post(http, "/generate", slime_body(sample), headers=headers))


def slime_num_requests(load: Any) -> int:
    """Its reading of a load: any counter that is not zero means that something is left."""
    counters = ("num_total_reqs", "num_running_reqs", "num_waiting_reqs")
    return max(int(rank[counter]) for rank in load["loads"] for counter in counters)


async def test_L2_L6_slime_aborts_all_until_idle_and_goes_on_with_partial_samples(
    http: httpx.AsyncClient,
) -> None:
    samples = [Sample(PROMPT_IDS, LONG) for _ in range(NUM_PLACES + 2)]
    pending = [asyncio.create_task(slime_generate(http, sample)) for sample in samples]
    await wait_for_tokens(http, NUM_PLACES, at_least=5)
    assert await post(http, "/abort_request", {"abort_all": True})
    loads = (await http.get("/v1/loads?include=core,disagg,queues")).json()
    assert slime_num_requests(loads) == 0, "one abort is enough: it is answered after its effect"
    await asyncio.wait_for(asyncio.gather(*pending), 5)

    assert {sample.ending for sample in samples} == {"abort"}
    assert sum(len(sample.ids) >= 5 for sample in samples) == NUM_PLACES
    assert sum(len(sample.ids) == 0 for sample in samples) == 2, "those that waited for a place"
    for sample in samples:
        sample.max_tokens = len(sample.ids) + 10
    await asyncio.wait_for(asyncio.gather(*(slime_generate(http, one) for one in samples)), 20)
    for sample in samples:
        assert sample.ending == "length"
        assert sample.num_tokens_left == 0
    for sample in samples[:3]:
        await assert_scored_by_the_model(http, PROMPT_IDS, sample.ids, sample.logprobs)


async def test_L2_slimes_group_draws_by_seed_and_keeps_the_stop_token(
    http: httpx.AsyncClient,
) -> None:
    def body(seed: int) -> dict[str, Any]:
        body = slime_body(Sample(PROMPT_IDS, 12))
        body["sampling_params"] |= {"sampling_seed": seed}
        return body

    results = [await post(http, "/generate", body(seed)) for seed in (3, 3, 4)]
    assert results[0]["output_ids"] == results[1]["output_ids"]
    assert results[0]["output_ids"] != results[2]["output_ids"]
    greedy = slime_body(Sample(PROMPT_IDS, 5))
    greedy["sampling_params"] |= {"temperature": 0}
    first = (await post(http, "/generate", greedy))["output_ids"][0]
    greedy["sampling_params"]["stop_token_ids"] = [first]
    stopped = await post(http, "/generate", greedy)
    assert stopped["output_ids"] == [first]
    assert stopped["text"]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": first}


@pytest.mark.parametrize("stream", [False, True])
async def test_slimes_teacher_scores_a_rollout_and_generates_nothing(
    http: httpx.AsyncClient, stream: bool
) -> None:
    params = {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False}
    body = {
        "input_ids": PROMPT_IDS,
        "sampling_params": params,
        "return_logprob": True,
        "logprob_start_len": 0,
        "stream": stream,
    }
    if stream:
        answer = await http.post("/generate", json=body)
        result = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
    else:
        result = await post(http, "/generate", body)
    info = result["meta_info"]
    assert (result["text"], result["output_ids"], info["output_token_logprobs"]) == ("", [], [])
    assert info["finish_reason"] == {"type": "length", "length": 0}
    assert info["completion_tokens"] == 0
    scores = [logprob for logprob, _, _ in info["input_token_logprobs"]]
    assert scores[0] is None
    await assert_scored_by_the_model(http, PROMPT_IDS[:1], PROMPT_IDS[1:], scores[1:])


async def test_L6_miles_aborts_once_and_collects_top_logprobs(http: httpx.AsyncClient) -> None:
    body = slime_body(Sample(PROMPT_IDS, LONG)) | {"top_logprobs_num": 2}
    pending = [asyncio.create_task(post(http, "/generate", body)) for _ in range(3)]
    await wait_for_tokens(http, 3, at_least=3)
    await asyncio.gather(*(post(http, "/abort_request", {"abort_all": True}) for _ in range(2)))
    for result in await asyncio.wait_for(asyncio.gather(*pending), 5):
        info = result["meta_info"]
        assert info["finish_reason"]["type"] == "abort"
        assert info["weight_version"] == "default"
        top = info["output_top_logprobs"]
        assert len(top) == len(info["output_token_logprobs"]) >= 3
        assert all(len(entries) == 2 for entries in top)


async def test_L2_areals_sglang_engine_goes_on_after_every_abort_and_keeps_to_its_budget(
    http: httpx.AsyncClient,
) -> None:
    async def send(sample: Sample) -> None:
        body = {
            "input_ids": sample.prompt_ids + sample.ids,
            "image_data": [],
            "sampling_params": {
                "top_p": 1.0,
                "top_k": 100_000_000,
                "max_new_tokens": sample.num_tokens_left,
                "temperature": 1.0,
                "stop_token_ids": [],
                "ignore_eos": True,
                "skip_special_tokens": False,
                "frequency_penalty": 0.0,
            },
            "return_logprob": True,
            "stream": False,
        }
        sample.add_sglang(await post(http, "/generate", body))

    await check_interrupted_rollout(
        http, send, lambda: post(http, "/abort_request", {"abort_all": True})
    )


async def test_L2_verl_aborts_seven_of_eight_and_the_server_lives(http: httpx.AsyncClient) -> None:
    def body(rid: str, max_new_tokens: int) -> dict[str, Any]:
        params = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "ignore_eos": True}
        return {
            "rid": rid,
            "input_ids": PROMPT_IDS,
            "sampling_params": params,
            "return_logprob": True,
        }

    lengths = [10, *[LONG] * 7]
    pending = [
        asyncio.create_task(post(http, "/generate", body(f"verl-{index}", length)))
        for index, length in enumerate(lengths)
    ]
    await asyncio.wait_for(pending[0], 20)
    await wait_for_tokens(http, NUM_PLACES, at_least=1)
    await post(http, "/abort_request", {"rid": "", "abort_all": True})
    endings = []
    for index, result in enumerate(await asyncio.wait_for(asyncio.gather(*pending), 5)):
        sample = Sample(PROMPT_IDS, lengths[index])
        sample.add_sglang(result)
        endings.append(sample.ending)
        assert result["meta_info"]["id"] == f"verl-{index}"
        assert len(sample.ids) == len(sample.logprobs)
    assert endings == ["length", *["abort"] * 7]
    assert await post(http, "/generate", body("verl-1", 2)), "an id is free after its end (L8)"


async def test_L3_rolls_routers_share_a_server_and_abort_only_their_own(
    http: httpx.AsyncClient,
) -> None:
    def start(router: str) -> dict[str, asyncio.Task[Any]]:
        return {
            rid: asyncio.create_task(
                post(http, "/generate", slime_body(Sample(PROMPT_IDS, LONG)) | {"rid": rid})
            )
            for rid in (f"{router}-1", f"{router}-10", f"{router}-2")
        }

    first, second = start("first"), start("second")
    await wait_for_tokens(http, 6, at_least=1)
    receipts = [await post(http, "/abort_request", {"rid": rid}) for rid in first]
    assert [receipt["num_aborted"] for receipt in receipts] == [1, 1, 1]
    results = await asyncio.wait_for(asyncio.gather(*first.values()), 5)
    assert {result["meta_info"]["finish_reason"]["type"] for result in results} == {"abort"}
    assert not any(task.done() for task in second.values())
    await post(http, "/abort_request", {"rid": list(second)})
    await asyncio.wait_for(asyncio.gather(*second.values()), 5)
