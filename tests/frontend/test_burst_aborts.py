"""Many streams dropped at once reach each engine as one Abort frame, in drop order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from frontend.async_engine import AsyncEngine
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.abort import Abort
from ipc.lifecycle import CAESURA_ABORT, AbortReceipt, RequestReceipt
from ipc.output import EngineCoreOutput, EngineCoreOutputs, FinishReason
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet

MAX_IDS_PER_FRAME = 1024
QUIET_S = 0.1
"""How long an engine must hear nothing before we believe that nothing follows."""


async def open_streams(
    frontend: AsyncEngine, engines: Sequence[MockEngine], num_streams: int
) -> dict[str, RequestStream]:
    """Streams of which each has delivered its first token, by internal id, in the order opened."""
    streams = {
        f"burst-{index}": frontend.generate(
            prompt_token_ids=[1, 2, 3],
            request_id=f"burst-{index}",
            sampling_params=SamplingParams(max_tokens=100),
        )
        for index in range(num_streams)
    }
    internal_ids: dict[str, str] = {}
    for engine in engines:
        outputs = []
        while len(internal_ids) < num_streams:
            try:
                request = await engine.next_add(timeout_s=0.3)
            except TimeoutError:
                break  # The others went to other engines.
            assert request.external_req_id is not None
            internal_ids[request.external_req_id] = request.request_id
            outputs.append(EngineCoreOutput(request.request_id, (42,)))
        await engine.send(EngineCoreOutputs(outputs=tuple(outputs)))
    async with asyncio.timeout(20):
        for stream in streams.values():
            assert list((await anext(stream)).token_ids) == [42]
    return {internal_ids[name]: stream for name, stream in streams.items()}


async def test_L7_three_streams_dropped_after_their_first_token_are_one_abort_frame() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 3)
        first, second, third = streams
        drop_order = [third, first, second]
        for request_id in drop_order:
            streams[request_id].close()
        assert await engine.next_abort() == drop_order
        await engine.expect_silence(QUIET_S)
        assert len(engine.aborts) == 1


async def test_L7_three_thousand_drops_over_three_engines_are_one_frame_each() -> None:
    async with mock_fleet(3) as (frontend, engines):
        streams = await open_streams(frontend, engines, 3000)
        owners = {add.request_id: engine for engine in engines for add in engine.adds}
        assert [len(engine.adds) for engine in engines] == [1000, 1000, 1000]
        drop_order = list(reversed(streams))
        for request_id in drop_order:
            streams[request_id].close()
        for engine in engines:
            expected = [request_id for request_id in drop_order if owners[request_id] is engine]
            assert await engine.next_abort() == expected
        for engine in engines:
            await engine.expect_silence(QUIET_S)


async def test_L7_three_thousand_drops_on_one_engine_are_three_frames_of_at_most_1024_ids() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 3000)
        for stream in streams.values():
            stream.close()
        frames = [await engine.next_abort() for _ in range(3)]
        assert [len(frame) for frame in frames] == [1024, 1024, 952]
        assert [request_id for frame in frames for request_id in frame] == list(streams)
        await engine.expect_silence(QUIET_S)


async def test_L7_a_lone_drop_waits_about_a_millisecond() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 20)
        delays_ms = []
        for request_id, stream in streams.items():
            dropped_s = time.monotonic()
            stream.close()
            assert await engine.next_abort() == [request_id]
            delays_ms.append((engine.received[-1].time_s - dropped_s) * 1000)
        delays_ms.sort()
        median_ms = delays_ms[len(delays_ms) // 2]
        print(f"lone drop to frame: median {median_ms:.2f} ms, longest {delays_ms[-1]:.2f} ms")
        assert median_ms < 20  # A loaded machine; unloaded it is 1 to 2 ms.
        await engine.expect_silence(QUIET_S)


async def test_L7_drops_that_never_cease_are_flushed_all_the_same() -> None:
    """Drops that never leave a quiet millisecond do not put off the frames for ever."""
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 200)
        first_drop_s = time.monotonic()
        for stream in streams.values():
            stream.close()
            time.sleep(0.0004)  # noqa: ASYNC251 (asyncio's own sleep would take a millisecond)
            await asyncio.sleep(0)
        last_drop_s = time.monotonic()
        while sum(map(len, engine.aborts)) < 200:
            await engine.next_abort()
        frame_times_s = [r.time_s for r in engine.received if isinstance(r.message, Abort)]
        assert frame_times_s[0] < last_drop_s, "nothing was sent until the drops ceased"
        assert 2 <= len(engine.aborts) <= 100
        assert [request_id for frame in engine.aborts for request_id in frame] == list(streams)
        print(
            f"{len(engine.aborts)} frames for 200 drops in "
            f"{(last_drop_s - first_drop_s) * 1000:.0f} ms, the first after "
            f"{(frame_times_s[0] - first_drop_s) * 1000:.1f} ms"
        )


async def test_L8_requests_that_have_ended_are_not_aborted() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 3)
        done, live, twice = streams
        await engine.send_tokens(done, [43], finish=FinishReason.LENGTH)
        assert (await streams[done].result()).finish_reason == "length"
        streams[done].close()
        streams[live].close()
        streams[twice].close()
        streams[twice].close()
        assert await engine.next_abort() == [live, twice]
        await engine.expect_silence(QUIET_S)


async def test_L8_a_drop_and_a_natural_end_that_cross_leave_nothing_behind() -> None:
    """The engine may still be told of the drop; it takes an id that it finished as nothing."""
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 1)
        [(request_id, stream)] = streams.items()
        stream.close()
        await engine.send_tokens(request_id, [43], finish=FinishReason.LENGTH)
        await asyncio.sleep(QUIET_S)
        assert engine.aborts in ([], [[request_id]])
        assert [out async for out in stream] == []
        assert frontend.num_live_requests == 0


async def test_L8_an_explicit_abort_of_a_dropped_stream_does_not_hang_or_repeat_the_abort() -> None:
    async with mock_fleet() as (frontend, [engine]):
        [(request_id, stream)] = (await open_streams(frontend, [engine], 1)).items()
        stream.close()
        receipt = await asyncio.wait_for(frontend.abort("burst-0"), 1)
        assert [entry.status for entry in receipt.requests.values()] in (["unknown"], ["finished"])
        assert await engine.next_abort() == [request_id]
        await engine.expect_silence(QUIET_S)


async def test_L8_a_drop_during_an_explicit_abort_of_it_changes_nothing_for_the_caller() -> None:
    async with mock_fleet() as (frontend, [engine]):
        streams = await open_streams(frontend, [engine], 2)
        [dropped, kept] = streams
        aborting = asyncio.create_task(frontend.abort(["burst-0", "burst-1"]))
        call = await engine.next_utility()
        assert (call.method, call.args[0]) == (CAESURA_ABORT, [dropped, kept])
        streams[dropped].close()
        await answer_abort(engine, call.call_id, [dropped, kept])
        receipt = await asyncio.wait_for(aborting, 5)
        assert sum(entry.status == "aborted" for entry in receipt.requests.values()) >= 1
        assert (await streams[kept].result()).finish_reason == "abort"
        await asyncio.sleep(QUIET_S)
        # The drop may still be told; an engine takes it as nothing.
        assert engine.aborts in ([], [[dropped]])


async def answer_abort(engine: MockEngine, call_id: int, request_ids: Sequence[str]) -> None:
    """What an engine answers to `caesura_abort`: terminals, then the receipt."""
    call = next(call for call in engine.utilities if call.call_id == call_id)
    for request_id in request_ids:
        await engine.send_tokens(request_id, [], finish=FinishReason.ABORT)
    receipts = {request_id: RequestReceipt("aborted", 1, "decode") for request_id in request_ids}
    await engine.reply(call, AbortReceipt(receipts, 1, 0).to_wire())


async def test_L7_matched_stop_strings_go_the_way_of_drops_and_the_log_tells_them_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with mock_fleet() as (frontend, [engine]):
        assert frontend.tokenizer is not None
        stop_tokens = frontend.tokenizer.encode("the end")
        sampling = SamplingParams(max_tokens=100, stop=["end"])
        matching = [
            frontend.generate(prompt_token_ids=[1], sampling_params=sampling) for _ in range(3)
        ]
        requests = [await engine.next_add() for _ in matching]
        outputs = [EngineCoreOutput(request.request_id, stop_tokens) for request in requests]
        await engine.send(EngineCoreOutputs(outputs=tuple(outputs)))
        results = [await asyncio.wait_for(stream.result(), 5) for stream in matching]
        assert [result.finish_reason for result in results] == ["stop"] * 3
        assert [result.stop_reason for result in results] == ["end"] * 3
        assert not any("end" in result.text for result in results)
        # Ids include the token that completed the stop string; only the text is cut.
        assert all(list(result.token_ids) == list(stop_tokens) for result in results)
        assert await engine.next_abort() == [request.request_id for request in requests]
        await engine.expect_silence(QUIET_S)
    flushes = [record.getMessage() for record in caplog.records if "stop" in record.getMessage()]
    assert flushes, "the log should name matched stop strings as the cause"


async def test_L7_a_failed_send_is_logged_with_engine_and_ids_and_the_others_get_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with mock_fleet(2) as (frontend, engines):
        streams = await open_streams(frontend, engines, 4)
        deaf, hearing = engines
        await deaf.go_deaf()
        await asyncio.sleep(0.05)  # Until the front end's socket knows.
        for stream in streams.values():
            stream.close()
        assert await hearing.next_abort() == [add.request_id for add in hearing.adds]
        await hearing.expect_silence(QUIET_S)
        assert frontend.is_healthy
    failures = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    named = [add.request_id for add in deaf.adds]
    assert any(
        "engine 0 failed" in message and all(request_id in message for request_id in named)
        for message in failures
    ), failures


async def test_L7_an_engine_that_vanished_costs_the_others_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with mock_fleet(2) as (frontend, engines):
        streams = await open_streams(frontend, engines, 4)
        gone, reachable = engines
        expected = [add.request_id for add in reachable.adds]
        await gone.vanish()
        for stream in streams.values():
            stream.close()
        assert await reachable.next_abort() == expected
        await reachable.expect_silence(QUIET_S)
    failures = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("engine 0" in message for message in failures), failures


async def drop_by_cancellation(streams: list[RequestStream]) -> None:
    async def consume(stream: RequestStream) -> None:
        async for _ in stream:
            pass

    tasks = [asyncio.create_task(consume(stream)) for stream in streams]
    streams.clear()
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def drop_by_cancelling_result(streams: list[RequestStream]) -> None:
    tasks = [asyncio.create_task(stream.result()) for stream in streams]
    streams.clear()
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def drop_by_garbage_collection(streams: list[RequestStream]) -> None:
    streams.clear()
    gc.collect()


async def drop_from_another_thread(streams: list[RequestStream]) -> None:
    def close_all() -> None:
        for stream in streams:
            stream.close()

    thread = threading.Thread(target=close_all)
    thread.start()
    await asyncio.to_thread(thread.join, 5)


async def drop_the_last_reference_in_another_thread(streams: list[RequestStream]) -> None:
    thread = threading.Thread(target=streams.clear)
    thread.start()
    await asyncio.to_thread(thread.join, 5)


@pytest.mark.parametrize(
    "drop",
    [
        drop_by_cancellation,
        drop_by_cancelling_result,
        drop_by_garbage_collection,
        drop_from_another_thread,
        drop_the_last_reference_in_another_thread,
    ],
)
async def test_L7_every_way_to_drop_streams_aborts_each_exactly_once(
    drop: Callable[[list[RequestStream]], asyncio.Future[None]],
) -> None:
    async with mock_fleet() as (frontend, [engine]):
        by_id = await open_streams(frontend, [engine], 5)
        request_ids, streams = set(by_id), list(by_id.values())
        by_id.clear()
        await drop(streams)
        aborted: list[str] = []
        while len(aborted) < 5:
            aborted += await engine.next_abort()
        assert sorted(aborted) == sorted(request_ids)
        await engine.expect_silence(QUIET_S)
