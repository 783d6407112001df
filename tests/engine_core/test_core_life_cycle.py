"""The life-cycle contract inside one engine: aborts at every stage, receipts, refusals, books."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable

import pytest

from engine_core.core import Input
from engine_core.fake_runner import expected_tokens
from ipc.frames import InputError
from ipc.lifecycle import EngineStatus
from ipc.output import FinishReason
from ipc.request import EngineCoreRequest, SamplingParams
from ipc.utility import UtilityCall
from tests.support.core_driver import CoreDriver

LONG = list(range(60))


def waiting(driver: CoreDriver) -> None:
    driver.add("x", [1, 2, 3], max_tokens=50)


def prefilling(driver: CoreDriver) -> None:
    driver.add("x", LONG, max_tokens=50)
    driver.step()


def decoding(driver: CoreDriver) -> None:
    driver.add("x", [1, 2, 3], max_tokens=50)
    for _ in range(4):
        driver.step()


def preempted(driver: CoreDriver) -> None:
    driver.add("hungry", [7] * 10, max_tokens=230, priority=-1)
    driver.add("x", [1, 2, 3], max_tokens=200)
    while driver.core.scheduler.num_preemptions == 0:
        driver.step()


STAGES = [
    pytest.param(waiting, "waiting", id="waiting"),
    pytest.param(prefilling, "prefill", id="prefill"),
    pytest.param(decoding, "decode", id="decode"),
    pytest.param(preempted, "preempted", id="preempted"),
]


@pytest.mark.parametrize(("bring_to", "stage"), STAGES)
def test_L1_L4_L5_an_abort_with_receipt_finds_a_request_at_any_stage(
    bring_to: Callable[[CoreDriver], None], stage: str
) -> None:
    driver = CoreDriver(max_num_batched_tokens=16, num_blocks=64)
    bring_to(driver)
    tokens = list(driver.tokens["x"])
    receipt = driver.abort_with_receipt("x")
    assert receipt.requests["x"].status == "aborted"
    assert receipt.requests["x"].stage == stage
    assert receipt.requests["x"].num_output_tokens == len(tokens)
    assert driver.finish_reasons("x") == [FinishReason.ABORT]
    assert tokens == expected_tokens(LONG if stage == "prefill" else [1, 2, 3], len(tokens))
    driver.run()
    assert driver.tokens["x"] == tokens


@pytest.mark.parametrize(("bring_to", "stage"), STAGES)
def test_L4_an_abort_frame_ends_a_request_silently_at_any_stage(
    bring_to: Callable[[CoreDriver], None], stage: str
) -> None:
    driver = CoreDriver(max_num_batched_tokens=16, num_blocks=64)
    bring_to(driver)
    num_outputs = len(driver.outputs["x"])
    driver.abort("x")
    driver.run()
    assert len(driver.outputs["x"]) == num_outputs
    assert driver.finish_reasons("x") == []


def test_L5_the_terminal_leaves_before_the_receipt_and_the_blocks_have_left_by_then() -> None:
    driver = CoreDriver()
    decoding(driver)
    held = driver.core.scheduler.pool.num_blocks - driver.core.scheduler.pool.num_available
    frames_before = len(driver.frames)
    receipt = driver.abort_with_receipt("x")
    assert receipt.num_blocks_freed + receipt.num_blocks_cached == held
    assert driver.core.scheduler.pool.num_available == driver.core.scheduler.pool.num_blocks
    frames = [frame for _, frame in driver.frames[frames_before:]]
    assert [output.request_id for output in frames[0].outputs] == ["x"]
    assert frames[1].utility_output is not None
    assert not frames[1].outputs


def test_L5_the_receipt_tells_freed_blocks_from_those_that_stay_in_the_prefix_cache() -> None:
    driver = CoreDriver()
    driver.add("x", list(range(10)), max_tokens=50)
    driver.step()
    receipt = driver.abort_with_receipt("x")
    assert (receipt.num_blocks_cached, receipt.num_blocks_freed) == (2, 1)
    driver.add("y", list(range(10)), max_tokens=1)
    driver.run()
    stats = driver.outputs["y"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == 8


def test_L3_an_abort_ends_exactly_the_ids_it_names() -> None:
    driver = CoreDriver()
    for request_id in ("job-1", "job-10", "job-11"):
        driver.add(request_id, [1], max_tokens=5)
    receipt = driver.abort_with_receipt("job-1")
    driver.run()
    assert list(receipt.requests) == ["job-1"]
    assert driver.finish_reasons("job-10") == [FinishReason.LENGTH]
    assert driver.finish_reasons("job-11") == [FinishReason.LENGTH]


def test_L8_repeating_an_abort_or_naming_unknown_ids_is_harmless() -> None:
    driver = CoreDriver()
    decoding(driver)
    assert driver.abort_with_receipt("x", "x", "never was").requests["x"].status == "aborted"
    receipt = driver.abort_with_receipt("x", "never was")
    assert [entry.status for entry in receipt.requests.values()] == ["unknown", "unknown"]
    driver.abort("x", "never was")
    assert driver.finish_reasons("x") == [FinishReason.ABORT]
    driver.run()


def test_L8_aborts_take_effect_in_arrival_order_so_an_id_may_be_used_again_at_once() -> None:
    driver = CoreDriver()
    driver.add("x", [1], max_tokens=50)
    driver.step()
    driver.abort("x")
    driver.add("x", [2], max_tokens=3)
    driver.run()
    assert driver.tokens["x"][1:] == expected_tokens([2], 3)
    assert driver.finish_reasons("x") == [FinishReason.LENGTH]


def test_L8_a_second_add_of_a_live_id_is_ignored_and_counted() -> None:
    driver = CoreDriver()
    driver.add("x", [1], max_tokens=3)
    assert driver.add("x", [2], max_tokens=9) == []
    driver.run()
    assert driver.tokens["x"] == expected_tokens([1], 3)
    assert driver.core.counters["duplicate_ids_ignored"] == 1


def test_L1_L12_a_malformed_add_is_answered_but_cannot_end_a_live_request() -> None:
    driver = CoreDriver()
    driver.add("x", [1], max_tokens=3)
    driver.apply(InputError("bad field", request_id="x", client_index=0))
    driver.apply(InputError("bad field", request_id="y", client_index=0))
    driver.apply(InputError("bad args", call_id=9, client_index=0))
    assert driver.apply(InputError("unknown type byte")) == []
    driver.run()
    assert driver.finish_reasons("x") == [FinishReason.LENGTH]
    assert driver.finish_reasons("y") == [FinishReason.ERROR]
    assert driver.replies[-1].failure_message == "bad args"
    assert driver.core.counters["malformed_messages"] == 4


def test_L8_another_clients_use_of_a_live_id_is_refused_to_that_client_alone() -> None:
    driver = CoreDriver()
    driver.add("x", [1], max_tokens=3)
    (frame,) = driver.core.apply([(1, request("x", client_index=1))], 0.0)
    client_index, outputs = frame
    assert client_index == 1
    assert outputs.outputs[0].finish_reason is FinishReason.ERROR
    driver.run()
    assert driver.finish_reasons("x") == [FinishReason.LENGTH]


def test_L12_a_client_cannot_abort_another_clients_requests() -> None:
    driver = CoreDriver()
    driver.add("x", [1], max_tokens=3)
    driver.abort("x", client_index=1)
    receipt = driver.abort_with_receipt("x", client_index=1)
    assert receipt.requests["x"].status == "unknown"
    driver.run()
    assert driver.finish_reasons("x") == [FinishReason.LENGTH]


def request(request_id: str, **fields: object) -> EngineCoreRequest:
    values: dict[str, object] = {
        "request_id": request_id,
        "prompt_token_ids": [1],
        "sampling_params": SamplingParams(),
    } | fields
    return EngineCoreRequest(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": None}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": [1] * 256}, "the prompt has 256 tokens.*max_model_len=256"),
        ({"prompt_token_ids": [31_999, 32_000]}, "prompt token id 32000.*32000 tokens"),
        ({"sampling_params": None}, "sampling_params is missing"),
        ({"client_index": 3}, "client_index=3 came over the socket of client 0"),
        (
            {"sampling_params": SamplingParams(allowed_token_ids=())},
            r"allowed_token_ids=\[\] leaves no token of the vocabulary of 32000",
        ),
        (
            {"sampling_params": SamplingParams(allowed_token_ids=(32_000,))},
            r"allowed_token_ids=\[32000\] leaves no token",
        ),
        (
            {
                "sampling_params": SamplingParams(
                    allowed_token_ids=(5, 32_000), min_tokens=2, all_stop_token_ids=frozenset({5})
                )
            },
            r"allowed_token_ids=\[5, 32000\].*min_tokens=2",
        ),
        ({"mm_features": [1]}, "not supported by this engine: mm_features"),
    ],
)
def test_L12_a_request_that_cannot_run_is_refused_in_words_and_the_others_go_on(
    fields: dict[str, object], message: str
) -> None:
    driver = CoreDriver()
    driver.add("good", [1], max_tokens=3)
    driver.apply(request("bad", **fields))
    driver.run()
    (output,) = driver.outputs["bad"]
    assert output.finish_reason is FinishReason.ERROR
    assert output.error is not None
    assert output.error.code == "validation_error"
    assert driver.tokens["good"] == expected_tokens([1], 3)
    assert re.search(message, output.error.message)


def test_a_request_that_is_added_only_to_be_aborted_makes_no_sound() -> None:
    driver = CoreDriver()
    assert driver.apply(request("x", abort_immediately=True)) == []
    assert not driver.core.has_work


def test_shutdown_ends_every_request_with_abort() -> None:
    driver = CoreDriver(max_num_seqs=2)
    for n in range(4):
        driver.add(f"r{n}", [n], max_tokens=9)
    driver.step()
    ((_, frame),) = driver.core.abort_everything(driver.now)
    ended = frame.outputs
    assert set(frame.finished_requests or ()) == {"r0", "r1", "r2", "r3"}
    assert {output.request_id for output in ended} == {"r0", "r1", "r2", "r3"}
    assert {output.finish_reason for output in ended} == {FinishReason.ABORT}
    driver.assert_idle_and_whole()


# ── utilities ─────────────────────────────────────────────────────────────────────────────────────


def test_vllms_questions_are_answered() -> None:
    driver = CoreDriver()
    assert driver.call("get_supported_tasks").result == ["generate"]
    assert driver.call("get_weight_version").result == "default"
    assert driver.call("is_scheduler_paused").result is False
    assert driver.call("is_sleeping").result is False
    assert driver.call("reset_mm_cache").failure_message is None
    assert driver.call("reset_encoder_cache").failure_message is None


def test_an_unknown_utility_fails_in_vllms_words_and_nothing_else_happens() -> None:
    driver = CoreDriver()
    reply = driver.call("bogus", 1)
    assert reply.failure_message is not None
    assert reply.failure_message.startswith("Call to bogus method failed:")
    assert "has no attribute 'bogus'" in reply.failure_message


@pytest.mark.parametrize("args", [("x", "cause"), ([1], "cause"), (["x"], 3)])
def test_L12_an_abort_call_with_bad_arguments_fails_and_aborts_nothing(
    args: tuple[object, ...],
) -> None:
    driver = CoreDriver()
    driver.add("x", [1], max_tokens=3)
    reply = driver.call("caesura_abort", *args)
    assert reply.failure_message is not None
    assert "expected [[request id" in reply.failure_message
    driver.run()
    assert driver.finish_reasons("x") == [FinishReason.LENGTH]


def test_resetting_the_prefix_cache_is_refused_while_requests_hold_blocks() -> None:
    driver = CoreDriver()
    prompt = list(range(20))
    driver.add("a", prompt, max_tokens=2)
    driver.step()
    assert driver.call("reset_prefix_cache", False, False).result is False
    driver.run()
    assert driver.core.scheduler.pool.num_cached > 0
    assert driver.call("reset_prefix_cache").result is True
    assert driver.core.scheduler.pool.num_cached == 0


def test_resetting_running_requests_too_has_them_recomputed_and_changes_no_token() -> None:
    driver = CoreDriver()
    prompt = list(range(20))
    driver.add("a", prompt, max_tokens=6)
    driver.step()
    driver.step()
    assert driver.call("reset_prefix_cache", True, False).result is True
    pool = driver.core.scheduler.pool
    assert pool.num_free == pool.num_blocks
    driver.run()
    assert driver.tokens["a"] == expected_tokens(prompt, 6)


def test_a_reply_follows_what_was_said_before_it_and_stands_alone() -> None:
    driver = CoreDriver()
    messages: list[tuple[int, Input]] = [
        (0, request("bad", prompt_token_ids=[])),
        (0, UtilityCall(0, 2**64 - 1, "is_sleeping", ())),
        (0, request("bad too", prompt_token_ids=[])),
    ]
    frames = [frame for _, frame in driver.core.apply(messages, 0.0)]
    assert [frame.outputs[0].request_id if frame.outputs else None for frame in frames] == [
        "bad",
        None,
        "bad too",
    ]
    reply = frames[1].utility_output
    assert reply is not None
    assert reply.call_id == 2**64 - 1


# ── books ─────────────────────────────────────────────────────────────────────────────────────────


def test_L11_status_reports_blocks_counts_and_an_integrity_check() -> None:
    driver = CoreDriver(max_num_seqs=1)
    driver.add("a", [1] * 6, max_tokens=9)
    driver.add("b", [2] * 6, max_tokens=9)
    driver.step()
    status = driver.status()
    assert (status.num_running, status.num_waiting) == (1, 1)
    assert status.num_blocks - status.num_free_blocks - status.num_cached_blocks == 2
    assert status.integrity_errors == ()
    assert status.counters["requests_added"] == 2


def test_L11_a_status_without_the_check_counts_the_same_and_leaves_the_books_unread() -> None:
    driver = CoreDriver()
    driver.add("a", [1] * 6, max_tokens=9)
    driver.step()
    unchecked = EngineStatus.from_wire(driver.call("caesura_status", False).result)
    assert unchecked == driver.status()
    driver.core.scheduler.pool.allocate(1)  # Nobody will ever release it.
    assert driver.status().integrity_errors
    assert not EngineStatus.from_wire(driver.call("caesura_status", False).result).integrity_errors


def test_L11_a_leak_is_logged_and_counted_when_the_engine_falls_idle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = CoreDriver()
    driver.add("a", [1], max_tokens=2)
    driver.step()
    driver.core.scheduler.pool.allocate(1)  # Nobody will ever release it.
    with caplog.at_level(logging.ERROR):
        driver.step()
    assert driver.core.counters["integrity_violations"] == 1
    assert "blocks leaked" in caplog.text


def test_L11_lost_slots_and_blocks_of_waiting_requests_are_noticed() -> None:
    driver = CoreDriver(max_num_seqs=1)
    driver.add("a", [1], max_tokens=2)
    driver.add("b", [1], max_tokens=2)
    driver.step()
    scheduler = driver.core.scheduler
    next(iter(scheduler.waiting)).block_ids = [3]
    scheduler._free_slots.append(0)
    errors = scheduler.check_integrity()
    assert any("slots" in error for error in errors)
    assert any("waits but holds 1 blocks" in error for error in errors)


@pytest.mark.parametrize("seed", range(12))
def test_L1_L2_L11_random_lives_end_once_with_right_tokens_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    driver = CoreDriver(num_blocks=64, max_num_seqs=6, max_num_batched_tokens=rng.choice([8, 64]))
    prompts: dict[str, list[int]] = {}
    silenced: set[str] = set()
    prefixes = [[n] * 20 for n in range(3)]
    for number in range(300):
        action = rng.random()
        if action < 0.35:
            request_id = f"r{number}"
            prompt = [*rng.choice(prefixes)[: rng.randint(1, 20)], rng.randrange(9)]
            prompts[request_id] = prompt
            driver.add(
                request_id, prompt, max_tokens=rng.randint(1, 120), priority=rng.randint(0, 2)
            )
        elif action < 0.42 and prompts:
            victim = rng.choice(list(prompts))
            if not driver.finish_reasons(victim):
                silenced.add(victim)
            driver.abort(victim)
        elif action < 0.5 and prompts:
            driver.abort_with_receipt(*rng.sample(list(prompts), min(3, len(prompts))))
        else:
            driver.step()
        assert driver.core.scheduler.check_integrity() == []
    driver.run()
    for request_id, prompt in prompts.items():
        tokens = driver.tokens[request_id]
        assert tokens == expected_tokens(prompt, len(tokens))
        ends = driver.finish_reasons(request_id)
        assert len(ends) == (0 if request_id in silenced and not ends else 1)
    assert_confirmed(driver, prompts)


def assert_confirmed(driver: CoreDriver, request_ids: Iterable[str]) -> None:
    """Each end was told, and no output came behind it; an ABORT may have had it told again."""
    gone: set[str] = set()
    for _, frame in driver.frames:
        assert gone.isdisjoint(output.request_id for output in frame.outputs)
        gone.update(frame.finished_requests or ())
    assert gone == set(request_ids)
