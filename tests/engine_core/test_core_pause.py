"""Pause and resume of one engine, by hand: what each mode does to requests at each stage."""

from __future__ import annotations

import pytest

from engine_core.fake_runner import expected_tokens
from ipc.output import FinishReason
from ipc.utility import UtilityCall
from tests.support.core_driver import CoreDriver

PROMPT = list(range(1, 12))


def full(driver: CoreDriver, *, num_waiting: int = 2, max_tokens: int = 12) -> list[str]:
    """Two requests run (all that fit), others wait. Returns all ids, in order of arrival."""
    names = [f"r{number}" for number in range(2 + num_waiting)]
    for name in names:
        driver.add(name, PROMPT, max_tokens=max_tokens)
    for _ in range(3):
        driver.step()
    assert len(driver.core.scheduler.running) == 2
    return names


def small_driver() -> CoreDriver:
    return CoreDriver(max_num_seqs=2)


def check_all_exact(driver: CoreDriver, names: list[str], num_tokens: int = 12) -> None:
    for name in names:
        assert driver.tokens[name] == expected_tokens(PROMPT, num_tokens), name
        assert driver.finish_reasons(name) == [FinishReason.LENGTH]


def test_L9_keep_freezes_running_requests_and_a_resume_loses_and_repeats_no_token() -> None:
    driver = small_driver()
    names = full(driver)
    receipt = driver.pause("keep", pause_id="p1")
    assert (receipt.num_kept, receipt.num_waiting, receipt.num_aborted) == (2, 2, 0)
    assert not driver.core.has_work
    before = driver.core.num_steps
    status = driver.status()
    assert (status.state, status.pause_mode, status.pause_id) == ("paused", "keep", "p1")
    assert driver.resume() == "paused"
    assert driver.status().state == "running"
    driver.run()
    check_all_exact(driver, names)
    assert driver.core.scheduler.num_preemptions == 0
    assert driver.core.num_steps > before


def test_L9_retract_frees_every_block_and_recomputes_in_the_order_of_arrival() -> None:
    driver = small_driver()
    names = full(driver)
    receipt = driver.pause("retract")
    assert (receipt.num_retracted, receipt.num_kept, receipt.num_waiting) == (2, 0, 4)
    assert receipt.num_blocks_freed + receipt.num_blocks_cached > 0
    pool = driver.core.scheduler.pool
    assert pool.num_free + pool.num_cached == pool.num_blocks
    driver.resume()
    driver.step()
    assert [request.request_id for request in driver.core.scheduler.running] == names[:2]
    driver.run()
    check_all_exact(driver, names)


def test_L9_keep_with_clear_cache_is_retract_and_empties_the_prefix_cache() -> None:
    driver = small_driver()
    names = full(driver)
    receipt = driver.pause("keep", clear_cache=True)
    assert (receipt.num_retracted, receipt.num_kept) == (2, 0)
    pool = driver.core.scheduler.pool
    assert (pool.num_free, pool.num_cached) == (pool.num_blocks, 0)
    driver.resume()
    driver.run()
    check_all_exact(driver, names)


def test_L9_abort_ends_what_runs_and_waits_before_it_is_answered() -> None:
    driver = small_driver()
    names = full(driver)
    position = len(driver.frames)
    receipt = driver.pause("abort")
    assert (receipt.num_aborted, receipt.num_kept, receipt.num_waiting) == (4, 0, 0)
    frames = [frame for _, frame in driver.frames[position:]]
    answered = [frame.utility_output is not None for frame in frames].index(True)
    told = [output.request_id for frame in frames[:answered] for output in frame.outputs]
    assert told == names
    assert all(driver.finish_reasons(name) == [FinishReason.ABORT] for name in names)
    assert driver.tokens["r0"] == expected_tokens(PROMPT, 12)[: len(driver.tokens["r0"])]
    pool = driver.core.scheduler.pool
    assert pool.num_free + pool.num_cached == pool.num_blocks


