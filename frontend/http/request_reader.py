"""From the bytes of a connection to its requests, one after the other.

Parsing is httptools' (llhttp, in its strict mode); what is bounded, and what is refused before its
body is read, is decided here.

Invariants
- A client can make a reader hold at most one head and one body.
- A request that is refused is passed on like any other, together with the error to answer it with,
  so that it is answered in its turn. If it was refused in its midst, it is the last one.
- After `stop` nothing is passed on, not even from within the piece of data that is being read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit

import httptools

from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange, Outlet

MAX_HEAD_BYTES = 64 * 1024
"""Also the most between two pieces of a body, and after the last: extensions and trailers."""
MAX_HEADERS = 100


class Receiver(Outlet, Protocol):
    """Whom the requests are for; their answers go there."""

    def on_request_begins(self) -> None:
        """Its first byte arrived."""

    def screen(self, exchange: Exchange) -> None:
        """Its head arrived. Raises ApiError to refuse it before its body is read."""

    def on_expectation(self) -> None:
        """The client waits to be told to send the body."""

    def on_request(self, exchange: Exchange, refusal: ApiError | None) -> None:
        """It arrived whole, or is refused. Raises ApiError to refuse it (only if it is not yet)."""


class _Stopped(Exception):
    """Leaves the parser: nothing of what follows is wanted."""


class RequestReader:
    """The requests of one connection; httptools' protocol."""

    def __init__(self, receiver: Receiver, *, max_body_bytes: int) -> None:
        self._receiver = receiver
        self._max_body_bytes = max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self.is_stopped = False
        self.was_cut_off = False
        """A request was refused in its midst: the client may still be sending it."""
        self._reset()

    def _reset(self) -> None:
        self._has_begun = False
        self._num_pending_bytes = 0
        """Received since the request began or since its last piece of body."""
        self._url = b""
        self._headers: dict[str, str] = {}
        self._num_headers = 0
        """Repeated ones count each."""
        self._exchange: Exchange | None = None
        """Set once the head has arrived."""
        self._head_without_upgrade = b""
        self._refusal: ApiError | None = None
        self._body: list[bytes] = []
        self._num_body_bytes = 0

    @property
    def is_amid_request(self) -> bool:
        return self._has_begun and not self.is_stopped

    def stop(self) -> None:
        """Read nothing more. Harmless to repeat."""
        self.is_stopped = True
        self._parser = None  # It refers back to here.

    def feed(self, data: bytes) -> None:
        while not self.is_stopped:
            self._num_pending_bytes += len(data)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # There is no protocol to change to. httptools takes all that follows the head,
                # even its body, for the other protocol; so the request is read once more.
                data = self._head_without_upgrade + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                self._reset()
                continue
            except httptools.HttpParserCallbackError as error:
                cause = error.__context__
                if isinstance(cause, ApiError):
                    self.refuse(cause)
                elif not isinstance(cause, _Stopped):
                    raise
            except httptools.HttpParserError as error:
                if not self.is_stopped:
                    self.refuse(ApiError(400, _complaint(data, error)))
            else:
                if self._num_pending_bytes > MAX_HEAD_BYTES and not self.is_stopped:
                    self.refuse(ApiError(431, f"the head exceeds {MAX_HEAD_BYTES} bytes"))
            return

    def refuse(self, error: ApiError) -> None:
        """Pass on what has arrived of a request with this error, and stop."""
        exchange = self._exchange
        if exchange is None:
            exchange = Exchange(self._receiver, "GET", "/", "", {}, "1.1", False)
        exchange.keep_alive, exchange.body = False, b""
        self.was_cut_off = True
        self.stop()
        self._reset()
        self._receiver.on_request(exchange, error)

    # -- httptools' callbacks ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_stopped:
            raise _Stopped
        self._has_begun = True
        self._receiver.on_request_begins()

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > MAX_HEAD_BYTES:
            raise ApiError(431, f"the head exceeds {MAX_HEAD_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None:
            return  # A trailer.
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise ApiError(431, f"the request has more than {MAX_HEADERS} headers")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        method = self._parser.get_method()
        if self._parser.should_upgrade() and method != b"CONNECT":
            self._head_without_upgrade = _plain_head(method, self._url, self._headers)
            return
        path, query_string = _split(self._url.decode("latin-1"))
        exchange = self._exchange = Exchange(
            self._receiver,
            method.decode("latin-1"),
            path,
            query_string,
            self._headers,
            self._parser.get_http_version(),
            self._parser.should_keep_alive(),
        )
        length = int(self._headers.get("content-length", "0"))  # llhttp checked it.
        has_body = length > 0 or "transfer-encoding" in self._headers
        try:
            if exchange.http_version == "1.1" and "host" not in self._headers:
                raise ApiError(400, "the Host header is missing; HTTP/1.1 needs one")
            if length > self._max_body_bytes:
                raise self._too_large()
            encoding = self._headers.get("content-encoding", "identity")
            if encoding.strip().lower() not in ("", "identity"):
                raise ApiError(415, f"content-encoding {encoding!r:.40}: send it uncompressed")
            self._receiver.screen(exchange)
        except ApiError as error:
            if has_body:
                raise
            self._refusal = error
            return
        expectation = self._headers.get("expect", "").lower()
        if has_body and expectation == "100-continue" and exchange.http_version == "1.1":
            self._receiver.on_expectation()

    def on_body(self, body: bytes) -> None:
        self._num_pending_bytes = 0
        self._num_body_bytes += len(body)
        if self._num_body_bytes > self._max_body_bytes:
            raise self._too_large()
        self._body.append(body)

    def on_message_complete(self) -> None:
        exchange, refusal = self._exchange, self._refusal
        if exchange is None:
            return  # It is read once more.
        exchange.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._receiver.on_request(exchange, refusal)
        self._reset()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._max_body_bytes} bytes")


def _complaint(data: bytes, error: httptools.HttpParserError) -> str:
    """What to say of bytes that are no request: often they are another protocol's."""
    if data.startswith(b"\x16\x03"):
        return "this port speaks plain HTTP/1.1, not TLS; use http://"
    if data.startswith(b"PRI * HTTP/2"):
        return "this port speaks HTTP/1.1, not HTTP/2"
    return f"this is not HTTP/1.1: {error}"


def _plain_head(method: bytes, target: bytes, headers: Mapping[str, str]) -> bytes:
    """An HTTP/1.1 head that asks for no other protocol."""
    plain = [method + b" " + target + b" HTTP/1.1"]
    for name, value in headers.items():
        if name == "connection":
            value = "close" if "close" in value.lower() else "keep-alive"
        if name != "upgrade":
            plain.append(f"{name}: {value}".encode("latin-1"))
    return b"\r\n".join([*plain, b"", b""])


def _split(target: str) -> tuple[str, str]:
    """A request target's path and query string. Raises ApiError."""
    path, _, query_string = target.partition("?")
    if path[:7].lower() == "http://" or path[:8].lower() == "https://":
        path = urlsplit(path).path or "/"  # As a client sends it to a proxy.
    if not path.startswith("/"):
        raise ApiError(400, f"the request target {target!r:.80} is not a path")
    return path, query_string
