"""The abort programs of `scripts/`, run against real engine processes with the fake runner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from ipc.engine_config import EngineConfig
from scripts.examples import abort_scenarios
from scripts.mass_abort import Plan, Report, num_free_blocks, run_inflight, run_workers

PROMPT = [5, 6, 7, 8]


def fake_config(num_engines: int = 1) -> FrontendConfig:
    """Engines of 64 rows and 8 ms a step: what a front end on a loaded core keeps up with."""
    return FrontendConfig(
        engine=EngineConfig(
            model="fake",
            runner="fake",
            max_model_len=4096,
            max_num_seqs=64,
            block_size=16,
            num_gpu_blocks_override=1500,
            fake_step_time_ms=8.0,
        ),
        data_parallel_size=num_engines,
    )


@contextlib.asynccontextmanager
async def fake_engine(num_engines: int = 1) -> AsyncIterator[AsyncEngine]:
    async with await AsyncEngine.start(fake_config(num_engines)) as engine:
        yield engine


async def assert_nothing_is_left(engine: AsyncEngine) -> None:
    """Registry empty, books balanced, every block free or cached."""
    assert engine.num_live_requests == 0
    # Drops linger a millisecond before they leave.
    await asyncio.sleep(0.1)
    for status in (await engine.status()).values():
        assert (status.num_running, status.num_waiting) == (0, 0)
        assert num_free_blocks({0: status}) == status.num_blocks
        assert status.integrity_errors == ()
        assert status.counters["integrity_violations"] == 0


def assert_report_is_clean(report: Report, plan: Plan) -> None:
    assert report.is_clean
    assert report.unaccounted == 0
    assert report.completed + report.aborted + report.not_sent == plan.num_requests
    assert report.actual >= plan.target
    assert report.aborted > 0
    assert report.blocks_free_after == report.blocks_free_before
    assert set(report.by_finish_reason) <= {"stop", "length", "abort"}


@pytest.mark.parametrize("num_engines", [1, 2])
def test_L1_L6_L11_fifty_workers_and_an_abort_all_leave_no_request_unaccounted_for(
    num_engines: int,
) -> None:
    plan = Plan(max_new_tokens=40)
    report = run_workers(fake_config(num_engines), plan)
    assert_report_is_clean(report, plan)
    assert report.aborted <= plan.num_workers
    assert report.not_sent > 0


@pytest.mark.parametrize("num_engines", [1, 2])
async def test_L1_L6_L11_an_abort_all_over_a_thousand_in_flight_leaves_none_unaccounted_for(
    num_engines: int,
) -> None:
    plan = Plan(max_new_tokens=40)
    report = await run_inflight(fake_config(num_engines), plan)
    assert_report_is_clean(report, plan)
    assert report.not_sent == 0
    assert report.sent == plan.num_requests


async def test_L7_clients_that_hang_up_cost_those_who_stay_nothing() -> None:
    async with fake_engine() as engine:
        num_served = await abort_scenarios.clients_hang_up(engine, {"prompt_token_ids": PROMPT})
        assert num_served == 10
        await assert_nothing_is_left(engine)


async def test_L2_a_deadline_keeps_exactly_the_tokens_generated_until_then() -> None:
    async with fake_engine() as engine:
        result = await abort_scenarios.deadline_passes(
            engine, {"prompt_token_ids": PROMPT}, deadline_s=0.1
        )
        assert result.finish_reason == "abort"
        assert 0 < len(result.token_ids) < 4000
        assert list(result.token_ids) == expected_tokens(PROMPT, len(result.token_ids))
        await assert_nothing_is_left(engine)


async def test_L3_the_stop_button_ends_the_chat_with_what_was_shown_and_nothing_invented() -> None:
    async with fake_engine() as engine:
        shown = await abort_scenarios.user_presses_stop(engine, {"prompt_token_ids": PROMPT})
        assert (shown[-1].finish_reason, shown[-1].abort_cause) == ("abort", "explicit")
        assert all(output.finish_reason is None for output in shown[:-1])
        token_ids = [token_id for output in shown for token_id in output.token_ids]
        assert len(token_ids) >= 10
        assert token_ids == expected_tokens(PROMPT, len(token_ids))
        await assert_nothing_is_left(engine)


async def test_L6_a_batch_that_is_cut_keeps_whole_and_partial_results() -> None:
    async with fake_engine(2) as engine:
        results = await abort_scenarios.batch_is_cut_at_80_percent(
            engine, {"prompt_token_ids": PROMPT}
        )
        assert len(results) == 25
        assert sum(result.finish_reason == "length" for result in results) == 20
        assert sum(result.finish_reason == "abort" for result in results) == 5
        for result in results:
            assert list(result.token_ids) == expected_tokens(PROMPT, len(result.token_ids))
        await assert_nothing_is_left(engine)
