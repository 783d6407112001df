"""A shutdown is done once and wholly, however often and by whomever it is called; so is the
clean-up after a start that failed."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import pytest

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.engines.supervisor import EngineSupervisor
from frontend.errors import EngineDeadError, EngineStartupError
from frontend.sync.engine import Engine
from ipc.engine_config import EngineConfig
from tests.support.mock_fleet import mock_fleet, one_stream_each

LOCAL = EngineConfig(model="fake", runner="fake", max_model_len=512, num_gpu_blocks_override=64)


@pytest.fixture
def socket_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private directories are made during the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def num_entries(directory: Path) -> int:
    return len(list(directory.iterdir()))


async def test_L1_a_shutdown_that_is_given_up_still_ends_every_request() -> None:
    async with mock_fleet() as (frontend, [engine]):
        [(_, stream)] = await one_stream_each(frontend, [engine])
        with pytest.raises(TimeoutError):  # The engine does not confirm the end of its request.
            await asyncio.wait_for(frontend.shutdown(), 0.05)
        with pytest.raises(EngineDeadError):
            frontend.generate(prompt_token_ids=[1])
        result = await asyncio.wait_for(stream.result(), 5)
        assert (result.finish_reason, result.abort_cause) == ("abort", "shutdown")


async def test_L5_every_shutdown_returns_when_all_requests_have_ended() -> None:
    async with mock_fleet() as (frontend, [engine]):
        [(_, stream)] = await one_stream_each(frontend, [engine])
        first = asyncio.create_task(frontend.shutdown())
        await asyncio.sleep(0.05)
        await asyncio.wait_for(frontend.shutdown(), 5)
        assert frontend.num_live_requests == 0
        result = await asyncio.wait_for(stream.result(), 0.1)
        assert result.abort_cause == "shutdown"
        await asyncio.wait_for(first, 0.1)


def test_L11_shutdowns_on_several_threads_leave_no_sockets_behind(
    socket_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(config=FrontendConfig(engine=LOCAL))
    assert num_entries(socket_directories) == 1
    slowly_ending, terminate = threading.Event(), EngineSupervisor.terminate

    def terminate_slowly(supervisor: EngineSupervisor) -> None:
        slowly_ending.set()
        threading.Event().wait(1.5)  # Longer than a loop thread that was stopped waits for tasks.
        terminate(supervisor)

    monkeypatch.setattr(EngineSupervisor, "terminate", terminate_slowly)
    threads = [threading.Thread(target=engine.shutdown) for _ in range(3)]
    threads[0].start()
    assert slowly_ending.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert num_entries(socket_directories) == 0


async def test_L11_a_start_that_times_out_leaves_nothing_behind(
    socket_directories: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may_tell, describe_exit = threading.Event(), EngineSupervisor.describe_exit

    def describe_later(supervisor: EngineSupervisor, rank: int, returncode: int) -> str:
        assert may_tell.wait(30)
        return describe_exit(supervisor, rank, returncode)

    monkeypatch.setattr(EngineSupervisor, "describe_exit", describe_later)
    with pytest.raises(EngineStartupError, match="not ready"):
        await asyncio.wait_for(
            AsyncEngine.start(FrontendConfig(engine=LOCAL, startup_timeout_s=0.01)), 30
        )
    assert num_entries(socket_directories) == 0
    may_tell.set()
    await asyncio.sleep(0.2)
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.getMessage()]


async def test_L11_a_start_that_is_cancelled_twice_leaves_no_sockets_behind(
    socket_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, may_end, terminate = threading.Event(), threading.Event(), EngineSupervisor.terminate

    def terminate_later(supervisor: EngineSupervisor) -> None:
        ending.set()
        assert may_end.wait(10)
        terminate(supervisor)

    monkeypatch.setattr(EngineSupervisor, "terminate", terminate_later)
    starting = asyncio.create_task(AsyncEngine.start(FrontendConfig(engine=LOCAL)))
    await asyncio.sleep(0.05)
    starting.cancel()
    assert await asyncio.to_thread(ending.wait, 10)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert num_entries(socket_directories) == 0
    may_end.set()
    await asyncio.sleep(0)
