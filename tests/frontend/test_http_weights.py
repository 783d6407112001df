"""Weight updates over HTTP, in every dialect. The engine's tokens are arithmetic, and tell by which
weights they were made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engine_core.fake_runner import expected_tokens, salt_of
from frontend.async_engine import AsyncEngine
from frontend.config import HttpConfig
from frontend.http.server import all_routes
from frontend.sampling_params import SamplingParams
from tests.support.called_routes import Answer, RouteClient
from tests.support.served_engine import PROMPT, fake

pytestmark = pytest.mark.asyncio(loop_scope="module")

BINARY = {"content-type": "application/octet-stream"}
NUM_TOKENS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[AsyncEngine]:
    async with await AsyncEngine.start(fake(fake_step_time_ms=1)) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def client(engine: AsyncEngine) -> AsyncIterator[RouteClient]:
    await engine.update_weights_from_disk("first", version="v0")
    yield RouteClient(all_routes(engine, HttpConfig()))
    await engine.resume()
    await engine.abort(abort_all=True)
    await engine.discard_weight_update()


async def post(client: RouteClient, path: str, body: object = None) -> Any:
    answer = await client.start("POST", path, b"" if body is None else body).answer()
    assert answer.status == 200, answer.body
    return answer.json()


async def completion(client: RouteClient, num_tokens: int = NUM_TOKENS) -> Answer:
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "return_token_ids": True}
    return await client.post("/v1/completions", body)


async def assert_weights(client: RouteClient, *paths: str, version: str) -> None:
    """What serves now, and how it is called."""
    [choice] = (await completion(client)).json()["choices"]
    assert choice["token_ids"] == expected_tokens(PROMPT, NUM_TOKENS, salt=salt_of(*paths))
    assert choice["weight_versions"] == [{"version": version, "start": 0, "end": NUM_TOKENS}]
    for path in ("/model_info", "/get_weight_version", "/weight_info"):
        assert (await client.get(path)).json()["weight_version"] == version
    assert (await client.get("/v1/status")).json()["weight_version"] == version


async def long_request(engine: AsyncEngine) -> Any:
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
    await anext(stream)
    return stream


# -- Caesura ---------------------------------------------------------------------------------------


async def test_L10_a_directory_replaces_the_weights_and_their_label(client: RouteClient) -> None:
    body = {"path": "/models/step-1", "version": "v1", "checksum": f"{salt_of('/models/step-1'):x}"}
    reply = await post(client, "/v1/weights", body)
    assert (reply["version"], reply["num_tensors"], reply["engines"]) == ("v1", 1, {"0": "ok"})
    assert reply["checksum"] == body["checksum"]
    await assert_weights(client, "/models/step-1", version="v1")


async def test_L10_tensors_in_the_body_replace_the_weights(client: RouteClient) -> None:
    call = client.start("POST", "/v1/weights?version=v2&mode=retract", b"tensors", BINARY)
    answer = await call.answer()
    assert answer.status == 200
    assert answer.json()["version"] == "v2"
    [choice] = (await completion(client)).json()["choices"]
    assert choice["token_ids"] != expected_tokens(PROMPT, NUM_TOKENS, salt=salt_of("first"))
    assert choice["weight_versions"][0]["version"] == "v2"


@pytest.mark.parametrize(
    "body",
    [
        {"path": "/missing", "version": "v9"},
        {"path": "/models/step-1", "version": "v9", "checksum": "other"},
        {"path": "/models/step-1", "version": ""},
        {"path": "/models/step-1", "mode": "gently"},
        {"path": ""},
        {"version": "v9"},
        {"path": "/models/step-1", "colour": "blue"},
    ],
)
async def test_L10_an_update_that_fails_leaves_weights_label_and_requests_alone(
    engine: AsyncEngine, client: RouteClient, body: dict[str, Any]
) -> None:
    stream = await long_request(engine)
    answer = await client.post("/v1/weights", body)
    assert answer.status == 400, answer.body
    assert answer.json()["error"]["message"]
    assert engine.pause_state.state == "running"
    await assert_weights(client, "first", version="v0")
    assert engine.num_live_requests == 1
    stream.close()


async def test_L10_a_request_that_crosses_an_update_tells_the_span_of_each_version(
    engine: AsyncEngine, client: RouteClient
) -> None:
    call = client.start("POST", "/generate", {"input_ids": PROMPT, "stream": True})
    await call.begun()
    await post(client, "/v1/weights", {"path": "second", "version": "v1"})
    events = (await call.answer()).events()
    infos = [event["meta_info"] for event in events]
    assert infos[0]["weight_version"] == "v0"
    assert not any("weight_versions" in info for info in infos[:-1])
    info = infos[-1]
    assert info["weight_version"] == "v1"
    [before, after] = info["weight_versions"]
    assert (before["version"], before["start"]) == ("v0", 0)
    assert (after["version"], after["end"]) == ("v1", 128)
    assert before["end"] == after["start"]


async def test_L9_an_update_during_a_pause_leaves_it_paused(
    engine: AsyncEngine, client: RouteClient
) -> None:
    await post(client, "/v1/pause", {"mode": "keep", "pause_id": "mine"})
    await post(client, "/v1/weights", {"path": "second", "version": "v1", "mode": "abort"})
    assert engine.pause_state.pause_id == "mine"
    await post(client, "/v1/resume", {"pause_id": "mine"})
    await assert_weights(client, "second", version="v1")


# -- SGLang ----------------------------------------------------------------------------------------


async def test_sglang_updates_from_disk_with_all_its_fields(client: RouteClient) -> None:
    body = {
        "model_path": "second",
        "load_format": None,
        "abort_all_requests": False,
        "weight_version": "v1",
        "flush_cache": True,
        "torch_empty_cache": True,
        "keep_pause": False,
        "is_async": False,
        "token_step": 0,
        "recapture_cuda_graph": False,
        "manifest": None,
    }
    reply = await post(client, "/update_weights_from_disk", body)
    assert (reply["success"], reply["num_paused_requests"]) == (True, 0)
    assert reply["message"]
    await assert_weights(client, "second", version="v1")


async def test_a_failed_update_has_sglangs_shape(client: RouteClient) -> None:
    answer = await client.post("/update_weights_from_disk", {"model_path": "missing"})
    assert answer.status == 400
    reply = answer.json()
    assert (reply["success"], reply["num_paused_requests"]) == (False, 0)
    assert "missing" in reply["message"]
    await assert_weights(client, "first", version="v0")


@pytest.mark.parametrize("is_paused", [False, True])
async def test_abort_all_requests_ends_all_before_the_new_weights_come(
    engine: AsyncEngine, client: RouteClient, is_paused: bool
) -> None:
    stream = await long_request(engine)
    if is_paused:
        await post(client, "/pause_generation", {"mode": "in_place"})
    body = {"model_path": "second", "abort_all_requests": True, "weight_version": "v1"}
    await post(client, "/update_weights_from_disk", body)
    ended = await asyncio.wait_for(stream.result(), 10)
    assert ended.finish_reason == "abort"
    assert {span.version for span in ended.weight_spans} == {"v0"}
    assert engine.pause_state.state == ("paused" if is_paused else "running")


async def test_L10_without_it_no_request_crosses_an_update_unless_it_is_paused(
    engine: AsyncEngine, client: RouteClient
) -> None:
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
    await anext(stream)
    await post(client, "/update_weights_from_disk", {"model_path": "second"})
    ended = await asyncio.wait_for(stream.result(), 10)
    assert ended.finish_reason == "length"


async def test_sglangs_tensors_come_as_a_file_and_never_as_a_pickle(client: RouteClient) -> None:
    path = "/update_weights_from_tensor"
    await post(client, path, {"path": "/dev/shm/new.safetensors", "weight_version": "v1"})
    await assert_weights(client, "/dev/shm/new.safetensors", version="v1")
    query = "?weight_version=v2&flush_cache=false&abort_all_requests=true"
    answer = await client.start("POST", path + query, b"tensors", BINARY).answer()
    assert answer.json()["version"] == "v2"
    for body, param in (
        ({"serialized_named_tensors": ["gASV"]}, "serialized_named_tensors"),
        ({"path": "/models/step-1"}, "path"),
        ({}, "path"),
        ({"path": "/x.safetensors", "load_format": "flattened_bucket"}, "load_format"),
    ):
        answer = await client.post(path, body)
        assert answer.status == 400
        assert answer.json()["error"]["param"] == param
    assert (await client.get("/weight_info")).json()["weight_version"] == "v2"


async def test_L10_parts_between_begin_and_end_take_effect_together(client: RouteClient) -> None:
    assert (await post(client, "/begin_weight_update", {"selector": "all"}))["success"] is True
    again = await client.post("/begin_weight_update", {})
    assert (again.status, again.json()["success"]) == (409, False)
    for name, version in (("a.safetensors", "v1"), ("b.safetensors", None)):
        body = {"path": name, "weight_version": version}
        await post(client, "/update_weights_from_tensor", body)
        await assert_weights(client, "first", version="v0")
    reply = await post(client, "/end_weight_update")
    assert (reply["success"], reply["num_tensors"], reply["version"]) == (True, 2, "v1")
    await assert_weights(client, "a.safetensors", "b.safetensors", version="v1")
    assert (await client.post("/end_weight_update", {})).status == 409


async def test_an_update_that_nobody_ends_can_be_discarded(client: RouteClient) -> None:
    await post(client, "/begin_weight_update")
    await post(client, "/update_weights_from_disk", {"model_path": "second"})
    reply = await client.start("DELETE", "/v1/weights", b"").answer()
    assert reply.json() == {"discarded": True}
    await assert_weights(client, "first", version="v0")
    await post(client, "/begin_weight_update")


async def test_L10_a_new_label_aborts_nothing_unless_it_is_told_to(
    engine: AsyncEngine, client: RouteClient
) -> None:
    stream = await long_request(engine)
    reply = await post(client, "/update_weight_version", {"new_version": "v1"})
    assert (reply["success"], reply["new_version"]) == (True, "v1")
    assert engine.num_live_requests == 1
    await assert_weights(client, "first", version="v1")
    body = {"new_version": "v2", "abort_all_requests": True}
    await post(client, "/update_weight_version", body)
    assert (await asyncio.wait_for(stream.result(), 10)).finish_reason == "abort"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/init_weights_update_group",
            {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2},
        ),
        ("/destroy_weights_update_group", {"group_name": "nobody"}),
        (
            "/update_weights_from_distributed",
            {"names": ["w"], "dtypes": ["torch.bfloat16"], "shapes": [[2, 2]]},
        ),
        ("/update_weights_from_distributed", {"names": ["w"], "dtypes": [], "shapes": []}),
        ("/update_weights_from_ipc", {"zmq_handles": {}}),
    ],
)
async def test_what_an_engine_cannot_do_is_told_in_sglangs_shape(
    client: RouteClient, path: str, body: dict[str, Any]
) -> None:
    answer = await client.post(path, body)
    assert answer.status == 400, answer.body
    assert answer.json()["success"] is False
    await assert_weights(client, "first", version="v0")


# -- vLLM ------------------------------------------------------------------------------------------


async def test_groups_are_joined_as_vllm_and_sglang_say(
    engine: AsyncEngine, client: RouteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    async def record(*arguments: Any, **fields: Any) -> None:
        calls.append((arguments, fields))

    for name in ("init_weights_update_group", "destroy_weights_update_group"):
        monkeypatch.setattr(engine, name, record)
    where = {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 2}
    reply = await post(client, "/init_weight_transfer_engine", {"init_info": where})
    assert reply == {"message": "Weight transfer initialized"}
    named = where | {"group_name": "trainers", "backend": "gloo"}
    assert (await post(client, "/init_weights_update_group", named))["success"] is True
    await post(client, "/destroy_weights_update_group", {"group_name": "trainers"})
    assert calls == [
        ((), where | {"group_name": "weight_transfer", "backend": "nccl"}),
        ((), named),
        (("trainers",), {}),
    ]


async def test_vllms_update_begins_and_finishes_with_its_messages(
    engine: AsyncEngine, client: RouteClient
) -> None:
    assert await post(client, "/start_weight_update") == {"message": "Weight update started"}
    again = await client.start("POST", "/start_weight_update", b"").answer()
    assert again.status == 409
    await engine.update_weights_from_disk("second")
    reply = await post(client, "/finish_weight_update", {"weight_version": "v1"})
    assert (reply["message"], reply["version"]) == ("Weight update finished", "v1")
    await assert_weights(client, "second", version="v1")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/start_weight_update", {"is_checkpoint_format": False}, "is_checkpoint_format"),
        ("/update_weights", {}, "update_info"),
        (
            "/update_weights",
            {
                "update_info": {
                    "names": ["w"],
                    "dtype_names": ["x"],
                    "shapes": [[1]],
                    "packed": True,
                }
            },
            "update_info.packed",
        ),
        (
            "/update_weights",
            {"update_info": {"names": ["w"], "dtype_names": ["x"], "shapes": [[-1]]}},
            "update_info.shapes[0][0]",
        ),
        ("/init_weight_transfer_engine", {"init_info": {}}, "init_info.master_address"),
    ],
)
async def test_what_vllm_takes_and_caesura_does_not_is_named(
    client: RouteClient, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await client.post(path, body)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == param


async def test_the_world_size_counts_engines(client: RouteClient) -> None:
    assert (await client.get("/get_world_size")).json() == {"world_size": 1}
    assert (await client.get("/get_world_size?include_dp=false")).json() == {"world_size": 1}


# -- FastDeploy ------------------------------------------------------------------------------------


async def test_fastdeploys_update_reads_a_path_or_what_is_served_again(client: RouteClient) -> None:
    reply = await post(client, "/v1/update_weights", {"version": "v1", "path": "second"})
    assert reply["request_id"].startswith("control-")
    assert (reply["status"], reply["result"]["version"]) == ("success", "v1")
    await assert_weights(client, "second", version="v1")
    await post(client, "/v1/update_weights", {"version": "v2"})
    await assert_weights(client, "none", version="v2")


async def test_rsync_is_refused_with_the_remedy_in_fastdeploys_shape(client: RouteClient) -> None:
    body = {"version": "v1", "rsync_config": {"etcd_server": "10.0.0.1"}}
    answer = await client.post("/v1/update_weights", body)
    assert answer.status == 400
    reply = json.loads(answer.body)
    assert (reply["status"], reply["result"]) == ("error", None)
    assert "path" in reply["error_message"]
    await assert_weights(client, "first", version="v0")
