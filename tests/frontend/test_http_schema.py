"""Every real answer fits the schema that the server publishes, however its request ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import pytest_asyncio

from frontend.config import FrontendConfig
from ipc.output import FinishReason
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet
from tests.support.served_engine import PROMPT, ServedEngine, fake, served_engine, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

Call = tuple[str, dict[str, Any]]

TOKENS_IN = "/inference/v1/generate"
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/completions": {
        "plain": {"prompt": PROMPT, "max_tokens": 5},
        "n": {"prompt": [PROMPT, [8]], "n": 2, "max_tokens": 3, "seed": 1},
        "logprobs": {"prompt": PROMPT, "max_tokens": 3, "logprobs": 2, "return_token_ids": True},
        "usage": {"prompt": PROMPT, "max_tokens": 3},
        "deadline": {"prompt": PROMPT, "max_tokens": 4000, "timeout_s": 0.1},
    },
    "/generate": {
        "plain": {"input_ids": PROMPT},
        "n": {"input_ids": [PROMPT, [8]], "sampling_params": {"n": 2, "max_new_tokens": 3}},
        "logprobs": {
            "input_ids": PROMPT,
            "return_logprob": True,
            "top_logprobs_num": 2,
            "logprob_start_len": 0,
        },
        "deadline": {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": 4000},
            "timeout_s": 0.1,
        },
    },
    TOKENS_IN: {
        "plain": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 5}},
        "n": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 3, "n": 3}},
        "logprobs": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 3, "logprobs": 2}},
        "usage": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 3}},
        "deadline": {
            "token_ids": PROMPT,
            "sampling_params": {"max_tokens": 4000},
            "timeout_s": 0.1,
        },
    },
}
CHAT = {"messages": [{"role": "user", "content": "def f"}], "max_tokens": 6}
TEXTS: dict[str, Call] = {
    "completion": ("/v1/completions", {"prompt": "def f", "max_tokens": 6}),
    "echo": ("/v1/completions", {"prompt": "def f", "max_tokens": 4, "echo": True, "logprobs": 1}),
    "stop": ("/v1/completions", {"prompt": "def f", "stop": ["("], "max_tokens": 40}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat choices": ("/v1/chat/completions", CHAT | {"n": 3, "temperature": 1.0}),
    "chat logprobs": ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 3}),
    "chat token ids": ("/v1/chat/completions", CHAT | {"return_token_ids": True}),
    "generate": ("/generate", {"text": ["def f", "x"], "sampling_params": {"max_new_tokens": 4}}),
    "generate logprobs": (
        "/generate",
        {
            "text": "def f",
            "return_logprob": True,
            "top_logprobs_num": 1,
            "logprob_start_len": 0,
            "return_text_in_logprobs": True,
        },
    ),
}
PROMPT_LOGPROBS: dict[str, Call] = {
    "completion": ("/v1/completions", {"prompt": "def f", "max_tokens": 2, "prompt_logprobs": 1}),
    "chat": ("/v1/chat/completions", CHAT | {"prompt_logprobs": 1}),
}


class Page:
    """The published schemas, to hold answers against."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    @classmethod
    async def of(cls, served: ServedEngine) -> Page:
        return cls((await served.http.get("/openapi.json")).json())

    def check_answer(
        self, path: str, value: object, status: int = 200, method: str = "post"
    ) -> None:
        content = self._responses(path, method)[str(status)]["content"]
        self._check(content["application/json"]["schema"], value)

    def check_event(self, path: str, data: str) -> None:
        schema = self._responses(path)["200"]["content"]["text/event-stream"]["itemSchema"]
        self._check(schema, {"data": data})
        # A validator takes `contentSchema` for a remark, so it is followed here.
        if data != "[DONE]":
            [in_json, _] = schema["properties"]["data"]["anyOf"]
            self._check(in_json["contentSchema"], json.loads(data))

    def _responses(self, path: str, method: str = "post") -> dict[str, Any]:
        responses: dict[str, Any] = self._document["paths"][path][method]["responses"]
        return responses

    def _check(self, schema: dict[str, Any], value: object) -> None:
        whole = {**schema, "components": self._document["components"]}
        jsonschema.Draft202012Validator(whole).validate(value)


