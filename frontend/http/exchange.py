"""One HTTP request and its answer, whole or as a stream.

Invariants
- An answer is begun once and finished once; what is written after the client hung up goes nowhere.
- `on_hang_up` is called at most once, and only before the answer is finished.
- `is_writable` is False while the client's socket is full; `on_writable` is called when it is no
  longer. Who writes all the same costs memory, and never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qs

import msgspec

JSON = "application/json"
BINARY = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
EVENT_STREAM = "text/event-stream; charset=utf-8"
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_LENGTH = 256

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}

_FAULT = (
    b'{"error":{"message":"the server met a fault; its log says which",'
    b'"type":"server_error","param":null,"code":null}}'
)


class Outlet(Protocol):
    """Where an answer goes: a connection."""

    is_writable: bool

    @property
    def peer_is_local(self) -> bool: ...

    @property
    def max_unread_tokens(self) -> int: ...

    def write(self, data: bytes) -> None: ...

    def on_answered(self, exchange: Exchange) -> None:
        """The answer is complete."""

    def date_header(self) -> bytes: ...

    def abort(self) -> None: ...


class Exchange:
    """A request that arrived whole, and the way to answer it."""

    __slots__ = (
        "_is_chunked",
        "_outlet",
        "_query_string",
        "body",
        "has_begun",
        "headers",
        "http_version",
        "is_finished",
        "keep_alive",
        "method",
        "on_hang_up",
        "on_writable",
        "path",
        "path_params",
        "request_id",
    )

    def __init__(
        self,
        outlet: Outlet,
        method: str,
        path: str,
        query_string: str,
        headers: Mapping[str, str],
        http_version: str,
        keep_alive: bool,
    ) -> None:
        self._outlet = outlet
        self.method = method
        self.path = path
        self._query_string = query_string
        self.headers = headers
        """By lower-case name; of a repeated one, the last."""
        self.http_version = http_version
        self.keep_alive = keep_alive
        """Whether the connection serves another request after this one."""
        self.body = b""
        self.request_id = headers.get(REQUEST_ID_HEADER, "")
        """Sent back as X-Request-Id, where it can be: the client's, or the one its request got."""
        self.path_params: dict[str, str] = {}
        self.has_begun = False
        self.is_finished = False
        self.on_hang_up: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self._is_chunked = False

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self._query_string, keep_blank_values=True)

    @property
    def peer_is_local(self) -> bool:
        """Whether the client is on this machine."""
        return self._outlet.peer_is_local

    @property
    def max_unread_tokens(self) -> int:
        """So many tokens of a stream may wait for a client that does not read."""
        return self._outlet.max_unread_tokens

    @property
    def is_writable(self) -> bool:
        return self._outlet.is_writable

    def respond(
        self,
        status: int,
        body: bytes = b"",
        content_type: str = JSON,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """The whole answer."""
        length = len(body)
        if self.method == "HEAD":
            body = b""
        self._begin()
        fields = f"content-type: {content_type}\r\n" if length else ""
        head = self._head(status, f"{fields}content-length: {length}\r\n", headers)
        self._outlet.write(head + body)
        self._finish()

    def respond_json(self, value: object, status: int = 200) -> None:
        self.respond(status, msgspec.json.encode(value))

    def start_stream(self, first: bytes = b"") -> None:
        """Begin a stream of server-sent events, with its first bytes."""
        self._begin()
        self._is_chunked = self.http_version == "1.1"
        self.keep_alive = self.keep_alive and self._is_chunked
        fields = f"content-type: {EVENT_STREAM}\r\ncache-control: no-cache\r\n"
        if self._is_chunked:
            fields += "transfer-encoding: chunked\r\n"
        self._outlet.write(self._head(200, fields, ()) + self._framed(first))

    def write(self, data: bytes) -> None:
        """More of the stream."""
        if self._is_chunked and data:  # An empty chunk would end the stream.
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._outlet.write(data)

    def finish(self, last: bytes = b"") -> None:
        """The end of the stream, with its last bytes."""
        self._outlet.write(self._framed(last) + (b"0\r\n\r\n" if self._is_chunked else b""))
        self._finish()

    def fail(self) -> None:
        """A fault of ours prevents the answer: a 500, or a connection that breaks off."""
        if self.is_finished:
            return
        self.keep_alive = False
        if self.has_begun:
            self.on_hang_up = None
            self._outlet.abort()
        else:
            self.respond(500, _FAULT)

    def hang_up(self) -> None:
        """The client is gone."""
        if not self.is_finished:
            self.is_finished = True
            self.on_writable = None
            on_hang_up, self.on_hang_up = self.on_hang_up, None
            if on_hang_up is not None:
                on_hang_up()

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data and self._is_chunked else data

    def _begin(self) -> None:
        assert not self.has_begun, "an exchange has one answer"
        self.has_begun = True

    def _finish(self) -> None:
        self.on_hang_up = self.on_writable = None
        if not self.is_finished:
            self.is_finished = True
            self._outlet.on_answered(self)

    def _head(self, status: int, fields: str, headers: Iterable[tuple[str, str]]) -> bytes:
        if _is_header_safe(self.request_id):
            fields += f"{REQUEST_ID_HEADER}: {self.request_id}\r\n"
        for name, value in headers:
            fields += f"{name}: {value}\r\n"
        if not self.keep_alive:
            fields += "connection: close\r\n"
        elif self.http_version != "1.1":
            fields += "connection: keep-alive\r\n"
        date = self._outlet.date_header()
        return _STATUS_LINES[status] + date + fields.encode("latin-1", "replace") + b"\r\n"


def _is_header_safe(request_id: str) -> bool:
    """Ids from a body may hold what would end the header, or begin another."""
    return 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH and request_id.isprintable()
