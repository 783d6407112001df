"""A Caesura front end over scripted engines: the stage of the front-end tests.

    async with mock_fleet(3) as (frontend, engines):
        stream = frontend.generate(prompt_token_ids=[1, 2, 3])

The engines are started by "others" (`data_parallel_size_local=0`), so they dial a TCP port.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.output import FinishReason
from tests.support.mock_engine import MockEngine

START_TIMEOUT_S = 20.0


def free_tcp_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def mock_fleet_config(
    num_engines: int, *, startup_timeout_s: float = START_TIMEOUT_S, **options: Any
) -> FrontendConfig:
    """A front end that waits for `num_engines` engines which others start."""
    return FrontendConfig(
        data_parallel_size=num_engines,
        data_parallel_size_local=0,
        data_parallel_rpc_port=free_tcp_port(),
        startup_timeout_s=startup_timeout_s,
        **options,
    )


@contextlib.asynccontextmanager
async def mock_fleet(
    num_engines: int = 1, *, caesura: bool = True, **options: Any
) -> AsyncIterator[tuple[AsyncEngine, list[MockEngine]]]:
    """Start both sides; `options` are fields of FrontendConfig. Both end with the context."""
    config = mock_fleet_config(num_engines, **options)
    engines = [
        MockEngine(config.handshake_tcp_address, rank=rank, caesura=caesura)
        for rank in range(num_engines)
    ]
    async with asyncio.timeout(START_TIMEOUT_S):
        starting = asyncio.create_task(AsyncEngine.start(config))
        await asyncio.gather(*(engine.start() for engine in engines))
        frontend = await starting
    try:
        yield frontend, engines
    finally:
        async with asyncio.timeout(START_TIMEOUT_S):
            for engine in engines:
                await engine.die()  # So that the front end need not wait for answers.
            await frontend.shutdown()
            for engine in engines:
                await engine.vanish()


async def one_stream_each(
    frontend: AsyncEngine, engines: list[MockEngine]
) -> list[tuple[str, RequestStream]]:
    """For each engine one stream that has delivered the tokens 7 and 8: (internal id, stream)."""
    streams = {}
    for index in range(len(engines)):
        name = f"stream-{index}"
        streams[name] = frontend.generate(
            prompt_token_ids=[1, 2],
            request_id=name,
            sampling_params=SamplingParams(max_tokens=100),
        )
    opened = []
    for engine in engines:
        request = await engine.next_add()
        assert request.external_req_id is not None
        stream = streams[request.external_req_id]
        await engine.send_tokens(request.request_id, [7, 8])
        assert list((await asyncio.wait_for(anext(stream), 5)).token_ids) == [7, 8]
        opened.append((request.request_id, stream))
    return opened


async def assert_serves(engine: MockEngine, request_id: str, stream: RequestStream) -> None:
    """The engine's request goes on, and ends as if nothing had happened."""
    await engine.send_tokens(request_id, [9], finish=FinishReason.LENGTH)
    result = await asyncio.wait_for(stream.result(), 5)
    assert result.finish_reason == "length"
