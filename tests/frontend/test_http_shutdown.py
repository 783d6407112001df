"""A server that is told to stop serves what it has accepted for a while, then ends the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from frontend import async_engine
from frontend.http import server
from ipc.lifecycle import AbortReceipt, RequestReceipt
from ipc.output import FinishReason
from tests.support.bare_server import raw_client
from tests.support.event_loops import event_loop_policy
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet
from tests.support.served_engine import PROMPT, ServedEngine, post_bytes, serving

__all__ = ["event_loop_policy"]
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

COMPLETIONS = "/v1/completions"
LONG_GRACE_S = 60.0
WHOLE = {"prompt": PROMPT, "max_tokens": 100, "return_token_ids": True}
STREAM = WHOLE | {"stream": True}


@asynccontextmanager
async def served_mock(grace_s: float) -> AsyncIterator[tuple[ServedEngine, MockEngine]]:
    async with mock_fleet() as (frontend, [engine]):
        tasks = asyncio.all_tasks()
        async with serving(frontend, shutdown_timeout_s=grace_s) as served:
            yield served, engine
            await asyncio.wait_for(asyncio.shield(served.serving), 5)
            with pytest.raises(httpx.ConnectError):
                await served.http.get("/health")
            assert frontend.num_live_requests == 0
        async with asyncio.timeout(2):
            while asyncio.all_tasks() - tasks:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def nothing_is_wrong(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    messages = [r.getMessage() for r in caplog.get_records("call") if r.levelname == "ERROR"]
    assert all("engine" in message and "died" in message for message in messages), messages


async def start(served: ServedEngine, engine: MockEngine, body: dict[str, Any]) -> tuple[Any, str]:
    """A client whose request has sent the token 65, and the request's internal id."""
    client = await raw_client(served.port)
    client.write(post_bytes(COMPLETIONS, body))
    request_id = (await engine.next_add()).request_id
    await engine.send_tokens(request_id, [65])
    if body.get("stream"):
        await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5)
        await asyncio.wait_for(client.reader.readuntil(b"\n\n\r\n"), 5)
    else:
        await asyncio.sleep(0.02)
    return client, request_id


async def answer_abort(engine: MockEngine, expected: list[str]) -> None:
    """What an engine does about an abort of these requests, and of no others."""
    call = await engine.next_utility()
    assert call.args[0] == expected
    for request_id in expected:
        await engine.send_tokens(request_id, [66], finish=FinishReason.ABORT)
    receipts = {request_id: RequestReceipt("aborted", 2, "decode") for request_id in expected}
    await engine.reply(call, AbortReceipt(receipts, 1, 0).to_wire())


def last_events(data: bytes) -> list[Any]:
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


async def test_during_the_grace_running_requests_finish_and_newcomers_are_sent_away() -> None:
    async with served_mock(LONG_GRACE_S) as (served, engine):
        idle = await raw_client(served.port)
        streaming, streamed = await start(served, engine, STREAM)
        waiting, awaited = await start(served, engine, WHOLE)
        assert (await served.http.get("/ready")).status_code == 200
        served.stop.stop()
        await asyncio.sleep(0.02)

        for body in (WHOLE, STREAM):
            refused = await served.http.post(COMPLETIONS, json=body)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "shutdown"
        idle.write(post_bytes(COMPLETIONS, WHOLE) + b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [(await idle.answer()).status for _ in range(2)] == [503, 503]
        assert (await served.http.get("/health")).status_code == 200
        assert (await served.http.get("/load")).json() == {"server_load": 2}

        await engine.send_tokens(streamed, [66], finish=FinishReason.LENGTH)
        await engine.send_tokens(awaited, [66], finish=FinishReason.LENGTH)
        choice = (await waiting.answer()).json["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"]) == ([65, 66], "length")
        *_, last, done = last_events(await streaming.rest())
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        assert await idle.rest() == b""
        assert not engine.utilities, "nothing was aborted"
        assert not engine.aborts


async def test_L5_an_abort_shortens_the_grace() -> None:
    async with served_mock(LONG_GRACE_S) as (served, engine):
        client, request_id = await start(served, engine, WHOLE)
        served.stop.stop()
        await asyncio.sleep(0.02)
        aborting = asyncio.create_task(served.http.post("/v1/abort", json={"abort_all": True}))
        await answer_abort(engine, [request_id])
        assert (await aborting).json()["num_aborted"] == 1
        answer = await client.answer()
        choice = answer.json["choices"][0]
        assert (choice["finish_reason"], choice["token_ids"]) == ("abort", [65, 66])
        assert answer.status == 200


async def test_L4_a_hang_up_shortens_the_grace() -> None:
    async with served_mock(LONG_GRACE_S) as (served, engine):
        client, request_id = await start(served, engine, STREAM)
        served.stop.stop()
        await asyncio.sleep(0.02)
        client.close()
        await asyncio.wait_for(asyncio.shield(served.serving), 5)
        assert await engine.next_abort() == [request_id]


@pytest.mark.parametrize("how", ["the grace is over", "a second signal", "no grace"])
async def test_L1_L2_what_is_left_then_ends_each_with_an_answer_and_its_engine_is_told(
    how: str,
) -> None:
    grace_s = {"the grace is over": 0.1, "a second signal": LONG_GRACE_S, "no grace": 0.0}[how]
    async with served_mock(grace_s) as (served, engine):
        streaming, streamed = await start(served, engine, STREAM)
        waiting, awaited = await start(served, engine, WHOLE)
        served.stop.stop()
        if how == "a second signal":
            await asyncio.sleep(0.02)
            assert not engine.utilities
            served.stop.stop()
        await answer_abort(engine, [streamed, awaited])
        answer = await waiting.answer()
        assert (answer.status, answer.error["code"]) == (503, "shutdown")
        assert answer.headers["retry-after"]
        *_, error, done = last_events(await streaming.rest())
        assert (error["error"]["code"], done) == ("shutdown", "[DONE]")
        assert await waiting.rest() == b""


async def test_L1_an_engine_that_does_not_confirm_delays_the_end_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(async_engine, "SHUTDOWN_ABORT_TIMEOUT_S", 0.1)
    async with served_mock(0.0) as (served, engine):
        client, request_id = await start(served, engine, WHOLE)
        served.stop.stop()
        call = await engine.next_utility()
        assert call.args[0] == [request_id]
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (503, "shutdown")


async def test_a_server_without_requests_stops_at_once_and_closes_its_connections() -> None:
    async with served_mock(LONG_GRACE_S) as (served, _):
        kept_alive, silent = await raw_client(served.port), await raw_client(served.port)
        kept_alive.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await kept_alive.answer()).status == 200
        served.stop.stop()
        assert await kept_alive.rest() == b""
        assert await silent.rest() == b""


async def test_a_client_that_never_reads_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.1)
    async with served_mock(0.0) as (served, _):
        client = await served.connect(receive_buffer_bytes=4096)
        await served.send(client, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        await asyncio.sleep(0.1)
        served.stop.stop()
        await asyncio.wait_for(asyncio.shield(served.serving), 3)
        client.close()
