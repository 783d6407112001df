"""Requests of RL frameworks that speak vLLM's dialect, as they send and read them, against a
running server with the bundled model: AReaL, SkyRL, TRL, PipelineRL and prime-rl.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from tests.support.rollouts import (
    LONG,
    MODEL,
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


async def test_L2_areals_vllm_engine_reads_ids_from_token_names(http: httpx.AsyncClient) -> None:
    async def send(sample: Sample) -> None:
        body = {
            "prompt": sample.prompt_ids + sample.ids,
            "top_p": 1.0,
            "top_k": 100_000_000,
            "max_tokens": sample.num_tokens_left,
            "temperature": 1.0,
            "stop_token_ids": [],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "frequency_penalty": 0.0,
            "return_tokens_as_token_ids": True,
            "logprobs": 0,
            "use_beam_search": False,
            "stream": False,
        }
        choice = (await post(http, "/v1/completions", body))["choices"][0]
        sample.ids += [int(name.split(":")[1]) for name in choice["logprobs"]["tokens"]]
        sample.logprobs += choice["logprobs"]["token_logprobs"]
        sample.ending = choice["finish_reason"]

    await check_interrupted_rollout(http, send, lambda: post(http, "/abort_requests", {}))


async def test_areals_teacher_scores_a_sequence(http: httpx.AsyncClient) -> None:
    sequence = [*PROMPT_IDS, 285, 600]
    body = {"prompt": sequence, "max_tokens": 1, "temperature": 0.0}
    body |= {"logprobs": 1, "prompt_logprobs": 1, "echo": True}
    choice = (await post(http, "/v1/completions", body))["choices"][0]
    scores = [next(iter(place.values()))["logprob"] for place in choice["prompt_logprobs"][-2:]]
    await assert_scored_by_the_model(http, PROMPT_IDS, sequence[-2:], scores)


async def test_L2_skyrl_sends_ids_and_has_ids_back(http: httpx.AsyncClient) -> None:
    async def generate(**params: Any) -> Any:
        body = {
            "token_ids": PROMPT_IDS,
            "model": MODEL,
            "cache_salt": "batch-1",
            "sampling_params": {
                "min_tokens": 1,
                "skip_special_tokens": True,
                "include_stop_str_in_output": True,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop": None,
                "logprobs": 1,
                "ignore_eos": True,
                **params,
            },
        }
        headers = {"X-Session-ID": "session-1", "X-Request-Id": "skyrl-1"}
        return await post(http, "/inference/v1/generate", body, headers=headers)

    async def check(choice: Any) -> None:
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        await assert_scored_by_the_model(http, PROMPT_IDS, choice["token_ids"], logprobs)

    (choice,) = (await generate(max_tokens=20))["choices"]
    assert choice["finish_reason"] == "length"
    await check(choice)
    text = await post(http, "/detokenize", {"model": MODEL, "tokens": choice["token_ids"]})
    body = {"model": MODEL, "prompt": text["prompt"], "add_special_tokens": False}
    again = (await post(http, "/tokenize", body))["tokens"]
    assert (await post(http, "/detokenize", {"model": MODEL, "tokens": again})) == text

    pending = asyncio.create_task(generate(max_tokens=LONG))
    await wait_for_tokens(http, 1, at_least=3)
    await post(http, "/inference/v1/abort_requests", {"request_ids": ["skyrl-1"]})
    (choice,) = (await asyncio.wait_for(pending, 5))["choices"]
    assert (choice["finish_reason"], choice["abort_cause"]) == ("abort", "explicit")
    await check(choice)


async def test_L2_trl_asks_for_ids_and_the_sampled_tokens_logprobs(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": PROMPT_IDS, "max_tokens": 20, "temperature": 1.0, "n": 1}
    body |= {"return_token_ids": True, "logprobs": 0}
    choice = (await post(http, "/v1/completions", body))["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    await assert_scored_by_the_model(http, PROMPT_IDS, choice["token_ids"], logprobs)


async def test_L2_pipelinerl_reads_ids_from_a_chats_token_names(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Read a file."}]
    body = {
        "model": MODEL,
        "messages": messages,
        "logprobs": 1,  # Not a truth value: so it is written, and so vLLM takes it.
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "max_tokens": 20,
        "return_tokens_as_token_ids": True,
    }
    answer = await post(http, "/v1/chat/completions", body)
    content = answer["choices"][0]["logprobs"]["content"]
    ids = [int(entry["token"].split(":")[-1]) for entry in content]
    assert len(ids) == answer["usage"]["completion_tokens"]
    prompt_ids = (await post(http, "/tokenize", {"messages": messages}))["tokens"]
    assert len(prompt_ids) == answer["usage"]["prompt_tokens"]
    logprobs = [entry["logprob"] for entry in content]
    await assert_scored_by_the_model(http, prompt_ids, ids, logprobs)


async def test_prime_rl_salts_its_cache_by_version_and_cancels_stale_rollouts(
    server: ServedEngine, http: httpx.AsyncClient
) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    question = "Write a function that reads a file. " * 12
    async with openai.AsyncOpenAI(base_url=url, api_key="EMPTY", max_retries=0) as client:

        async def rollout(version: int, max_tokens: int = 8) -> Any:
            return await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                max_completion_tokens=max_tokens,
                top_p=1.0,
                logprobs=True,
                extra_body={
                    "return_token_ids": True,
                    "top_k": -1,
                    "min_p": 0.0,
                    "min_tokens": max_tokens,
                    "repetition_penalty": 1.0,
                    "cache_salt": str(version),
                },
            )

        num_cached = []
        for version in (1, 1, 2):
            answer = await rollout(version)
            num_cached.append(answer.usage.prompt_tokens_details.cached_tokens)
            ids = answer.choices[0].model_extra["token_ids"]
            logprobs = [entry.logprob for entry in answer.choices[0].logprobs.content]
            prompt_ids = answer.model_extra["prompt_token_ids"]
            await assert_scored_by_the_model(http, prompt_ids, ids, logprobs)
        assert num_cached[0] == num_cached[2] == 0
        assert num_cached[1] > 0

        stale = [asyncio.create_task(rollout(1, LONG)) for _ in range(3)]
        await wait_for_tokens(http, 3, at_least=1)
        for task in stale[:2]:
            task.cancel()
        await server.wait_for_live_requests(1)
        assert not stale[2].done()
        stale[2].cancel()
        await asyncio.gather(*stale, return_exceptions=True)
