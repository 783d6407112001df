"""HTTP/1.1 as servers must speak it, and what they must refuse, over real sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from frontend.http.exchange import Exchange
from frontend.http.router import Route
from tests.support.bare_server import BareServer, bare_server
from tests.support.event_loops import event_loop_policy

__all__ = ["event_loop_policy"]
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

NOT_FOUND = b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n"
GET_NOW = b"GET /now?a=1 HTTP/1.1\r\nHost: x\r\n\r\n"
POST_ECHO = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED_ECHO = (
    b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\nhe\r\n3;extension=1\r\nllo\r\n0\r\nX-Request-Id: trailer\r\n\r\n"
)
CLOSE_NOW = b"GET /now HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def now(exchange: Exchange) -> None:
    exchange.respond_json({"path": exchange.path, "query": exchange.query})


def echo(exchange: Exchange) -> None:
    exchange.respond(200, exchange.body, "text/plain")


async def later(exchange: Exchange) -> None:
    await asyncio.sleep(0.02)
    exchange.respond_json({"later": exchange.query})


def stream(exchange: Exchange) -> None:
    exchange.start_stream(b"data: 1\n\n")
    exchange.write(b"")
    exchange.write(b"data: 2\n\n")
    exchange.finish(b"data: [DONE]\n\n")


def item(exchange: Exchange) -> None:
    exchange.respond_json(exchange.path_params)


def fault(exchange: Exchange) -> None:
    raise RuntimeError("the inside")


async def later_fault(exchange: Exchange) -> None:
    await asyncio.sleep(0)
    raise RuntimeError("the inside")


def fault_amid_stream(exchange: Exchange) -> None:
    exchange.start_stream(b"data: 1\n\n")
    raise RuntimeError("the inside")


def route(method: str, path: str, handler: object) -> Route:
    return Route(method=method, path=path, handler=handler, summary="", tag="")  # type: ignore[arg-type]


ROUTES = [
    route("GET", "/now", now),
    route("POST", "/now", now),
    route("POST", "/echo", echo),
    route("GET", "/later", later),
    route("GET", "/stream", stream),
    route("GET", "/items/{name}", item),
    route("GET", "/fault", fault),
    route("GET", "/later-fault", later_fault),
    route("GET", "/fault-amid-stream", fault_amid_stream),
]


@pytest.fixture
async def server(caplog: pytest.LogCaptureFixture) -> AsyncIterator[BareServer]:
    async with bare_server(ROUTES, max_body_bytes=1000) as bare:
        yield bare
    faults = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert all("fault failed" in f or "fault-amid-stream failed" in f for f in faults), faults


async def test_a_connection_is_kept_alive(server: BareServer) -> None:
    client = await server.connect()
    for _ in range(3):
        client.write(GET_NOW)
        answer = await client.answer()
        assert answer.json == {"path": "/now", "query": {"a": ["1"]}}
        assert "connection" not in answer.headers
        assert answer.headers["date"].endswith("GMT")
    assert len(server.connections.open) == 1


@pytest.mark.parametrize("request_bytes", [GET_NOW, POST_ECHO, CHUNKED_ECHO])
async def test_a_request_may_arrive_in_pieces_split_anywhere(
    server: BareServer, request_bytes: bytes
) -> None:
    client = await server.connect()
    client.write(request_bytes)
    whole = await client.answer()
    assert "x-request-id" not in whole.headers, "a trailer is no header"
    for at in range(1, len(request_bytes)):
        await client.write_slowly(request_bytes, at)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, whole.body), at
    for at in range(len(request_bytes)):
        client.write(request_bytes[at : at + 1])
        await asyncio.sleep(0)
    assert (await client.answer()).body == whole.body


async def test_pipelined_requests_are_answered_in_order(server: BareServer) -> None:
    client = await server.connect()
    slow = [b"GET /later?n=%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(3)]
    client.write(slow[0] + GET_NOW + slow[1] + POST_ECHO + CHUNKED_ECHO + slow[2] + GET_NOW)
    bodies = [(await client.answer()).body for _ in range(7)]
    assert [b"later" in body for body in bodies] == [True, False, True, False, False, True, False]
    assert [body for body in bodies if b"later" in body] == [
        b'{"later":{"n":["%d"]}}' % number for number in range(3)
    ]
    assert bodies[3:5] == [b"hello", b"hello"]


async def test_a_thousand_requests_in_one_segment_are_all_answered(server: BareServer) -> None:
    client = await server.connect()
    client.write(GET_NOW * 1000)
    for _ in range(1000):
        assert (await client.answer()).status == 200


async def test_a_refused_request_is_answered_in_its_turn_and_others_follow(
    server: BareServer,
) -> None:
    client = await server.connect()
    client.write(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n" + NOT_FOUND + GET_NOW)
    assert [(await client.answer()).status for _ in range(3)] == [200, 404, 200]
    client.write(NOT_FOUND + GET_NOW)
    assert [(await client.answer()).status for _ in range(2)] == [404, 200]


async def test_a_request_of_http_1_1_without_a_host_is_refused(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"GET /now HTTP/1.1\r\n\r\n" + GET_NOW)
    refusal = await client.answer()
    assert refusal.status == 400
    assert "Host" in refusal.json["error"]["message"]
    assert (await client.answer()).status == 200
    older = await server.connect()
    older.write(b"GET /now HTTP/1.0\r\n\r\n")
    assert (await older.answer()).status == 200


async def test_garbage_behind_good_requests_is_answered_last(server: BareServer) -> None:
    client = await server.connect()
    client.write(
        b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n"
        + GET_NOW
        + b"\x16\x03\x01 garbage\r\n\r\n"
        + GET_NOW
    )
    assert [(await client.answer()).status for _ in range(3)] == [200, 200, 400]
    assert await client.rest() == b""


async def test_what_follows_a_last_request_is_not_served(server: BareServer) -> None:
    for last in (CLOSE_NOW, b"GET /now HTTP/1.0\r\n\r\n"):
        client = await server.connect()
        client.write(last + GET_NOW)
        answer = await client.answer()
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert await client.rest() == b""


async def test_http_1_0_may_be_kept_alive_and_gets_no_chunks(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"GET /now HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert (await client.answer()).headers["connection"] == "keep-alive"
    client.write(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    answer = await client.answer()
    assert answer.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert answer.headers["connection"] == "close"
    assert "transfer-encoding" not in answer.headers


async def test_a_stream_is_chunked_and_the_connection_serves_on(server: BareServer) -> None:
    client = await server.connect()
    client.write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    for _ in range(2):
        answer = await client.answer()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_head_is_get_without_the_body(server: BareServer) -> None:
    client = await server.connect()
    head_now = b"HEAD /now HTTP/1.1\r\nHost: x\r\n\r\n"
    client.write(head_now + head_now.replace(b"/now", b"/nope") + GET_NOW)
    head = await client.answer(to_head=True)
    assert int(head.headers["content-length"]) > 0
    assert (await client.answer(to_head=True)).status == 404
    assert (await client.answer()).json["path"] == "/now"


async def test_a_client_that_expects_100_continue_is_told_or_refused(
    server: BareServer,
) -> None:
    client = await server.connect()
    head, _, body = POST_ECHO.partition(b"\r\n\r\n")
    client.write(head + b"\r\nExpect: 100-continue\r\n\r\n")
    assert (await client.answer()).status == 100
    client.write(body)
    assert (await client.answer()).body == b"hello"
    client.write(head.replace(b"/echo", b"/nope") + b"\r\nExpect: 100-continue\r\n\r\n")
    refusal = await client.answer()
    assert (refusal.status, refusal.headers["connection"]) == (404, "close")


@pytest.mark.parametrize("request_bytes", [GET_NOW, POST_ECHO])
async def test_a_client_that_would_rather_speak_http_2_is_served_http_1(
    server: BareServer, request_bytes: bytes
) -> None:
    client = await server.connect()
    line, _, rest = request_bytes.partition(b"\r\n")
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    client.write((line + b"\r\n" + upgrade + rest) * 500 + GET_NOW)
    for _ in range(501):
        assert (await client.answer()).status == 200


async def test_curl_is_served_with_any_version_of_http(server: BareServer) -> None:
    url = f"http://127.0.0.1:{server.port}/echo"
    for flags in (["--http2"], ["--http1.0"], ["--http1.1"], ["-H", "Expect: 100-continue"]):
        command = ["curl", "-sS", "-m", "5", *flags, "-d", "one", url, "--next", "-sS", url]
        curl = await asyncio.create_subprocess_exec(
            *command, "-d", "two", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(curl.communicate(), 10)
        assert output == b"onetwo", flags


async def test_a_target_may_be_absolute_and_its_path_encoded(server: BareServer) -> None:
    client = await server.connect()
    for target in (b"http://host:80/now?a=1", b"HTTPS://h/now?a=1", b"/n%6fw?a=1"):
        client.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        assert (await client.answer()).json["query"] == {"a": ["1"]}
    for target, name in ((b"a", "a"), (b"a%2Fb%20%C3%A9", "a/b é"), (b"org/m", "org/m")):
        client.write(b"GET /items/%b HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        assert (await client.answer()).json == {"name": name}
    client.write(b"GET /items/{name} HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await client.answer()).json == {"name": "{name}"}


async def test_an_unknown_route_names_the_nearest_and_a_wrong_method_the_right_ones(
    server: BareServer,
) -> None:
    client = await server.connect()
    client.write(b"GET /nwo HTTP/1.1\r\nHost: x\r\n\r\nDELETE /now HTTP/1.1\r\nHost: x\r\n\r\n")
    unknown, wrong = await client.answer(), await client.answer()
    assert (unknown.status, wrong.status) == (404, 405)
    assert "did you mean /now?" in unknown.error["message"]
    assert wrong.headers["allow"] == "GET, POST"
    client.write(b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"now" * 10000))
    long = await client.answer()
    assert long.status == 404
    assert len(long.body) < 1000


async def test_the_request_id_is_echoed_and_cannot_carry_another_header(
    server: BareServer,
) -> None:
    client = await server.connect()
    for value in (b"mine", "ü".encode("latin-1"), b"a: b; c=%0d%0aX-Evil: 1"):
        client.write(b"GET /now HTTP/1.1\r\nHost: x\r\nX-Request-ID: %b\r\n\r\n" % value)
        answer = await client.answer()
        assert answer.headers["x-request-id"].encode("latin-1") == value
        assert "x-evil" not in answer.headers
    client.write(b"GET /now HTTP/1.1\r\nHost: x\r\nX-Request-ID: %b\r\n\r\n" % (b"x" * 300))
    assert "x-request-id" not in (await client.answer()).headers
    for value in (b"a\rX-Evil: 1", b"a\nX-Evil: 1", b"a\r\n X-Evil: 1", b"a\0"):
        client = await server.connect()
        client.write(b"GET /now HTTP/1.1\r\nHost: x\r\nX-Request-ID: %b\r\n\r\n" % value)
        answer = await client.answer()
        assert answer.status == 400
        assert not {"x-evil", "x-request-id"} & set(answer.headers)


@pytest.mark.parametrize("path", ["fault", "later-fault"])
async def test_a_fault_of_ours_is_a_500_that_tells_nothing_of_the_inside(
    server: BareServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await server.connect()
    client.write(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await client.answer()
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert b"inside" not in answer.body
    assert "the inside" in caplog.text


async def test_a_fault_amid_a_stream_breaks_it_off_without_a_proper_end(
    server: BareServer,
) -> None:
    client = await server.connect()
    client.write(b"GET /fault-amid-stream HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await client.answer()
    await server.wait_for_connections(0)
