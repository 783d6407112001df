"""SGLang's and verl's life-cycle tests that had no counterpart here; `docs/peer_tests.md` lists
them all.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from engine_core.fake_runner import expected_tokens
from frontend.sglang.calls import read_call
from tests.support.served_engine import PROMPT, ServedEngine, fake, post_bytes, reset, served_engine

LONG = {"max_new_tokens": 3000}


async def abort_all_of(
    served: ServedEngine, num: int, *, min_preempted: int = 0
) -> list[dict[str, Any]]:
    """Results of so many long requests that were aborted together."""
    posts = [
        asyncio.create_task(
            served.http.post(
                "/generate",
                json={
                    "input_ids": [number, 7],
                    "sampling_params": LONG,
                    "return_logprob": True,
                    "rid": f"r-{number}",
                },
            )
        )
        for number in range(num)
    ]
    await served.wait_for_live_requests(num)
    async with asyncio.timeout(10):
        while True:
            live = await served.engine.list_requests()
            num_started = sum(request.num_output_tokens > 0 for request in live)
            num_preempted = sum(request.stage == "preempted" for request in live)
            if num_started >= 8 and num_preempted >= min_preempted:
                break
            await asyncio.sleep(0.02)
    receipt = (await served.http.post("/abort_request", json={"abort_all": True})).json()
    assert receipt["num_aborted"] == num
    answers = await asyncio.wait_for(asyncio.gather(*posts), 20)
    assert all(answer.status_code == 200 for answer in answers)
    await served.wait_until_idle()
    return [answer.json() for answer in answers]


def assert_counts_agree(results: list[dict[str, Any]]) -> None:
    for number, result in enumerate(results):
        info = result["meta_info"]
        assert info["finish_reason"]["type"] == "abort"
        assert info["completion_tokens"] == len(result["output_ids"])
        assert len(info["output_token_logprobs"]) == len(result["output_ids"])
        assert info["e2e_latency"] > 0
        num_tokens = len(result["output_ids"])
        assert result["output_ids"] == expected_tokens([number, 7], num_tokens)


async def test_L6_abort_all_over_a_full_batch_and_a_queue_ends_all_and_the_server_lives() -> None:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=8)) as served:
        results = await abort_all_of(served, 32)
        assert_counts_agree(results)
        num_started = sum(bool(result["output_ids"]) for result in results)
        assert num_started == 8
        answer = await served.http.post("/generate", json={"input_ids": PROMPT})
        assert answer.json()["output_ids"] == expected_tokens(PROMPT, 128)


async def test_L2_L6_preempted_requests_end_with_what_they_had_and_counts_agree() -> None:
    config = fake(fake_step_time_ms=1, max_model_len=512, num_gpu_blocks_override=33, block_size=16)
    async with served_engine(config) as served:
        assert_counts_agree(await abort_all_of(served, 16, min_preempted=3))


async def test_L4_L11_hang_ups_behind_an_api_key_leave_nothing() -> None:
    async with served_engine(fake(fake_step_time_ms=1, max_num_seqs=4), api_key="key") as served:
        headers = {"Authorization": "Bearer key"}
        connections = [await served.connect() for _ in range(16)]
        for connection in connections:
            body = {"input_ids": PROMPT, "sampling_params": LONG, "stream": True}
            await served.send(connection, post_bytes("/generate", body, headers))
        await served.wait_for_live_requests(16)
        for connection in connections:
            reset(connection)
        await served.wait_until_idle()
        listed = await served.http.get("/requests", headers=headers)
        assert listed.json() == {"requests": []}
        assert (await served.http.get("/requests")).status_code == 401


async def test_L8_a_list_that_names_a_rid_twice_is_refused_whole() -> None:
    async with served_engine(fake()) as served:
        body = {"input_ids": [[1], [2], [3]], "rid": ["a", "b", "a"]}
        answer = await served.http.post("/generate", json=body)
        assert answer.status_code == 400
        assert "'a'" in answer.json()["error"]["message"]
        assert served.engine.num_live_requests == 0
        again = await served.http.post("/generate", json=body | {"rid": ["a", "b", "c"]})
        assert again.status_code == 200


def test_a_callers_sampling_parameters_are_not_changed() -> None:
    params = {"max_new_tokens": 5, "n": 2, "stop": ["x"], "sampling_seed": 3}
    before = json.dumps(params)
    assert len(read_call(None, [1, 2], params).requests) == 2
    assert json.dumps(params) == before
