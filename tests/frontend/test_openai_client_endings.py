"""Errors and aborts as users of the official `openai` package see them, against a running server
with the bundled model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from frontend.config import FrontendConfig
from ipc.engine_config import EngineConfig
from tests.support.openai_clients import CHAT, MODEL, NEVER_ENDS, TEXT, client_of
from tests.support.served_engine import FAKE_MODEL, PROMPT, ServedEngine, fake, served_engine

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


async def wait_for_stages(served: ServedEngine, stages: set[str]) -> None:
    """Return when there are requests, and they are in these stages."""
    async with asyncio.timeout(10):
        while {one.stage for one in await served.engine.list_requests()} != stages:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


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
