"""Calls of several requests: accepted together or not at all, and reached by the call's names."""

from __future__ import annotations

import asyncio

import pytest

from frontend.errors import DuplicateRequestIdError, InvalidRequestError, OverloadedError
from frontend.requests.new_request import NewRequest
from frontend.sampling_params import SamplingParams
from tests.support.auto_answers import AutoAnswers
from tests.support.mock_fleet import mock_fleet

LONG = SamplingParams(max_tokens=100_000)


def children(
    call: str, number: int, *, params: SamplingParams = LONG, aliases: tuple[str, ...] = ()
) -> list[NewRequest]:
    return [
        NewRequest(
            prompt_token_ids=[1, 2],
            sampling_params=params,
            request_id=f"{call}-{index}",
            batch_id=call,
            aliases=aliases,
        )
        for index in range(number)
    ]


async def test_L3_an_abort_of_any_name_of_a_call_ends_all_of_it_and_nothing_else() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        streams = frontend.accept(children("call", 3, aliases=("cmpl-call",)))
        other = frontend.generate(prompt_token_ids=[1], sampling_params=LONG, request_id="call-33")
        async with asyncio.timeout(5):
            for stream in [*streams, other]:
                await anext(stream)
        receipt = await frontend.abort("cmpl-call")
        assert set(receipt.requests) == {"call-0", "call-1", "call-2"}
        for stream in streams:
            assert (await stream.result()).finish_reason == "abort"
        assert frontend.num_live_requests == 1


async def test_L8_one_child_with_a_live_name_refuses_the_whole_call() -> None:
    async with mock_fleet() as (frontend, [engine]):
        live = frontend.generate(prompt_token_ids=[1], sampling_params=LONG, request_id="call-2")
        await engine.next_add()
        with pytest.raises(DuplicateRequestIdError, match="'call-2'"):
            frontend.accept(children("call", 3))
        assert frontend.num_live_requests == 1
        await engine.expect_silence(0.05)
        live.close()


async def test_one_bad_child_refuses_the_whole_call_before_an_engine_hears_of_it() -> None:
    async with mock_fleet() as (frontend, [engine]):
        bad = NewRequest(prompt_token_ids=[], sampling_params=LONG)
        with pytest.raises(InvalidRequestError, match="the prompt is empty"):
            frontend.accept([*children("call", 2), bad])
        assert frontend.num_live_requests == 0
        await engine.expect_silence(0.05)


async def test_a_call_is_admitted_whole_or_not() -> None:
    async with mock_fleet(max_num_queued_requests=3) as (frontend, [engine]):
        streams = frontend.accept(children("a", 2))
        with pytest.raises(OverloadedError, match="max_num_queued_requests=3"):
            frontend.accept(children("b", 2))
        with pytest.raises(InvalidRequestError, match="at most max_num_queued_requests=3"):
            frontend.accept(children("c", 4))
        assert frontend.num_live_requests == 2
        first = await engine.next_add()
        await engine.send_tokens(first.request_id, [5])
        await asyncio.wait_for(anext(streams[0]), 5)
        frontend.accept(children("d", 2))[0].close()
        assert frontend.metrics.num_refused["max_num_queued_requests"] == 1


async def test_L7_the_dropped_streams_of_a_call_leave_as_one_frame() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = frontend.accept(children("call", 4))
        for _ in streams:
            await engine.next_add()
        for stream in streams:
            stream.close()
        assert len(await engine.next_abort()) == 4
        await engine.expect_silence(0.05)


async def test_a_final_only_request_comes_as_one_output_with_everything() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        whole = NewRequest(
            prompt_token_ids=[1, 2],
            sampling_params=SamplingParams(max_tokens=20),
            is_final_only=True,
        )
        [stream] = frontend.accept([whole])
        async with asyncio.timeout(5):
            outputs = [output async for output in stream]
        assert [len(output.token_ids) for output in outputs] == [20]
        assert outputs[0].finish_reason == "length"
