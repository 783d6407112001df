"""`POST /v1/completions` over real sockets, with the fake runner: its tokens check themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine_core.fake_runner import FAKE_LOGPROB, expected_tokens
from frontend.config import FrontendConfig
from frontend.http.openai.completions import CompletionForm
from tests.support.served_engine import PROMPT, ServedEngine, fake, served_engine


@pytest.fixture
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=2)) as server:
        yield server


async def read_events(served: ServedEngine, body: dict[str, Any]) -> list[Any]:
    """The decoded events of a stream; the last is the string `[DONE]`."""
    events: list[Any] = []
    async with served.http.stream(
        "POST", "/v1/completions", json=body | {"stream": True}
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line:
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    return events


async def test_an_answer_has_the_tokens_that_were_sampled_and_their_count(
    served: ServedEngine,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "return_token_ids": True, "model": "fake"}
    answer = await served.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    completion = answer.json()
    assert completion["object"] == "text_completion"
    assert completion["model"] == "fake"
    [choice] = completion["choices"]
    assert choice["token_ids"] == expected_tokens(PROMPT, 12)
    assert choice["prompt_token_ids"] == PROMPT
    assert choice["finish_reason"] == "length"
    usage = completion["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        3,
        12,
        15,
    )


async def test_a_stream_carries_the_same_tokens_and_ends_with_usage_and_done(
    served: ServedEngine,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "return_token_ids": True}
    events = await read_events(served, body | {"stream_options": {"include_usage": True}})
    *chunks, usage, done = events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    choices = [chunk["choices"][0] for chunk in chunks]
    token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert token_ids == expected_tokens(PROMPT, 12)
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[0]["prompt_token_ids"] == PROMPT
    assert not any("prompt_token_ids" in choice for choice in choices[1:])
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_logprobs_come_one_a_token(served: ServedEngine) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "logprobs": 2}
    answer = await served.http.post("/v1/completions", json=body)
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in expected_tokens(PROMPT, 5)]
    assert logprobs["token_logprobs"] == [FAKE_LOGPROB] * 5
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 5


async def test_a_stop_token_ends_the_answer_and_is_named(served: ServedEngine) -> None:
    third = expected_tokens(PROMPT, 3)[-1]
    body = {"prompt": PROMPT, "max_tokens": 50, "stop_token_ids": [third]}
    [choice] = (await served.http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == third


async def test_L3_a_request_is_aborted_by_its_header_or_the_id_of_its_response(
    served: ServedEngine,
) -> None:
    for name in ("mine", "cmpl-mine"):
        body = {"prompt": PROMPT, "max_tokens": 3000, "return_token_ids": True}
        headers = {"X-Request-Id": "mine"}
        post = asyncio.create_task(served.http.post("/v1/completions", json=body, headers=headers))
        await asyncio.sleep(0.1)
        receipt = await served.engine.abort(name)
        assert receipt.num_aborted == 1
        answer = await post
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "mine"
        completion = answer.json()
        assert completion["id"] == "cmpl-mine"
        [choice] = completion["choices"]
        assert choice["finish_reason"] == "abort"
        assert choice["abort_cause"] == "explicit"
        num_tokens = completion["usage"]["completion_tokens"]
        assert num_tokens > 0
        assert choice["token_ids"] == expected_tokens(PROMPT, num_tokens)


async def test_L2_an_aborted_stream_ends_with_its_finish_reason_and_done(
    served: ServedEngine,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3000, "request_id": "mine", "return_token_ids": True}
    reading = asyncio.create_task(read_events(served, body))
    await asyncio.sleep(0.1)
    receipt = await served.engine.abort("mine")
    *chunks, done = await reading
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "abort"
    token_ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
    assert token_ids == expected_tokens(PROMPT, len(token_ids))
    assert receipt.requests["mine"].num_output_tokens == len(token_ids)


async def test_a_kept_alive_connection_serves_one_request_after_the_other(
    served: ServedEngine,
) -> None:
    for index in range(5):
        body = {"prompt": [index + 1], "max_tokens": 3, "return_token_ids": True}
        answer = await served.http.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["token_ids"] == expected_tokens([index + 1], 3)
    [status] = (await served.engine.status()).values()
    assert status.counters["abort_frames"] == 0


async def test_a_wrong_request_for_a_stream_has_an_http_status_too(served: ServedEngine) -> None:
    body = {"prompt": [99_999], "stream": True}
    answer = await served.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "99999" in answer.json()["error"]["message"]


async def test_what_is_no_json_is_told_so(served: ServedEngine) -> None:
    broken = await served.http.post("/v1/completions", content=b"{")
    assert broken.status_code == 400
    assert "not JSON" in broken.json()["error"]["message"]
    deep = await served.http.post("/v1/completions", content=b"[" * 100_000)
    assert deep.status_code == 400
    assert "nested too deeply" in deep.json()["error"]["message"]


async def test_L8_a_live_request_id_is_refused_and_free_again_afterwards(
    served: ServedEngine,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4000, "request_id": "twice"}
    first = asyncio.create_task(served.http.post("/v1/completions", json=body))
    await asyncio.sleep(0.1)
    second = await served.http.post("/v1/completions", json=body)
    assert second.status_code == 400
    assert "twice" in second.json()["error"]["message"]
    await served.engine.abort("twice")
    assert (await first).json()["choices"][0]["finish_reason"] == "abort"
    third = await served.http.post("/v1/completions", json=body | {"max_tokens": 2})
    assert third.json()["choices"][0]["finish_reason"] == "length"


async def test_models_and_health_tell_what_is_served(served: ServedEngine) -> None:
    assert (await served.http.get("/health")).status_code == 200
    [card] = (await served.http.get("/v1/models")).json()["data"]
    assert card["id"] == "fake"
    assert card["max_model_len"] == 4096


async def test_L12_requests_of_a_dead_engine_end_with_an_error_and_health_is_503(
    served: ServedEngine,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4000}
    whole = asyncio.create_task(served.http.post("/v1/completions", json=body))
    reading = asyncio.create_task(read_events(served, body))
    await asyncio.sleep(0.15)
    served.engine._supervisor.kill()
    assert (await whole).status_code in (500, 503)
    *_, error, done = await reading
    assert done == "[DONE]"
    assert error["error"]["message"]
    assert (await served.http.get("/health")).status_code == 503
    assert (await served.http.post("/v1/completions", json=body)).status_code == 503


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_L11_a_fault_in_shaping_an_answer_ends_that_call_alone(
    served: ServedEngine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(form: CompletionForm, *_: object) -> bytes:
        raise RuntimeError("the inside")

    body = {"prompt": PROMPT, "max_tokens": 50, "n": 2, "stream": stream}
    with monkeypatch.context() as patched:
        patched.setattr(CompletionForm, "event", fail)
        patched.setattr(CompletionForm, "body", fail)
        answer = await served.http.post("/v1/completions", json=body)
    assert answer.status_code == 500
    assert "inside" not in answer.text
    await served.wait_until_idle()
    assert (await served.http.post("/v1/completions", json=body)).status_code == 200


async def test_text_goes_in_and_comes_out_the_same_whether_streamed_or_not() -> None:
    async with served_engine(FrontendConfig()) as served:
        body = {"prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        whole = (await served.http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        *chunks, _ = await read_events(served, body)
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(pieces) == whole
        assert len(pieces) > 5
        stop = whole[6:9]
        answer = await served.http.post("/v1/completions", json=body | {"stop": [stop]})
        [choice] = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == stop
        assert choice["text"] == whole[: whole.index(stop)]
