"""The pause routes of vLLM, SGLang and FastDeploy, as their clients call them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens
from frontend.async_engine import AsyncEngine
from frontend.config import HttpConfig
from frontend.http.server import all_routes
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from tests.support.called_routes import RouteClient
from tests.support.served_engine import PROMPT, fake

pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def cleared(engine: AsyncEngine) -> AsyncIterator[None]:
    """Leave the engine running and idle."""
    yield
    await engine.resume()
    await engine.abort(abort_all=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[AsyncEngine]:
    async with await AsyncEngine.start(fake(fake_step_time_ms=2)) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(running: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    async with cleared(running):
        yield running


@pytest.fixture
def client(engine: AsyncEngine) -> RouteClient:
    return RouteClient(all_routes(engine, HttpConfig()))


async def start(engine: AsyncEngine, num_tokens: int = 300) -> RequestStream:
    """A request that has its first token."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
    await anext(stream)
    return stream


async def result(stream: RequestStream) -> tuple[str, int]:
    """How a started request ended, and how many tokens it had behind the first output."""
    ended = await asyncio.wait_for(stream.result(), 20)
    return ended.finish_reason, len(ended.token_ids)


# -- vLLM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "outcome", "newcomers"),
    [
        ("", "abort", "reject"),
        ("?mode=abort&clear_cache=false", "abort", "reject"),
        ("?mode=wait", "length", "reject"),
        ("?mode=keep&clear_cache=false", "length", "hold"),
        ("?mode=keep", "length", "hold"),
    ],
)
async def test_L9_vllm_pauses_in_its_modes_and_treats_newcomers_as_since_0_33(
    engine: AsyncEngine, client: RouteClient, query: str, outcome: str, newcomers: str
) -> None:
    stream = await start(engine)
    answer = await client.start("POST", f"/pause{query}", b"").answer()
    assert answer.status == 200
    assert answer.json()["status"] == "paused"
    assert (await client.get("/is_paused")).json()["is_paused"] is True
    assert engine.pause_state.newcomers == newcomers
    body = {"prompt": PROMPT, "max_tokens": 2}
    asking = client.start("POST", "/v1/completions", body)
    if newcomers == "reject":
        refusal = await asking.answer()
        assert (refusal.status, refusal.json()["error"]["code"]) == (503, "engine_paused")
        assert "retry-after: 1" in refusal.head
    resumed = (await client.start("POST", "/resume", b"").answer()).json()
    assert (resumed["status"], resumed["was"]) == ("resumed", "paused")
    assert (await client.get("/is_paused")).json() == {"is_paused": False, "state": "running"}
    assert (await result(stream))[0] == outcome
    if newcomers == "hold":
        assert (await asking.answer()).status == 200


async def test_L9_keep_with_a_cleared_cache_retracts(
    engine: AsyncEngine, client: RouteClient
) -> None:
    stream = await start(engine)
    reply = (await client.start("POST", "/pause?mode=keep&clear_cache=true", b"").answer()).json()
    assert (reply["num_retracted"], reply["num_kept"]) == (1, 0)
    await client.start("POST", "/resume", b"").answer()
    assert (await result(stream))[0] == "length"


async def test_a_server_may_hold_newcomers_during_every_pause_as_vllm_0_32(
    engine: AsyncEngine,
) -> None:
    client = RouteClient(all_routes(engine, HttpConfig(hold_while_paused=True)))
    await client.start("POST", "/pause", b"").answer()
    assert engine.pause_state.newcomers == "hold"
    held = client.start("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
    assert engine.pause_state.num_held == 1
    await client.start("POST", "/resume", b"").answer()
    assert (await held.answer()).status == 200


async def test_a_mode_that_vllm_has_not_is_refused_by_its_name(
    engine: AsyncEngine, client: RouteClient
) -> None:
    for mode in ("bogus", "retract"):
        answer = await client.start("POST", f"/pause?mode={mode}", b"").answer()
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "mode"
    assert engine.pause_state.state == "running"


async def test_the_prefix_cache_is_reset_unless_requests_hold_blocks(
    engine: AsyncEngine, client: RouteClient
) -> None:
    path = "/reset_prefix_cache"
    stream = await start(engine)
    refusal = (await client.start("POST", path, b"").answer()).json()
    assert refusal["success"] is False
    assert "1 requests are live" in refusal["message"]
    assert "?reset_running_requests=true" in refusal["message"]
    query = "?reset_running_requests=true&reset_external=true"
    assert (await client.start("POST", path + query, b"").answer()).json() == {"success": True}
    assert (await result(stream))[0] == "length"
    assert (await client.start("POST", path, b"").answer()).json() == {"success": True}


# -- SGLang ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "counted", "outcome"),
    [
        (b"", "num_aborted", "abort"),
        ({}, "num_aborted", "abort"),
        ({"mode": "abort"}, "num_aborted", "abort"),
        ({"mode": "in_place"}, "num_kept", "length"),
        ({"mode": "retract"}, "num_retracted", "length"),
    ],
)
async def test_L9_sglang_pauses_in_its_modes_and_holds_newcomers(
    engine: AsyncEngine, client: RouteClient, body: object, counted: str, outcome: str
) -> None:
    stream = await start(engine)
    reply = (await client.post("/pause_generation", body)).json()
    assert (reply["status"], reply["message"]) == ("ok", "Generation paused successfully.")
    assert reply[counted] == 1
    held = client.start("POST", "/generate", {"input_ids": PROMPT})
    assert engine.pause_state.num_held == 1
    reply = (await client.post("/continue_generation", {"torch_empty_cache": True})).json()
    assert (reply["status"], reply["message"]) == ("ok", "Generation continued successfully.")
    assert reply["num_released"] == 1
    assert (await result(stream))[0] == outcome
    assert (await held.answer()).json()["output_ids"] == expected_tokens(PROMPT, 128)


