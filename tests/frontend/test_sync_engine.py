"""What the synchronous engine answers, over a real engine process whose tokens are arithmetic."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.errors import DuplicateRequestIdError, InvalidRequestError, PromptTooLongError
from frontend.sampling_params import SamplingParams
from frontend.sglang.calls import SamplingArgument
from frontend.sync.engine import Engine
from tests.support.sync_engines import (
    ENDLESS,
    MAX_MODEL_LEN,
    WAIT_S,
    assert_nothing_runs,
    fake_config,
    num_live_requests,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(config=fake_config()) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        yield threads


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
        "weight_versions": [{"version": "default", "start": 0, "end": 4}],
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