async def read_stream(served: ServedEngine, path: str, body: dict[str, Any]) -> list[str]:
    """The data of all events."""
    async with served.http.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        lines = [line async for line in answer.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [line.removeprefix("data: ") for line in lines]


def endings(path: str, values: list[Any]) -> list[tuple[str, str | None]]:
    """(finish reason, abort cause) of everything that ended in these answers or events."""
    found = []
    for value in values:
        if path == "/generate":
            entries = value if isinstance(value, list) else [value]
            reasons = [entry["meta_info"]["finish_reason"] for entry in entries]
            found += [(r["type"], r.get("abort_cause")) for r in reasons if r is not None]
        else:
            choices = [c for c in value["choices"] if c["finish_reason"] is not None]
            found += [(c["finish_reason"], c.get("abort_cause")) for c in choices]
    return found


async def outcome(
    served: ServedEngine, page: Page, call: Call, *, stream: bool
) -> list[tuple[str, str | None]]:
    """How a call's requests ended; each of its answers and events is held against the page."""
    path, body = call
    if not stream:
        answer = await served.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        page.check_answer(path, answer.json())
        return endings(path, [answer.json()])
    events = await read_stream(served, path, body)
    for data in events:
        page.check_event(path, data)
    return endings(path, [json.loads(data) for data in events[:-1]])


def fake_calls() -> Iterator[Any]:
    for path, options in OPTIONS.items():
        for name, body in options.items():
            for stream in (False, True):
                more = {"stream_options": {"include_usage": True}}
                whole = body | more if stream and name == "usage" else body
                what = "stream" if stream else "whole"
                yield pytest.param((path, whole), stream, id=f"{path} {name} {what}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arithmetic() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bundled() -> AsyncIterator[ServedEngine]:
    async with served_engine(FrontendConfig()) as served:
        yield served


@pytest.mark.parametrize(("call", "stream"), [*fake_calls()])
async def test_every_way_to_generate_answers_as_the_page_says(
    arithmetic: ServedEngine, call: Call, stream: bool
) -> None:
    ended = await outcome(arithmetic, await Page.of(arithmetic), call, stream=stream)
    is_late = "timeout_s" in call[1]
    assert set(ended) <= ({("abort", "deadline")} if is_late else {("length", None)})
    assert ended


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("call", TEXTS.values(), ids=list(TEXTS))
async def test_answers_with_text_are_as_the_page_says(
    bundled: ServedEngine, call: Call, stream: bool
) -> None:
    assert await outcome(bundled, await Page.of(bundled), call, stream=stream)


@pytest.mark.parametrize("call", PROMPT_LOGPROBS.values(), ids=list(PROMPT_LOGPROBS))
async def test_logprobs_of_a_prompt_are_as_the_page_says(bundled: ServedEngine, call: Call) -> None:
    assert await outcome(bundled, await Page.of(bundled), call, stream=False)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", list(OPTIONS))
async def test_L3_an_aborted_answer_and_its_receipts_are_as_the_page_says(
    arithmetic: ServedEngine, path: str, stream: bool
) -> None:
    page = await Page.of(arithmetic)
    long: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 4000, "request_id": "long"},
        "/generate": {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": 4000},
            "rid": "long",
        },
        TOKENS_IN: {
            "token_ids": PROMPT,
            "sampling_params": {"max_tokens": 4000},
            "request_id": "long",
        },
    }
    running = asyncio.create_task(outcome(arithmetic, page, (path, long[path]), stream=stream))
    await arithmetic.wait_for_live_requests(1)
    for abort, body in (
        ("/v1/abort", {"request_id": ["long", "stranger"]}),
        ("/abort_request", {"rid": "long"}),
        ("/abort_requests", {"request_ids": ["long"]}),
        ("/inference/v1/abort_requests", {"request_ids": ["long"]}),
        ("/v1/abort_requests", {"req_ids": ["long"]}),
    ):
        answer = await arithmetic.http.post(abort, json=body)
        assert answer.status_code == 200
        page.check_answer(abort, answer.json())
    assert await asyncio.wait_for(running, 10) == [("abort", "explicit")]


@pytest.mark.parametrize("path", list(OPTIONS))
async def test_L12_an_error_amid_a_stream_is_an_event_as_the_page_says(path: str) -> None:
    async with mock_fleet() as (frontend, [engine]), serving(frontend) as served:
        page = await Page.of(served)
        body = OPTIONS[path]["plain"] | {"stream": True}
        reading = asyncio.create_task(read_until_failure(served, engine, path, body))
        first, error, done = await asyncio.wait_for(reading, 10)
        assert "error" in json.loads(error)
        assert done == "[DONE]"
        page.check_event(path, first)
        page.check_event(path, error)


