"""The synchronous core with the fake runner: batching, chunks, prefixes, preemption, ends.

The fake runner reads its tokens back through the block tables, so right tokens mean right blocks.
"""

from __future__ import annotations

from typing import Any

import pytest

from engine_core.config import SchedulerConfig
from engine_core.fake_runner import expected_tokens
from engine_core.scheduler import Scheduler
from ipc.output import EventType, FinishReason
from tests.support.core_driver import CoreDriver


def test_a_request_gets_its_tokens_and_one_terminal() -> None:
    driver = CoreDriver()
    driver.add("a", [1, 2, 3], max_tokens=5)
    driver.run()
    assert driver.tokens["a"] == expected_tokens([1, 2, 3], 5)
    assert driver.finish_reasons("a") == [FinishReason.LENGTH]


def test_requests_of_mixed_lengths_run_in_one_batch() -> None:
    driver = CoreDriver()
    prompts = {f"r{n}": list(range(n, 2 * n + 1)) for n in range(1, 8)}
    for request_id, prompt in prompts.items():
        driver.add(request_id, prompt, max_tokens=20)
    driver.run()
    for request_id, prompt in prompts.items():
        assert driver.tokens[request_id] == expected_tokens(prompt, 20)
    assert driver.core.num_steps <= 22


def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget() -> None:
    driver = CoreDriver(max_num_batched_tokens=8)
    prompt = list(range(50))
    driver.add("a", prompt, max_tokens=3)
    for _ in range(6):
        driver.step()
        assert driver.outputs["a"] == []
    driver.run()
    assert driver.tokens["a"] == expected_tokens(prompt, 3)


def test_no_decode_starves_behind_a_long_prefill() -> None:
    driver = CoreDriver(max_num_batched_tokens=8)
    driver.add("short", [1], max_tokens=100, priority=1)
    driver.step()
    driver.add("long", list(range(100)), max_tokens=1, priority=0)
    for _ in range(10):
        before = len(driver.tokens["short"])
        driver.step()
        assert len(driver.tokens["short"]) == before + 1
    driver.run()


