"""Requests as RL frameworks send them, read as they read them, against a running server with the
bundled model.

Each test speaks one framework's way to generate, to abort and to go on. What they share is checked
in one way: every token that a trainer gets has the log-probability which the model itself gives it
at that place (`assert_scored_by_the_model`), so nothing was lost, made up or shifted (L2).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig
from ipc.engine_config import EngineConfig
from tests.support.served_engine import ServedEngine, served_engine

MODEL = "caesura-bundled"
PROMPT_IDS = [603, 558, 285, 285, 600]
LONG = 6000
"""Tokens of an answer that does not end before it is aborted."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[ServedEngine]:
    engine = EngineConfig(model=str(BUNDLED_MODEL_DIRECTORY), dtype="float32", max_num_seqs=6)
    async with served_engine(FrontendConfig(engine=engine)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def http(server: ServedEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Whatever a test does with it, the server is alive and holds nothing afterwards (L11)."""
    yield server.http
    await server.wait_until_idle(10)
    assert (await server.http.get("/health_generate")).status_code == 200


async def post(http: httpx.AsyncClient, path: str, body: object, **options: Any) -> Any:
    response = await http.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    return response.json()


async def wait_for_tokens(http: httpx.AsyncClient, num_requests: int, at_least: int) -> None:
    """Return when so many requests have so many tokens each."""
    async with asyncio.timeout(20):
        while True:
            requests = (await http.get("/requests")).json()["requests"]
            ready = [one for one in requests if one["num_output_tokens"] >= at_least]
            if len(ready) >= num_requests:
                return
            await asyncio.sleep(0.01)


async def assert_scored_by_the_model(
    http: httpx.AsyncClient,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[float],
) -> None:
    """Fail unless each token has the log-probability that a fresh prefill gives it."""
    assert len(ids) == len(logprobs) > 0
    body = {
        "input_ids": [*prompt_ids, *ids],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": len(prompt_ids) - 1,
    }
    entries = (await post(http, "/generate", body))["meta_info"]["input_token_logprobs"][1:]
    assert [token_id for _, token_id, _ in entries] == list(ids)
    for (expected, _, _), given in zip(entries, logprobs, strict=True):
        assert given == pytest.approx(expected, abs=2e-3)


@dataclass
class Sample:
    """A rollout, as a trainer's buffer holds it."""

    prompt_ids: list[int]
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ending: str = ""

    def add_sglang(self, result: Any) -> None:
        """Ids and log-probabilities are taken from `output_token_logprobs` alone."""
        info = result["meta_info"]
        entries = info["output_token_logprobs"]
        assert [token_id for _, token_id, _ in entries] == result["output_ids"]
        assert info["completion_tokens"] == len(entries)
        self.ids += [entry[1] for entry in entries]
        self.logprobs += [entry[0] for entry in entries]
        self.ending = info["finish_reason"]["type"]

    @property
    def num_tokens_left(self) -> int:
        return self.max_tokens - len(self.ids)


# -- SGLang's dialect ----------------------------------------------------------------------------


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
    samples = [Sample(PROMPT_IDS, LONG) for _ in range(8)]  # Two of them wait for a place.
    pending = [asyncio.create_task(slime_generate(http, sample)) for sample in samples]
    await wait_for_tokens(http, 6, at_least=5)
    assert await post(http, "/abort_request", {"abort_all": True})
    loads = (await http.get("/v1/loads?include=core,disagg,queues")).json()
    assert slime_num_requests(loads) == 0, "one abort is enough: it is answered after its effect"
    await asyncio.wait_for(asyncio.gather(*pending), 5)

    assert [sample.ending for sample in samples] == ["abort"] * 8
    assert sorted(len(sample.ids) >= 5 for sample in samples) == [False] * 2 + [True] * 6
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


async def check_interrupted_rollout(
    http: httpx.AsyncClient,
    send: Callable[[Sample], Awaitable[None]],
    abort: Callable[[], Awaitable[Any]],
) -> None:
    """AReaL's and verl's loop: an aborted call is sent again with what came, until it ends. Here
    two are aborted, and the third one's budget is kept to the token.
    """
    sample = Sample(PROMPT_IDS, LONG)

    async def roll_out() -> int:
        num_calls = 0
        while sample.ending in ("", "abort") and sample.num_tokens_left > 0:
            await send(sample)
            num_calls += 1
            if num_calls == 2:
                sample.max_tokens = len(sample.ids) + 30
        return num_calls

    rollout = asyncio.create_task(roll_out())
    for _ in range(2):
        await wait_for_tokens(http, 1, at_least=20)
        await abort()
    assert await asyncio.wait_for(rollout, 30) == 3
    assert (sample.ending, sample.num_tokens_left) == ("length", 0)
    assert len(sample.ids) >= 70
    await assert_scored_by_the_model(http, PROMPT_IDS, sample.ids, sample.logprobs)


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
    await wait_for_tokens(http, 6, at_least=1)
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


# -- vLLM's dialect ------------------------------------------------------------------------------


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
