"""The synchronous engine, over a real engine process whose tokens are arithmetic."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.config import FrontendConfig
from frontend.errors import (
    DuplicateRequestIdError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
)
from frontend.sampling_params import SamplingParams
from frontend.sglang.calls import SamplingArgument
from frontend.sync.engine import Engine
from ipc.engine_config import EngineConfig

REPOSITORY = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(config=fake_config()) as running:
        yield running


@pytest.fixture
def own_engine() -> Iterator[Engine]:
    """For tests that end it."""
    with Engine(config=fake_config()) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        yield threads


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


# -- results ---------------------------------------------------------------------------------------


def test_one_prompt_gives_one_dictionary(engine: Engine) -> None:
    result = engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 4}, rid="one")
    assert result["output_ids"] == expected_tokens([5, 6, 7], 4)
    meta_info = result["meta_info"]
    assert 0 < meta_info.pop("e2e_latency") < WAIT_S
    assert meta_info == {
        "id": "one",
        "finish_reason": {"type": "length", "length": 4},
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "weight_version": "default",
    }


def test_a_list_of_prompts_gives_a_list_in_its_order(engine: Engine) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    params: list[SamplingArgument] = [
        {"max_new_tokens": 3},
        SamplingParams(max_tokens=2),
        {"max_new_tokens": 1},
    ]
    results = engine.generate(input_ids=prompts, sampling_params=params)
    for prompt, num_tokens, result in zip(prompts, (3, 2, 1), results, strict=True):
        assert result["output_ids"] == expected_tokens(prompt, num_tokens)
    assert engine.generate(input_ids=[[9]], sampling_params={"max_new_tokens": 1})[0]
    assert engine.generate(prompt=[]) == []


def test_without_parameters_128_tokens_are_generated(engine: Engine) -> None:
    assert engine.generate(input_ids=[8])["meta_info"]["completion_tokens"] == 128


def test_a_stop_token_is_named_as_what_matched(engine: Engine) -> None:
    stop = expected_tokens([5], 3)[-1]
    result = engine.generate(input_ids=[5], sampling_params={"stop_token_ids": [stop]})
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert result["output_ids"][-1] == stop


def test_L2_each_token_has_a_logprob_if_asked_for(engine: Engine) -> None:
    plain, with_logprobs = engine.generate(
        input_ids=[[5], [6]], sampling_params={"max_new_tokens": 3}, return_logprob=[False, True]
    )
    assert "output_token_logprobs" not in plain["meta_info"]
    entries = with_logprobs["meta_info"]["output_token_logprobs"]
    assert [token_id for _, token_id, _ in entries] == with_logprobs["output_ids"]
    assert "output_top_logprobs" not in with_logprobs["meta_info"]
    top = engine.generate(
        input_ids=[5],
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        top_logprobs_num=1,
    )
    assert [len(each) for each in top["meta_info"]["output_top_logprobs"]] == [1, 1]


def test_a_stream_grows_and_its_last_dictionary_is_the_plain_result(engine: Engine) -> None:
    results = list(
        engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 6}, stream=True)
    )
    lengths = [len(result["output_ids"]) for result in results]
    assert lengths == sorted(lengths)
    assert len(results) > 1
    assert [result["meta_info"]["finish_reason"] is None for result in results[:-1]].count(
        False
    ) == 0
    assert results[-1]["output_ids"] == expected_tokens([5], 6)
    assert results[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}


def test_a_streamed_list_says_which_prompt_each_dictionary_is_for(engine: Engine) -> None:
    last: dict[int, list[int]] = {}
    prompts = [[5], [6, 7]]
    for result in engine.generate(
        input_ids=prompts, sampling_params={"max_new_tokens": 5}, stream=True
    ):
        last[result["index"]] = result["output_ids"]
    assert last == {index: expected_tokens(prompt, 5) for index, prompt in enumerate(prompts)}


async def test_async_generate_works_on_any_running_loop(engine: Engine) -> None:
    params = {"max_new_tokens": 3}
    results = await asyncio.gather(
        *(engine.async_generate(input_ids=[n], sampling_params=params) for n in range(1, 5))
    )
    assert [r["output_ids"] for r in results] == [expected_tokens([n], 3) for n in range(1, 5)]
    stream = await engine.async_generate(input_ids=[5], sampling_params=params, stream=True)
    streamed = [result["output_ids"] async for result in stream]
    assert streamed[-1] == expected_tokens([5], 3)


def test_many_threads_generate_at_once(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    def generate(n: int) -> list[int]:
        ids: list[int] = engine.generate(
            input_ids=[n], sampling_params={"max_new_tokens": 5 + n % 7}
        )["output_ids"]
        return ids

    outputs = pool.map(generate, range(1, 65), timeout=WAIT_S)
    assert list(outputs) == [expected_tokens([n], 5 + n % 7) for n in range(1, 65)]


def test_samples_of_prompts_are_one_flat_list_with_names_of_their_own(engine: Engine) -> None:
    params = {"max_new_tokens": 2, "n": 2}
    results = engine.generate(input_ids=[[5], [6]], sampling_params=params, rid=["a", "b"])
    assert [r["output_ids"] for r in results] == [
        expected_tokens(prompt, 2) for prompt in ([5], [5], [6], [6])
    ]
    assert [r["meta_info"]["id"] for r in results] == ["a_0", "a_1", "b_0", "b_1"]
    streamed = list(engine.generate(input_ids=[5], sampling_params=params, stream=True))
    assert {result["index"] for result in streamed} == {0, 1}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a prompt text or input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "either a prompt text or input_ids"),
        ({"prompt": "a"}, "no tokenizer"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "sampling_params has 1 entries for 2"),
        ({"input_ids": [1], "lora_path": "x"}, "lora_path='x' is not supported"),
        ({"input_ids": [1], "cache_salt": "x"}, "cache_salt='x' is not supported"),
        ({"input_ids": [1], "sampling_params": {"n": "2"}}, "n='2' must be an integer"),
    ],
)
def test_a_bad_call_is_refused_before_anything_is_accepted(
    engine: Engine, arguments: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(InvalidRequestError, match=message):
            engine.generate(**arguments, stream=stream)
    assert num_live_requests(engine) == 0


def test_an_unknown_argument_is_a_type_error_and_absent_sglang_ones_may_be_none(
    engine: Engine,
) -> None:
    with pytest.raises(TypeError, match="'promt'"):
        engine.generate(promt="a")
    engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 1}, lora_path=None)


def test_L1_of_a_list_all_prompts_are_accepted_or_none(engine: Engine) -> None:
    too_long = [1] * MAX_MODEL_LEN
    with pytest.raises(PromptTooLongError):
        engine.generate(input_ids=[[1], [2], too_long], sampling_params=ENDLESS)
    assert_nothing_runs(engine)
    with pytest.raises(DuplicateRequestIdError):
        engine.generate(input_ids=[[1], [2]], rid=["same", "same"], sampling_params=ENDLESS)
    assert_nothing_runs(engine)


# -- aborts ----------------------------------------------------------------------------------------


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


# -- the end ---------------------------------------------------------------------------------------


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


# -- text ------------------------------------------------------------------------------------------


def test_L2_the_bundled_model_streams_text_and_stops_at_a_stop_string() -> None:
    greedy = {"max_new_tokens": 24, "temperature": 0}
    with Engine(context_length=256) as running:
        whole = running.generate("def add(", greedy)
        assert running.tokenizer is not None
        assert whole["text"] == running.tokenizer.decode(whole["output_ids"])
        *_, streamed = running.generate("def add(", greedy, stream=True)
        assert streamed["text"] == whole["text"]

        stop = whole["text"][5:9]
        stopped = running.generate(["def add("], greedy | {"stop": stop})[0]
        assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        num_tokens = stopped["meta_info"]["completion_tokens"]
        assert stopped["output_ids"] == whole["output_ids"][:num_tokens]
        assert stop in running.tokenizer.decode(stopped["output_ids"])
        assert stop not in running.tokenizer.decode(stopped["output_ids"][:-1])

        prompt_ids = running.tokenizer.encode("def add(")
        info = running.generate(
            input_ids=prompt_ids,
            sampling_params=greedy | {"max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=1,
        )["meta_info"]
        (first, *rest) = info["input_token_logprobs"]
        assert first == (None, prompt_ids[1], None)
        assert [token_id for _, token_id, _ in rest] == prompt_ids[2:]
        assert all(logprob < 0 for logprob, _, _ in rest)
