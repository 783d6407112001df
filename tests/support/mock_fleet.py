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