def test_L9_wait_lets_what_has_begun_finish_and_holds_the_rest() -> None:
    driver = small_driver()
    names = full(driver)
    call = driver.start_call("caesura_pause", "wait", False, None, None)
    assert driver.reply(call) is None
    assert driver.status().state == "draining"
    driver.add("late", PROMPT, max_tokens=12)
    while driver.core.has_work:
        assert driver.reply(call) is None
        driver.step()
    reply = driver.reply(call)
    assert reply is not None
    assert reply.failure_message is None
    assert driver.status().state == "paused"
    check_all_exact(driver, names[:2])
    for held in (*names[2:], "late"):
        assert driver.tokens[held] == []
    driver.resume()
    driver.run()
    check_all_exact(driver, [*names, "late"])


def test_L9_wait_recomputes_what_was_preempted_before_it_drains() -> None:
    driver = CoreDriver(max_num_seqs=2, max_model_len=40, num_blocks=10)
    for name in ("a", "b"):
        driver.add(name, PROMPT, max_tokens=20)
    while driver.core.scheduler.num_preemptions == 0:
        driver.step()
    call = driver.start_call("caesura_pause", "wait", False, None, None)
    while driver.core.has_work:
        driver.step()
    assert driver.reply(call) is not None
    check_all_exact(driver, ["a", "b"], 20)


def test_L9_the_last_abort_of_a_drain_completes_the_pause() -> None:
    driver = small_driver()
    driver.add("only", PROMPT, max_tokens=100)
    driver.step()
    call = driver.start_call("caesura_pause", "wait", False, None, None)
    assert driver.reply(call) is None
    driver.abort("only")
    assert driver.reply(call) is not None
    assert driver.status().state == "paused"


def test_L9_a_drained_wait_clears_the_cache_only_then() -> None:
    driver = small_driver()
    driver.add("only", PROMPT, max_tokens=12)
    driver.step()
    call = driver.start_call("caesura_pause", "wait", True, None, None)
    driver.step()
    assert driver.core.scheduler.pool.num_free < driver.core.scheduler.pool.num_blocks
    while driver.core.has_work:
        driver.step()
    assert driver.reply(call) is not None
    assert driver.core.scheduler.pool.num_free == driver.core.scheduler.pool.num_blocks


def test_L9_a_later_pause_leaves_an_earlier_one_its_empty_cache() -> None:
    driver = small_driver()
    driver.add("done", list(range(40, 60)), max_tokens=2)
    driver.run()
    driver.add("only", PROMPT, max_tokens=12)
    driver.step()
    first = driver.start_call("caesura_pause", "wait", True, None, "first")
    assert driver.core.scheduler.pool.num_cached > 0
    driver.pause("keep")
    assert driver.reply(first) is not None
    assert driver.core.scheduler.pool.num_cached == 0
    driver.resume()
    driver.run()
    check_all_exact(driver, ["only"])


@pytest.mark.parametrize("first", ["keep", "retract"])
@pytest.mark.parametrize("second", ["abort", "wait", "retract", "keep"])
def test_L9_a_later_pause_acts_on_what_an_earlier_one_holds(first: str, second: str) -> None:
    driver = small_driver()
    names = full(driver)
    driver.pause(first)
    call = driver.start_call("caesura_pause", second, False, None, "second")
    while driver.core.has_work:
        driver.step()
    assert driver.reply(call) is not None
    status = driver.status()
    assert (status.state, status.pause_id) == ("paused", "second")
    if second == "abort":
        assert all(driver.finish_reasons(name) == [FinishReason.ABORT] for name in names)
        driver.assert_idle_and_whole()
    elif second == "wait":
        check_all_exact(driver, names[:2])
    elif second == "retract":
        assert not driver.core.scheduler.running
    driver.resume()
    driver.run()
    if second != "abort":
        check_all_exact(driver, names)


def test_L9_a_resume_answers_the_pause_that_it_overtakes() -> None:
    driver = small_driver()
    names = full(driver)
    call = driver.start_call("caesura_pause", "wait", False, None, None)
    assert driver.resume() == "draining"
    reply = driver.reply(call)
    assert reply is not None
    assert reply.failure_message is not None
    assert "a resume overtook" in reply.failure_message
    driver.run()
    check_all_exact(driver, names)


