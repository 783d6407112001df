"""`resume_from` over HTTP: every aborted answer that can go on carries it, and every way to
generate but the chat takes it. The tokens are arithmetic, so a chain of parts must give the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from frontend.async_engine import AsyncEngine
from frontend.config import HttpConfig
from frontend.http.server import all_routes
from tests.support.called_routes import Answer, RouteClient
from tests.support.served_engine import PROMPT, fake

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, GENERATE, TOKENS_IN = "/v1/completions", "/generate", "/inference/v1/generate"
PATHS = (COMPLETIONS, GENERATE, TOKENS_IN)
NUM_TOKENS = 200


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[AsyncEngine]:
    async with await AsyncEngine.start(fake(fake_step_time_ms=1)) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def client(engine: AsyncEngine) -> AsyncIterator[RouteClient]:
    yield RouteClient(all_routes(engine, HttpConfig()))
    await engine.abort(abort_all=True)


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    """A request that begins: `fields` are added."""
    match path:
        case "/v1/completions":
            body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
        case "/generate":
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": NUM_TOKENS}}
        case _:
            body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": NUM_TOKENS}}
    return body | fields


def continued(path: str, resume_from: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The same request, from there on."""
    body: dict[str, Any] = {"resume_from": resume_from, "stream": fields.get("stream", False)}
    if path == COMPLETIONS:
        body["return_token_ids"] = True
    if path == TOKENS_IN:
        body["sampling_params"] = {}
    return body | fields


class Ended:
    """What an answer, or a whole stream, tells of its one request."""

    def __init__(self, path: str, answer: Answer, *, is_stream: bool) -> None:
        assert answer.status == 200, answer.body
        events = answer.events() if is_stream else [answer.json()]
        if path == GENERATE:
            last = events[-1]
            self.end: dict[str, Any] = last["meta_info"]
            self.token_ids: list[int] = last["output_ids"]
            self.reason = self.end["finish_reason"]["type"]
        else:
            choices = [event["choices"][0] for event in events]
            self.end = choices[-1]
            self.token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
            self.reason = self.end["finish_reason"]
            assert not any("resume_from" in choice for choice in choices[:-1])
            assert not any("weight_versions" in choice for choice in choices[:-1])


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS)
async def test_L2_parts_of_a_request_that_is_aborted_twice_are_the_whole(
    engine: AsyncEngine, client: RouteClient, path: str, is_stream: bool
) -> None:
    token_ids: list[int] = []
    body = body_for(path, stream=is_stream)
    for _ in range(2):
        call = client.start("POST", path, body)
        await some_tokens(engine)
        await engine.abort(abort_all=True)
        ended = Ended(path, await call.answer(), is_stream=is_stream)
        assert ended.reason == "abort"
        token_ids += ended.token_ids
        resume_from = ended.end["resume_from"]
        assert resume_from["output_token_ids"] == token_ids
        assert resume_from["num_output_tokens_left"] == NUM_TOKENS - len(token_ids)
        assert ended.end["weight_versions"][0]["end"] == len(ended.token_ids)
        body = continued(path, resume_from, stream=is_stream)
    ended = Ended(path, await client.start("POST", path, body).answer(), is_stream=is_stream)
    assert ended.reason == "length"
    assert token_ids + ended.token_ids == expected_tokens(PROMPT, NUM_TOKENS)
    assert "resume_from" not in ended.end


async def some_tokens(engine: AsyncEngine) -> None:
    async with asyncio.timeout(10):
        while True:
            if any(each.num_output_tokens for each in await engine.list_requests()):
                return
            await asyncio.sleep(0.002)


def point(**fields: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": PROMPT,
        "output_token_ids": expected_tokens(PROMPT, 2),
        "num_output_tokens_left": 3,
        "position": len(PROMPT) + 2,
    } | fields


@pytest.mark.parametrize("path", PATHS)
async def test_fewer_tokens_than_are_left_may_be_asked_for(client: RouteClient, path: str) -> None:
    body = continued(path, point(num_output_tokens_left=50))
    match path:
        case "/v1/completions":
            body["max_tokens"] = 4
        case "/generate":
            body["sampling_params"] = {"max_new_tokens": 4}
        case _:
            body["sampling_params"] = {"max_tokens": 4}
    ended = Ended(path, await client.post(path, body), is_stream=False)
    assert ended.token_ids == expected_tokens(PROMPT, 6)[2:]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"position": 4}, "resume_from.position"),
        ({"position": "here"}, "position"),
        ({"prompt_token_ids": []}, "resume_from.prompt_token_ids"),
        ({"output_token_ids": [-1, 2]}, "output_token_ids"),
        ({"num_output_tokens_left": 0}, "num_output_tokens_left"),
        ({"weight_spans": [{"version": "v", "start": 1, "end": 9}]}, "weight_spans"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_a_point_that_cannot_be_is_refused_with_its_field(
    engine: AsyncEngine, client: RouteClient, path: str, fields: dict[str, Any], complaint: str
) -> None:
    answer = await client.post(path, continued(path, point(**fields)))
    assert answer.status == 400
    assert complaint in answer.json()["error"]["message"]
    assert engine.num_live_requests == 0


async def test_a_chat_goes_on_as_a_completion_and_says_so(
    engine: AsyncEngine, client: RouteClient
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "resume_from": point()}
    answer = await client.post("/v1/chat/completions", body)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "resume_from"
    assert "send it to /v1/completions" in answer.json()["error"]["message"]
    assert engine.num_live_requests == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_prompt_beside_it_or_neither_is_refused(client: RouteClient, path: str) -> None:
    for body in (body_for(path, resume_from=point()), continued(path, point()) | NEITHER):
        answer = await client.post(path, body)
        assert answer.status == 400
        assert "resume_from" in answer.json()["error"]["message"]


NEITHER = {"resume_from": None}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"n": 2}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"prompt_logprobs": 1}),
        (GENERATE, {"sampling_params": {"n": 2}}),
        (TOKENS_IN, {"sampling_params": {"n": 2}}),
    ],
)
async def test_what_makes_no_sense_of_a_continued_request_is_refused(
    client: RouteClient, path: str, fields: dict[str, Any]
) -> None:
    answer = await client.post(path, continued(path, point(), **fields))
    assert answer.status == 400, answer.body
    assert answer.json()["error"]["message"]


async def test_several_are_continued_in_one_call_of_generate(client: RouteClient) -> None:
    answer = await client.post(GENERATE, {"resume_from": [point(), point()], "rid": "both"})
    assert answer.status == 200
    rest = expected_tokens(PROMPT, 5)[2:]
    assert [result["output_ids"] for result in answer.json()] == [rest, rest]
    assert [result["meta_info"]["id"] for result in answer.json()] == ["both_0", "both_1"]
