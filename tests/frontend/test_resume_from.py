"""Aborted requests that are continued: what they carry, what an engine is sent, and that whoever
reads the parts reads the whole."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.errors import InvalidRequestError, PromptTooLongError
from frontend.outputs import AbortCause, RequestResult, ResumeFrom, WeightSpan
from frontend.requests.intake import MAX_INLINE_CHARS
from frontend.requests.resume_from import plain_resume_from, read_resume_from
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.engine_config import EngineConfig
from tests.support.mock_fleet import mock_fleet

PROMPT = [5, 6, 7]
NUM_TOKENS = 120
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
RESUME = ResumeFrom(
    prompt_token_ids=(5, 6, 7),
    output_token_ids=(8, 9),
    num_output_tokens_left=10,
    position=5,
    seed=3,
    min_tokens_left=4,
    stop_tail_text="fo",
    weight_spans=(WeightSpan("v1", 0, 1), WeightSpan("v2", 1, 2)),
)


@contextlib.asynccontextmanager
async def running(**fields: Any) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model="none", runner="fake", fake_step_time_ms=1.0, **{"max_model_len": 2048} | fields
    )
    engine = await AsyncEngine.start(FrontendConfig(engine=config))
    async with asyncio.timeout(60), engine:
        yield engine
        for status in (await engine.status()).values():
            assert status.integrity_errors == ()
            assert status.num_running == status.num_waiting == 0


async def aborted_after(
    engine: AsyncEngine, stream: RequestStream, num_tokens: int
) -> tuple[list[int], ResumeFrom]:
    """Abort a stream that has so many tokens; returns all of them, and how to go on."""
    token_ids: list[int] = []
    async for output in stream:
        token_ids += output.token_ids
        if output.finish_reason is not None:
            assert output.finish_reason == "abort"
            assert output.resume_from is not None
            return token_ids, output.resume_from
        if len(token_ids) >= num_tokens:
            await engine.abort(stream.request_id)
    raise AssertionError("the stream has no end")


async def result_of(stream: RequestStream) -> RequestResult:
    return await asyncio.wait_for(stream.result(), 10)


# -- continuing ------------------------------------------------------------------------------------


async def test_L2_a_request_that_is_aborted_and_continued_twice_is_the_whole_one() -> None:
    async with running() as engine:
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=PARAMS)
        first, resume_from = await aborted_after(engine, stream, 20)
        assert resume_from.prompt_token_ids == tuple(PROMPT)
        assert resume_from.output_token_ids == tuple(first)
        assert resume_from.num_output_tokens_left == NUM_TOKENS - len(first)
        assert resume_from.position == len(PROMPT) + len(first)
        assert resume_from.weight_spans == (WeightSpan("default", 0, len(first)),)

        await engine.set_weight_version("second")
        stream = engine.generate(resume_from=resume_from, sampling_params=PARAMS)
        second, resume_from = await aborted_after(engine, stream, 20)
        assert resume_from.output_token_ids == (*first, *second)
        assert resume_from.weight_spans == (
            WeightSpan("default", 0, len(first)),
            WeightSpan("second", len(first), len(first) + len(second)),
        )

        stream = engine.generate(resume_from=resume_from, sampling_params=PARAMS)
        result = await result_of(stream)
        whole = [*first, *second, *result.token_ids]
        assert whole == expected_tokens(PROMPT, NUM_TOKENS)
        assert result.finish_reason == "length"
        assert result.resume_from is None
        assert result.num_prompt_tokens == len(PROMPT)
        assert list(stream.prompt_token_ids) == PROMPT
        assert result.num_cached_tokens <= len(PROMPT)
        assert result.weight_spans == (WeightSpan("second", 0, len(result.token_ids)),)


async def test_logprobs_of_a_continued_request_are_for_its_new_tokens() -> None:
    async with running() as engine:
        params = dataclasses.replace(PARAMS, logprobs=0)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        _, resume_from = await aborted_after(engine, stream, 5)
        result = await result_of(engine.generate(resume_from=resume_from, sampling_params=params))
        assert [record.token_id for record in result.logprobs] == list(result.token_ids)


async def test_stop_tokens_and_min_tokens_count_from_the_first_start() -> None:
    tokens = expected_tokens(PROMPT, 60)
    stop = next(token for token in tokens[45:] if token not in tokens[:45])
    params = SamplingParams(max_tokens=100, min_tokens=10, stop_token_ids=[stop])
    async with running() as engine:
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        first, resume_from = await aborted_after(engine, stream, 12)
        assert resume_from.min_tokens_left == 0
        result = await result_of(engine.generate(resume_from=resume_from, sampling_params=params))
        assert (result.finish_reason, result.stop_reason) == ("stop", stop)
        assert [*first, *result.token_ids] == tokens[: tokens.index(stop) + 1]


async def test_the_context_and_a_smaller_max_tokens_bound_what_is_left() -> None:
    async with running(max_model_len=256) as engine:
        endless = SamplingParams(ignore_eos=True)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=endless)
        first, resume_from = await aborted_after(engine, stream, 10)
        assert resume_from.num_output_tokens_left == 256 - len(PROMPT) - len(first)
        short = engine.generate(
            resume_from=resume_from, sampling_params=SamplingParams(max_tokens=3, ignore_eos=True)
        )
        assert len((await result_of(short)).token_ids) == 3
        generous = dataclasses.replace(resume_from, num_output_tokens_left=10**6)
        full = await result_of(engine.generate(resume_from=generous, sampling_params=endless))
        assert full.finish_reason == "length"
        assert len(first) + len(full.token_ids) == 256 - len(PROMPT)
        whole = dataclasses.replace(
            resume_from, output_token_ids=(1,) * 253, position=256, weight_spans=()
        )
        with pytest.raises(PromptTooLongError):
            engine.generate(resume_from=whole, sampling_params=endless)


# -- whoever is aborted carries it -----------------------------------------------------------------


async def test_L4_a_request_aborted_before_an_engine_had_it_carries_what_it_was_given() -> None:
    async with running() as engine:
        await engine.pause("keep")
        params = dataclasses.replace(PARAMS, seed=11, min_tokens=2)
        held = engine.generate(prompt_token_ids=PROMPT, request_id="a", sampling_params=params)
        again = engine.generate(resume_from=RESUME, request_id="b", sampling_params=params)
        await engine.abort(abort_all=True)
        assert (await result_of(held)).resume_from == ResumeFrom(
            prompt_token_ids=tuple(PROMPT),
            output_token_ids=(),
            num_output_tokens_left=NUM_TOKENS,
            position=len(PROMPT),
            seed=11,
            min_tokens_left=2,
        )
        assert (await result_of(again)).resume_from == dataclasses.replace(
            RESUME, stop_tail_text=""
        )
        await engine.resume()


async def test_a_request_aborted_while_its_text_is_tokenized_has_nothing_to_resume_from() -> None:
    async with mock_fleet() as (frontend, _):
        stream = frontend.generate("x = 1\n" * MAX_INLINE_CHARS, request_id="long")
        await frontend.abort("long")
        result = await result_of(stream)
        assert result.finish_reason == "abort"
        assert result.resume_from is None


@pytest.mark.parametrize("cause", [AbortCause.PAUSE, AbortCause.DEADLINE, AbortCause.SHUTDOWN])
async def test_L2_whatever_the_cause_of_the_abort_the_result_can_be_continued(
    cause: AbortCause,
) -> None:
    async with running() as engine:
        timeout_s = 0.05 if cause is AbortCause.DEADLINE else None
        stream = engine.generate(
            prompt_token_ids=PROMPT,
            sampling_params=SamplingParams(ignore_eos=True),
            timeout_s=timeout_s,
        )
        await anext(stream)
        if cause is AbortCause.PAUSE:
            await engine.pause("abort")
        elif cause is AbortCause.SHUTDOWN:
            await engine.shutdown()
        result = await result_of(stream)
        assert result.abort_cause is cause
        assert result.resume_from is not None
        assert result.resume_from.output_token_ids == result.token_ids


async def test_text_held_back_for_a_stop_string_is_told_and_its_completion_ends_the_next_one() -> (
    None
):
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        assert frontend.tokenizer is not None
        a_fo, x_y = (
            [id for char in text for id in frontend.tokenizer.encode(char)]
            for text in ("a fo", "xy")
        )
        params = SamplingParams(max_tokens=50, stop=["fox"])
        stream = frontend.generate(prompt_token_ids=PROMPT, request_id="a", sampling_params=params)
        await engine.send_tokens((await engine.next_add()).request_id, a_fo)
        first = await anext(stream)
        await frontend.abort("a")
        result = await result_of(stream)
        assert (first.text, result.text) == ("a ", "a fo")
        assert result.resume_from is not None
        assert result.resume_from.stop_tail_text == "fo"

        stream = frontend.generate(resume_from=result.resume_from, sampling_params=params)
        await engine.send_tokens((await engine.next_add()).request_id, x_y)
        result = await result_of(stream)
        assert (result.finish_reason, result.stop_reason) == ("stop", "fox")
        assert (result.text, result.token_ids) == ("", tuple(x_y[:1]))


# -- on the wire -----------------------------------------------------------------------------------


@pytest.mark.parametrize("caesura", [True, False])
async def test_an_engine_is_told_which_tokens_are_outputs_and_vllm_how_many_are_left(
    caesura: bool,
) -> None:
    async with mock_fleet(caesura=caesura) as (frontend, [engine]):
        params = SamplingParams(temperature=0.5, seed=99, min_tokens=50, max_tokens=60)
        stream = frontend.generate(resume_from=RESUME, sampling_params=params)
        request = await engine.next_add()
        assert request.prompt_token_ids == [5, 6, 7, 8, 9]
        sent = request.sampling_params
        assert sent is not None
        assert (sent.seed, sent.temperature) == (3, 0.5)
        if caesura:
            assert sent.extra_args == {"caesura_num_resumed_tokens": 2}
            assert (sent.min_tokens, sent.max_tokens) == (6, 12)
        else:
            assert sent.extra_args is None
            assert (sent.min_tokens, sent.max_tokens) == (4, 10)
        stream.close()


# -- what is refused -------------------------------------------------------------------------------


def test_what_a_result_carries_survives_json() -> None:
    assert read_resume_from(json.loads(json.dumps(plain_resume_from(RESUME)))) == RESUME
    assert read_resume_from(RESUME) == RESUME


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 6}, "resume_from.position=6 must be 5"),
        ({"position": "5"}, "resume_from.position"),
        ({"positon": 5}, "unknown key 'positon'; did you mean 'position'"),
        ({"num_output_tokens_left": 0}, "num_output_tokens_left"),
        ({"num_output_tokens_left": True}, "num_output_tokens_left"),
        ({"prompt_token_ids": [], "position": 2}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": [5, -1, 7]}, r"prompt_token_ids\[1\]"),
        ({"output_token_ids": "ab"}, "output_token_ids"),
        ({"output_token_ids": [8, 2.0]}, r"output_token_ids\[1\]"),
        ({"seed": "x"}, "seed"),
        ({"min_tokens_left": 11}, "min_tokens_left"),
        ({"stop_tail_text": None}, "stop_tail_text"),
        ({"stop_tail_text": "x" * 1024}, "stop_tail_text has 1024 characters"),
        ({"weight_spans": [{"version": "a", "start": 0}]}, r"weight_spans\[0\].end is missing"),
        ({"weight_spans": [{"version": "a", "start": 0, "end": 3}]}, r"weight_spans\[0\].end"),
        ({"weight_spans": [{"version": "a", "start": 1, "end": 1}]}, r"weight_spans\[0\].end"),
        ({"weight_spans": [{"version": 1, "start": 0, "end": 2}]}, r"weight_spans\[0\].version"),
    ],
)
def test_inconsistent_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_resume_from(plain_resume_from(RESUME) | changes)


def test_a_value_without_a_field_or_of_another_shape_is_refused() -> None:
    plain = plain_resume_from(RESUME)
    del plain["position"]
    with pytest.raises(InvalidRequestError, match="position is missing"):
        read_resume_from(plain)
    with pytest.raises(InvalidRequestError, match="must be an object"):
        read_resume_from([1, 2])


async def test_a_call_that_makes_no_sense_is_refused_and_nothing_is_accepted() -> None:
    async with mock_fleet() as (frontend, [engine]):
        with pytest.raises(InvalidRequestError, match="one of them"):
            frontend.generate("def ", resume_from=RESUME)
        with pytest.raises(InvalidRequestError, match="position=9 must be 5"):
            frontend.generate(resume_from=dataclasses.replace(RESUME, position=9))
        params = SamplingParams(prompt_logprobs=1)
        with pytest.raises(InvalidRequestError, match="prompt_logprobs=1"):
            frontend.generate(resume_from=RESUME, sampling_params=params)
        assert frontend.num_live_requests == 0
        await engine.expect_silence(0.05)
