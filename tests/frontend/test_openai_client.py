"""The official `openai` package, asynchronous and synchronous, against a running server with the
bundled model: what its users rely on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from frontend.config import FrontendConfig
from tests.support.openai_clients import CHAT, MODEL, NEVER_ENDS, TEXT, client_of
from tests.support.served_engine import ServedEngine, served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(FrontendConfig()) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def client(served: ServedEngine) -> AsyncIterator[AsyncOpenAI]:
    """Whatever a test does with it, the engine holds nothing afterwards (L11)."""
    async with client_of(served) as client:
        yield client
        await served.wait_until_idle(10)


async def test_the_served_model_is_listed_and_found_by_its_name(client: AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-5")


async def test_a_batch_of_prompts_with_n_choices_each_keeps_their_order(
    client: AsyncOpenAI,
) -> None:
    prompts = ["import ", "class "]
    completion = await client.completions.create(
        model=MODEL, prompt=prompts, n=2, max_tokens=4, echo=True, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    for choice in completion.choices:
        assert choice.text.startswith(prompts[choice.index // 2])
        assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


async def test_a_streamed_completion_is_the_whole_one_in_pieces(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=24, temperature=0, seed=1
    )
    stream = await client.completions.create(
        model=MODEL,
        prompt=TEXT,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    *with_choice, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert "".join(chunk.choices[0].text for chunk in with_choice) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in with_choice]
    assert set(map(str, reasons[:-1])) == {"None"}
    assert reasons[-1] == whole.choices[0].finish_reason


async def test_logprobs_are_parallel_lists_and_echo_adds_those_of_the_prompt(
    client: AsyncOpenAI,
) -> None:
    completion = await client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=5, logprobs=2, echo=True, temperature=0
    )
    choice = completion.choices[0]
    logprobs, usage = choice.logprobs, completion.usage
    assert logprobs is not None
    assert usage is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == usage.total_tokens
    assert "".join(logprobs.tokens) == choice.text
    first, *others = logprobs.token_logprobs
    assert first is None
    assert all(value <= 0 for value in others)
    greedy = logprobs.top_logprobs[-1]
    assert max(greedy.values()) == others[-1]


async def test_a_stop_string_ends_the_text_before_it_and_is_named(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model=MODEL, prompt=TEXT, max_tokens=24, temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = await client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=24, temperature=0, stop=["\x00", stop]
    )
    choice = cut.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == stop
    assert "abort_cause" not in choice.model_extra


async def test_a_bias_decides_every_token(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=4, logit_bias={"558": 100}, temperature=1
    )
    (spelled,) = {completion.choices[0].text[i : i + 3] for i in range(0, 12, 3)}
    assert spelled == " os"


async def test_a_seed_reproduces_its_draws_and_choices_differ(client: AsyncOpenAI) -> None:
    def draw(**options: Any) -> Any:
        options = {"temperature": 1.0, "max_tokens": 12, "n": 2} | options
        return client.completions.create(model=MODEL, prompt=TEXT, **options)

    first, second, other = await asyncio.gather(draw(seed=7), draw(seed=7), draw(seed=70))
    texts = [[choice.text for choice in each.choices] for each in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


async def test_a_frequency_penalty_makes_repetition_rarer(client: AsyncOpenAI) -> None:
    async def most_frequent(penalty: float) -> int:
        completion = await client.completions.create(
            model=MODEL,
            prompt="0, 0, 0, 0, 0, 0, 0, 0, 0,",
            max_tokens=40,
            temperature=0,
            frequency_penalty=penalty,
            presence_penalty=penalty,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        extra = completion.choices[0].model_extra
        assert extra is not None
        return max(Counter(extra["token_ids"]).values())

    assert await most_frequent(2.0) < await most_frequent(0.0)


async def test_a_streamed_chat_is_the_whole_one_in_pieces(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=16, temperature=0
    )
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_completion_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"


async def test_a_chats_logprobs_have_alternatives_and_bytes(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert chat.usage is not None
    assert len(logprobs.content) == chat.usage.completion_tokens
    for entry in logprobs.content:
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 3
        values = [alternative.logprob for alternative in entry.top_logprobs]
        assert values == sorted(values, reverse=True)


async def test_extensions_travel_in_the_extra_body(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(
        model=MODEL,
        prompt=[603, 558],
        max_tokens=6,
        extra_body={
            "ignore_eos": True,
            "min_tokens": 6,
            "top_k": 5,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "return_token_ids": True,
            "priority": -1,
            "tags": ["evaluation"],
            "timeout_s": 15.0,
            "cache_salt": "v1",
        },
    )
    choice = completion.choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["prompt_token_ids"] == [603, 558]
    assert len(choice.model_extra["token_ids"]) == 6


async def test_the_synchronous_client_works_as_well(
    served: ServedEngine, client: AsyncOpenAI
) -> None:
    def use() -> None:
        url = f"http://127.0.0.1:{served.port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20.0) as client:
            assert client.models.retrieve(MODEL).id == MODEL
            whole = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=8, temperature=0)
            stream = client.completions.create(
                model=MODEL, prompt=TEXT, max_tokens=8, temperature=0, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
            chat = client.chat.completions.create(
                model=MODEL, messages=CHAT, max_completion_tokens=4
            )
            assert chat.choices[0].message.content is not None
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model=MODEL, prompt=TEXT, n=0)
            endless = client.completions.create(model=MODEL, prompt=TEXT, stream=True, **NEVER_ENDS)
            with endless:
                next(iter(endless))
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).completions.create(
                    model=MODEL, prompt=TEXT, **NEVER_ENDS
                )

    await asyncio.wait_for(asyncio.to_thread(use), 60)
    await served.wait_until_idle()
