"""L12: what goes wrong with one request is that request's alone, whatever it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from frontend.config import FrontendConfig
from frontend.outputs import AbortCause
from frontend.requests.new_request import NewRequest
from frontend.sampling_params import SamplingParams
from frontend.text.output_processor import OutputProcessor
from tests.support.auto_answers import AutoAnswers
from tests.support.mock_fleet import assert_serves, mock_fleet, one_stream_each
from tests.support.served_engine import fake, served_engine

LONG = SamplingParams(max_tokens=100_000)


@pytest.mark.parametrize(
    "names",
    [
        {"request_id": "a", "aliases": ["a"]},
        {"request_id": "a", "aliases": ["b", "b"]},
        {"request_id": "a-0", "aliases": ["a-0"], "batch_id": "a"},
        {"request_id": "a", "batch_id": "a"},
    ],
    ids=str,
)
async def test_L12_a_request_that_has_one_name_twice_lives_and_ends_as_any_other(
    names: dict[str, Any],
) -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        three = SamplingParams(max_tokens=3)
        stream = frontend.generate(prompt_token_ids=[1], sampling_params=three, **names)
        assert (await asyncio.wait_for(stream.result(), 5)).finish_reason == "length"
        again = frontend.generate(prompt_token_ids=[1], sampling_params=three, **names)
        again.close()
        other = frontend.generate(prompt_token_ids=[1], sampling_params=three)
        assert (await asyncio.wait_for(other.result(), 5)).finish_reason == "length"
        assert frontend.num_live_requests == 0


async def test_L12_a_body_id_that_is_also_the_headers_harms_nobody() -> None:
    async with served_engine(fake()) as served:
        body = {"prompt": [1, 2], "max_tokens": 3}
        for twice in (
            {"request_id": "foo", "header": "cmpl-foo"},
            {"request_id": "bar", "header": "bar-0", "n": 2},
        ):
            header = {"X-Request-Id": str(twice.pop("header"))}
            answer = await served.http.post("/v1/completions", json=body | twice, headers=header)
            assert answer.status_code == 200
            assert (await served.http.post("/v1/completions", json=body)).status_code == 200
        await served.wait_until_idle()


async def test_L12_a_fault_in_one_requests_processing_ends_that_one_and_tells_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = OutputProcessor.process

    def fail_on_13(self: OutputProcessor, token_ids: Any, finished: bool) -> Any:
        if 13 in token_ids:
            raise ZeroDivisionError("a fault of the test's making")
        return process(self, token_ids, finished)

    monkeypatch.setattr(OutputProcessor, "process", fail_on_13)
    async with mock_fleet(1) as (frontend, [engine]):
        streams = [frontend.generate(prompt_token_ids=[1], sampling_params=LONG) for _ in range(3)]
        ids = [(await engine.next_add()).request_id for _ in streams]
        await engine.send_tokens(ids[0], [13])
        for request_id in ids[1:]:
            await engine.send_tokens(request_id, [7])
        result = await asyncio.wait_for(streams[0].result(), 5)
        assert result.finish_reason == "error"
        assert result.error is not None
        assert "ZeroDivisionError" not in result.error.message, "the inside is for the log"
        assert await engine.next_abort() == [ids[0]]
        for request_id, stream in zip(ids[1:], streams[1:], strict=True):
            await assert_serves(engine, request_id, stream)
        assert frontend.num_live_requests == 0
        assert frontend.metrics.num_aborts[AbortCause.FRONTEND_FAULT, "waiting"] == 1


async def test_L11_an_abort_of_a_request_whose_last_frame_was_lost_is_confirmed() -> None:
    async with mock_fleet(2) as (frontend, engines):
        [(_, stream), (_, other)] = await one_stream_each(frontend, engines)
        await engines[0].send_frame(b"no outputs frame at all")
        assert (await asyncio.wait_for(stream.result(), 5)).finish_reason == "error"
        await engines[0].next_abort()
        async with asyncio.timeout(5):
            while frontend.num_ending_requests:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)
        assert list(frontend.num_in_flight) == [0, 1]
        other.close()


async def test_L2_a_streamed_call_that_fails_before_its_first_token_has_its_status() -> None:
    async with served_engine(FrontendConfig()) as served:
        body = {"prompt": "def f(x): return x\n" * 4000, "stream": True, "n": 2}
        answer = await served.http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        await served.wait_until_idle()


async def test_a_long_text_of_several_completions_is_tokenized_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mock_fleet(max_num_queued_tokens=10) as (frontend, [engine]), AutoAnswers(engine):
        assert frontend.tokenizer is not None
        calls: list[int] = []
        encode = type(frontend.tokenizer).encode

        def counted(self: Any, text: str, **options: Any) -> list[int]:
            calls.append(len(text))
            return encode(self, text, **options)

        monkeypatch.setattr(type(frontend.tokenizer), "encode", counted)
        text = "def f(x): return x\n" * 600
        requests = [
            NewRequest(prompt=text, sampling_params=SamplingParams(max_tokens=2)) for _ in range(4)
        ]
        streams = frontend.accept(requests)
        results = await asyncio.wait_for(asyncio.gather(*(one.result() for one in streams)), 10)
        assert {result.finish_reason for result in results} <= {"length", "error"}
        assert len(calls) == 1
        assert len({result.finish_reason for result in results}) == 1, "all or none"
