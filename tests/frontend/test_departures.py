"""How a request leaves its engine: confirmed, or without a word."""

from __future__ import annotations

import asyncio

from frontend.sampling_params import SamplingParams
from ipc.abort import Abort
from ipc.output import EngineCoreOutputs
from tests.support.mock_fleet import mock_fleet, one_stream_each

LONG = SamplingParams(max_tokens=100_000)


async def test_L11_a_request_is_ending_until_its_engine_says_that_it_left() -> None:
    async with mock_fleet() as (frontend, [engine]):
        engine.confirms_aborts = False
        stream = frontend.generate(prompt_token_ids=[1], sampling_params=LONG, request_id="a")
        request = await engine.next_add()
        await engine.send_tokens(request.request_id, [7])
        await asyncio.wait_for(anext(stream), 5)
        stream.close()
        assert await engine.next_abort() == [request.request_id]
        await engine.send_tokens(request.request_id, [8, 9])
        async with asyncio.timeout(5):
            while frontend.metrics.num_wasted_tokens < 2:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)
        assert (frontend.num_live_requests, frontend.num_ending_requests) == (0, 1)
        assert frontend.metrics.hang_up_to_blocks_freed.total == 0
        await engine.confirm([request.request_id])
        async with asyncio.timeout(5):
            while frontend.num_ending_requests:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)
        assert frontend.metrics.hang_up_to_blocks_freed.total > 0
        assert sum(isinstance(one.message, Abort) for one in engine.received) == 1


async def test_L1_a_request_that_its_engine_let_go_without_a_terminal_ends_with_an_error() -> None:
    async with mock_fleet(2) as (frontend, engines):
        [(gone, stream), (_, other)] = await one_stream_each(frontend, engines)
        await engines[0].send_tokens(gone, [9])
        await engines[0].send(EngineCoreOutputs(finished_requests=[gone]))
        result = await asyncio.wait_for(stream.result(), 5)
        assert (result.finish_reason, result.token_ids[-1:]) == ("error", (9,))
        assert result.error is not None
        assert "engine 0 let the request go" in result.error.message
        assert frontend.num_live_requests == 1
        other.close()


async def test_L12_an_engine_cannot_let_another_ones_request_go() -> None:
    async with mock_fleet(2) as (frontend, engines):
        [(_, stream), (other, other_stream)] = await one_stream_each(frontend, engines)
        await engines[0].send(EngineCoreOutputs(finished_requests=[other, "nobody"]))
        await asyncio.sleep(0.05)
        assert frontend.num_live_requests == 2
        stream.close()
        other_stream.close()


async def test_L11_a_departure_that_was_told_in_a_damaged_frame_is_asked_for_again() -> None:
    async with mock_fleet() as (frontend, [engine]):
        engine.confirms_aborts = False
        stream = frontend.generate(prompt_token_ids=[1], sampling_params=LONG)
        request = await engine.next_add()
        stream.close()
        assert await engine.next_abort() == [request.request_id]
        engine.confirms_aborts = True
        await engine.send_frame(b"no outputs frame at all")
        assert await engine.next_abort() == [request.request_id]
        async with asyncio.timeout(5):
            while frontend.num_ending_requests:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)
        assert list(frontend.num_in_flight) == [0]
