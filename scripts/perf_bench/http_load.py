"""Loads on an OpenAI-compatible server: closed (so many requests at a time) and open (so many a
second, whatever the server does).

Invariants
- Prompts are random token ids: no two requests share one, within a seed or between seeds.
- A reply of an open load counts from when it was due, not from when it could be sent.
- A request whose connection fails or ends early is a reply that is not good.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from scripts.http_bench.client import CONNECT_TIMEOUT_S, Connection, Reply
from scripts.http_bench.servers import HOST


@dataclass(frozen=True, slots=True)
class Target:
    """A server and its model."""

    url: str
    """http://HOST:PORT, without a path."""
    model: str
    vocab_size: int
    """Prompts' token ids lie below this."""

    async def answer(self, request: bytes) -> Reply:
        """Send one request, over a connection of its own."""
        address = urlsplit(self.url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    Connection, address.hostname or HOST, address.port or 80
                )
        except OSError:
            return Reply(time.monotonic())
        try:
            return await connection.send(request)
        finally:
            connection.close()

    def requests(
        self, num: int, *, num_prompt_tokens: int, max_tokens: int, seed: str
    ) -> list[bytes]:
        """Streaming completions of so many tokens each, greedy and ignoring EOS."""
        draw = random.Random(seed).randrange
        host = urlsplit(self.url).netloc
        requests = []
        for _ in range(num):
            fields = {
                "model": self.model,
                "prompt": [draw(self.vocab_size) for _ in range(num_prompt_tokens)],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
            }
            body = json.dumps(fields).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            requests.append(head.encode() + body)
        return requests


async def closed_loop(target: Target, requests: Sequence[bytes], concurrency: int) -> list[Reply]:
    """Each of `concurrency` clients sends its next request when its last one has ended."""
    waiting = list(reversed(requests))
    replies: list[Reply] = []

    async def client() -> None:
        while waiting:
            replies.append(await target.answer(waiting.pop()))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return replies


async def open_loop(
    target: Target, requests: Sequence[bytes], rate: float, seed: str
) -> list[Reply]:
    """Send `rate` requests a second on average, at the times of a Poisson process."""
    gap_s = random.Random(seed).expovariate

    async def client(request: bytes, due_s: float) -> Reply:
        reply = await target.answer(request)
        reply.sent_s = due_s
        return reply

    tasks = []
    due_s = time.monotonic()
    for request in requests:
        due_s += gap_s(rate)
        await asyncio.sleep(due_s - time.monotonic())
        tasks.append(asyncio.create_task(client(request, due_s)))
    return await asyncio.gather(*tasks)
