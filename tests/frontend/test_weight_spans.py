"""Which weights sampled which tokens: the arithmetic of spans, and results that tell them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.outputs import RequestResult, WeightSpan
from frontend.requests.stream import RequestStream
from frontend.requests.weight_spans import Mark, joined, spans_of
from frontend.sampling_params import SamplingParams
from ipc.engine_config import EngineConfig
from ipc.output import EngineCoreOutput, EngineCoreOutputs, FinishReason
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet

PARAMS = SamplingParams(max_tokens=100)


def plain(spans: Sequence[WeightSpan]) -> list[tuple[str, int, int]]:
    return [(span.version, span.start, span.end) for span in spans]


async def send(
    engine: MockEngine,
    request_id: str,
    token_ids: Sequence[int],
    version: str | None,
    finish: FinishReason | None = None,
) -> None:
    output = EngineCoreOutput(request_id, token_ids, finish_reason=finish)
    await engine.send(EngineCoreOutputs(outputs=[output], weight_version=version))


async def result_of(stream: RequestStream) -> RequestResult:
    return await asyncio.wait_for(stream.result(), 10)


# -- arithmetic ------------------------------------------------------------------------------------

FRAMES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=12)


def labels(spans: Sequence[WeightSpan]) -> list[str]:
    """One a token; the spans must be whole, in order and as few as can be."""
    told: list[str] = []
    for before, span in zip([None, *spans], spans, strict=False):
        assert span.start == len(told)
        assert span.end > span.start
        assert before is None or before.version != span.version
        told += [span.version] * (span.end - span.start)
    return told


@given(FRAMES, st.integers(0, 40))
def test_L10_spans_are_the_labels_of_the_tokens_put_together(
    frames: list[tuple[str, int]], num_reported: int
) -> None:
    marks: list[Mark] = []
    of_tokens: list[str] = []
    for version, num_tokens in frames:
        marks.append((len(of_tokens), version))
        of_tokens += [version] * num_tokens
    num_reported = min(num_reported, len(of_tokens))
    assert labels(spans_of(marks, num_reported)) == of_tokens[:num_reported]


@given(FRAMES, FRAMES)
def test_L10_the_spans_of_a_chain_are_those_of_its_parts_put_together(
    earlier: list[tuple[str, int]], later: list[tuple[str, int]]
) -> None:
    parts = []
    for frames in (earlier, later):
        marks, num_tokens = [], 0
        for version, num_new in frames:
            marks.append((num_tokens, version))
            num_tokens += num_new
        parts.append((spans_of(marks, num_tokens), num_tokens))
    (first, num_first), (second, _) = parts
    assert labels(joined(first, num_first, second)) == labels(first) + labels(second)


def test_tokens_without_a_label_are_in_no_span() -> None:
    assert spans_of([], 5) == ()
    assert spans_of([(2, "a")], 5) == (WeightSpan("a", 2, 5),)
    assert joined((), 3, [WeightSpan("a", 0, 2)]) == (WeightSpan("a", 3, 5),)


# -- over the wire ---------------------------------------------------------------------------------


async def test_L10_a_result_tells_where_the_label_changed_and_utility_frames_change_nothing() -> (
    None
):
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(prompt_token_ids=[1, 2], sampling_params=PARAMS)
        request_id = (await engine.next_add()).request_id
        await send(engine, request_id, [5, 6], "v1")
        await send(engine, request_id, [7], "v2")
        await send(engine, request_id, [8], None)
        await frontend.status()
        await send(engine, request_id, [9], "v2")
        await send(engine, request_id, [10], "v3", FinishReason.LENGTH)
        result = await result_of(stream)
        assert result.token_ids == (5, 6, 7, 8, 9, 10)
        assert plain(result.weight_spans) == [("v1", 0, 2), ("v2", 2, 5), ("v3", 5, 6)]
        assert result.resume_from is None


async def test_L10_requests_sent_before_during_and_after_a_change_are_all_right() -> None:
    async with mock_fleet() as (frontend, [engine]):
        ids, streams = [], []
        for index in range(3):
            streams.append(frontend.generate(prompt_token_ids=[index], sampling_params=PARAMS))
            ids.append((await engine.next_add()).request_id)
            # No frame with this label has a token of a request that came later.
            await send(engine, ids[0], [5 + index], f"v{index}")
            while len(frontend._dispatcher.weight_versions) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await send(engine, ids[1], [9], "v2", FinishReason.LENGTH)
        await send(engine, ids[0], [9], "v1", FinishReason.LENGTH)
        await send(engine, ids[2], [9], "v1", FinishReason.LENGTH)
        first, second, third = [await result_of(stream) for stream in streams]
        assert plain(first.weight_spans) == [
            *[("v0", 0, 1), ("v1", 1, 2), ("v2", 2, 3)],
            ("v1", 3, 4),
        ]
        assert plain(second.weight_spans) == [("v2", 0, 1)]
        assert plain(third.weight_spans) == [("v1", 0, 1)]


async def test_L10_each_engine_has_labels_of_its_own() -> None:
    async with mock_fleet(2) as (frontend, engines):
        streams = [
            frontend.generate(prompt_token_ids=[index], sampling_params=PARAMS)
            for index in range(2)
        ]
        ids = [(await engine.next_add()).request_id for engine in engines]
        await send(engines[0], ids[0], [5], "old")
        await send(engines[1], ids[1], [5], "old")
        await send(engines[0], ids[0], [6], "new", FinishReason.LENGTH)
        assert plain((await result_of(streams[0])).weight_spans) == [("old", 0, 1), ("new", 1, 2)]
        assert frontend.weight_version is None
        await send(engines[1], ids[1], [6], "old", FinishReason.LENGTH)
        assert plain((await result_of(streams[1])).weight_spans) == [("old", 0, 2)]
        frontend._dispatcher.on_engine_dead(1, "it died")
        assert frontend.weight_version == "new"


async def test_L10_a_stop_string_cuts_the_spans_with_the_tokens() -> None:
    async with mock_fleet() as (frontend, [engine]):
        assert frontend.tokenizer is not None
        params = SamplingParams(max_tokens=100, stop=["return"])
        stream = frontend.generate("def f():\n", sampling_params=params)
        request_id = (await engine.next_add()).request_id
        token_ids = [id for word in ("a", "return") for id in frontend.tokenizer.encode(word)]
        await send(engine, request_id, token_ids, "v1")
        await send(engine, request_id, frontend.tokenizer.encode(" x = 1"), "v2")
        result = await result_of(stream)
        assert result.finish_reason == "stop"
        assert plain(result.weight_spans) == [("v1", 0, len(result.token_ids))]


async def test_L10_before_the_first_token_there_is_no_span() -> None:
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        stream = frontend.generate(prompt_token_ids=[1], request_id="x", sampling_params=PARAMS)
        await engine.next_add()
        await frontend.abort("x")
        result = await result_of(stream)
        assert result.finish_reason == "abort"
        assert result.weight_spans == ()


async def test_L10_a_label_change_under_load_splits_the_spans_and_aborts_nothing() -> None:
    config = EngineConfig(model="none", runner="fake", max_model_len=2048, fake_step_time_ms=1.0)
    engine = await AsyncEngine.start(FrontendConfig(engine=config))
    async with asyncio.timeout(60), engine:
        params = SamplingParams(max_tokens=120, ignore_eos=True)
        streams = [
            engine.generate(prompt_token_ids=[n], sampling_params=params) for n in range(1, 9)
        ]
        firsts = [await anext(stream) for stream in streams]
        await engine.set_weight_version("second")
        assert engine.weight_version == "second"
        for first, stream in zip(firsts, streams, strict=True):
            result = await stream.result()
            assert result.finish_reason == "length"
            (_, start, bound), (_, begin, end) = plain(result.weight_spans)
            assert [span.version for span in result.weight_spans] == ["default", "second"]
            assert start == 0 < len(first.token_ids) <= bound == begin < end == 120
