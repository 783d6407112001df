"""The official `openai` package, asynchronous and synchronous, against a running server with the
bundled model: what its users rely on, and what they see of aborts.
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
from ipc.engine_config import EngineConfig
from tests.support.served_engine import FAKE_MODEL, PROMPT, ServedEngine, fake, served_engine

MODEL = "caesura-bundled"
TEXT = "import os\n\n\ndef read(path):\n"
CHAT: Any = [{"role": "user", "content": "Read a file."}]
NEVER_ENDS: dict[str, Any] = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}

pytestmark = pytest.mark.asyncio(loop_scope="module")


def client_of(served: ServedEngine, **options: Any) -> AsyncOpenAI:
    """A client that does not retry, so that the first answer is seen."""
    defaults: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 20.0}
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", **(defaults | options))


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


async def wait_for_stages(served: ServedEngine, stages: set[str]) -> None:
    """Return when there are requests, and they are in these stages."""
    async with asyncio.timeout(10):
        while {one.stage for one in await served.engine.list_requests()} != stages:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# -- what it is for ------------------------------------------------------------------------------


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


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a " * 9000}, "prompt"),
        ({"extra_body": {"top_k": "many"}}, "top_k"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ],
)
async def test_a_bad_request_names_its_field(
    client: AsyncOpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(**({"model": MODEL, "prompt": TEXT} | fields))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


async def test_another_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-5", messages=CHAT)
    assert caught.value.code == "model_not_found"


async def test_a_server_with_a_key_knows_its_clients() -> None:
    async with served_engine(fake(), api_key="right") as served:
        async with client_of(served, api_key="wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        async with client_of(served, api_key="right") as friend:
            assert (await friend.models.list()).data[0].id == FAKE_MODEL


async def test_an_overloaded_server_says_so_at_once_and_serves_a_client_that_retries() -> None:
    engine = EngineConfig(model="none", runner="fake", max_num_seqs=1, fake_step_time_ms=2)
    config = FrontendConfig(engine=engine, served_model_name=FAKE_MODEL, max_num_queued_requests=1)
    async with served_engine(config) as served, client_of(served) as client:

        def complete(client: AsyncOpenAI, max_tokens: int) -> asyncio.Future[Any]:
            return asyncio.ensure_future(
                client.completions.create(
                    model=FAKE_MODEL,
                    prompt=PROMPT,
                    max_tokens=max_tokens,
                    extra_body={"ignore_eos": True},
                )
            )

        running = complete(client, 400)
        await wait_for_stages(served, {"decode"})
        waiting = complete(client, 5)
        await served.wait_for_live_requests(2)
        with pytest.raises(openai.InternalServerError) as caught:
            await complete(client, 5)
        assert isinstance(caught.value, openai.APIStatusError)
        assert caught.value.status_code == 503
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        patient = complete(client.with_options(max_retries=5), 5)
        for request in (running, waiting, patient):
            completion = await asyncio.wait_for(request, 20)
            assert completion.choices[0].finish_reason == "length"
        await served.wait_until_idle()


# -- life-cycle ----------------------------------------------------------------------------------


async def test_L4_breaking_out_of_a_stream_ends_its_request(
    served: ServedEngine, client: AsyncOpenAI
) -> None:
    stream = await client.completions.create(model=MODEL, prompt=TEXT, stream=True, **NEVER_ENDS)
    async with stream:
        async for _ in stream:
            break
    await served.wait_until_idle()


async def test_L4_closing_a_chats_stream_ends_all_its_choices(
    served: ServedEngine, client: AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=CHAT, n=3, stream=True, **NEVER_ENDS
    )
    await anext(aiter(stream))
    assert served.engine.num_live_requests == 3
    await stream.close()
    await served.wait_until_idle()


async def test_L4_a_client_that_loses_patience_ends_its_request(
    served: ServedEngine, client: AsyncOpenAI
) -> None:
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        await impatient.completions.create(model=MODEL, prompt=TEXT, **NEVER_ENDS)
    await served.wait_until_idle()


async def test_L4_a_cancelled_task_ends_its_request(
    served: ServedEngine, client: AsyncOpenAI
) -> None:
    async def read() -> None:
        async for _ in await client.completions.create(
            model=MODEL, prompt=TEXT, stream=True, **NEVER_ENDS
        ):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.3)
    await served.wait_until_idle()


@pytest.mark.parametrize("name", ["rollout", "cmpl-rollout"])
async def test_L2_L3_an_aborted_stream_keeps_its_partial_text(
    served: ServedEngine, client: AsyncOpenAI, name: str
) -> None:
    stream = await client.completions.create(
        model=MODEL,
        prompt=TEXT,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Request-Id": "rollout"},
        **NEVER_ENDS,
    )
    text, num_chunks, receipt, ending, usage = "", 0, None, None, None
    async for chunk in stream:
        num_chunks += 1
        usage = chunk.usage
        for choice in chunk.choices:
            text += choice.text
            ending = choice
        if num_chunks == 10:
            answer = await served.http.post("/v1/abort", json={"request_id": name})
            receipt = answer.json()["requests"]["rollout"]
    assert ending is not None
    assert ending.model_extra is not None
    assert (str(ending.finish_reason), ending.model_extra["abort_cause"]) == ("abort", "explicit")
    assert text
    assert receipt is not None
    assert receipt["status"] == "aborted"
    assert usage is not None
    assert usage.completion_tokens == receipt["num_output_tokens"]


async def test_L2_a_deadline_returns_what_there_is_as_a_success(client: AsyncOpenAI) -> None:
    body = {"ignore_eos": True, "timeout_s": 0.3}
    chat = await client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=8000, extra_body=body
    )
    choice = chat.choices[0]
    assert choice.model_extra is not None
    assert (str(choice.finish_reason), choice.model_extra["abort_cause"]) == ("abort", "deadline")
    assert choice.message.content


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
