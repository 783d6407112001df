"""Aborts through the synchronous engine: explicit ones, dropped streams, Ctrl-C."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.errors import InvalidRequestError
from frontend.sync.engine import Engine
from tests.support.sync_engines import (
    ENDLESS,
    WAIT_S,
    assert_nothing_runs,
    fake_config,
    num_live_requests,
    num_running_in_engine,
    wait_until,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(config=fake_config()) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        yield threads


def test_L2_an_aborted_request_returns_what_it_has(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    future = pool.submit(engine.generate, None, ENDLESS, [5], rid="victim")
    wait_until(lambda: num_running_in_engine(engine) == 1)
    receipt = engine.abort_request("victim")
    result = future.result(WAIT_S)
    assert receipt is not None
    assert receipt.requests["victim"].status == "aborted"
    assert receipt.requests["victim"].num_output_tokens == len(result["output_ids"])
    assert result["output_ids"] == expected_tokens([5], len(result["output_ids"]))
    assert result["meta_info"]["finish_reason"]["type"] == "abort"
    assert result["meta_info"]["finish_reason"]["abort_cause"] == "explicit"


def test_L3_the_id_of_a_list_aborts_its_children_and_nobody_else(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    batch = pool.submit(engine.generate, None, ENDLESS, [[5], [6]], rid="x")
    bystanders = [
        pool.submit(engine.generate, None, ENDLESS, [7], rid="xy"),
        pool.submit(engine.generate, None, ENDLESS, [[8], [9]], rid="x_"),
    ]
    wait_until(lambda: num_live_requests(engine) == 5)
    receipt = engine.abort_request("x")
    assert receipt is not None
    assert set(receipt.requests) == {"x_0", "x_1"}
    results = batch.result(WAIT_S)
    assert [r["meta_info"]["finish_reason"]["type"] for r in results] == ["abort", "abort"]
    assert num_live_requests(engine) == 3
    assert not any(bystander.done() for bystander in bystanders)
    engine.abort_request(["xy", "x_"])
    concurrent.futures.wait(bystanders, WAIT_S)
    assert_nothing_runs(engine)


def test_L3_a_prefix_or_a_tag_aborts_only_if_it_is_said_to_be_one(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    for rid, tags in (("job-1", ["day"]), ("job-2", ["night"]), ("other", ["night"])):
        pool.submit(engine.generate, None, ENDLESS, [5], rid=rid, tags=tags)
    pool.submit(engine.generate, None, ENDLESS | {"n": 2}, [5], rid="twins")
    wait_until(lambda: num_live_requests(engine) == 5)

    def aborted(rid: str = "", **selector: Any) -> set[str]:
        receipt = engine.abort_request(rid, **selector)
        assert receipt is not None
        return {name for name, each in receipt.requests.items() if each.status == "aborted"}

    assert aborted("job-") == set()
    assert aborted("twins") == {"twins_0", "twins_1"}
    assert aborted("job-", prefix=True) == {"job-1", "job-2"}
    assert aborted(tag="night") == {"other"}
    with pytest.raises(InvalidRequestError, match="not both"):
        engine.abort_request("a", tag="night")
    assert_nothing_runs(engine)


def test_L6_abort_all_ends_everything_and_overrides_rid(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    futures = [pool.submit(engine.generate, None, ENDLESS, [n], rid=f"r{n}") for n in range(1, 9)]
    wait_until(lambda: num_live_requests(engine) == 8)
    receipt = engine.abort_request("r1", abort_all=True)
    assert receipt is not None
    assert receipt.num_aborted == 8
    for future in futures:
        assert future.result(WAIT_S)["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 1})["output_ids"]


def test_an_abort_without_a_selector_does_nothing_and_says_so(
    engine: Engine,
    pool: concurrent.futures.ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    future = pool.submit(engine.generate, None, {"max_new_tokens": 20}, [5])
    assert engine.abort_request() is None
    assert "nothing was aborted" in caplog.text
    assert future.result(WAIT_S)["meta_info"]["finish_reason"]["type"] == "length"


def test_L8_aborting_an_unknown_request_is_harmless(engine: Engine) -> None:
    receipt = engine.abort_request("nobody")
    assert receipt is not None
    assert receipt.requests["nobody"].status == "unknown"


def test_L7_a_stream_that_is_closed_or_forgotten_ends_in_the_engine(engine: Engine) -> None:
    closed = engine.generate(input_ids=[5], sampling_params=ENDLESS, stream=True)
    next(closed)
    closed.close()
    assert_nothing_runs(engine)
    for result in engine.generate(input_ids=[5], sampling_params=ENDLESS, stream=True):
        if len(result["output_ids"]) > 3:
            break
    assert_nothing_runs(engine)
    engine.generate(input_ids=[5], sampling_params=ENDLESS, stream=True)  # never read
    assert_nothing_runs(engine)


async def test_L7_a_cancelled_task_ends_its_request(engine: Engine) -> None:
    task = asyncio.create_task(engine.async_generate(input_ids=[5], sampling_params=ENDLESS))
    await asyncio.to_thread(wait_until, lambda: num_live_requests(engine) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = await engine.async_generate(input_ids=[[5], [6]], sampling_params=ENDLESS, stream=True)
    await anext(stream)
    await stream.aclose()
    await asyncio.to_thread(assert_nothing_runs, engine)


def test_ctrl_c_ends_the_request_that_the_main_thread_waits_for(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    other = pool.submit(engine.generate, None, ENDLESS, [6], rid="other")
    for stream in (False, True):

        def interrupt() -> None:
            wait_until(lambda: num_running_in_engine(engine) == 2)
            main_thread = threading.main_thread().ident
            assert main_thread is not None
            signal.pthread_kill(main_thread, signal.SIGINT)

        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(input_ids=[5], sampling_params=ENDLESS, stream=stream))
        wait_until(lambda: num_running_in_engine(engine) == 1)
    assert not other.done()
    engine.abort_request("other")
    assert other.result(WAIT_S)["meta_info"]["finish_reason"]["type"] == "abort"
