"""FastDeploy's HTTP dialect: `POST /v1/abort_requests`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from frontend.async_engine import AsyncEngine
from frontend.http import fastdeploy
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from tests.support.auto_answers import AutoAnswers
from tests.support.called_routes import RouteClient
from tests.support.mock_fleet import mock_fleet

PATH = "/v1/abort_requests"


@asynccontextmanager
async def served() -> AsyncIterator[tuple[RouteClient, AsyncEngine]]:
    async with mock_fleet() as (engine, [mock]), AutoAnswers(mock):
        yield RouteClient(fastdeploy.routes(engine)), engine


def generate(engine: AsyncEngine, name: str) -> RequestStream:
    return engine.generate(
        prompt_token_ids=[5],
        request_id=name,
        aliases=[f"chatcmpl-{name}"],
        sampling_params=SamplingParams(max_tokens=100_000),
    )


async def start(engine: AsyncEngine, name: str) -> RequestStream:
    stream = generate(engine, name)
    await anext(stream)
    return stream


async def test_L5_the_reply_tells_tokens_and_what_was_not_found() -> None:
    async with served() as (client, engine):
        streams = {}
        for name in ("a", "b", "c"):
            streams[name] = generate(engine, name)
            await anext(streams[name])
        answer = await client.post(PATH, {"req_ids": ["a", "chatcmpl-b", "nobody"]})
        assert answer.status == 200
        reply = answer.json()
        assert reply["request_id"].startswith("control-")
        assert (reply["status"], reply["error_message"]) == ("success", None)
        counts = {
            each["request_id"]: each["output_token_count"] for each in reply["result"]["aborted"]
        }
        assert set(counts) == {"a", "b"}
        assert reply["result"]["not_found"] == ["nobody"]
        assert reply["num_aborted"] == 2
        for name, count in counts.items():
            result = await streams[name].result()
            assert result.finish_reason == "abort"
            assert count == len(result.token_ids)
        assert engine.num_live_requests == 1


async def test_L6_abort_all_aborts_everything() -> None:
    async with served() as (client, engine):
        streams = [await start(engine, name) for name in ("a", "b")]
        reply = (await client.post(PATH, {"abort_all": True, "req_ids": ["a"]})).json()
        assert {each["request_id"] for each in reply["result"]["aborted"]} == {"a", "b"}
        assert engine.num_live_requests == 0
        assert [(await stream.result()).finish_reason for stream in streams] == ["abort", "abort"]


@pytest.mark.parametrize("body", [{}, {"req_ids": []}, {"abort_all": False}])
async def test_an_empty_selector_is_fastdeploys_400(body: dict[str, object]) -> None:
    async with served() as (client, engine):
        stream = await start(engine, "a")
        answer = await client.post(PATH, body)
        assert answer.status == 400
        assert answer.json() == {"error": "must provide abort_all=true or req_ids"}
        assert engine.num_live_requests == 1
        stream.close()


async def test_an_unknown_field_names_the_nearest_one() -> None:
    async with served() as (client, engine):
        stream = await start(engine, "a")
        answer = await client.post(PATH, {"stop_all": True})
        assert answer.status == 400
        assert "did you mean 'abort_all'" in answer.json()["error"]["message"]
        assert engine.num_live_requests == 1
        stream.close()
