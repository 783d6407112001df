"""Caesura's own control routes: `POST /v1/abort` and `GET /requests`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from frontend.async_engine import AsyncEngine
from frontend.http.control import control_routes
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.lifecycle import CAESURA_ABORT
from tests.support.auto_answers import AutoAnswers
from tests.support.called_routes import RouteClient
from tests.support.mock_fleet import mock_fleet

LONG = SamplingParams(max_tokens=100_000)


@asynccontextmanager
async def served() -> AsyncIterator[tuple[RouteClient, AsyncEngine]]:
    async with mock_fleet() as (engine, [mock]), AutoAnswers(mock):
        yield RouteClient(control_routes(engine)), engine


async def start(engine: AsyncEngine, *names: str, **options: Any) -> list[RequestStream]:
    streams = [
        engine.generate(prompt_token_ids=[5, 6], request_id=name, sampling_params=LONG, **options)
        for name in names
    ]
    for stream in streams:
        await anext(stream)
    return streams


# -- aborts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "aborted"),
    [
        ({"request_id": "job-1"}, {"job-1"}),
        ({"request_id": ["job-1", "job-2", "job-1"]}, {"job-1", "job-2"}),
        ({"prefix": "job-1"}, {"job-1", "job-10"}),
        ({"tag": "night"}, {"job-1", "job-2", "job-10"}),
        ({"abort_all": True}, {"job-1", "job-2", "job-10"}),
    ],
)
async def test_L3_each_selector_hits_what_it_names_and_nothing_else(
    body: dict[str, object], aborted: set[str]
) -> None:
    async with served() as (client, engine):
        streams = await start(engine, "job-1", "job-2", "job-10", tags=["night"])
        answer = await client.post("/v1/abort", body)
        assert answer.status == 200
        receipt = answer.json()
        assert set(receipt["requests"]) == aborted
        assert {each["status"] for each in receipt["requests"].values()} == {"aborted"}
        assert receipt["num_aborted"] == len(aborted)
        assert receipt["engines"] == {"0": "ok"}
        assert receipt.keys() >= {"num_blocks_freed", "num_blocks_cached"}
        assert engine.num_live_requests == 3 - len(aborted)
        for stream in streams:
            if stream.request_id in aborted:
                assert (await stream.result()).finish_reason == "abort"
            stream.close()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"request_id": ""},
        {"request_id": []},
        {"request_id": [""]},
        {"prefix": ""},
        {"tag": ""},
        {"abort_all": False},
        {"request_id": "a", "abort_all": True},
        {"prefix": "a", "tag": "b"},
        {"request_id": 5},
        {"abort_all": "yes"},
        {"abort_all": True, "timeout_s": -1},
    ],
)
async def test_an_abort_that_names_nothing_or_two_things_is_a_400(body: dict[str, Any]) -> None:
    async with served() as (client, engine):
        (stream,) = await start(engine, "a")
        answer = await client.post("/v1/abort", body)
        assert answer.status == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert engine.num_live_requests == 1
        stream.close()


async def test_an_abort_is_refused_in_the_words_of_json() -> None:
    async with served() as (client, _):
        message = (await client.post("/v1/abort", {})).json()["error"]["message"]
        assert "prefix, tag or abort_all=true" in message


async def test_an_unknown_field_of_a_control_route_names_the_nearest_one() -> None:
    async with served() as (client, engine):
        (stream,) = await start(engine, "a")
        answer = await client.post("/v1/abort", {"stop_all": True})
        assert answer.status == 400
        assert "'abort_all'" in answer.json()["error"]["message"]
        assert (await client.get("/requests?tags=x")).status == 400
        assert engine.num_live_requests == 1
        stream.close()


async def test_L5_the_answer_waits_for_the_effect_or_says_pending() -> None:
    async with mock_fleet() as (engine, [mock]):
        client = RouteClient(control_routes(engine))
        streams = [
            engine.generate(prompt_token_ids=[1], request_id=name, sampling_params=LONG)
            for name in ("a", "b")
        ]
        unwaited = await client.post("/v1/abort", {"request_id": "a", "wait": False})
        assert unwaited.json()["requests"]["a"]["status"] == "pending"
        bounded = await client.post("/v1/abort", {"request_id": "b", "timeout_s": 0.1})
        assert bounded.json()["requests"]["b"]["status"] == "pending"
        assert bounded.json()["engines"] == {"0": "timeout"}
        assert [(await mock.next_utility()).method for _ in range(2)] == [CAESURA_ABORT] * 2
        for stream in streams:
            stream.close()


# -- the list --------------------------------------------------------------------------------------


async def test_requests_are_listed_with_their_stage_and_filtered() -> None:
    async with served() as (client, engine):
        (first,) = await start(engine, "one", tags=["night"], priority=3)
        batch = await start(engine, "two-0", "two-1", batch_id="two")
        cards = (await client.get("/requests")).json()["requests"]
        assert [card["request_id"] for card in cards] == ["one", "two-0", "two-1"]
        card = cards[0]
        assert 0 <= card.pop("age_s") < 60
        assert card.pop("num_output_tokens") > 0
        assert card == {
            "request_id": "one",
            "aliases": [],
            "stage": "decode",
            "num_prompt_tokens": 2,
            "tags": ["night"],
            "engine": 0,
            "priority": 3,
            "aborting": None,
        }
        assert cards[1]["aliases"] == ["two"]

        async def listed(query: str) -> list[str]:
            cards = (await client.get(f"/requests?{query}")).json()["requests"]
            return [card["request_id"] for card in cards]

        assert await listed("tag=night") == ["one"]
        assert await listed("prefix=two") == ["two-0", "two-1"]
        assert await listed("prefix=tw&tag=night") == []
        for stream in (first, *batch):
            stream.close()


async def test_a_request_that_is_being_aborted_says_since_when_and_why() -> None:
    async with mock_fleet() as (engine, [mock]):
        client = RouteClient(control_routes(engine))
        stream = engine.generate(prompt_token_ids=[1], request_id="a", sampling_params=LONG)
        await client.post("/v1/abort", {"abort_all": True, "wait": False})
        await asyncio.sleep(0.01)
        async with AutoAnswers(mock):
            (card,) = (await client.get("/requests")).json()["requests"]
        assert card["aborting"]["cause"] == "explicit"
        assert card["aborting"]["for_s"] > 0
        stream.close()
