"""SGLang's tests of weight versions and pauses that had no counterpart here;
`docs/peer_tests.md` lists them all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from engine_core.fake_runner import salt_of
from tests.support.arithmetic_rollouts import LONG, Rollout, assert_nothing_left, results, start
from tests.support.rollouts import post, wait_for_tokens
from tests.support.served_engine import ServedEngine, fake, served_engine


@pytest_asyncio.fixture
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=4)) as served:
        await post(served.http, "/update_weight_version", {"new_version": "v0"})
        yield served
        await assert_nothing_left(served)


async def pause(served: ServedEngine, mode: str) -> None:
    await post(served.http, "/pause_generation", {"mode": mode})


async def resume(served: ServedEngine) -> None:
    await post(served.http, "/continue_generation", {})


async def update(served: ServedEngine, path: str, **fields: Any) -> None:
    body = {"model_path": path, "flush_cache": False} | fields
    assert (await post(served.http, "/update_weights_from_disk", body))["success"] is True


async def num_tokens_of_one(served: ServedEngine) -> int:
    """How many tokens the only live request has."""
    [live] = await served.engine.list_requests()
    return live.num_output_tokens


async def test_L10_an_update_changes_the_outputs_and_its_reversal_restores_them(
    served: ServedEngine,
) -> None:
    await update(served, "old")
    before = (await Rollout(served, "x", 30).result(salt=salt_of("old"))).token_ids
    await update(served, "new")
    changed = (await Rollout(served, "x", 30).result(salt=salt_of("new"))).token_ids
    await update(served, "old")
    restored = (await Rollout(served, "x", 30).result(salt=salt_of("old"))).token_ids
    assert before == restored != changed


async def test_L10_three_versions_are_three_spans_and_none_where_no_version_was_given(
    served: ServedEngine,
) -> None:
    """An update without a version, and the same version again, split nothing."""
    rollout = Rollout(served, "x", 300)
    boundaries = []
    for index, fields in enumerate(
        ({"weight_version": "v1"}, {}, {"weight_version": "v1"}, {"weight_version": "v2"})
    ):
        await wait_for_tokens(served.http, 1, at_least=5 * index + 5)
        await pause(served, "in_place")
        boundaries.append(await num_tokens_of_one(served))
        await update(served, f"step-{index}", **fields)
        await resume(served)
    result = await rollout.result_of_mixed_weights()
    first, _, _, last = boundaries
    assert result.info["weight_versions"] == [
        {"version": "v0", "start": 0, "end": first},
        {"version": "v1", "start": first, "end": last},
        {"version": "v2", "start": last, "end": 300},
    ]


async def test_L10_the_boundary_of_a_retracted_request_is_exact(served: ServedEngine) -> None:
    rollouts = start(served, ["a", "b", "c"], 150)
    await wait_for_tokens(served.http, 3, at_least=5)
    await pause(served, "retract")
    live = await served.engine.list_requests()
    num_tokens = {request.request_id: request.num_output_tokens for request in live}
    await update(served, "new", weight_version="v1", flush_cache=True)
    await resume(served)
    for rollout in rollouts:
        result = await rollout.result_of_mixed_weights()
        assert result.info["weight_versions"] == [
            {"version": "v0", "start": 0, "end": num_tokens[rollout.rid]},
            {"version": "v1", "start": num_tokens[rollout.rid], "end": 150},
        ]


async def test_L10_requests_aborted_while_retracted_frozen_or_queued_tell_their_spans(
    served: ServedEngine,
) -> None:
    """Of one that has no token the list is empty. It is told at the abort, not after continue."""
    begun = start(served, ["a", "b", "c", "d"], LONG)
    await wait_for_tokens(served.http, 4, at_least=3)
    queued = Rollout(served, "queued", LONG)
    await served.wait_for_live_requests(5)
    await pause(served, "in_place")
    await post(served.http, "/abort_request", {"rid": ["a", "b"]})
    await pause(served, "retract")
    await update(served, "new", weight_version="v1")
    await post(served.http, "/abort_request", {"rid": ["c", "d", "queued"]})
    for result in await results(begun):
        num = len(result.token_ids)
        assert result.ending == "abort"
        assert result.info["weight_versions"] == [{"version": "v0", "start": 0, "end": num}]
        assert result.info["weight_version"] == "v0"
        assert result.info["e2e_latency"] > 0
    result = await queued.result()
    assert (result.token_ids, result.info["weight_versions"]) == ([], [])
    assert served.engine.pause_state.state == "paused"
    await resume(served)
