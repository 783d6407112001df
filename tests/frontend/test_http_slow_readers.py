"""A slow reader costs the memory of its own tokens, up to a limit, and nobody else's time."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.http import connection, server, sockets
from frontend.http.generation import StreamedAnswer
from frontend.outputs import AbortCause
from frontend.requests.stream import RequestStream
from tests.support.event_loops import event_loop_policy
from tests.support.served_engine import PROMPT, ServedEngine, fake, reset, served_engine

__all__ = ["event_loop_policy"]
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

NUM_TOKENS = 3000
MAX_UNREAD_TOKENS = 100
MAX_STEP_TOKENS = 64
"""Outputs of several steps may arrive in one turn of the loop."""
STREAM = {
    "prompt": PROMPT,
    "max_tokens": NUM_TOKENS,
    "stream": True,
    "return_token_ids": True,
}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "NOT_SENT_LOW_WATER_BYTES", 4096)


@pytest.fixture
def most_unread(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most tokens that the streams of a call held for its reader; its only item."""
    most = [0]
    on_news = StreamedAnswer._on_news

    def watched(answer: StreamedAnswer, index: int, stream: RequestStream) -> None:
        most[0] = max(most[0], sum(one.num_unread_tokens for one in answer._streams))
        on_news(answer, index, stream)

    monkeypatch.setattr(StreamedAnswer, "_on_news", watched)
    return most


async def start_slow_stream(served: ServedEngine, **fields: Any) -> socket.socket:
    """A stream that is not read, once its socket is full: tokens wait in the front end."""
    client = await served.connect(receive_buffer_bytes=4096)
    await served.post(client, "/v1/completions", STREAM | fields)
    return client


def events_of(answer: bytes) -> list[Any]:
    """The data of a chunked answer's server-sent events; the end of it is the string `[DONE]`."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    data = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def token_ids_of(events: list[Any]) -> list[int]:
    choices = [event["choices"][0] for event in events if "choices" in event]
    return [token_id for choice in choices for token_id in choice["token_ids"]]


async def test_L2_a_slow_reader_that_resumes_gets_every_token_once_and_in_order() -> None:
    async with served_engine(fake()) as served:
        client = await start_slow_stream(served)
        await served.wait_for_live_requests(1)
        body = {"prompt": PROMPT, "max_tokens": 200, "return_token_ids": True}
        other = await asyncio.wait_for(served.http.post("/v1/completions", json=body), 5)
        assert other.json()["choices"][0]["token_ids"] == expected_tokens(PROMPT, 200)
        await served.wait_until_idle(timeout_s=10)
        await asyncio.sleep(0.05)
        *events, done = events_of(await served.receive_until(client, b"[DONE]\n\n\r\n0\r\n\r\n"))
        assert done == "[DONE]"
        assert token_ids_of(events) == expected_tokens(PROMPT, NUM_TOKENS)
        assert len(events) < NUM_TOKENS, "what waits merges"
        # The connection serves on.
        await served.post(client, "/v1/completions", body | {"max_tokens": 1})
        assert b"200 OK" in await served.receive_until(client, b"length")
        client.close()


@pytest.mark.parametrize("n", [1, 2])
async def test_L2_past_the_limit_a_slow_readers_requests_end_and_it_is_told(
    n: int, most_unread: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    config = fake(fake_step_time_ms=1)
    async with served_engine(config, max_unread_tokens=MAX_UNREAD_TOKENS) as served:
        client = await start_slow_stream(served, n=n)
        await served.wait_for_live_requests(n)
        await served.wait_until_idle(timeout_s=10)
        assert MAX_UNREAD_TOKENS < most_unread[0] <= MAX_UNREAD_TOKENS + MAX_STEP_TOKENS
        counts = served.engine.metrics.num_aborts
        slow = {key: count for key, count in counts.items() if AbortCause.SLOW_READER in key}
        assert sum(slow.values()) == n
        [status] = (await served.engine.status()).values()
        assert status.counters["requests_aborted"] == n
        *events, error, done = events_of(await served.receive_all(client))
        assert done == "[DONE]"
        assert error["error"]["code"] == "slow_reader"
        assert f"max_unread_tokens={MAX_UNREAD_TOKENS}" in error["error"]["message"]
        if n == 1:
            token_ids = token_ids_of(events)
            assert 0 < len(token_ids) < NUM_TOKENS
            assert token_ids == expected_tokens(PROMPT, len(token_ids))
        client.close()
    assert "Error" not in caplog.text


async def test_an_answer_that_is_no_stream_may_be_longer_than_the_limit() -> None:
    async with served_engine(fake(), max_unread_tokens=MAX_UNREAD_TOKENS) as served:
        body = {"prompt": PROMPT, "max_tokens": 1000, "return_token_ids": True}
        [choice] = (await served.http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["token_ids"] == expected_tokens(PROMPT, 1000)


@pytest.mark.parametrize("how", ["reset", "close", "half-close", "stall"])
async def test_L4_a_slow_reader_that_goes_away_ends_its_request(
    how: str, most_unread: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_HOUSEKEEPING_S", 0.02)
    if how == "stall":
        monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3)
    if how == "half-close":
        monkeypatch.setattr(connection, "DRAIN_TIMEOUT_S", 0.1)
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        client = await start_slow_stream(served)
        async with asyncio.timeout(5):
            while most_unread[0] < 20:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)
        assert served.engine.num_live_requests == 1
        match how:
            case "reset":
                reset(client)
            case "close":
                client.close()
            case "half-close":
                client.shutdown(socket.SHUT_WR)
        await served.wait_for_live_requests(0, timeout_s=1.0)
        await served.wait_until_idle(timeout_s=1.0)
        num_connections = served.engine.metrics.num_connections
        assert num_connections is not None
        async with asyncio.timeout(1):
            while num_connections() > 1:  # noqa: ASYNC110  # httpx has one at most
                await asyncio.sleep(0.005)
        client.close()
