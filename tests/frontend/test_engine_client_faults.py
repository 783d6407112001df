"""What an engine can do wrong, and that only its own requests suffer from it."""

from __future__ import annotations

import asyncio
import gc
import time

import numpy as np
import pytest

from frontend.errors import DuplicateRequestIdError, EngineDeadError
from frontend.outputs import RequestOutput
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.codec import pack
from ipc.lifecycle import AbortReceipt
from ipc.output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    LogprobsLists,
    encode_outputs,
)
from ipc.utility import UtilityCall
from tests.support.mock_fleet import assert_serves, mock_fleet, one_stream_each

BAD_FRAMES = {
    "no msgpack": [b"\xc1\xc1"],
    "not an array": [pack({"outputs": []})],
    "pickled data": [b"\x94\x00\x91\x93\xa1x\x91\x01\xd4\x01\x00\xc0\xcb" + bytes(8)],
    "outputs that are no list": [pack([0, 7, None, 1.5])],
    "an output without an id": [pack([0, [[None, [1]]], None, 1.5])],
    "a token that is no integer": [pack([0, [["x", ["one"]]], None, 1.5])],
    "an empty message": [b""],
    "logprobs of no token": encode_outputs(
        EngineCoreOutputs(
            outputs=[
                EngineCoreOutput(
                    "x",
                    [1],
                    new_logprobs=LogprobsLists(
                        np.zeros((1, 0), np.int32),
                        np.zeros((1, 0), np.float32),
                        np.ones(1, np.int64),
                    ),
                )
            ]
        )
    ),
}

ONE_LOGPROB = LogprobsLists(
    np.array([[4]], np.int32), np.array([[-0.5]], np.float32), np.array([1], np.int64)
)


async def assert_ended_with_error(stream: RequestStream) -> None:
    """The stream yields one terminal, an error that tells why, within a second."""
    rest = await asyncio.wait_for(collect(stream), 1)
    assert [out.finish_reason for out in rest] == ["error"]
    assert rest[-1].error


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [out async for out in stream]


