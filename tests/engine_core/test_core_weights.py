"""Weight updates of one engine, by hand: staged beside the weights that serve, committed whole."""

from __future__ import annotations

from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens, salt_of, token_behind
from ipc.output import FinishReason
from ipc.weights import WeightSource
from tests.support.core_driver import CoreDriver

PROMPT = list(range(1, 20))


def source(path: str) -> object:
    return WeightSource(kind="file", path=path).to_wire()


def stage(driver: CoreDriver, path: str = "w1", update_id: str = "u") -> None:
    reply = driver.call("caesura_stage_weights", update_id, source(path))
    assert reply.failure_message is None, reply.failure_message


def failure(driver: CoreDriver, method: str, *args: object) -> str:
    message = driver.call(method, *args).failure_message
    assert message is not None
    return message


def test_L10_an_update_takes_effect_at_its_commit_with_its_label() -> None:
    driver = CoreDriver()
    stage(driver)
    driver.add("old", PROMPT, max_tokens=5)
    driver.run()
    assert driver.tokens["old"] == expected_tokens(PROMPT, 5)
    assert driver.call("caesura_commit_weights", "u", "v1").result == "v1"
    assert driver.call("get_weight_version").result == "v1"
    position = len(driver.frames)
    driver.add("new", PROMPT, max_tokens=5)
    driver.run()
    assert driver.tokens["new"] == expected_tokens(PROMPT, 5, salt=salt_of("w1"))
    labels = {frame.weight_version for _, frame in driver.frames[position:] if frame.outputs}
    assert labels == {"v1"}


def test_L10_each_step_carries_the_label_that_it_ran_under() -> None:
    driver = CoreDriver()
    driver.add("a", PROMPT, max_tokens=6)
    driver.step()
    driver.call("set_weight_version", "named")
    driver.run()
    labels = [frame.weight_version for _, frame in driver.frames if frame.outputs]
    assert labels == ["default"] + ["named"] * 5
    assert driver.tokens["a"] == expected_tokens(PROMPT, 6)
    assert driver.finish_reasons("a") == [FinishReason.LENGTH]


def test_L10_the_prefix_cache_never_serves_kv_of_older_weights() -> None:
    driver = CoreDriver()
    driver.add("old", PROMPT, max_tokens=2)
    driver.run()
    stage(driver)
    driver.call("caesura_commit_weights", "u", None)
    driver.add("new", PROMPT, max_tokens=6)
    driver.run()
    assert driver.tokens["new"] == expected_tokens(PROMPT, 6, salt=salt_of("w1"))
    driver.add("again", PROMPT, max_tokens=6)
    hits = driver.core.scheduler.prefix_cache.num_hit_tokens
    driver.run()
    assert driver.core.scheduler.prefix_cache.num_hit_tokens > hits
    assert driver.tokens["again"] == driver.tokens["new"]


def test_L10_a_request_that_crosses_an_update_publishes_no_block_any_more() -> None:
    driver = CoreDriver()
    driver.add("crossing", PROMPT, max_tokens=30)
    driver.step()
    stage(driver)
    driver.call("caesura_commit_weights", "u", None)
    driver.run()
    salt = salt_of("w1")
    context = PROMPT + driver.tokens["crossing"][:1]
    # KV of the prompt is of the old weights; that of each output is written by the step behind it.
    salts = [0] * len(PROMPT) + [salt] * 30
    while len(context) < len(PROMPT) + 30:
        context.append(token_behind(context, salts, salt))
    assert driver.tokens["crossing"] == context[len(PROMPT) :]
    whole = PROMPT + driver.tokens["crossing"]
    driver.add("follower", whole, max_tokens=4)
    driver.run()
    assert driver.core.scheduler.prefix_cache.num_hit_tokens == 0
    assert driver.tokens["follower"] == expected_tokens(whole, 4, salt=salt)


def test_L10_a_request_that_is_recomputed_takes_the_new_weights_throughout() -> None:
    driver = CoreDriver()
    driver.add("a", PROMPT, max_tokens=8)
    for _ in range(3):
        driver.step()
    before = list(driver.tokens["a"])
    driver.pause("retract")
    stage(driver)
    driver.call("caesura_commit_weights", "u", "v1")
    driver.resume()
    driver.run()
    after = expected_tokens(PROMPT + before, 8 - len(before), salt=salt_of("w1"))
    assert driver.tokens["a"] == before + after
    hits = driver.core.scheduler.prefix_cache.num_hit_tokens
    driver.add("sharing", PROMPT + before, max_tokens=2)
    driver.run()
    assert driver.core.scheduler.prefix_cache.num_hit_tokens > hits


def test_L10_parts_add_up_and_take_effect_together() -> None:
    driver = CoreDriver()
    stage(driver, "w1")
    stage(driver, "w2")
    driver.add("a", PROMPT, max_tokens=3)
    driver.run()
    assert driver.tokens["a"] == expected_tokens(PROMPT, 3)
    driver.call("caesura_commit_weights", "u", None)
    driver.add("b", PROMPT, max_tokens=3)
    driver.run()
    assert driver.tokens["b"] == expected_tokens(PROMPT, 3, salt=salt_of("w1", "w2"))


def test_L10_parts_that_arrive_together_add_up_too() -> None:
    driver = CoreDriver()
    for path in ("w1", "w2"):
        driver.start_call("caesura_stage_weights", "u", source(path))
    jobs = [(job, job.done()) for job in driver.jobs]
    driver.jobs.clear()
    for job, done in jobs:
        driver.apply(done, job.client_index)
    driver.call("caesura_commit_weights", "u", None)
    driver.add("b", PROMPT, max_tokens=3)
    driver.run()
    assert driver.tokens["b"] == expected_tokens(PROMPT, 3, salt=salt_of("w1", "w2"))