async def test_L9_an_abort_after_an_in_place_pause_ends_what_that_holds(
    engine: AsyncEngine, client: RouteClient
) -> None:
    stream = await start(engine, 4000)
    await client.post("/pause_generation", {"mode": "in_place"})
    reply = (await client.post("/pause_generation", {"mode": "abort"})).json()
    assert reply["num_aborted"] == 1
    assert (await result(stream))[0] == "abort"
    assert engine.pause_state.state == "paused"


async def test_a_mode_that_sglang_has_not_is_refused_by_its_name(
    engine: AsyncEngine, client: RouteClient
) -> None:
    answer = await client.post("/pause_generation", {"mode": "keep"})
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "mode"
    assert engine.pause_state.state == "running"


async def test_the_cache_is_flushed_when_idle_and_the_refusal_says_why_not(
    engine: AsyncEngine, client: RouteClient
) -> None:
    for method in ("GET", "POST"):
        answer = await client.start(method, "/flush_cache", b"").answer()
        assert (answer.status, answer.body) == (200, b"Cache flushed.\n")
        assert "content-type: text/plain" in answer.head
    stream = await start(engine, 4000)
    answer = await client.get("/flush_cache?timeout=0.05")
    assert answer.status == 400
    assert b"1 requests are live" in answer.body
    waiting = client.start("POST", "/flush_cache?timeout=10", b"")
    await asyncio.sleep(0.02)
    assert not waiting.data
    stream.close()
    assert (await waiting.answer()).status == 200


async def test_L9_a_retracting_pause_lets_the_cache_be_flushed(
    engine: AsyncEngine, client: RouteClient
) -> None:
    stream = await start(engine)
    await client.post("/pause_generation", {"mode": "in_place"})
    assert (await client.get("/flush_cache")).status == 400
    await client.post("/pause_generation", {"mode": "retract"})
    assert (await client.get("/flush_cache")).status == 200
    await client.post("/continue_generation", {})
    assert (await result(stream))[0] == "length"


async def test_server_info_and_ready_tell_of_a_pause(
    engine: AsyncEngine, client: RouteClient
) -> None:
    assert (await client.get("/server_info")).json()["state"] == "running"
    assert (await client.get("/ready")).status == 200
    await client.post("/pause_generation", {"mode": "in_place"})
    assert (await client.get("/server_info")).json()["state"] == "paused"
    assert (await client.get("/ready")).status == 503
    assert (await client.get("/health")).status == 200
    assert (await client.get("/health_generate")).status == 200


# -- FastDeploy ------------------------------------------------------------------------------------


async def test_L9_a_pause_without_a_body_is_fastdeploys(
    engine: AsyncEngine, client: RouteClient
) -> None:
    stream = await start(engine)
    reply = (await client.start("POST", "/v1/pause", b"").answer()).json()
    assert reply["request_id"].startswith("control-")
    assert (reply["status"], reply["error_message"], reply["num_aborted"]) == ("success", None, 1)
    assert (await result(stream))[0] == "abort"
    assert engine.pause_state.newcomers == "reject"
    refused = await client.post("/v1/completions", {"prompt": PROMPT})
    assert refused.status == 503
    reply = (await client.get("/v1/is_paused")).json()
    assert (reply["status"], reply["result"]) == ("success", {"is_paused": True, "state": "paused"})
    again = await client.start("POST", "/v1/pause", b"").answer()
    assert again.json()["status"] == "success"
    for was in ("paused", "running"):
        reply = (await client.start("POST", "/v1/resume", b"").answer()).json()
        assert (reply["status"], reply["was"]) == ("success", was)
    assert (await client.get("/v1/is_paused")).json()["result"]["is_paused"] is False


async def test_a_pause_with_an_empty_object_is_caesuras(
    engine: AsyncEngine, client: RouteClient
) -> None:
    await client.post("/v1/pause", {})
    assert engine.pause_state.newcomers == "hold"


async def test_a_refusal_has_fastdeploys_shape_and_openais(
    engine: AsyncEngine, client: RouteClient
) -> None:
    answer = await client.post("/v1/pause", {"mode": "gently"})
    assert answer.status == 400
    reply = answer.json()
    assert (reply["status"], reply["result"]) == ("error", None)
    assert "gently" in reply["error_message"]
    assert reply["error"]["message"] == reply["error_message"]
