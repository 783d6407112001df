"""Handshakes that go wrong, and front ends that come up all the same or say what is missing."""

from __future__ import annotations

import asyncio

import pytest

from frontend.async_engine import AsyncEngine
from frontend.errors import EngineStartupError
from ipc.codec import pack
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import assert_serves, mock_fleet_config, one_stream_each


async def test_L12_a_repeated_hello_is_refused_and_disturbs_neither_start_nor_service(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = mock_fleet_config(1)
    starting = asyncio.create_task(AsyncEngine.start(config))
    engine = MockEngine(config.handshake_tcp_address)
    second = MockEngine(config.handshake_tcp_address)
    try:
        await engine.say("HELLO")
        init = await engine.receive_init()
        await engine.say("HELLO")
        engine.connect(init)
        await engine.register()
        await engine.say("READY")
        frontend = await asyncio.wait_for(starting, 10)
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        await second.say("HELLO")
        with pytest.raises(TimeoutError):
            await second.receive_init(timeout_s=0.2)
        await assert_serves(engine, request_id, stream)
        await frontend.shutdown()
    finally:
        starting.cancel()
        await engine.vanish()
        await second.vanish()
    assert sum("HELLO again" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("payload", [b"", b"\xc1", pack({}), pack({"max_model_len": "long"})])
async def test_L12_an_engine_that_registers_wrongly_may_try_again(payload: bytes) -> None:
    config = mock_fleet_config(1)
    starting = asyncio.create_task(AsyncEngine.start(config))
    engine = MockEngine(config.handshake_tcp_address)
    try:
        await engine.say("HELLO")
        engine.connect(await engine.receive_init())
        await engine.register(payload)
        await asyncio.sleep(0.1)
        assert not starting.done()
        await engine.register()
        await engine.say("READY")
        frontend = await asyncio.wait_for(starting, 10)
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        await assert_serves(engine, request_id, stream)
        await frontend.shutdown()
    finally:
        starting.cancel()
        await engine.vanish()


async def test_L12_an_engine_with_an_unexpected_rank_does_not_disturb_the_start() -> None:
    config = mock_fleet_config(1)
    starting = asyncio.create_task(AsyncEngine.start(config))
    stranger = MockEngine(config.handshake_tcp_address, rank=5)
    engine = MockEngine(config.handshake_tcp_address)
    try:
        await stranger.say("HELLO")
        await engine.start()
        frontend = await asyncio.wait_for(starting, 10)
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        await assert_serves(engine, request_id, stream)
        await frontend.shutdown()
    finally:
        starting.cancel()
        await stranger.vanish()
        await engine.vanish()


async def test_L12_a_start_without_engines_fails_in_time_and_says_which_is_missing() -> None:
    config = mock_fleet_config(2, startup_timeout_s=0.5)
    engine = MockEngine(config.handshake_tcp_address, rank=0)
    starting = asyncio.create_task(AsyncEngine.start(config))
    try:
        await engine.start()
        with pytest.raises(EngineStartupError, match="engines 1 "):
            await asyncio.wait_for(starting, 5)
    finally:
        await engine.vanish()


async def test_the_smallest_context_of_all_engines_is_the_limit_of_prompts() -> None:
    config = mock_fleet_config(2)
    engines = [
        MockEngine(config.handshake_tcp_address, rank=rank, registration={"max_model_len": length})
        for rank, length in enumerate((4096, 512))
    ]
    starting = asyncio.create_task(AsyncEngine.start(config))
    try:
        for engine in engines:
            await engine.start()
        frontend = await asyncio.wait_for(starting, 10)
        assert frontend.max_model_len == 512
        await frontend.shutdown()
    finally:
        starting.cancel()
        for engine in engines:
            await engine.vanish()
