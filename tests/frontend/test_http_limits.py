"""What a client may make the server hold is bounded, and what exceeds a limit is told which."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator

import pytest

from frontend.http import connection
from frontend.http.connection import MAX_PIPELINED
from frontend.http.exchange import Exchange
from frontend.http.request_reader import MAX_HEAD_BYTES, MAX_HEADERS
from frontend.http.router import Route
from tests.support.bare_server import BareServer, RawClient, bare_server
from tests.support.event_loops import event_loop_policy

__all__ = ["event_loop_policy"]
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

MAX_BODY_BYTES = 100_000
LARGE = b"x" * 500_000
GET_NOW = b"GET /now HTTP/1.1\r\nHost: x\r\n\r\n"
GET_LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
num_handled = 0


def now(exchange: Exchange) -> None:
    global num_handled
    num_handled += 1
    exchange.respond_json({"num_bytes": len(exchange.body)})


def large(exchange: Exchange) -> None:
    global num_handled
    num_handled += 1
    exchange.respond(200, LARGE)


async def later(exchange: Exchange) -> None:
    await asyncio.sleep(0.05)
    exchange.respond_json({})


ROUTES = [
    Route(method=method, path=f"/{handler.__name__}", handler=handler, summary="", tag="")
    for method in ("GET", "POST")
    for handler in (now, large, later)
]


@pytest.fixture
async def server() -> AsyncIterator[BareServer]:
    global num_handled
    num_handled = 0
    async with bare_server(ROUTES, max_body_bytes=MAX_BODY_BYTES, max_connections=5) as bare:
        yield bare


async def refusal(client: RawClient, status: int) -> str:
    """The message of the last answer on the connection."""
    answer = await client.answer()
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert await client.rest() == b""
    message: str = answer.error["message"]
    return message


async def pour(client: RawClient, piece: bytes, num_bytes: int = 1 << 22) -> None:
    """Send a piece again and again, until the server has heard enough."""
    for _ in range(num_bytes // len(piece)):
        client.write(piece)
        if client.reader._buffer:  # type: ignore[attr-defined]  # an answer has come
            return
        await asyncio.sleep(0)
    await client.writer.drain()


@pytest.mark.parametrize(
    "endless",
    [b"GET /", b"GET /now HTTP/1.1\r\nHost: x\r\n", b"GET /now HTTP/1.1\r\nHost: x\r\nX-A: "],
    ids=["target", "headers", "header"],
)
async def test_a_head_that_never_ends_is_refused(server: BareServer, endless: bytes) -> None:
    client = await server.connect()
    client.write(endless)
    await pour(client, b"X-A: %b\r\n" % (b"b" * 1000) if endless.endswith(b"\n") else b"a" * 1000)
    assert str(MAX_HEAD_BYTES) in await refusal(client, 431)


@pytest.mark.parametrize("endless", [b"5;" + b"a" * 100, b"0\r\nX-A: " + b"a" * 100])
async def test_chunk_extensions_and_trailers_that_never_end_are_refused(
    server: BareServer, endless: bytes
) -> None:
    client = await server.connect()
    client.write(b"POST /now HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + endless)
    await pour(client, b"a" * 1000)
    assert str(MAX_HEAD_BYTES) in await refusal(client, 431)


async def test_too_many_headers_are_refused(server: BareServer) -> None:
    client = await server.connect()
    headers = b"".join(b"X-%d: y\r\n" % number for number in range(MAX_HEADERS + 1))
    client.write(b"GET /now HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
    assert str(MAX_HEADERS) in await refusal(client, 431)


async def test_repeated_headers_count_each(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"GET /now HTTP/1.1\r\nHost: x\r\n" + b"X-A: y\r\n" * (MAX_HEADERS + 1) + b"\r\n")
    assert str(MAX_HEADERS) in await refusal(client, 431)


@pytest.mark.parametrize(
    ("opening", "status", "remedy"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400, "not TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "not HTTP/2"),
        (
            b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\n",
            415,
            "send it",
        ),
    ],
)
async def test_what_is_not_spoken_here_is_told(
    server: BareServer, opening: bytes, status: int, remedy: str
) -> None:
    client = await server.connect()
    client.write(opening)
    assert remedy in await refusal(client, status)


async def test_a_body_too_large_is_refused_by_its_length_alone(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n")
    assert str(MAX_BODY_BYTES) in await refusal(client, 413)
    client = await server.connect()
    client.write(b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    client.write(b"x" * MAX_BODY_BYTES)
    assert (await client.answer()).json == {"num_bytes": MAX_BODY_BYTES}


async def test_a_chunked_body_is_refused_once_it_is_too_large(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"POST /now HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    await pour(client, b"2710\r\n" + b"x" * 10_000 + b"\r\n")
    assert str(MAX_BODY_BYTES) in await refusal(client, 413)
    assert num_handled == 0


async def test_a_client_that_sends_all_of_a_refused_body_can_read_why(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n")
    for _ in range(300):
        client.write(b"x" * 100_000)
        await client.writer.drain()
    assert str(MAX_BODY_BYTES) in await refusal(client, 413)
    client.close()
    await server.wait_for_connections(0)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /now HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /now HTTP/1.1\r\nHost: x\r\nContent-Length: 1e3\r\n\r\n",
        b"GET /now HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
        b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /now HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
        b"GET now HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT host:80 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"BREW /now HTTP/1.1\r\n\r\n",
        b"GET /now HTTP/1.1\nHost: x\n\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_not_http_is_refused(server: BareServer, head: bytes) -> None:
    client = await server.connect()
    client.write(head + GET_NOW)
    await refusal(client, 400)
    assert num_handled == 0


async def test_a_request_that_arrives_too_slowly_is_ended(
    server: BareServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.05)
    clients = [await server.connect() for _ in range(4)]
    amid = b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"
    started = [b"", b"GET", amid, GET_NOW + b"GET"]
    for client, data in zip(clients, started, strict=True):
        client.write(data)
    assert (await clients[3].answer()).status == 200
    await asyncio.sleep(0.03)
    server.connections.close_overdue(asyncio.get_running_loop().time())
    assert len(server.connections.open) == 4, "nobody is late yet"
    await asyncio.sleep(0.04)
    server.connections.close_overdue(asyncio.get_running_loop().time())
    for client in clients[1:]:
        assert "0.05 s" in await refusal(client, 408)
    assert await clients[0].rest() == b""
    for client in clients:
        client.close()
    await server.wait_for_connections(0)


async def test_an_idle_connection_is_closed_in_the_end_and_a_busy_one_is_not(
    server: BareServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.0)
    idle, busy = await server.connect(), await server.connect()
    idle.write(GET_NOW)
    assert (await idle.answer()).status == 200
    busy.write(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0.01)
    server.connections.close_overdue(asyncio.get_running_loop().time() + 0.001)
    await server.wait_for_connections(1)
    assert (await busy.answer()).status == 200


async def test_a_connection_too_many_is_turned_away_and_counted(server: BareServer) -> None:
    clients = [await server.connect() for _ in range(5)]
    for client in clients:
        client.write(GET_NOW)
        assert (await client.answer()).status == 200
    for _ in range(3):
        late = await server.connect()
        late.write(GET_NOW)
        message = await refusal(late, 503)
        assert "max_connections=5" in message
        assert "--max-connections" in message
        late.close()
    assert num_handled == 5
    assert server.connections.metrics.num_refused["max_connections"] == 3
    clients[0].close()
    await server.wait_for_connections(4)
    late = await server.connect()
    late.write(GET_NOW)
    assert (await late.answer()).status == 200


async def test_more_pipelined_requests_than_are_kept_are_refused_in_their_turn(
    server: BareServer,
) -> None:
    client = await server.connect()
    client.write(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n" + GET_NOW * (MAX_PIPELINED + 3))
    answers = [await client.answer() for _ in range(MAX_PIPELINED + 1)]
    assert {answer.status for answer in answers} == {200}
    assert str(MAX_PIPELINED) in await refusal(client, 429)
    assert num_handled == MAX_PIPELINED


async def test_pipelined_bodies_are_bounded_together(server: BareServer) -> None:
    client = await server.connect()
    body = b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000
    client.write(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n" + body * 3)
    assert [(await client.answer()).status for _ in range(2)] == [200, 200]
    assert str(MAX_BODY_BYTES) in await refusal(client, 429)


async def test_a_client_that_never_reads_its_answers_gets_no_more_of_them(
    server: BareServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.2)
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        await loop.sock_sendall(client, GET_LARGE * MAX_PIPELINED)
        await asyncio.sleep(0.1)
        [held] = server.connections.open
        assert num_handled < MAX_PIPELINED, "answers pile up in memory"
        assert held._transport.get_write_buffer_size() < 3 * len(LARGE)
        await asyncio.sleep(0.15)
        server.connections.close_overdue(loop.time())
        await server.wait_for_connections(0)


async def test_a_client_that_reads_slowly_gets_all_its_answers(server: BareServer) -> None:
    client = await server.connect()
    client.write(GET_LARGE * MAX_PIPELINED)
    await asyncio.sleep(0.1)
    for _ in range(MAX_PIPELINED):
        assert (await client.answer()).body == LARGE


async def test_a_stop_closes_idle_connections_and_lets_busy_ones_finish(
    server: BareServer,
) -> None:
    idle, new, amid, busy = [await server.connect() for _ in range(4)]
    idle.write(GET_NOW)
    assert (await idle.answer()).status == 200
    amid.write(b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    busy.write(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    await asyncio.sleep(0.01)
    server.connections.close_idle()
    for client in (idle, new, amid):
        assert await client.rest() == b""
    assert "connection" not in (await busy.answer()).headers
    last = await busy.answer()
    assert (last.status, last.headers["connection"]) == (200, "close")
    assert await busy.rest() == b""
    await asyncio.wait_for(server.connections.all_closed.wait(), 1)


async def test_L11_a_closed_connection_is_gone_without_the_garbage_collector(
    server: BareServer,
) -> None:
    gc.disable()
    try:
        client = await server.connect()
        client.write(GET_NOW + b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [(await client.answer()).status for _ in range(2)] == [200, 404]
        [gone] = [weakref.ref(one) for one in server.connections.open]
        client.close()
        await server.wait_for_connections(0)
        await asyncio.sleep(0.02)
        assert gone() is None
    finally:
        gc.enable()
