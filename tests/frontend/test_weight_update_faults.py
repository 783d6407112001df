"""Weight updates where engines disagree, die, or do not answer."""

from __future__ import annotations

import asyncio

import pytest

from frontend.async_engine import AsyncEngine
from frontend.errors import (
    EngineTimeoutError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
from frontend.weights import updates
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME, PauseReceipt
from ipc.utility import UtilityCall
from ipc.weights import (
    CAESURA_COMMIT_WEIGHTS,
    CAESURA_DISCARD_WEIGHTS,
    CAESURA_STAGE_WEIGHTS,
    StagedReceipt,
)
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet

STAGED = StagedReceipt(num_tensors=3, num_bytes=12, checksum="c0ffee").to_wire()
OTHER = StagedReceipt(num_tensors=3, num_bytes=12, checksum="decaf").to_wire()


async def next_call(engine: MockEngine, method: str) -> UtilityCall:
    call = await engine.next_utility()
    assert call.method == method
    return call


async def staged_and_paused(
    frontend: AsyncEngine, engines: list[MockEngine]
) -> asyncio.Task[object]:
    """An update whose commits come next."""
    updating: asyncio.Task[object] = asyncio.create_task(
        frontend.update_weights_from_disk("w", version="v")
    )
    for engine in engines:
        await engine.reply(await next_call(engine, CAESURA_STAGE_WEIGHTS), STAGED)
    for engine in engines:
        await engine.reply(await next_call(engine, CAESURA_PAUSE), PauseReceipt().to_wire())
    return updating


async def assert_discarded(frontend: AsyncEngine, engines: list[MockEngine]) -> None:
    for engine in engines:
        await next_call(engine, CAESURA_DISCARD_WEIGHTS)
        await engine.expect_silence(0.05)
    assert frontend.pause_state.state == "running"
    assert frontend.metrics.num_weight_updates["failed"] == 1


async def test_L10_engines_that_staged_different_tensors_change_nothing() -> None:
    async with mock_fleet(2) as (frontend, engines):
        updating = asyncio.create_task(frontend.update_weights_from_disk("w"))
        for engine, receipt in zip(engines, (STAGED, OTHER), strict=True):
            await engine.reply(await next_call(engine, CAESURA_STAGE_WEIGHTS), receipt)
        with pytest.raises(WeightUpdateError, match=r"engine 0 .*c0ffee.*engine 1 .*decaf"):
            await updating
        await assert_discarded(frontend, engines)


async def test_L10_a_failure_of_one_engine_stops_the_others_at_once() -> None:
    async with mock_fleet(2) as (frontend, engines):
        updating = asyncio.create_task(frontend.update_weights_from_disk("w"))
        calls = [await next_call(engine, CAESURA_STAGE_WEIGHTS) for engine in engines]
        await engines[1].reply(calls[1], failure="no such file")
        with pytest.raises(WeightUpdateError, match="engine 1: no such file; nothing was changed"):
            await asyncio.wait_for(updating, 2)
        await assert_discarded(frontend, engines)


async def test_L10_an_engine_that_does_not_stage_in_time_changes_nothing() -> None:
    async with mock_fleet(2) as (frontend, engines):
        updating = asyncio.create_task(frontend.update_weights_from_disk("w", timeout_s=0.1))
        calls = [await next_call(engine, CAESURA_STAGE_WEIGHTS) for engine in engines]
        await engines[0].reply(calls[0], STAGED)
        with pytest.raises(
            EngineTimeoutError, match=r"engine 1 did not answer.*nothing was changed"
        ):
            await updating
        await assert_discarded(frontend, engines)


async def test_L10_a_caller_that_gives_up_while_tensors_are_staged_changes_nothing() -> None:
    async with mock_fleet() as (frontend, engines):
        updating = asyncio.create_task(frontend.update_weights_from_disk("w"))
        await next_call(engines[0], CAESURA_STAGE_WEIGHTS)
        updating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await updating
        await assert_discarded(frontend, engines)


async def test_L12_an_engine_that_dies_is_no_failure_of_the_others() -> None:
    async with mock_fleet(3) as (frontend, engines):
        updating = asyncio.create_task(frontend.update_weights_from_disk("w", version="v"))
        calls = [await next_call(engine, CAESURA_STAGE_WEIGHTS) for engine in engines]
        await engines[2].die()
        for engine, call in zip(engines[:2], calls[:2], strict=True):
            await engine.reply(call, STAGED)
        for engine in engines[:2]:
            await engine.reply(await next_call(engine, CAESURA_PAUSE), PauseReceipt().to_wire())
        commits = [await next_call(engine, CAESURA_COMMIT_WEIGHTS) for engine in engines[:2]]
        await engines[1].die()
        await engines[0].reply(commits[0], "v")
        await engines[0].reply(await next_call(engines[0], CAESURA_RESUME), "paused")
        report = await asyncio.wait_for(updating, 5)
        assert (report.version, report.engines) == ("v", {0: "ok", 1: "error"})
        assert frontend.weight_version == "v"


async def test_L10_a_commit_without_an_answer_says_who_has_the_new_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(updates, "COMMIT_TIMEOUT_S", 0.2)
    async with mock_fleet(3) as (frontend, engines):
        updating = await staged_and_paused(frontend, engines)
        commits = [await next_call(engine, CAESURA_COMMIT_WEIGHTS) for engine in engines]
        await engines[0].reply(commits[0], "v")
        await engines[2].reply(commits[2], failure="no weight update is staged")
        for engine in engines:
            await next_call(engine, CAESURA_DISCARD_WEIGHTS)
            await engine.reply(await next_call(engine, CAESURA_RESUME), "paused")
        with pytest.raises(WeightUpdateIncompleteError) as caught:
            await asyncio.wait_for(updating, 5)
        assert caught.value.engines == {0: "ok", 1: "timeout", 2: "error"}
        assert "took effect on engine 0; engine 1 did not answer" in str(caught.value)
        assert frontend.weight_version is None, "the engines differ"
        assert frontend.pause_state.state == "running"
        assert frontend.metrics.num_weight_updates["incomplete"] == 1


async def test_L10_a_pause_that_began_meanwhile_is_left_as_it_is() -> None:
    async with mock_fleet() as (frontend, [engine]):
        updating = await staged_and_paused(frontend, [engine])
        commit = await next_call(engine, CAESURA_COMMIT_WEIGHTS)
        pausing = asyncio.create_task(frontend.pause("keep", pause_id="mine"))
        pause = await next_call(engine, CAESURA_PAUSE)
        await engine.reply(commit, "v")
        await engine.reply(pause, PauseReceipt().to_wire())
        await asyncio.wait_for(asyncio.gather(updating, pausing), 5)
        assert (frontend.pause_state.state, frontend.pause_state.pause_id) == ("paused", "mine")
        await engine.expect_silence(0.05)


async def test_content_is_refused_where_engines_run_on_other_machines() -> None:
    async with mock_fleet() as (frontend, [engine]):
        with pytest.raises(WeightUpdateError, match="give the path"):
            await frontend.update_weights_from_tensors(b"tensors")
        await engine.expect_silence(0.05)


async def test_a_plain_vllm_engine_takes_no_update_from_here() -> None:
    async with mock_fleet(caesura=False) as (frontend, [engine]):
        with pytest.raises(WeightUpdateError, match="plain vLLM"):
            await frontend.update_weights_from_disk("w")
        await engine.expect_silence(0.05)