async def read_until_failure(
    served: ServedEngine, engine: MockEngine, path: str, body: dict[str, Any]
) -> list[str]:
    """The events of a stream whose request fails once its first event was read."""

    async def play() -> str:
        request = await engine.next_add()
        await engine.send_tokens(request.request_id, [65])
        return request.request_id

    playing = asyncio.create_task(play())
    async with served.http.stream("POST", path, json=body) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        await engine.send_tokens(await playing, [66], finish=FinishReason.ERROR)
        events = [first, *[line async for line in lines if line]]
    return [event.removeprefix("data: ") for event in events]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": 5}, 400),
        ("/v1/completions", {"prompt": PROMPT, "model": "gpt-x"}, 404),
        ("/generate", {"input_ids": PROMPT, "rod": "a"}, 400),
        (TOKENS_IN, {}, 400),
        ("/v1/abort", {}, 400),
        ("/v1/abort_requests", {}, 400),
        ("/abort_requests", {"request_id": "a"}, 400),
    ],
)
async def test_a_refusal_is_as_the_page_says(
    arithmetic: ServedEngine, path: str, body: dict[str, Any], status: int
) -> None:
    answer = await arithmetic.http.post(path, json=body)
    assert answer.status_code == status
    (await Page.of(arithmetic)).check_answer(path, answer.json(), status)


@pytest.mark.parametrize("path", list(OPTIONS))
async def test_the_page_is_strict_enough_to_notice_a_wrong_ending(
    arithmetic: ServedEngine, path: str
) -> None:
    page = await Page.of(arithmetic)
    answer = (await arithmetic.http.post(path, json=OPTIONS[path]["plain"])).json()
    [event, *_] = await read_stream(arithmetic, path, OPTIONS[path]["plain"])
    ends = [answer["meta_info"]] if path == "/generate" else answer["choices"]
    right = ends[0]["finish_reason"]
    wrongs: list[object] = [5, "aborted", {"type": "aborted", "message": ""}, {"type": "length"}]
    for wrong in wrongs:
        ends[0]["finish_reason"] = wrong
        with pytest.raises(jsonschema.ValidationError):
            page.check_answer(path, answer)
        with pytest.raises(jsonschema.ValidationError):
            page.check_event(path, json.dumps(answer))
    ends[0]["finish_reason"] = right
    page.check_answer(path, answer)
    for wrong_event in ("{}", "DONE", json.dumps({"error": "late"})):
        with pytest.raises((jsonschema.ValidationError, json.JSONDecodeError)):
            page.check_event(path, wrong_event)
    page.check_event(path, event)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", list(OPTIONS))
async def test_L9_L10_pauses_updates_and_what_they_end_answer_as_the_page_says(
    arithmetic: ServedEngine, path: str, stream: bool
) -> None:
    page = await Page.of(arithmetic)
    call = (path, OPTIONS[path]["deadline"] | {"timeout_s": 20.0})
    running = asyncio.create_task(outcome(arithmetic, page, call, stream=stream))
    await arithmetic.wait_for_live_requests(1)
    for control, body in (
        ("/v1/pause", {"mode": "keep"}),
        ("/pause_generation", {"mode": "in_place"}),
        ("/v1/weights", {"path": "new", "version": "v1"}),
        ("/update_weights_from_disk", {"model_path": "new"}),
        ("/update_weight_version", {"new_version": "v2"}),
        ("/v1/update_weights", {"version": "v3"}),
        ("/v1/resume", {}),
        ("/pause", None),
        ("/resume", None),
        ("/continue_generation", {}),
        ("/reset_prefix_cache", None),
        ("/begin_weight_update", {}),
    ):
        answer = await arithmetic.http.post(control, json=body)
        assert answer.status_code == 200, answer.text
        page.check_answer(control, answer.json())
    for probe in ("/v1/status", "/is_paused", "/v1/is_paused", "/weight_info", "/server_info"):
        page.check_answer(probe, (await arithmetic.http.get(probe)).json(), method="get")
    assert (await arithmetic.http.delete("/v1/weights")).json() == {"discarded": True}
    assert await asyncio.wait_for(running, 10) == [("abort", "pause")]


async def test_the_small_routes_answer_as_the_page_says(bundled: ServedEngine) -> None:
    page = await Page.of(bundled)
    tokens = (await bundled.http.post("/tokenize", json={"prompt": "def f"})).json()
    page.check_answer("/tokenize", tokens)
    text = (await bundled.http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
    page.check_answer("/detokenize", text)
    assert text == {"prompt": "def f"}
