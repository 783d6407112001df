"""What is refused of weight updates over HTTP, and in which words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from frontend.async_engine import AsyncEngine
from frontend.config import HttpConfig
from frontend.errors import InvalidRequestError, UtilityCallError
from frontend.http.server import all_routes
from frontend.requests.fan_out import FanOut
from frontend.sampling_params import SamplingParams
from tests.support.called_routes import RouteClient
from tests.support.served_engine import PROMPT, fake

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[AsyncEngine]:
    async with await AsyncEngine.start(fake(fake_step_time_ms=1)) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def client(engine: AsyncEngine) -> AsyncIterator[RouteClient]:
    await engine.update_weights_from_disk("first", version="v0")
    yield RouteClient(all_routes(engine, HttpConfig()))
    await engine.discard_weight_update()


async def post(client: RouteClient, path: str, body: object = b"") -> Any:
    answer = await client.start("POST", path, body).answer()
    assert answer.status == 200, answer.body
    return answer.json()


@pytest.mark.parametrize("path", ["/v1/weights", "/update_weights_from_tensor"])
@pytest.mark.parametrize("content", [b"\x90\1\0\0\0\0\0\0{}", b"\x80\4\x95.", b"PK\3\4\0\0"])
async def test_tensors_without_their_content_type_are_told_the_header(
    client: RouteClient, path: str, content: bytes
) -> None:
    answer = await client.start("POST", path, content).answer()
    assert answer.status == 400
    assert "Content-Type: application/octet-stream" in answer.json()["error"]["message"]
    answer = await client.start("POST", path, b"{").answer()
    assert "the body is not JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/weights", {"path": "p", "version": "a\nb"}, "version"),
        ("/v1/pause", {"pause_id": "a\x00b"}, "pause_id"),
        ("/update_weight_version", {"new_version": "a\x1b[2J"}, "version"),
        ("/destroy_weights_update_group", {"group_name": "a\rb"}, "group_name"),
    ],
)
async def test_names_that_would_forge_lines_of_a_log_are_refused(
    engine: AsyncEngine, client: RouteClient, path: str, body: Any, field: str
) -> None:
    answer = await client.post(path, body)
    assert answer.status == 400
    assert f"{field}='a\\" in answer.json()["error"]["message"]
    assert engine.pause_state.state == "running"


async def test_L10_an_update_that_takes_too_long_is_504_and_changes_nothing(
    client: RouteClient,
) -> None:
    answer = await client.post("/v1/weights", {"path": "late", "timeout_s": 0.0})
    assert answer.status == 504
    assert "nothing was changed" in answer.json()["error"]["message"]
    answer = await client.post("/v1/weights", {"path": "late", "timeout_s": 3601})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "timeout_s")
    assert (await client.get("/get_weight_version")).json()["weight_version"] == "v0"


async def test_engines_that_say_the_same_are_named_together() -> None:
    loop = asyncio.get_running_loop()
    calls = {rank: loop.create_future() for rank in range(3)}
    for rank, reason in enumerate(("no such file", "no memory", "no such file")):
        calls[rank].set_exception(UtilityCallError(reason))
    assert FanOut(calls).failures == ["engines 0, 2: no such file", "engine 1: no memory"]


async def test_a_refusal_does_not_name_the_call_that_nobody_made(client: RouteClient) -> None:
    answer = await client.post("/v1/weights", {"path": "missing"})
    message = answer.json()["error"]["message"]
    assert message == "engine 0: path='missing': there are no such weights; nothing was changed"


async def test_a_path_as_a_text_is_no_content(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"give the file's content as bytes, or Path"):
        await engine.update_weights_from_tensors("step.safetensors")  # type: ignore[arg-type]


async def test_L10_a_part_that_was_refused_does_not_abort_requests_at_the_end(
    engine: AsyncEngine, client: RouteClient
) -> None:
    await post(client, "/begin_weight_update")
    await engine.discard_weight_update()
    body = {"model_path": "missing", "abort_all_requests": True}
    assert (await client.post("/update_weights_from_disk", body)).status == 400
    await post(client, "/update_weights_from_disk", {"model_path": "m", "abort_all_requests": True})
    await engine.begin_weight_update()
    part = await post(client, "/update_weights_from_disk", {"model_path": "second"})
    assert (part["state"], part["message"].startswith("The tensors were staged")) == (
        "staged",
        True,
    )
    stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=SamplingParams(max_tokens=40))
    await anext(stream)
    reply = await post(client, "/end_weight_update")
    assert (reply["state"], reply["message"]) == ("committed", "The weights were updated.")
    assert (await stream.result()).finish_reason == "length"
