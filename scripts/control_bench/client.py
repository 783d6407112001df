"""Clients that keep what they are told: streams of tokens, and calls of control routes.

They are `http_bench`'s connections, which note when bytes arrive. The bytes are kept as they come
and read after the measurement, so that reading costs nothing while it runs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from scripts.http_bench.client import Connection, Reply

EVENT = b"data: "


def http_request(method: str, path: str, body: object = None, *, name: str | None = None) -> bytes:
    """The bytes of a request: bytes as they are, anything else as JSON; `name` is its id."""
    is_binary = isinstance(body, bytes)
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: application/{'octet-stream' if is_binary else 'json'}",
        f"Content-Length: {len(data)}",
        *([] if name is None else [f"X-Request-Id: {name}"]),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Recorder(Connection):
    """A connection that keeps the bytes of its newest answer."""

    def __init__(self) -> None:
        super().__init__()
        self._received: list[bytes] = []

    def send(self, request: bytes) -> asyncio.Future[Reply]:
        self._received = []
        return super().send(request)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        super().data_received(data)

    def body(self) -> bytes:
        """What has come of it so far."""
        head, _, rest = b"".join(self._received).partition(b"\r\n\r\n")
        return _join_chunks(rest) if b"transfer-encoding: chunked" in head.lower() else rest


def _join_chunks(data: bytes) -> bytes:
    body = b""
    while b"\r\n" in data:
        size, _, rest = data.partition(b"\r\n")
        body += rest[: int(size, 16)]
        data = rest[int(size, 16) + 2 :]
    return body


@dataclass(frozen=True, slots=True)
class Answer:
    """That of a control route."""

    status: int
    body: Any
    """Its JSON; None for no body, a text as it is."""
    sent_s: float
    end_s: float

    @property
    def took_s(self) -> float:
        return self.end_s - self.sent_s

    def checked(self) -> dict[str, Any]:
        """The JSON of a success. Raises RuntimeError for anything else."""
        if self.status != 200:
            raise RuntimeError(f"a control call was answered with {self.status}: {self.body}")
        fields: dict[str, Any] = self.body
        return fields


class Control:
    """A keep-alive connection for control calls, one at a time."""

    def __init__(self, connection: Recorder) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, port: int) -> Self:
        """Raises OSError."""
        return cls(await Recorder.open(port))

    async def get(self, path: str) -> Answer:
        return await self._call(http_request("GET", path))

    async def post(self, path: str, body: object = None) -> Answer:
        return await self._call(http_request("POST", path, body))

    async def _call(self, request: bytes) -> Answer:
        reply = await self._connection.send(request)
        if not reply.end_s:
            raise RuntimeError(f"the connection was lost before an answer to {request[:80]!r}")
        data = self._connection.body()
        body = json.loads(data) if data[:1] in (b"{", b"[") else data.decode() or None
        return Answer(reply.status, body, reply.sent_s, reply.end_s)

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one event, and when it came."""

    arrived_s: float
    ids: tuple[int, ...]


@dataclass(slots=True)
class Received:
    """All that a stream brought."""

    status: int
    events: list[Tokens] = field(default_factory=list)
    """Those with tokens."""
    endings: list[dict[str, Any]] = field(default_factory=list)
    """Choices that say a finish reason; there is to be one, in the last event."""
    num_told: int | None = None
    """How many tokens the request had, as the server says at its end."""
    errors: list[Any] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for event in self.events for token_id in event.ids]

    @property
    def finish_reason(self) -> str | None:
        return self.endings[0]["finish_reason"] if self.endings else None

    @property
    def resume_from(self) -> dict[str, Any] | None:
        return self.endings[0].get("resume_from") if self.endings else None

    @property
    def is_whole(self) -> bool:
        """It ended once, and its server counted the tokens that came."""
        return (
            self.status == 200
            and len(self.endings) == 1
            and (self.num_told == len(self.token_ids) and not self.errors)
        )

    def num_tokens_before(self, at_s: float) -> int:
        return sum(len(event.ids) for event in self.events if event.arrived_s <= at_s)

    def gaps_s(self, begin_s: float = 0.0, end_s: float = 1e18) -> list[float]:
        """Between one event with tokens and the next, of gaps that end in a window."""
        return [
            after.arrived_s - before.arrived_s
            for before, after in pairwise(self.events)
            if begin_s <= after.arrived_s < end_s
        ]


class TokenStream:
    """A greedy request to `/inference/v1/generate`: token ids in, a stream of token ids out."""

    def __init__(
        self, connection: Recorder, prompt: Sequence[int], max_tokens: int, name: str | None = None
    ) -> None:
        """`name` is its X-Request-Id. Nothing is sent yet."""
        self.prompt = list(prompt)
        self.max_tokens = max_tokens
        self.name = name
        self.connection = connection
        self.ended: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        """Done when its answer has ended; set by `send`."""
        self._received: Received | None = None

    @classmethod
    async def open(
        cls, port: int, prompt: Sequence[int], max_tokens: int, name: str | None = None
    ) -> Self:
        """Connected and not sent. Raises OSError."""
        return cls(await Recorder.open(port), prompt, max_tokens, name)

    def send(self) -> None:
        body = {
            "token_ids": self.prompt,
            "sampling_params": {
                "max_tokens": self.max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            },
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = http_request("POST", "/inference/v1/generate", body, name=self.name)
        self.ended = self.connection.send(request)

    @property
    def num_events(self) -> int:
        """So far, without reading them; while it runs, each has tokens."""
        return len(self.connection.reply.arrivals_s)

    @property
    def is_running(self) -> bool:
        """It has tokens, and did not end."""
        return self.num_events > 0 and not self.ended.done()

    @property
    def received(self) -> Received:
        """Once it has ended. Read at the first use, so that it costs nothing before."""
        assert self.ended.done(), "the stream goes on"
        if self._received is None:
            self._received = self._read()
        return self._received

    def _read(self) -> Received:
        reply = self.connection.reply
        received = Received(reply.status)
        body = self.connection.body()
        if reply.status != 200:
            received.errors.append(json.loads(body) if body else None)
            return received
        whole_lines = body.split(b"\n")[:-1]
        lines = [line.removeprefix(EVENT) for line in whole_lines if line.startswith(EVENT)]
        for arrived_s, line in zip(reply.arrivals_s, lines, strict=False):
            event = json.loads(line)
            if "choices" not in event:
                received.errors.append(event)
                continue
            for choice in event["choices"]:
                if choice["token_ids"]:
                    received.events.append(Tokens(arrived_s, tuple(choice["token_ids"])))
                if choice["finish_reason"] is not None:
                    received.endings.append(choice)
            if event.get("usage") is not None:
                received.num_told = event["usage"]["completion_tokens"]
        return received

    def close(self) -> None:
        self.connection.close()


def make_prompt(number: int, num_tokens: int) -> list[int]:
    """Token ids that share no prefix of a block with another number's."""
    return [
        300 + (7919 * number + 31 * place + place * place) % 3000 for place in range(num_tokens)
    ]