def test_a_repeated_prompt_is_served_from_the_prefix_cache() -> None:
    driver = CoreDriver()
    prompt = list(range(21))
    driver.add("a", prompt, max_tokens=4)
    driver.run()
    driver.add("b", prompt, max_tokens=4)
    driver.run()
    stats = driver.outputs["b"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == 20
    assert stats.num_computed_tokens == 1
    assert driver.tokens["b"] == expected_tokens(prompt, 4)


def test_a_prompt_of_whole_blocks_leaves_one_block_to_compute() -> None:
    driver = CoreDriver()
    prompt = list(range(16))
    for request_id in ("a", "b"):
        driver.add(request_id, prompt, max_tokens=2)
        driver.run()
    stats = driver.outputs["b"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == 12


def test_outputs_extend_a_cached_prefix() -> None:
    driver = CoreDriver()
    driver.add("a", [1, 2, 3], max_tokens=30)
    driver.run()
    longer = [1, 2, 3, *driver.tokens["a"], 9]
    driver.add("b", longer, max_tokens=4)
    driver.run()
    stats = driver.outputs["b"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == 32
    assert driver.tokens["b"] == expected_tokens(longer, 4)


@pytest.mark.parametrize(
    ("limits", "request_fields", "sampling"),
    [
        ({"enable_prefix_caching": False}, {}, {}),
        ({}, {"cache_salt": "other tenant"}, {}),
        ({}, {}, {"skip_reading_prefix_cache": True}),
    ],
)
def test_the_prefix_cache_is_not_read_when_it_must_not_be(
    limits: dict[str, Any], request_fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    driver = CoreDriver(**limits)
    prompt = list(range(20))
    driver.add("a", prompt, max_tokens=2)
    driver.run()
    driver.add("b", prompt, max_tokens=2, request=request_fields, **sampling)
    driver.run()
    stats = driver.outputs["b"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == 0


def test_short_of_blocks_the_last_request_is_preempted_and_recomputed_with_its_tokens() -> None:
    driver = CoreDriver(num_blocks=16, max_model_len=64, enable_prefix_caching=False)
    prompts = {f"r{n}": [n] * 10 for n in range(3)}
    for request_id, prompt in prompts.items():
        driver.add(request_id, prompt, max_tokens=40)
    driver.run()
    assert driver.core.scheduler.num_preemptions > 0
    for request_id, prompt in prompts.items():
        assert driver.tokens[request_id] == expected_tokens(prompt, 40)
    preempted = {
        request_id
        for request_id, outputs in driver.outputs.items()
        for output in outputs
        for event in output.events or ()
        if event.type is EventType.PREEMPTED
    }
    assert "r0" not in preempted
    assert preempted


def test_a_lower_priority_number_runs_first_and_is_preempted_last() -> None:
    driver = CoreDriver(max_num_seqs=1)
    driver.add("later", [1], max_tokens=2, priority=5)
    driver.add("sooner", [2], max_tokens=2, priority=-1)
    driver.run()
    order = [output.request_id for _, frame in driver.frames for output in frame.outputs]
    assert order == ["sooner", "sooner", "later", "later"]


def test_the_rows_of_the_batch_bound_how_many_run_at_once() -> None:
    driver = CoreDriver(max_num_seqs=2)
    for n in range(5):
        driver.add(f"r{n}", [n], max_tokens=3)
    driver.step()
    assert len(driver.core.scheduler.running) == 2
    assert len(driver.core.scheduler.waiting) == 3
    driver.run()


def test_a_pool_that_cannot_hold_one_full_request_is_refused_with_the_remedy() -> None:
    config = SchedulerConfig(
        max_model_len=100, max_num_seqs=1, max_num_batched_tokens=10, block_size=4
    )
    with pytest.raises(ValueError, match=r"holds 40 tokens.*max_model_len=100.*memory"):
        Scheduler(config, num_blocks=10, vocab_size=100)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_batched_tokens": 4}, r"max_num_batched_tokens=4 is below max_num_seqs=8"),
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoreDriver(**limits)


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────


def test_eos_ends_a_request_without_a_stop_reason() -> None:
    driver = CoreDriver()
    eos = expected_tokens([1, 2, 3], 3)[2]
    driver.add("a", [1, 2, 3], max_tokens=10, eos_token_id=eos)
    driver.run()
    last = driver.outputs["a"][-1]
    assert driver.tokens["a"] == expected_tokens([1, 2, 3], 3)
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, None)


def test_a_stop_token_ends_a_request_and_is_named() -> None:
    driver = CoreDriver()
    stop = expected_tokens([1, 2, 3], 3)[2]
    driver.add("a", [1, 2, 3], max_tokens=10, stop_token_ids=[stop])
    driver.run()
    last = driver.outputs["a"][-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, stop)


def test_neither_eos_nor_stop_tokens_end_a_request_before_min_tokens() -> None:
    driver = CoreDriver()
    eos = expected_tokens([1, 2, 3], 3)[2]
    driver.add("a", [1, 2, 3], max_tokens=6, min_tokens=4, eos_token_id=eos)
    driver.run()
    assert driver.finish_reasons("a") == [FinishReason.LENGTH]


def test_the_context_bounds_a_request_without_max_tokens() -> None:
    driver = CoreDriver(max_model_len=16)
    driver.add("a", [1, 2, 3], max_tokens=None)
    driver.run()
    assert len(driver.tokens["a"]) == 13
    assert driver.finish_reasons("a") == [FinishReason.LENGTH]


def test_logprobs_come_with_each_token_that_asked_for_them() -> None:
    driver = CoreDriver()
    driver.add("a", [1], max_tokens=3, logprobs=2)
    driver.add("b", [2], max_tokens=3)
    driver.run()
    for output in driver.outputs["a"]:
        assert output.new_logprobs is not None
        assert output.new_logprobs.token_ids[0, 0] == output.new_token_ids[0]
        assert output.new_logprobs.token_ids.shape == (1, 3)
    assert all(output.new_logprobs is None for output in driver.outputs["b"])


def test_statistics_ride_with_outputs_now_and_then_and_once_at_the_end() -> None:
    driver = CoreDriver()
    driver.add("a", [1], max_tokens=50)
    driver.run()
    stats = [f.scheduler_stats for _, f in driver.frames if f.scheduler_stats is not None]
    assert 2 <= len(stats) < 20
    assert stats[0].num_running_reqs == 1
    assert (stats[-1].num_running_reqs, stats[-1].kv_cache_usage) == (0, 0.0)


def test_statistics_count_prefix_cache_hits_since_the_last_report_and_so_each_once() -> None:
    driver = CoreDriver()
    prompt = list(range(9))
    driver.add("a", prompt, max_tokens=50)
    driver.run()
    driver.add("b", prompt, max_tokens=50)
    driver.run()
    reports = [
        frame.scheduler_stats.prefix_cache_stats
        for _, frame in driver.frames
        if frame.scheduler_stats is not None
    ]
    assert len(reports) > 4
    assert sum(report.requests for report in reports) == 2
    assert sum(report.queries for report in reports) == 18
    assert sum(report.hits for report in reports) == 8
