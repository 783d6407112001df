"""Explicit aborts: exact aim, any stage, effect before answer, and abort-all as one cut."""

from __future__ import annotations

import asyncio
import time

from frontend.async_engine import AsyncEngine
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.lifecycle import CAESURA_ABORT
from ipc.output import FinishReason
from tests.support.auto_answers import AutoAnswers
from tests.support.mock_fleet import mock_fleet

LONG = SamplingParams(max_tokens=100_000)


async def streams_with_a_token(frontend: AsyncEngine, names: list[str]) -> dict[str, RequestStream]:
    streams = {
        name: frontend.generate(prompt_token_ids=[1, 2], request_id=name, sampling_params=LONG)
        for name in names
    }
    async with asyncio.timeout(10):
        for stream in streams.values():
            await anext(stream)
    return streams


async def live_names(streams: dict[str, RequestStream], wait_s: float = 0.1) -> list[str]:
    """Names of the streams that still bring tokens."""
    await asyncio.sleep(wait_s)
    names = []
    for name, stream in streams.items():
        async with asyncio.timeout(5):
            out = await anext(stream, None)
        if out is not None and out.finish_reason is None:
            names.append(name)
    return names


async def test_L3_abort_hits_the_exact_id_and_never_a_prefix_of_it() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        streams = await streams_with_a_token(frontend, ["a", "a-1", "a-10", "a-2"])
        receipt = await frontend.abort("a-1")
        assert [entry.status for entry in receipt.requests.values()] == ["aborted"]
        assert (await streams.pop("a-1").result()).finish_reason == "abort"
        assert await live_names(streams) == ["a", "a-10", "a-2"]


async def test_L3_prefix_and_tag_are_selectors_of_their_own() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        streams = await streams_with_a_token(frontend, ["job-1", "job-2", "other"])
        streams["tagged"] = frontend.generate(
            prompt_token_ids=[1], request_id="tagged", sampling_params=LONG, tags=["night", "eu"]
        )
        await anext(streams["tagged"])
        await frontend.abort(prefix="job-")
        assert await live_names(streams) == ["other", "tagged"]
        await frontend.abort(tag="eu")
        assert await live_names({name: streams[name] for name in ("other", "tagged")}) == ["other"]


async def test_L5_abort_answers_after_the_terminals_were_handed_to_their_streams() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine):
        streams = {
            name: frontend.generate(prompt_token_ids=[1], request_id=name, sampling_params=LONG)
            for name in ("a", "b")
        }
        await asyncio.sleep(0.05)
        receipt = await frontend.abort(["a", "b", "unheard-of"])
        assert {name: entry.status for name, entry in receipt.requests.items()} == {
            "a": "aborted",
            "b": "aborted",
            "unheard-of": "unknown",
        }
        reading = {name: asyncio.create_task(stream.result()) for name, stream in streams.items()}
        await asyncio.sleep(0)
        for name, task in reading.items():
            assert task.done(), "the answer came before the terminal"
            result = task.result()
            assert result.finish_reason == "abort"
            assert receipt.requests[name].num_output_tokens == len(result.token_ids) > 0


async def test_L5_an_engine_that_does_not_answer_in_time_leaves_the_abort_pending() -> None:
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(prompt_token_ids=[1], request_id="slow", sampling_params=LONG)
        request = await engine.next_add()
        await engine.send_tokens(request.request_id, [3])
        started_s = time.monotonic()
        receipt = await frontend.abort("slow", timeout_s=0.2)
        assert time.monotonic() - started_s < 2
        assert receipt.requests["slow"].status == "pending"
        # The effect still follows.
        await engine.send_tokens(request.request_id, [], finish=FinishReason.ABORT)
        result = await asyncio.wait_for(stream.result(), 5)
        assert (result.finish_reason, list(result.token_ids)) == ("abort", [3])


async def test_L1_an_end_that_overtakes_the_abort_is_the_one_end() -> None:
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(prompt_token_ids=[1], request_id="race", sampling_params=LONG)
        request = await engine.next_add()
        aborting = asyncio.create_task(frontend.abort("race", timeout_s=0.5))
        call = await engine.next_utility()
        assert call.method == CAESURA_ABORT
        await engine.send_tokens(request.request_id, [3], finish=FinishReason.STOP)
        await engine.reply(
            call,
            {
                "requests": {
                    request.request_id: {"status": "unknown", "num_output_tokens": 0, "stage": ""}
                },
                "num_blocks_freed": 0,
                "num_blocks_cached": 0,
            },
        )
        receipt = await asyncio.wait_for(aborting, 5)
        assert receipt.requests["race"].status == "finished"
        assert [out.finish_reason async for out in stream] == ["stop"]


async def test_L2_L4_a_request_aborted_in_the_turn_it_was_made_ends_with_the_step_in_flight() -> (
    None
):
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine) as answers:
        stream = frontend.generate("a text that has to be tokenised", request_id="early")
        receipt = (await frontend.abort("early")).requests["early"]
        assert receipt.status == "aborted"
        result = await asyncio.wait_for(stream.result(), 5)
        assert result.finish_reason == "abort"
        # A step may have begun between the two messages; its token is the client's.
        assert len(result.token_ids) == receipt.num_output_tokens <= 1
        await asyncio.sleep(0.1)
        assert not answers.live, "the engine still runs a request that was aborted"


async def test_L4_a_request_dropped_in_the_turn_it_was_made_does_not_run_on() -> None:
    async with mock_fleet() as (frontend, [engine]), AutoAnswers(engine) as answers:
        streams = [frontend.generate("tokenise this", sampling_params=LONG) for _ in range(20)]
        for stream in streams:
            stream.close()
        await asyncio.sleep(0.3)
        assert not answers.live


async def test_L6_abort_all_ends_what_was_accepted_before_it_and_nothing_after() -> None:
    async with mock_fleet(2) as (frontend, engines):
        async with AutoAnswers(engines[0]), AutoAnswers(engines[1]):
            before = await streams_with_a_token(frontend, [f"before-{i}" for i in range(10)])
            # Not yet sent, when the call begins.
            before["fresh"] = frontend.generate("hello", request_id="fresh", sampling_params=LONG)
            aborting = asyncio.create_task(frontend.abort(abort_all=True))
            receipt = await asyncio.wait_for(aborting, 5)
            after = await streams_with_a_token(frontend, ["after-0", "after-1"])
            assert set(receipt.requests) == set(before)
            for stream in before.values():
                assert (await asyncio.wait_for(stream.result(), 5)).finish_reason == "abort"
            assert await live_names(after) == ["after-0", "after-1"]


async def test_L5_a_foreign_engines_requests_end_with_what_the_front_end_received() -> None:
    """A plain vLLM knows no `caesura_abort`: one ABORT frame, and no word of it ever returns."""
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        streams = [
            frontend.generate(prompt_token_ids=[1], request_id=name, sampling_params=LONG)
            for name in ("a", "b")
        ]
        requests = [await engine.next_add() for _ in streams]
        for request in requests:
            await engine.send_tokens(request.request_id, [3, 4])
        await asyncio.sleep(0.05)
        receipt = await asyncio.wait_for(frontend.abort(["a", "b"]), 5)
        assert await engine.next_abort() == [request.request_id for request in requests]
        assert [entry.num_output_tokens for entry in receipt.requests.values()] == [2, 2]
        for stream in streams:
            result = await asyncio.wait_for(stream.result(), 5)
            assert (result.finish_reason, list(result.token_ids)) == ("abort", [3, 4])
        await engine.expect_silence(0.1)
