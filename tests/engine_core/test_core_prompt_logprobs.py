"""Log-probabilities of a prompt, in the synchronous core: whole, once, whatever the schedule."""

from __future__ import annotations

import random

import pytest

from engine_core.fake_runner import expected_prompt_logprobs, expected_tokens
from ipc.output import (
    EngineCoreOutputs,
    FinishReason,
    LogprobsLists,
    decode_outputs,
    encode_outputs,
)
from tests.support.core_driver import CoreDriver

PROMPT = list(range(3, 53))


def prompt_logprobs(driver: CoreDriver, request_id: str) -> LogprobsLists:
    """What the first output of a request brought; no later one may bring any."""
    first, *later = driver.outputs[request_id]
    assert first.prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in later)
    return first.prompt_logprobs


@pytest.mark.parametrize("budget", [8, 9, 49, 50, 64])
def test_L2_a_prompts_logprobs_come_whole_with_its_first_output_however_it_was_chunked(
    budget: int,
) -> None:
    driver = CoreDriver(max_num_batched_tokens=budget)
    driver.add("a", PROMPT, max_tokens=4, prompt_logprobs=2)
    driver.run()
    received = prompt_logprobs(driver, "a")
    assert received == expected_prompt_logprobs(PROMPT, 2)
    assert received.token_ids.shape == (len(PROMPT) - 1, 3)
    assert driver.tokens["a"] == expected_tokens(PROMPT, 4)


def test_only_those_who_asked_get_prompt_logprobs_each_as_many_as_it_asked_for() -> None:
    driver = CoreDriver(max_num_batched_tokens=16)
    prompts = {f"r{n}": PROMPT[n : 20 + 3 * n] for n in range(4)}
    wanted = {"r0": 0, "r1": None, "r2": 5, "r3": None}
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=9, prompt_logprobs=wanted[name], logprobs=1)
    driver.run()
    for name, prompt in prompts.items():
        num_alternatives = wanted[name]
        if num_alternatives is None:
            assert all(output.prompt_logprobs is None for output in driver.outputs[name])
        else:
            expected = expected_prompt_logprobs(prompt, num_alternatives)
            assert prompt_logprobs(driver, name) == expected
        assert all(output.new_logprobs is not None for output in driver.outputs[name])


@pytest.mark.parametrize(("asked", "num_columns"), [(0, 1), (31_999, 32_000), (-1, 32_001)])
def test_a_prompt_of_one_token_has_no_position_to_tell_of(asked: int, num_columns: int) -> None:
    driver = CoreDriver()
    driver.add("a", [7], max_tokens=2, prompt_logprobs=asked)
    driver.run()
    assert prompt_logprobs(driver, "a").token_ids.shape == (0, num_columns)
    decoded = decode_outputs(encode_outputs(EngineCoreOutputs(outputs=driver.outputs["a"][:1])))
    assert decoded.outputs[0].prompt_logprobs is not None
    assert len(decoded.outputs[0].prompt_logprobs.ranks) == 0


@pytest.mark.parametrize("asked", [-1, 40_000])
def test_alternatives_beyond_the_vocabulary_are_the_whole_vocabulary(asked: int) -> None:
    driver = CoreDriver()
    driver.add("a", [7, 8, 9], max_tokens=1, prompt_logprobs=asked)
    driver.run()
    assert prompt_logprobs(driver, "a") == expected_prompt_logprobs([7, 8, 9], 32_000)


def test_a_request_that_ends_with_its_first_token_has_its_prompt_logprobs() -> None:
    driver = CoreDriver()
    driver.add("a", PROMPT, max_tokens=1, prompt_logprobs=1)
    driver.run()
    (only,) = driver.outputs["a"]
    assert only.finish_reason is FinishReason.LENGTH
    assert only.prompt_logprobs == expected_prompt_logprobs(PROMPT, 1)


