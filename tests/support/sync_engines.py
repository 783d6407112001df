"""Synchronous engines over real engine processes whose tokens are arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable

from frontend.config import FrontendConfig
from frontend.sync.engine import Engine
from ipc.engine_config import EngineConfig

MAX_MODEL_LEN = 4096
ENDLESS = {"max_new_tokens": None, "ignore_eos": True}
WAIT_S = 20.0


def fake_config(step_time_ms: float = 2.0) -> FrontendConfig:
    """An endless request takes several seconds, so a test that aborts it cannot lose the race."""
    return FrontendConfig(
        engine=EngineConfig(
            model="fake",
            runner="fake",
            max_model_len=MAX_MODEL_LEN,
            fake_step_time_ms=step_time_ms,
        )
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def num_live_requests(engine: Engine) -> int:
    return engine._engine.num_live_requests


def num_running_in_engine(engine: Engine) -> int:
    status = engine._loop_thread.run(engine._engine.status())
    return sum(each.num_running + each.num_waiting for each in status.values())


def assert_nothing_runs(engine: Engine) -> None:
    wait_until(lambda: num_live_requests(engine) == 0)
    wait_until(lambda: num_running_in_engine(engine) == 0)
