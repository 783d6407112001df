"""A client that goes away takes its requests with it, at every stage, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from frontend.async_engine import AsyncEngine
from frontend.http.connection import Connection
from ipc.lifecycle import AbortReceipt, RequestReceipt
from ipc.output import FinishReason
from tests.support.event_loops import event_loop_policy
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet
from tests.support.served_engine import (
    PROMPT,
    ServedEngine,
    fake,
    post_bytes,
    reset,
    served_engine,
    serving,
)

__all__ = ["event_loop_policy"]
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

COMPLETIONS = "/v1/completions"
QUIET_S = 0.03
WAYS: dict[str, Callable[[socket.socket], None]] = {
    "FIN": lambda connection: connection.close(),
    "RST": reset,
    "half-close": lambda connection: connection.shutdown(socket.SHUT_WR),
}
each_way = pytest.mark.parametrize("hang_up", WAYS.values(), ids=list(WAYS))
streaming_or_not = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@asynccontextmanager
async def served_mocks(
    num_engines: int = 1,
) -> AsyncIterator[tuple[ServedEngine, list[MockEngine]]]:
    """A server over scripted engines. It must end as it began: with no task and no request."""
    async with mock_fleet(num_engines) as (frontend, engines):
        async with serving(frontend) as served:
            await served.http.get("/health")
            tasks = asyncio.all_tasks()
            yield served, engines
            await served.wait_for_live_requests(0)
            async with asyncio.timeout(2):
                while asyncio.all_tasks() - tasks:  # noqa: ASYNC110  # no event to await
                    await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def nothing_is_wrong(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    records = caplog.get_records("call")
    assert not [record.getMessage() for record in records if record.levelno > logging.WARNING]


@pytest.fixture
def drops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests left the front end within each callback that told of a hang-up."""
    heard: list[int] = []
    accept = AsyncEngine.accept
    engines: list[AsyncEngine] = []

    def remember(engine: AsyncEngine, requests: list) -> list:  # type: ignore[type-arg]
        engines.append(engine)
        return accept(engine, requests)

    def counted(name: str) -> Callable[..., object]:
        original = getattr(Connection, name)

        def callback(connection: Connection, *arguments: object) -> object:
            before = engines[-1].num_live_requests if engines else 0
            result = original(connection, *arguments)
            if engines and before - engines[-1].num_live_requests:
                heard.append(before - engines[-1].num_live_requests)
            return result

        return callback

    monkeypatch.setattr(AsyncEngine, "accept", remember)
    for name in ("eof_received", "connection_lost"):
        monkeypatch.setattr(Connection, name, counted(name))
    return heard


@each_way
@streaming_or_not
@pytest.mark.parametrize("n", [1, 3])
async def test_L4_L7_a_hang_up_ends_its_requests_within_the_callback_and_with_one_frame(
    drops: list[int], hang_up: Callable[[socket.socket], None], stream: bool, n: int
) -> None:
    async with served_mocks() as (served, [engine]):
        with await served.connect() as client:
            body = {"prompt": PROMPT, "max_tokens": 100, "stream": stream, "n": n}
            await served.post(client, COMPLETIONS, body)
            adds = [await engine.next_add() for _ in range(n)]
            for add in adds:
                await engine.send_tokens(add.request_id, [65, 66])
            if stream:
                await served.receive_until(client, b"data: ")
            hang_up(client)
            await served.wait_for_live_requests(0)
            assert drops == [n]
            assert await engine.next_abort() == [add.request_id for add in adds]
            await engine.expect_silence(QUIET_S)


async def test_L7_the_drops_of_one_turn_are_exactly_one_frame(drops: list[int]) -> None:
    async with served_mocks() as (served, [engine]):
        clients = [await served.connect() for _ in range(30)]
        for client in clients:
            await served.post(client, COMPLETIONS, {"prompt": PROMPT, "stream": True})
        ids = [(await engine.next_add()).request_id for _ in clients]
        for number, client in enumerate(clients):
            list(WAYS.values())[number % 3](client)
        assert sorted(await engine.next_abort()) == sorted(ids)
        await engine.expect_silence(QUIET_S)
        assert drops == [1] * 30
        for client in clients:
            client.close()


async def test_L7_a_storm_of_resets_is_a_frame_or_two_for_each_engine() -> None:
    async with served_mocks(2) as (served, engines):
        clients = [await served.connect() for _ in range(300)]
        for client in clients:
            await served.post(client, COMPLETIONS, {"prompt": PROMPT, "stream": True})
        await served.wait_for_live_requests(300)
        async with asyncio.timeout(5):
            while sum(len(engine.adds) for engine in engines) < 300:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for engine in engines:
            for add in engine.adds:
                await engine.send_tokens(add.request_id, [65])
        await asyncio.sleep(0.05)
        for client in clients:
            reset(client)
        await served.wait_for_live_requests(0)
        await asyncio.sleep(0.05)
        for engine in engines:
            assert 1 <= len(engine.aborts) <= 3
            aborted = [request_id for frame in engine.aborts for request_id in frame]
            assert sorted(aborted) == sorted(add.request_id for add in engine.adds)