@pytest.mark.parametrize("frames", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_L12_a_malformed_output_frame_ends_only_its_engines_requests(
    frames: list[bytes],
) -> None:
    async with mock_fleet(2) as (frontend, [bad, good]):
        (_, broken), (good_id, healthy) = await one_stream_each(frontend, [bad, good])
        await bad.send_frame(*frames)
        await assert_ended_with_error(broken)
        await assert_serves(good, good_id, healthy)


async def test_L12_the_dead_sentinel_ends_only_its_engines_requests_within_a_second() -> None:
    async with mock_fleet(2) as (frontend, [dying, good]):
        (_, broken), (good_id, healthy) = await one_stream_each(frontend, [dying, good])
        await dying.die()
        await assert_ended_with_error(broken)
        await assert_serves(good, good_id, healthy)


async def test_L12_a_vanished_engines_requests_end_within_a_second_with_their_partial_tokens() -> (
    None
):
    async with mock_fleet(2) as (frontend, [vanishing, good]):
        streams = [
            frontend.generate(prompt_token_ids=[1], request_id=f"vanish-{index}")
            for index in range(2)
        ]
        request = await vanishing.next_add()
        other = await good.next_add()
        by_name = {f"vanish-{index}": stream for index, stream in enumerate(streams)}
        assert request.external_req_id is not None
        assert other.external_req_id is not None
        broken, healthy = by_name[request.external_req_id], by_name[other.external_req_id]
        result = asyncio.create_task(broken.result())
        await vanishing.send_tokens(request.request_id, [7, 8, 9])
        await asyncio.sleep(0.05)
        vanished_s = time.monotonic()
        await vanishing.vanish()
        ended = await asyncio.wait_for(result, 2)
        assert time.monotonic() - vanished_s < 1
        assert (ended.finish_reason, list(ended.token_ids)) == ("error", [7, 8, 9])
        await assert_serves(good, other.request_id, healthy)


async def test_L12_new_requests_go_to_the_engines_that_are_left() -> None:
    async with mock_fleet(2) as (frontend, [dying, good]):
        await dying.die()
        await asyncio.sleep(0.1)
        streams = [frontend.generate(prompt_token_ids=[1]) for _ in range(3)]
        for _ in streams:
            request = await good.next_add()
            await good.send_tokens(request.request_id, [5], finish=FinishReason.STOP)
        for stream in streams:
            assert (await asyncio.wait_for(stream.result(), 5)).finish_reason == "stop"
        await dying.expect_silence(0.05)


async def test_L12_a_request_for_an_engine_that_cannot_be_reached_goes_to_the_next() -> None:
    async with mock_fleet(2) as (frontend, engines):
        opened = await one_stream_each(frontend, engines)
        await engines[0].go_deaf()
        await asyncio.sleep(0.05)  # Until the front end's socket knows.
        streams = [frontend.generate(prompt_token_ids=[n]) for n in range(3)]
        for _ in streams:
            await engines[1].next_add()
        await assert_ended_with_error(opened[0][1])
        await assert_serves(engines[1], *opened[1])
        for stream in streams:
            stream.close()


async def test_L5_L12_an_abort_for_an_unreachable_engine_says_so_and_its_streams_end() -> None:
    async with mock_fleet(2) as (frontend, engines):
        opened = await one_stream_each(frontend, engines)
        await engines[0].go_deaf()
        await asyncio.sleep(0.05)  # Until the front end's socket knows.
        receipt = await frontend.abort("stream-0")
        assert receipt.requests["stream-0"].status == "engine_error"
        assert receipt.engines == {0: "error"}
        await assert_ended_with_error(opened[0][1])
        await assert_serves(engines[1], *opened[1])


async def test_L12_with_no_engine_left_a_request_is_refused_at_once() -> None:
    async with mock_fleet() as (frontend, [engine]):
        assert frontend.is_healthy
        await engine.die()
        await asyncio.sleep(0.1)
        assert not frontend.is_healthy
        with pytest.raises(EngineDeadError):
            frontend.generate(prompt_token_ids=[1])


async def test_L12_frames_of_a_dead_engine_that_come_late_fall_away() -> None:
    async with mock_fleet(2) as (frontend, [dying, good]):
        (dead_id, broken), (good_id, healthy) = await one_stream_each(frontend, [dying, good])
        await dying.die()
        await assert_ended_with_error(broken)
        await dying.send_tokens(dead_id, [9], finish=FinishReason.LENGTH)
        await dying.send_frame(b"\xc1")
        await asyncio.sleep(0.05)
        assert await collect(broken) == []
        await assert_serves(good, good_id, healthy)


async def test_L12_an_engine_cannot_answer_another_engines_request() -> None:
    async with mock_fleet(2) as (frontend, [forger, good]):
        _, (good_id, healthy) = await one_stream_each(frontend, [forger, good])
        await forger.send_tokens(good_id, [666], finish=FinishReason.STOP)
        await asyncio.sleep(0.05)
        await good.send_tokens(good_id, [9], finish=FinishReason.LENGTH)
        rest = await asyncio.wait_for(healthy.result(), 5)
        assert (list(rest.token_ids)[-1], rest.finish_reason) == (9, "length")


@pytest.mark.parametrize(
    "output",
    [
        EngineCoreOutput("", [2**31 - 1]),
        EngineCoreOutput("", [1, 2], new_logprobs=ONE_LOGPROB),
    ],
    ids=["a token outside the vocabulary", "fewer logprobs than tokens"],
)
async def test_L12_an_output_that_makes_no_sense_does_not_stop_the_others_of_its_frame(
    output: EngineCoreOutput,
) -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = [
            frontend.generate(
                prompt_token_ids=[1], sampling_params=SamplingParams(logprobs=0, max_tokens=9)
            )
            for _ in range(2)
        ]
        bad, good = [(await engine.next_add()).request_id for _ in streams]
        await engine.send(
            EngineCoreOutputs(
                outputs=[
                    output._replace(request_id=bad),
                    EngineCoreOutput(good, [4], new_logprobs=ONE_LOGPROB),
                ]
            )
        )
        await engine.send_tokens(good, [], finish=FinishReason.LENGTH)
        await engine.send_tokens(bad, [], finish=FinishReason.LENGTH)
        ends = [await asyncio.wait_for(stream.result(), 2) for stream in streams]
        assert (ends[1].finish_reason, list(ends[1].token_ids)) == ("length", [4])


async def test_L12_an_engine_that_claims_another_index_is_known_by_its_socket() -> None:
    async with mock_fleet(2) as (frontend, [liar, good]):
        (liars_id, first), (good_id, second) = await one_stream_each(frontend, [liar, good])
        for engine_index in (1, 65_535):
            row = [liars_id, [9]]
            await liar.send_frame(pack([engine_index, [row], None, 1.5]))
        await liar.send_frame(pack([1, "bad", None, 1.5]))
        rest = await asyncio.wait_for(collect(first), 1)
        assert [token for out in rest for token in out.token_ids] == [9, 9]
        assert rest[-1].finish_reason == "error"
        await assert_serves(good, good_id, second)


async def test_L12_an_engine_cannot_answer_another_engines_call() -> None:
    async with mock_fleet(2) as (frontend, [forger, good]):
        _, (_, healthy) = await one_stream_each(frontend, [forger, good])
        aborting = asyncio.create_task(frontend.abort(healthy.request_id, timeout_s=1))
        call = await good.next_utility()
        await forger.reply(call, failure="forged")
        await asyncio.sleep(0.05)
        assert not aborting.done()
        await good.reply(call, AbortReceipt().to_wire())
        assert (await aborting).engines == {1: "ok"}


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f"])
async def test_L12_a_stranger_who_knocks_at_the_ports_and_leaves_ends_nothing(words: bytes) -> None:
    async with mock_fleet() as (frontend, [engine]):
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        assert engine.init is not None
        for address in (*engine.init.inputs, *engine.init.outputs):
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(words)
            await asyncio.sleep(0.05)
            writer.close()
            await asyncio.sleep(0.05)
        await assert_serves(engine, request_id, stream)
        assert frontend.is_healthy


async def test_L12_outputs_of_unknown_requests_are_ignored() -> None:
    async with mock_fleet() as (frontend, [engine]):
        await engine.send_tokens("never-heard-of", [1, 2], finish=FinishReason.STOP)
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        await assert_serves(engine, request_id, stream)
        assert frontend.is_healthy


async def test_L1_a_finished_request_gets_nothing_more() -> None:
    async with mock_fleet() as (frontend, [engine]):
        [(request_id, stream)] = await one_stream_each(frontend, [engine])
        end = EngineCoreOutput(request_id, (9,), finish_reason=FinishReason.STOP)
        more = EngineCoreOutput(request_id, (10,), finish_reason=FinishReason.LENGTH)
        await engine.send(EngineCoreOutputs(outputs=(end, more)))
        await engine.send_tokens(request_id, [11])
        outputs = [out async for out in stream]
        assert [out.finish_reason for out in outputs] == ["stop"]
        assert list(outputs[0].token_ids) == [9]


async def test_L1_an_engines_own_error_ends_that_request_alone() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = [frontend.generate(prompt_token_ids=[1], request_id=name) for name in "ab"]
        first, second = [await engine.next_add() for _ in streams]
        await engine.send_tokens(first.request_id, [], finish=FinishReason.ERROR)
        await engine.send_tokens(second.request_id, [4], finish=FinishReason.REPETITION)
        reasons = {(await asyncio.wait_for(stream.result(), 5)).finish_reason for stream in streams}
        assert reasons == {"error", "repetition"}
        assert frontend.is_healthy


async def test_L8_a_duplicate_live_id_is_refused_and_no_second_add_is_sent() -> None:
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(prompt_token_ids=[1], request_id="same")
        request = await engine.next_add()
        with pytest.raises(DuplicateRequestIdError, match="same"):
            frontend.generate(prompt_token_ids=[2], request_id="same")
        await engine.expect_silence(0.1)
        await assert_serves(engine, request.request_id, stream)


async def test_L8_an_external_id_may_be_used_again_once_its_terminal_is_out() -> None:
    async with mock_fleet() as (frontend, [engine]):
        internal_ids = []
        for _ in range(2):
            stream = frontend.generate(prompt_token_ids=[1], request_id="again")
            request = await engine.next_add()
            assert request.external_req_id == "again"
            internal_ids.append(request.request_id)
            await assert_serves(engine, request.request_id, stream)
        assert internal_ids[0] != internal_ids[1], "an engine must never see an id twice"


async def test_L11_a_call_that_was_given_up_leaves_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with mock_fleet() as (frontend, [engine]):
        [(_, stream)] = await one_stream_each(frontend, [engine])
        engine.on_message = lambda _: None  # It hears, and says nothing.
        await frontend.abort(stream.request_id, timeout_s=0.02)
        assert await frontend.status(timeout_s=0.02) == {}
        await frontend.abort(stream.request_id, wait=False)
        await asyncio.sleep(0)
        assert len(frontend._dispatcher.client._engines[0].calls) == 1  # Its answer may still come.
        given_up = asyncio.create_task(frontend.status())
        await asyncio.sleep(0.02)
        given_up.cancel()
        await engine.vanish()
        await assert_ended_with_error(stream)
        await asyncio.sleep(0)
        assert not frontend._dispatcher.client._engines[0].calls
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.getMessage()]


async def test_L12_a_status_that_makes_no_sense_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with mock_fleet(2) as (frontend, [confused, good]):
        replies = []

        def answer(message: object) -> None:
            assert isinstance(message, UtilityCall)
            replies.append(asyncio.create_task(confused.reply(message, {"state": 3})))

        confused.on_message = answer
        assert await frontend.status() == {1: good.make_status()}
        assert len(replies) == 1
    assert "engine 0 told its status wrongly" in caplog.text
