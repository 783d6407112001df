"""Caesura's own routes for pausing: `/v1/pause`, `/v1/resume` and `/v1/status`, over real sockets
and a real engine whose tokens are arithmetic, so that every result checks itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from tests.support.served_engine import PROMPT, ServedEngine, fake, post_bytes, served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
STEP_TIME_MS = 2


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=STEP_TIME_MS, max_num_seqs=4)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(running: ServedEngine) -> AsyncIterator[ServedEngine]:
    yield running
    await running.engine.resume()
    await running.engine.abort(abort_all=True)
    await running.wait_until_idle()


def ask(served: ServedEngine, num_tokens: int, **fields: Any) -> asyncio.Task[httpx.Response]:
    """Send a request whose tokens are known, without awaiting the answer."""
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "return_token_ids": True} | fields
    return asyncio.create_task(served.http.post(COMPLETIONS, json=body))


async def choice_of(asking: asyncio.Task[httpx.Response]) -> dict[str, Any]:
    answer = await asyncio.wait_for(asking, 20)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return dict(choice)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once it holds."""
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110  # no event to await
            await asyncio.sleep(0.005)


async def wait_for_tokens(served: ServedEngine) -> None:
    """Until some request has one."""

    async def has_tokens() -> bool:
        return any(each.num_output_tokens for each in await served.engine.list_requests())

    await until(has_tokens)


async def wait_for_state(served: ServedEngine, state: str) -> None:
    async def is_reached() -> bool:
        return bool((await served.http.get("/is_paused")).json()["state"] == state)

    await until(is_reached)


async def post(served: ServedEngine, path: str, body: object = None) -> Any:
    answer = await served.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def status_of(served: ServedEngine) -> Any:
    answer = await served.http.get("/v1/status")
    assert answer.status_code == 200
    return answer.json()


async def test_L9_a_kept_request_freezes_and_a_newcomer_waits_for_the_resume(
    served: ServedEngine,
) -> None:
    kept = ask(served, 300)
    await served.wait_for_live_requests(1)
    await wait_for_tokens(served)
    report = await post(served, "/v1/pause", {"mode": "keep", "pause_id": "mine"})
    assert (report["pause_id"], report["state"], report["num_kept"]) == ("mine", "paused", 1)
    assert report["engines"] == {"0": "ok"}
    newcomer = ask(served, 3)
    await served.wait_for_live_requests(2)
    before = await status_of(served)
    assert (before["state"], before["mode"], before["newcomers"]) == ("paused", "keep", "hold")
    assert (before["pause_id"], before["num_held"], before["num_live_requests"]) == ("mine", 1, 2)
    assert before["lease_left_s"] is None
    assert before["engines"]["0"]["state"] == "paused"
    await asyncio.sleep(20 * STEP_TIME_MS / 1000)
    after = await status_of(served)
    assert after["engines"]["0"]["num_steps"] == before["engines"]["0"]["num_steps"]
    assert not kept.done()
    assert not newcomer.done()
    resumed = await post(served, "/v1/resume", {"pause_id": "mine"})
    assert (resumed["was"], resumed["pause_id"], resumed["num_released"]) == ("paused", "mine", 1)
    assert (await choice_of(kept))["token_ids"] == expected_tokens(PROMPT, 300)
    assert (await choice_of(newcomer))["token_ids"] == expected_tokens(PROMPT, 3)


async def test_L9_retracted_requests_give_their_blocks_up_and_lose_no_token(
    served: ServedEngine,
) -> None:
    retracted = ask(served, 300)
    await served.wait_for_live_requests(1)
    await wait_for_tokens(served)
    report = await post(served, "/v1/pause", {"mode": "retract", "clear_cache": True})
    assert (report["num_retracted"], report["num_kept"]) == (1, 0)
    engine = (await status_of(served))["engines"]["0"]
    assert engine["num_free_blocks"] == engine["num_blocks"]
    assert engine["integrity_errors"] == []
    await post(served, "/v1/resume")
    assert (await choice_of(retracted))["token_ids"] == expected_tokens(PROMPT, 300)