@pytest.mark.parametrize("skips", [None, False])
def test_a_cached_prefix_is_not_used_for_a_prompt_whose_logprobs_are_wanted_but_comes_of_it(
    skips: bool | None,
) -> None:
    driver = CoreDriver()
    for name in ("a", "b"):
        driver.add(name, PROMPT, max_tokens=1, prompt_logprobs=1, skip_reading_prefix_cache=skips)
        driver.run()
        assert prompt_logprobs(driver, name) == expected_prompt_logprobs(PROMPT, 1)
        stats = driver.outputs[name][0].prefill_stats
        assert stats is not None
        assert stats.num_cached_tokens == 0
    driver.add("c", PROMPT, max_tokens=1)
    driver.run()
    stats = driver.outputs["c"][0].prefill_stats
    assert stats is not None
    assert stats.num_cached_tokens == 48


def test_L2_a_prefill_that_is_preempted_begins_its_prompt_logprobs_anew() -> None:
    driver = CoreDriver(max_num_batched_tokens=8, num_blocks=64)
    driver.add("hungry", [7] * 10, max_tokens=200, priority=-1)
    while len(driver.tokens["hungry"]) < 140:
        driver.step()
    prompt = list(range(100))
    driver.add("victim", prompt, max_tokens=3, prompt_logprobs=1)
    while driver.core.scheduler.num_preemptions == 0:
        driver.step()
    assert driver.tokens["victim"] == []
    driver.run()
    assert prompt_logprobs(driver, "victim") == expected_prompt_logprobs(prompt, 1)


def test_L2_a_preemption_after_the_first_output_does_not_send_them_again() -> None:
    driver = CoreDriver(max_num_batched_tokens=16, num_blocks=64)
    driver.add("hungry", [7] * 10, max_tokens=230, priority=-1)
    driver.add("victim", PROMPT, max_tokens=150, prompt_logprobs=3)
    driver.run()
    assert driver.core.scheduler.num_preemptions > 0
    assert prompt_logprobs(driver, "victim") == expected_prompt_logprobs(PROMPT, 3)
    assert driver.tokens["victim"] == expected_tokens(PROMPT, 150)


def test_L8_a_slot_that_was_left_in_mid_prompt_owes_nothing_for_its_next_request() -> None:
    driver = CoreDriver(max_num_seqs=1, max_num_batched_tokens=8)
    driver.add("gone", PROMPT, max_tokens=3, prompt_logprobs=1)
    driver.step()
    driver.abort("gone")
    driver.add("next", PROMPT, max_tokens=3)
    driver.run()
    assert all(output.prompt_logprobs is None for output in driver.outputs["next"])


def test_L12_more_prompt_logprobs_than_a_frame_should_carry_are_refused_in_words() -> None:
    driver = CoreDriver(max_model_len=512, num_blocks=256)
    driver.add("good", [1] * 300, max_tokens=1, prompt_logprobs=20)
    driver.add("bad", [1] * 300, max_tokens=1, prompt_logprobs=-1)
    driver.run()
    assert driver.finish_reasons("good") == [FinishReason.LENGTH]
    (refused,) = driver.outputs["bad"]
    assert refused.error is not None
    assert "prompt_logprobs=-1 of a prompt of 300 tokens" in refused.error.message


@pytest.mark.parametrize("seed", range(6))
def test_L2_L11_random_lives_get_their_prompt_logprobs_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    driver = CoreDriver(num_blocks=64, max_num_seqs=6, max_num_batched_tokens=rng.choice([8, 32]))
    wanted: dict[str, tuple[list[int], int]] = {}
    for number in range(150):
        action = rng.random()
        if action < 0.3:
            prompt, num_alternatives = PROMPT[: rng.randint(1, 50)], rng.randint(0, 3)
            wanted[f"r{number}"] = prompt, num_alternatives
            driver.add(
                f"r{number}",
                prompt,
                max_tokens=rng.randint(1, 120),
                priority=rng.randint(0, 2),
                prompt_logprobs=num_alternatives,
            )
        elif action < 0.4 and wanted:
            driver.abort_with_receipt(rng.choice(list(wanted)))
        else:
            driver.step()
    driver.run()
    for name, (prompt, num_alternatives) in wanted.items():
        if driver.tokens[name]:
            expected = expected_prompt_logprobs(prompt, num_alternatives)
            assert prompt_logprobs(driver, name) == expected