def test_L10_a_part_that_fails_drops_the_whole_update() -> None:
    driver = CoreDriver()
    stage(driver, "w1")
    assert "missing" in failure(driver, "caesura_stage_weights", "u", source("missing"))
    assert "no weight update 'u'" in failure(driver, "caesura_commit_weights", "u", "v1")
    driver.add("a", PROMPT, max_tokens=3)
    driver.run()
    assert driver.tokens["a"] == expected_tokens(PROMPT, 3)
    assert driver.call("get_weight_version").result == "default"
    stage(driver, "w3", update_id="next")
    assert driver.call("caesura_commit_weights", "next", None).result == "default"


def test_L10_a_second_update_waits_for_the_end_of_the_first() -> None:
    driver = CoreDriver()
    stage(driver, update_id="first")
    assert "'first' is on its way" in failure(
        driver, "caesura_stage_weights", "second", source("w2")
    )
    assert driver.call("caesura_discard_weights", "other").result is False
    assert driver.call("caesura_discard_weights", "first").result is True
    stage(driver, update_id="second")


def test_L10_an_update_that_still_loads_can_be_discarded_but_not_committed() -> None:
    driver = CoreDriver()
    stage(driver, "w1")
    loading = driver.start_call("caesura_stage_weights", "u", source("w2"))
    commit = driver.start_call("caesura_commit_weights", "u", None)
    reply = driver.reply(commit)
    assert reply is not None
    assert "still being loaded" in str(reply.failure_message)
    discard = driver.start_call("caesura_discard_weights", "u")
    assert getattr(driver.reply(discard), "result", None) is True
    driver.run_jobs()
    assert "was discarded meanwhile" in str(getattr(driver.reply(loading), "failure_message", ""))
    assert "no weight update" in failure(driver, "caesura_commit_weights", "u", None)


def test_L13_steps_go_on_while_a_part_is_loaded() -> None:
    driver = CoreDriver()
    driver.add("a", PROMPT, max_tokens=5)
    call = driver.start_call("caesura_stage_weights", "u", source("w1"))
    driver.run()
    assert driver.tokens["a"] == expected_tokens(PROMPT, 5)
    assert driver.reply(call) is None
    driver.run_jobs()
    assert driver.reply(call) is not None


@pytest.mark.parametrize("args", [(), ("u",), ("u", "path"), (3, {"kind": "file"})])
def test_L12_a_bad_update_call_fails_and_changes_nothing(args: tuple[object, ...]) -> None:
    driver = CoreDriver()
    failure(driver, "caesura_stage_weights", *args)
    stage(driver)


def test_L2_a_resumed_request_goes_on_where_the_aborted_one_ended() -> None:
    driver = CoreDriver()
    tokens = expected_tokens(PROMPT, 10)
    resumed = {"caesura_num_resumed_tokens": 4}
    driver.add("rest", PROMPT + tokens[:4], max_tokens=10, min_tokens=5, extra_args=resumed)
    driver.run()
    assert driver.tokens["rest"] == tokens[4:]
    assert driver.finish_reasons("rest") == [FinishReason.LENGTH]
    assert driver.outputs["rest"][0].prefill_stats is not None
    assert all(output.prefill_stats is None for output in driver.outputs["rest"][1:])


def test_L2_a_receipt_counts_the_new_tokens_of_a_resumed_request() -> None:
    driver = CoreDriver()
    tokens = expected_tokens(PROMPT, 10)
    resumed = {"caesura_num_resumed_tokens": 4}
    driver.add("rest", PROMPT + tokens[:4], max_tokens=10, extra_args=resumed)
    driver.step()
    driver.step()
    assert driver.live_requests()["rest"].num_output_tokens == 2
    assert driver.abort_with_receipt("rest").requests["rest"].num_output_tokens == 2


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([*PROMPT, 10**6], "resume_from.output_token_ids: token id 1000000 is outside"),
        ([10**6, *PROMPT], "prompt token id 1000000 is outside the vocabulary"),
    ],
)
def test_L12_a_token_outside_the_vocabulary_is_told_with_its_field(
    token_ids: list[int], message: str
) -> None:
    driver = CoreDriver()
    driver.add("x", token_ids, max_tokens=10, extra_args={"caesura_num_resumed_tokens": 1})
    (output,) = driver.outputs["x"]
    assert output.error is not None
    assert output.error.message.startswith(message)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"extra_args": {"caesura_num_resumed_tokens": 19}}, "leave at least one"),
        ({"extra_args": {"caesura_num_resumed_tokens": -1}}, "leave at least one"),
        ({"extra_args": {"caesura_num_resumed_tokens": "x"}}, "leave at least one"),
        ({"extra_args": {"caesura_num_resumed_tokens": 4}, "max_tokens": 4}, "is used up"),
        ({"extra_args": {"caesura_num_resumed_tokens": 4}, "prompt_logprobs": 1}, "not supported"),
    ],
)
def test_L12_a_resumed_request_that_cannot_be_is_refused_by_name(
    sampling: dict[str, Any], message: str
) -> None:
    driver = CoreDriver()
    driver.add("x", PROMPT, **{"max_tokens": 10, **sampling})
    (output,) = driver.outputs["x"]
    assert output.error is not None
    assert message in output.error.message
