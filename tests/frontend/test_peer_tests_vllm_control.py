"""vLLM's tests of pauses that had no counterpart here; `docs/peer_tests.md` lists them all."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from tests.support.arithmetic_rollouts import assert_nothing_left
from tests.support.rollouts import post
from tests.support.served_engine import PROMPT, ServedEngine, fake, served_engine


@pytest_asyncio.fixture
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        yield served
        await assert_nothing_left(served)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
async def test_L9_with_nothing_in_flight_every_mode_holds_at_once_and_may_be_repeated(
    served: ServedEngine, mode: str
) -> None:
    for _ in range(2):
        async with asyncio.timeout(5):
            reply = await post(served.http, f"/pause?mode={mode}", None)
        assert (reply["status"], reply["state"]) == ("paused", "paused")
        assert (await served.http.get("/is_paused")).json()["is_paused"] is True
    for was in ("paused", "running"):
        assert (await post(served.http, "/resume", None))["was"] == was
        assert (await served.http.get("/is_paused")).json()["is_paused"] is False


async def test_L9_pauses_and_resumes_at_once_neither_block_nor_fail(served: ServedEngine) -> None:
    for _ in range(5):
        paths = [f"/pause?mode={mode}" for mode in ("abort", "wait", "keep")] + ["/resume"] * 2
        calls = [served.http.post(path) for path in paths]
        answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
        # A resume that overtakes a pause which still drained ends it with 409.
        assert {answer.status_code for answer in answers} <= {200, 409}
    await post(served.http, "/resume", None)


async def what_came(served: ServedEngine, client: socket.socket) -> bytes:
    """Everything that a client had not received, up to a silence."""
    data = b""
    with contextlib.suppress(TimeoutError):
        while news := await served.receive(client, timeout_s=0.05):
            data += news
    return data


@pytest.mark.parametrize("num_streams", [1, 4])
async def test_L9_streams_stand_still_while_kept_and_end_with_the_exact_count(
    served: ServedEngine, num_streams: int
) -> None:
    clients = [await served.connect() for _ in range(num_streams)]
    body = {"prompt": PROMPT, "max_tokens": 300, "stream": True, "return_token_ids": True}
    for client in clients:
        await served.post(client, "/v1/completions", body)
    received = [await served.receive_until(client, b"token_ids") for client in clients]
    await post(served.http, "/pause?mode=keep&clear_cache=false", None)
    received = [
        data + await what_came(served, client)
        for client, data in zip(clients, received, strict=True)
    ]
    for client in clients:
        assert await what_came(served, client) == b""
    await post(served.http, "/resume", None)
    for client, data in zip(clients, received, strict=True):
        whole = data + await served.receive_until(client, b"[DONE]")
        lists = re.findall(rb'"token_ids":\[([\d,]+)\]', whole)
        token_ids = [int(token_id) for each in lists for token_id in each.split(b",")]
        assert token_ids == expected_tokens(PROMPT, 300)
        client.close()
