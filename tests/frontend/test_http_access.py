"""Who may call what: every combination of keys, routes and peers."""

from __future__ import annotations

import asyncio
import logging

import pytest

from frontend.http import connection, sockets
from frontend.http import router as router_module
from frontend.http.access import Access, AccessRules
from frontend.http.exchange import Exchange
from frontend.http.router import Route
from ipc.logs import RateLimitedLog
from tests.support.bare_server import bare_server
from tests.support.event_loops import event_loop_policy

__all__ = ["event_loop_policy"]
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

API, ADMIN = "api-secret", "admin-secret"
handled: list[str] = []


def note(exchange: Exchange) -> None:
    handled.append(exchange.path)
    exchange.respond_json({})


ROUTES = [
    Route(method="POST", path=f"/{access.value}", handler=note, summary="", tag="", access=access)
    for access in Access
]

# (API key, admin key, is the peer local) → what (nobody, the API key, the admin key) get of the
# clients' routes, and of the control routes.
MATRIX: dict[tuple[str | None, str | None, bool], tuple[list[int], list[int]]] = {
    (None, None, True): ([200, 200, 200], [200, 200, 200]),
    (None, None, False): ([200, 200, 200], [403, 403, 403]),
    (API, None, True): ([401, 200, 401], [401, 200, 401]),
    (API, None, False): ([401, 200, 401], [401, 200, 401]),
    (None, ADMIN, True): ([200, 200, 200], [401, 401, 200]),
    (None, ADMIN, False): ([200, 200, 200], [401, 401, 200]),
    (API, ADMIN, True): ([401, 200, 200], [401, 403, 200]),
    (API, ADMIN, False): ([401, 200, 200], [401, 403, 200]),
}


def post(path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here:8000", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize(("api_key", "admin_key", "is_local"), list(MATRIX))
async def test_each_route_is_for_those_whom_it_is_for(
    api_key: str | None, admin_key: str | None, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "peer_is_local", lambda transport: is_local)
    handled.clear()
    async with bare_server(ROUTES, AccessRules(api_key, admin_key)) as server:
        client = await server.connect()
        given = [[], [f"Authorization: Bearer {API}"], [f"authorization: bearer {ADMIN}"]]
        statuses: dict[str, list[int]] = {}
        for access in Access:
            for headers in given:
                client.write(post(f"/{access.value}", *headers))
                answer = await client.answer()
                statuses.setdefault(access.value, []).append(answer.status)
                assert ("www-authenticate" in answer.headers) == (answer.status == 401)
        of_client, of_admin = MATRIX[api_key, admin_key, is_local]
        assert statuses == {"open": [200, 200, 200], "client": of_client, "admin": of_admin}
        assert len(handled) == sum(statuses[key].count(200) for key in statuses)


@pytest.mark.parametrize(
    "given",
    [
        "",
        API,
        f"Basic {API}",
        f"Bearer {API}x",
        f"Bearer x{API}",
        "Bearer \xfc",
        "Bearer",
    ],
)
async def test_what_is_not_exactly_the_key_opens_nothing(
    given: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with bare_server(ROUTES, AccessRules(API, None)) as server:
        client = await server.connect()
        client.write(post("/client", f"Authorization: {given}"))
        answer = await client.answer()
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
        assert API not in answer.body.decode()
    assert API not in caplog.text


@pytest.mark.parametrize(
    ("rules", "path", "status"),
    [(AccessRules(API, None), "/client", 401), (AccessRules(None, None), "/admin", 403)],
)
async def test_a_refusal_does_not_wait_for_the_body(
    rules: AccessRules, path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "peer_is_local", lambda transport: False)
    handled.clear()
    async with bare_server(ROUTES, rules) as server:
        client = await server.connect()
        request = post(path, body=b"x" * 1000)
        client.write(request[:-1000])
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        client.write(b"x" * 1000 + post("/open"))
        assert await client.rest() == b""
    assert not handled


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("X-Forwarded-For: 203.0.113.5", 403),
        ("Forwarded: for=203.0.113.5", 403),
        ("Origin: http://elsewhere.example", 403),
        ("Origin: null", 403),
        ("Origin: http://here:8000", 200),
        ("X-Other: 1", 200),
    ],
)
async def test_a_proxy_or_a_web_page_on_this_machine_speaks_for_others(
    header: str, status: int
) -> None:
    async with bare_server(ROUTES) as server:
        client = await server.connect()
        client.write(post("/admin", header) + post("/client", header))
        assert [(await client.answer()).status for _ in range(2)] == [status, 200]


async def test_a_refusal_is_logged_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    router_module._refusals = RateLimitedLog(router_module.logger)
    async with bare_server(ROUTES, AccessRules(API, ADMIN)) as server:
        client = await server.connect()
        client.write(post("/admin", f"Authorization: Bearer {API}"))
        assert "admin key" in (await client.answer()).error["message"]
    assert "refused POST /admin with 403" in caplog.text
    assert API not in caplog.text


class Peer(asyncio.Transport):
    def __init__(self, address: object) -> None:
        super().__init__({"peername": address})


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        (("127.0.0.1", 5), True),
        (("127.8.8.8", 5), True),
        (("::1", 5, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), True),
        (("::ffff:10.0.0.1", 5, 0, 0), False),
        (("10.127.0.1", 5), False),
        (("fe80::1", 5, 0, 0), False),
        ("", True),
    ],
)
def test_loopback_addresses_and_unix_sockets_are_this_machine(
    address: object, is_local: bool
) -> None:
    assert sockets.peer_is_local(Peer(address)) == is_local
