"""How RL frameworks pause a server, change its weights and go on, call by call as they make them:
miles and AReaL in SGLang's dialect, prime-rl in vLLM's. The engine's tokens are arithmetic, and
tell the weights that made them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens, salt_of, token_behind
from tests.support.arithmetic_rollouts import (
    Completion,
    Rollout,
    assert_nothing_left,
    prompt_of,
    start,
)
from tests.support.rollouts import post, wait_for_tokens
from tests.support.served_engine import PROMPT, ServedEngine, fake, post_bytes, served_engine


@pytest_asyncio.fixture
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=8)) as served:
        yield served
        await assert_nothing_left(served)


async def test_L9_L10_miles_retracts_flushes_updates_and_labels_without_an_abort(
    served: ServedEngine,
) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(10)], 150)  # Eight run.
    await wait_for_tokens(served.http, 8, at_least=3)
    await post(served.http, "/pause_generation", {"mode": "retract"})
    assert (await served.http.get("/flush_cache")).status_code == 200
    await post(served.http, "/update_weights_from_disk", {"model_path": "step-1"})
    body = {"new_version": "1", "abort_all_requests": False}
    assert (await post(served.http, "/update_weight_version", body))["new_version"] == "1"
    await post(served.http, "/continue_generation", {})
    salt = salt_of("step-1")
    for rollout in rollouts:
        result = await rollout.result_of_mixed_weights()
        assert (result.ending, len(result.token_ids)) == ("length", 150)
        *_, last = result.info["weight_versions"]
        num_old = last["start"]
        assert (last["version"], last["end"]) == ("1", 150)
        assert result.token_ids[:num_old] == expected_tokens(rollout.prompt, num_old)
        context = rollout.prompt + result.token_ids[:num_old]
        while len(context) < len(rollout.prompt) + 150:  # All KV is of the new weights.
            context.append(token_behind(context, [salt] * len(context), salt))
        assert result.token_ids == context[len(rollout.prompt) :]


async def test_L9_miles_in_place_skips_the_flush_and_loses_no_token(served: ServedEngine) -> None:
    rollouts = start(served, [f"r-{index}" for index in range(4)], 150)
    await wait_for_tokens(served.http, 4, at_least=3)
    await post(served.http, "/pause_generation", {"mode": "in_place"})
    body = {"model_path": "step-1", "weight_version": "1", "flush_cache": False}
    await post(served.http, "/update_weights_from_disk", body)
    await post(served.http, "/continue_generation", {})
    for rollout in rollouts:
        result = await rollout.result_of_mixed_weights()
        [old, new] = result.info["weight_versions"]
        assert [old["version"], new["version"]] == ["default", "1"]
        assert (old["start"], old["end"], new["end"]) == (0, new["start"], 150)
        assert result.token_ids[: old["end"]] == expected_tokens(rollout.prompt, old["end"])


async def areal_generate(served: ServedEngine, rid: str, num_tokens: int) -> list[str]:
    """Its loop: an aborted call is sent again with what came. The version of every token."""
    prompt = prompt_of(rid)
    versions: list[str] = []
    ids: list[int] = []
    while len(ids) < num_tokens:
        params = {"max_new_tokens": num_tokens - len(ids), "stop_token_ids": []}
        body = {"input_ids": prompt + ids, "sampling_params": params, "return_logprob": True}
        result = await post(served.http, "/generate", body)
        ids += result["output_ids"]
        for span in result["meta_info"]["weight_versions"]:
            assert span["start"] == len(versions) - (len(ids) - len(result["output_ids"]))
            versions += [span["version"]] * (span["end"] - span["start"])
        if result["meta_info"]["finish_reason"]["type"] != "abort":
            break
    assert len(ids) == len(versions) == num_tokens
    num_old = versions.count("default")
    assert ids[:num_old] == expected_tokens(prompt, num_old)
    salt = salt_of("step-1")
    assert ids[num_old:] == expected_tokens(prompt + ids[:num_old], num_tokens - num_old, salt=salt)
    return versions


async def test_L9_L10_areal_pauses_twice_and_labels_each_token_by_what_sampled_it(
    served: ServedEngine,
) -> None:
    """Its clients send again at once, while the server is paused: they are held."""
    tasks = [asyncio.create_task(areal_generate(served, f"r-{index}", 200)) for index in range(10)]
    await wait_for_tokens(served.http, 8, at_least=5)
    await post(served.http, "/pause_generation", {})
    await post(served.http, "/pause_generation", {"mode": "in_place"})
    await served.wait_for_live_requests(10)
    assert served.engine.pause_state.num_held == 10
    body = {"model_path": "step-1", "abort_all_requests": True, "weight_version": "1"}
    await post(served.http, "/update_weights_from_disk", body)
    await served.wait_for_live_requests(10)  # Aborted while held, they came again.
    assert not any(task.done() for task in tasks)
    await post(served.http, "/continue_generation", {})
    for versions in await asyncio.wait_for(asyncio.gather(*tasks), 20):
        assert versions == sorted(versions, reverse=True), "old ones first"
        assert versions[-1] == "1"


async def test_L9_a_forgotten_continue_is_one_resume_away_and_a_failed_update_changes_nothing(
    served: ServedEngine,
) -> None:
    """As AReaL met it: a path without `continue_generation` left the server paused."""
    await post(served.http, "/pause_generation", {"mode": "in_place"})
    waiting = Rollout(served, "waiting", 20)
    await served.wait_for_live_requests(1)
    failed = await served.http.post("/update_weights_from_disk", json={"model_path": "missing"})
    assert (failed.status_code, failed.json()["success"]) == (400, False)
    assert (await served.http.get("/ready")).status_code == 503
    assert (await served.http.get("/health")).status_code == 200
    await post(served.http, "/continue_generation", {})
    result = await waiting.result()
    assert (result.ending, result.token_ids) == ("length", expected_tokens(waiting.prompt, 20))


@pytest.mark.parametrize("is_paused", [False, True])
async def test_L10_an_update_that_fails_aborts_nobody_although_it_was_to_abort_all(
    served: ServedEngine, is_paused: bool
) -> None:
    rollout = Rollout(served, "spared", 400)
    await wait_for_tokens(served.http, 1, at_least=1)
    if is_paused:
        await post(served.http, "/pause_generation", {"mode": "in_place"})
    body = {"model_path": "missing", "abort_all_requests": True}
    failed = await served.http.post("/update_weights_from_disk", json=body)
    assert failed.status_code == 400
    await post(served.http, "/continue_generation", {})
    assert (await rollout.result()).ending == "length"


async def test_L9_L10_prime_rl_freezes_cancels_stale_rollouts_updates_and_always_resumes(
    served: ServedEngine,
) -> None:
    """Cancelling while the server is frozen ended its engine; here it ends the rollouts."""
    http = served.http
    stale = [await served.connect() for _ in range(3)]
    for client in stale:
        body = {"prompt": PROMPT, "max_tokens": 3000, "cache_salt": "0"}
        await served.send(client, post_bytes("/v1/completions", body))
    kept = start(served, ["kept-0", "kept-1"], 200, Completion, cache_salt="0")
    await wait_for_tokens(http, 5, at_least=3)
    outcomes = []
    for directory in ("missing", "step-1"):
        try:
            await post(http, "/pause?mode=keep&clear_cache=false", None)
            for client in stale:
                client.close()
            await served.wait_for_live_requests(2)
            answer = await http.post("/v1/weights", json={"path": directory, "version": "1"})
            outcomes.append(answer.status_code)
        finally:
            await post(http, "/resume", None)
        assert served.engine.pause_state.state == "running"
    assert outcomes == [400, 200]
    for rollout in kept:
        result = await rollout.result_of_mixed_weights()
        assert (result.ending, len(result.token_ids)) == ("length", 200)
        [old, new] = result.info["weight_versions"]
        assert (old["start"], old["end"], new["end"]) == (0, new["start"], 200)
        before = result.token_ids[: old["end"]]
        assert before == expected_tokens(rollout.prompt, old["end"])
    fresh = await Completion(served, "fresh", 10, cache_salt="1").result(salt=salt_of("step-1"))
    assert fresh.info["weight_versions"] == [{"version": "1", "start": 0, "end": 10}]


async def test_areals_group_is_described_with_its_port_as_text(
    served: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[dict[str, Any]] = []

    async def join(**fields: Any) -> None:
        joined.append(fields)

    monkeypatch.setattr(served.engine, "init_weights_update_group", join)
    body = {
        "master_address": "[::1]",
        "master_port": "29500",
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
        "group_name": "update_weight_group",
    }
    await post(served.http, "/init_weights_update_group", body)
    assert joined == [body | {"master_address": "::1", "master_port": 29500}]