def test_L9_a_resume_of_another_pause_is_refused_and_changes_nothing() -> None:
    driver = small_driver()
    driver.pause("keep", pause_id="mine")
    refusal = driver.call("caesura_resume", "yours").failure_message
    assert refusal is not None
    assert "'mine', not 'yours'" in refusal
    assert driver.status().state == "paused"
    assert driver.call("caesura_resume", "mine").result == "paused"
    assert driver.call("caesura_resume", "mine").result == "running"


def test_L9_a_lease_that_is_over_resumes_by_itself() -> None:
    driver = small_driver()
    names = full(driver)
    driver.pause("keep", lease_s=2.0)
    assert driver.core.lease_ends_s == driver.now + 2.0
    driver.now += 1.9
    assert driver.status().state == "paused"
    driver.now += 0.2
    assert driver.status().state == "running"
    assert driver.core.lease_ends_s is None
    driver.run()
    check_all_exact(driver, names)


def test_L9_a_resume_and_a_new_pause_end_an_older_lease() -> None:
    driver = small_driver()
    driver.pause("keep", lease_s=1.0)
    driver.resume()
    driver.pause("keep")
    driver.now += 5.0
    assert driver.status().state == "paused"
    driver.pause("keep", lease_s=1.0)
    driver.pause("keep")
    driver.now += 5.0
    assert driver.status().state == "paused"


def test_L4_aborts_take_effect_at_once_while_paused() -> None:
    driver = small_driver()
    names = full(driver)
    driver.pause("keep")
    driver.add("late", PROMPT, max_tokens=12)
    receipt = driver.abort_with_receipt("r0", "r2", "late")
    stages = {name: one.stage for name, one in receipt.requests.items()}
    assert stages == {"r0": "decode", "r2": "waiting", "late": "waiting"}
    assert receipt.num_blocks_freed + receipt.num_blocks_cached > 0
    assert driver.core.scheduler.check_integrity() == []
    driver.resume()
    driver.run()
    check_all_exact(driver, [names[1], names[3]])
    for aborted in ("r0", "r2", "late"):
        assert driver.finish_reasons(aborted) == [FinishReason.ABORT]


def test_L9_vllms_pause_scheduler_holds_newcomers_and_its_pause_generation_refuses_them() -> None:
    driver = small_driver()
    assert driver.call("pause_scheduler", "abort", True).result is None
    assert driver.call("is_scheduler_paused").result is True
    driver.add("held", PROMPT, max_tokens=3)
    assert driver.outputs["held"] == []
    assert driver.call("resume_scheduler").result is None
    driver.run()
    assert driver.tokens["held"] == expected_tokens(PROMPT, 3)
    assert driver.call("pause_generation").result is None
    driver.add("refused", PROMPT, max_tokens=3)
    (output,) = driver.outputs["refused"]
    assert output.finish_reason is FinishReason.ERROR
    assert output.error is not None
    assert (output.error.code, output.error.retryable) == ("engine_paused", True)
    driver.call("resume_scheduler")
    driver.add("welcome", PROMPT, max_tokens=3)
    driver.run()
    assert driver.tokens["welcome"] == expected_tokens(PROMPT, 3)


@pytest.mark.parametrize("method", ["pause_scheduler", "caesura_pause"])
def test_L12_a_pause_in_an_unknown_mode_fails_and_pauses_nothing(method: str) -> None:
    driver = small_driver()
    names = full(driver)
    failure = driver.call(method, "bogus", False).failure_message
    assert failure is not None
    assert "bogus" in failure
    driver.run()
    check_all_exact(driver, names)


def test_L9_the_abort_of_a_pause_ends_the_requests_of_every_client() -> None:
    driver = small_driver()
    driver.add("mine", PROMPT, max_tokens=20)
    driver.add("theirs", PROMPT, max_tokens=20, client_index=1)
    driver.step()
    position = len(driver.frames)
    driver.apply(UtilityCall(0, 99, "pause_scheduler", ("abort", False)))
    clients = {
        output.request_id: client
        for client, frame in driver.frames[position:]
        for output in frame.outputs
    }
    assert clients == {"mine": 0, "theirs": 1}