async def test_L9_an_aborting_pause_ends_requests_at_every_stage_as_successes(
    served: ServedEngine,
) -> None:
    asked = [ask(served, 4000, prompt=[*PROMPT, index]) for index in range(7)]  # Four run.
    await served.wait_for_live_requests(7)
    await wait_for_tokens(served)
    report = await post(served, "/v1/pause", {"mode": "abort"})
    assert report["num_aborted"] == 7
    for index, asking in enumerate(asked):
        choice = await choice_of(asking)
        assert (choice["finish_reason"], choice["abort_cause"]) == ("abort", "pause")
        prompt = [*PROMPT, index]
        assert choice["token_ids"] == expected_tokens(prompt, len(choice["token_ids"]))
        assert choice["resume_from"]["output_token_ids"] == choice["token_ids"]
    assert served.engine.num_live_requests == 0


async def test_L9_rejected_newcomers_are_told_so_and_welcome_after_the_resume(
    served: ServedEngine,
) -> None:
    await post(served, "/v1/pause", {"newcomers": "reject"})
    answer = await ask(served, 3)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_paused"
    assert int(answer.headers["retry-after"]) >= 1
    streamed = await ask(served, 3, stream=True)
    assert streamed.status_code == 503
    assert served.engine.num_live_requests == 0
    await post(served, "/v1/resume")
    assert (await choice_of(ask(served, 3)))["token_ids"] == expected_tokens(PROMPT, 3)


async def test_L13_while_a_pause_drains_probes_and_status_answer_and_aborts_take_effect(
    served: ServedEngine,
) -> None:
    asking = ask(served, 4000, request_id="slow")
    await served.wait_for_live_requests(1)
    await wait_for_tokens(served)
    pausing = asyncio.create_task(served.http.post("/v1/pause", json={"mode": "wait"}))
    await wait_for_state(served, "draining")
    assert (await served.http.get("/is_paused")).json()["is_paused"] is False
    assert (await served.http.get("/v1/is_paused")).json()["result"]["is_paused"] is False
    assert (await status_of(served))["state"] == "draining"
    assert (await served.http.get("/health")).status_code == 200
    ready = await served.http.get("/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_paused")
    assert "draining" in ready.json()["error"]["message"]
    assert not pausing.done()
    await post(served, "/v1/abort", {"request_id": "slow"})
    assert (await asyncio.wait_for(pausing, 5)).json()["state"] == "paused"
    assert (await choice_of(asking))["abort_cause"] == "explicit"
    assert (await served.http.get("/is_paused")).json() == {"is_paused": True, "state": "paused"}
    await post(served, "/v1/resume")
    assert (await served.http.get("/ready")).status_code == 200


async def test_L9_a_pause_that_takes_too_long_is_504_and_goes_on_draining(
    served: ServedEngine,
) -> None:
    asking = ask(served, 4000)
    await served.wait_for_live_requests(1)
    await wait_for_tokens(served)
    answer = await served.http.post("/v1/pause", json={"mode": "wait", "timeout_s": 0.05})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    assert "engine 0" in answer.json()["error_message"]
    assert (await status_of(served))["state"] == "draining"
    resumed = await post(served, "/v1/resume")
    assert resumed["was"] == "draining"
    assert not asking.done()
    await post(served, "/v1/abort", {"abort_all": True})
    await choice_of(asking)


async def test_L9_a_resume_ends_a_pause_that_is_still_waited_for_with_409(
    served: ServedEngine,
) -> None:
    ask(served, 4000)
    await served.wait_for_live_requests(1)
    await wait_for_tokens(served)
    pausing = asyncio.create_task(served.http.post("/v1/pause", json={"mode": "wait"}))
    await wait_for_state(served, "draining")
    await post(served, "/v1/resume")
    assert (await asyncio.wait_for(pausing, 5)).status_code == 409


