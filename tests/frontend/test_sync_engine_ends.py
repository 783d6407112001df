"""The end of a synchronous engine: shutdown, the death of its process, the end of the program."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.errors import EngineDeadError
from frontend.sync.engine import Engine
from tests.support.sync_engines import (
    ENDLESS,
    WAIT_S,
    fake_config,
    num_running_in_engine,
    wait_until,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def own_engine() -> Iterator[Engine]:
    with Engine(config=fake_config()) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        yield threads


def test_L1_shutdown_ends_every_waiting_call_with_what_it_has(
    own_engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    calls = [pool.submit(own_engine.generate, None, ENDLESS, [[n], [n + 1]]) for n in range(1, 5)]
    stream = own_engine.generate(input_ids=[5], sampling_params=ENDLESS, stream=True)
    next(stream)
    reader = pool.submit(list, own_engine.generate(None, ENDLESS, [6], stream=True))
    wait_until(lambda: num_running_in_engine(own_engine) == 10)
    own_engine.shutdown()
    results = [result for call in calls for result in call.result(WAIT_S)]
    results += [reader.result(WAIT_S)[-1], list(stream)[-1]]
    for result in results:
        assert result["meta_info"]["finish_reason"]["abort_cause"] == "shutdown"
    assert results[-1]["output_ids"] == expected_tokens([5], len(results[-1]["output_ids"]))


def test_after_shutdown_calls_are_refused_and_another_shutdown_does_nothing(
    own_engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    for future in [pool.submit(own_engine.shutdown) for _ in range(4)]:
        future.result(WAIT_S)
    own_engine.shutdown()
    assert not own_engine.is_healthy
    for stream in (False, True):
        with pytest.raises(EngineDeadError, match="shut down"):
            own_engine.generate(input_ids=[1], stream=stream)
    with pytest.raises(EngineDeadError, match="shut down"):
        own_engine.abort_request(abort_all=True)
    with pytest.raises(EngineDeadError, match="shut down"):
        asyncio.run(own_engine.async_generate(input_ids=[1]))


def test_L12_the_death_of_the_engine_process_ends_a_call_with_its_partial_tokens(
    own_engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    call = pool.submit(own_engine.generate, None, ENDLESS, [5])
    wait_until(lambda: num_running_in_engine(own_engine) == 1)
    time.sleep(0.05)
    os.kill(own_engine._engine._supervisor.pid(0), signal.SIGKILL)
    result = call.result(WAIT_S)
    finish_reason = result["meta_info"]["finish_reason"]
    assert (finish_reason["type"], finish_reason["status_code"]) == ("abort", 500)
    assert finish_reason["err_type"] == "engine_dead"
    assert result["output_ids"] == expected_tokens([5], len(result["output_ids"]))
    assert result["output_ids"]


def test_a_program_that_never_shuts_down_ends_and_leaves_nothing_running() -> None:
    program = """
        import threading
        from caesura import Engine, EngineConfig, FrontendConfig

        config = EngineConfig(model="fake", runner="fake", max_model_len=4096, fake_step_time_ms=2)
        engine = Engine(config=FrontendConfig(engine=config))
        endless = {"max_new_tokens": None}
        for _ in range(3):
            waiting = lambda: engine.generate(None, endless, [5])
            threading.Thread(target=waiting, daemon=True).start()
        next(engine.generate(None, endless, [5], stream=True))
        print(engine._engine._supervisor.pid(0))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    pid = int(ended.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_an_engine_that_cannot_start_says_so_and_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="no/such/model"):
        Engine(model_path="/no/such/model")
    assert threading.active_count() == before