@each_way
@streaming_or_not
async def test_L4_L11_hang_ups_of_queued_and_running_requests_give_all_blocks_back(
    hang_up: Callable[[socket.socket], None], stream: bool
) -> None:
    config = fake(fake_step_time_ms=5, max_num_seqs=1)
    async with served_engine(config) as served:
        body = {"prompt": PROMPT, "max_tokens": 4000, "stream": stream}
        clients = [await served.connect() for _ in range(2)]
        for client in clients:
            await served.post(client, COMPLETIONS, body)
        await served.wait_for_live_requests(2)
        async with asyncio.timeout(5):
            while True:
                [status] = (await served.engine.status()).values()
                if (status.num_running, status.num_waiting) == (1, 1):
                    break
        hang_up(clients[1])
        await served.wait_for_live_requests(1)
        hang_up(clients[0])
        await served.wait_until_idle(timeout_s=1.0)
        [status] = (await served.engine.status()).values()
        assert status.num_free_blocks + status.num_cached_blocks == status.num_blocks
        assert status.counters["requests_aborted"] == 2
        for client in clients:
            client.close()


@streaming_or_not
async def test_L4_a_hang_up_amid_a_prefill_ends_it(stream: bool) -> None:
    config = fake(fake_step_time_ms=20, max_num_batched_tokens=16, max_num_seqs=4)
    async with served_engine(config) as served:
        with await served.connect() as client:
            body = {"prompt": [9] * 3000, "max_tokens": 9, "stream": stream}
            await served.post(client, COMPLETIONS, body)
            await served.wait_for_live_requests(1)
            await asyncio.sleep(0.05)
            [live] = await served.engine.list_requests()
            assert live.stage == "prefill"
        await served.wait_until_idle(timeout_s=1.0)


@each_way
async def test_L4_a_hang_up_while_a_long_text_is_tokenized_reaches_no_engine(
    hang_up: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served_mocks() as (served, [engine]):
        may_go_on = threading.Event()
        tokenizer = served.engine.tokenizer
        assert tokenizer is not None
        encode = type(tokenizer).encode

        def encode_slowly(*arguments: object, **options: object) -> object:
            may_go_on.wait(5)
            return encode(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(type(tokenizer), "encode", encode_slowly)
        with await served.connect() as client:
            await served.post(client, COMPLETIONS, {"prompt": "word " * 3000})
            await served.wait_for_live_requests(1)
            hang_up(client)
            await served.wait_for_live_requests(0)
            may_go_on.set()
            await engine.expect_silence(0.1)


@each_way
async def test_L4_a_hang_up_while_its_body_arrives_leaves_nothing(
    hang_up: Callable[[socket.socket], None],
) -> None:
    async with served_mocks() as (served, [engine]):
        request = post_bytes(COMPLETIONS, {"prompt": PROMPT})
        for part in (request[:10], request[:-5]):
            with await served.connect() as client:
                await served.send(client, part)
                await asyncio.sleep(0.01)
                hang_up(client)
                await engine.expect_silence(QUIET_S)


@each_way
@streaming_or_not
async def test_L4_pipelined_requests_of_a_client_that_hung_up_never_begin(
    hang_up: Callable[[socket.socket], None], stream: bool
) -> None:
    async with served_mocks() as (served, [engine]):
        with await served.connect() as client:
            request = post_bytes(COMPLETIONS, {"prompt": PROMPT, "stream": stream})
            await served.send(client, request * 3)
            first = await engine.next_add()
            await engine.send_tokens(first.request_id, [65], finish=FinishReason.LENGTH)
            second = await engine.next_add()
            hang_up(client)
            assert await engine.next_abort() == [second.request_id]
            await engine.expect_silence(QUIET_S)


@streaming_or_not
async def test_L4_a_hang_up_between_two_pipelined_requests_does_not_begin_the_second(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one is answered, and the hang-up heard before the other one's turn of the loop."""
    answered = Connection.on_answered

    def hang_up_when_answered(connection: Connection, exchange: object) -> None:
        answered(connection, exchange)  # type: ignore[arg-type]
        connection.eof_received()

    async with served_mocks() as (served, [engine]):
        with await served.connect() as client:
            request = post_bytes(COMPLETIONS, {"prompt": PROMPT, "stream": stream})
            await served.send(client, request * 2)
            first = await engine.next_add()
            monkeypatch.setattr(Connection, "on_answered", hang_up_when_answered)
            await engine.send_tokens(first.request_id, [65], finish=FinishReason.LENGTH)
            assert b"length" in await served.receive_all(client)
            await engine.expect_silence(QUIET_S)


@pytest.mark.parametrize("way", ["half-close", "RST"])
async def test_L5_a_control_call_whose_client_hangs_up_takes_effect_and_is_answered(
    way: str,
) -> None:
    async with served_mocks() as (served, [engine]):
        reading = asyncio.create_task(served.http.post(COMPLETIONS, json={"prompt": PROMPT}))
        request_id = (await engine.next_add()).request_id
        with await served.connect() as client:
            await served.post(client, "/v1/abort", {"abort_all": True})
            call = await engine.next_utility()
            WAYS[way](client)
            await asyncio.sleep(0.02)
            await engine.send_tokens(request_id, [], finish=FinishReason.ABORT)
            receipts = {request_id: RequestReceipt("aborted", 0, "decode")}
            await engine.reply(call, AbortReceipt(receipts, 1, 0).to_wire())
            if way == "half-close":
                answer = await served.receive_all(client)
                assert answer.startswith(b"HTTP/1.1 200 OK")
                assert b"connection: close" in answer
                assert b'"num_aborted":1' in answer
        [choice] = (await reading).json()["choices"]
        assert choice["finish_reason"] == "abort"