async def test_L9_a_resume_that_names_another_pause_changes_nothing(served: ServedEngine) -> None:
    await post(served, "/v1/pause", {"pause_id": "mine"})
    answer = await served.http.post("/v1/resume", json={"pause_id": "yours"})
    assert answer.status_code == 409
    assert "'mine'" in answer.json()["error"]["message"]
    assert (await status_of(served))["state"] == "paused"
    assert (await post(served, "/v1/resume"))["pause_id"] == "mine"
    assert (await post(served, "/v1/resume"))["was"] == "running"


async def test_L9_a_lease_ends_by_itself(served: ServedEngine) -> None:
    await post(served, "/v1/pause", {"mode": "keep", "lease_s": 0.3})
    held = ask(served, 3)
    await served.wait_for_live_requests(1)
    assert 0 < (await status_of(served))["lease_left_s"] <= 0.3
    assert (await choice_of(held))["token_ids"] == expected_tokens(PROMPT, 3)
    assert (await status_of(served))["state"] == "running"


async def test_L9_a_client_that_hangs_up_does_not_take_its_pause_back(
    served: ServedEngine,
) -> None:
    ask(served, 4000)
    await served.wait_for_live_requests(1)
    await wait_for_tokens(served)
    client = await served.connect()
    await served.post(client, "/v1/pause", {"mode": "wait", "pause_id": "gone"})
    await wait_for_state(served, "draining")
    client.close()
    await post(served, "/v1/abort", {"abort_all": True})
    await wait_for_state(served, "paused")
    assert (await status_of(served))["pause_id"] == "gone"


async def test_L4_a_held_request_ends_with_its_client_and_by_an_abort(
    served: ServedEngine,
) -> None:
    await post(served, "/v1/pause", {"mode": "keep"})
    client = await served.connect()
    await served.send(client, post_bytes(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 9}))
    held = ask(served, 9, request_id="held")
    await served.wait_for_live_requests(2)
    assert (await status_of(served))["num_held"] == 2
    client.close()
    await served.wait_for_live_requests(1)
    receipt = await post(served, "/v1/abort", {"request_id": "held"})
    assert receipt["requests"]["held"]["status"] == "aborted"
    assert (await choice_of(held))["token_ids"] == []
    assert (await status_of(served))["num_held"] == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"mode": "stop"}, "mode"),
        ({"mode": "in_place"}, "mode"),
        ({"newcomers": "queue"}, "newcomers"),
        ({"lease_s": 0}, "lease_s"),
        ({"pause_id": ""}, "pause_id"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"clear": True}, "clear"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_paused(
    served: ServedEngine, body: dict[str, Any], param: str
) -> None:
    answer = await served.http.post("/v1/pause", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert served.engine.pause_state.state == "running"


async def test_control_needs_the_admin_key() -> None:
    async with served_engine(fake(), api_key="client", admin_api_key="admin") as served:
        for method, path in (
            ("POST", "/v1/pause"),
            ("POST", "/v1/resume"),
            ("GET", "/v1/status"),
            ("POST", "/v1/weights"),
            ("DELETE", "/v1/weights"),
            ("POST", "/pause"),
            ("POST", "/pause_generation"),
            ("POST", "/update_weights_from_disk"),
        ):
            for key, expected in (("client", 403), ("wrong", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                answer = await served.http.request(method, path, headers=headers)
                assert answer.status_code == expected, path
        headers = {"Authorization": "Bearer admin"}
        assert (await served.http.get("/v1/status", headers=headers)).status_code == 200
        assert served.engine.pause_state.state == "running"


async def test_L12_L13_status_answers_though_an_engine_does_not_and_names_it(
    served: ServedEngine,
) -> None:
    pid = served.engine._supervisor.pid(0)
    os.kill(pid, signal.SIGSTOP)
    try:
        status = await asyncio.wait_for(status_of(served), 5)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert status["engines"] == {"0": {"state": "unreachable"}}
    assert status["state"] == "running"
