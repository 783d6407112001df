"""How RL frameworks change the weights of the bundled model while it serves, in their order of
calls: TRL and SkyRL by a broadcast in vLLM's dialect, slime by tensors in SGLang's. They send
packed buffers over NCCL, and pickles; here each tensor is broadcast by itself, or in a safetensors
file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save
from torch import Tensor

from frontend.config import BUNDLED_MODEL_DIRECTORY
from frontend.http.vllm.weights import GROUP
from scripts.trainer_group import broadcast_tensors, described, init_trainer_group
from tests.support.mock_fleet import free_tcp_port
from tests.support.rollouts import (
    LONG,
    MODEL,
    NUM_PLACES,
    PROMPT_IDS,
    Sample,
    assert_alive_and_idle,
    assert_scored_by_the_model,
    post,
    rollout_server,
    wait_for_tokens,
)
from tests.support.served_engine import ServedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")
TIMEOUT_S = 30.0
NUM_TOKENS = 250
BINARY = {"Content-Type": "application/octet-stream"}
FIRST_WEIGHTS = {"model_path": str(BUNDLED_MODEL_DIRECTORY), "weight_version": "0"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[ServedEngine]:
    async with rollout_server() as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(server: ServedEngine) -> Any:
    """A group of this process, as the trainer, and the engine."""
    # SkyRL's client sends a body with its GETs.
    world_size = await server.http.request("GET", "/get_world_size", json={})
    where = {
        "master_address": "127.0.0.1",
        "master_port": free_tcp_port(),
        "rank_offset": 1,
        "world_size": 1 + world_size.json()["world_size"],
        "backend": "gloo",
    }
    init = asyncio.to_thread(
        init_trainer_group, "127.0.0.1", where["master_port"], 2, group_name=GROUP
    )
    body = {"init_info": where}
    group, _ = await asyncio.wait_for(
        asyncio.gather(init, post(server.http, "/init_weight_transfer_engine", body)), TIMEOUT_S
    )
    return group


def trained_tensors(factor: float) -> dict[str, Tensor]:
    """Some of the bundled model's, as a trainer might have changed them."""
    tensors = load_file(BUNDLED_MODEL_DIRECTORY / "model.safetensors")
    return {name: tensor * factor for name, tensor in tensors.items() if "layers.3.mlp" in name}


@pytest.mark.parametrize(
    ("framework", "pause", "version"),
    [("TRL", "/pause?mode=keep", "1"), ("SkyRL", "/pause?mode=keep&clear_cache=false", "2")],
)
async def test_L9_L10_trl_and_skyrl_freeze_broadcast_and_resume_without_an_abort(
    server: ServedEngine, trainer: Any, framework: str, pause: str, version: str
) -> None:
    http = server.http
    body = {
        "model": MODEL,
        "prompt": PROMPT_IDS,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 0,
    }
    pending = [asyncio.create_task(post(http, "/v1/completions", body)) for _ in range(4)]
    await wait_for_tokens(http, 4, at_least=10)
    tensors = trained_tensors(0.9 if framework == "TRL" else 1.1)
    names, dtypes, shapes = described(tensors)
    info = {"names": names, "dtype_names": dtypes, "shapes": shapes, "packed": False}
    try:
        await post(http, pause, None)
        assert (await http.get("/is_paused")).json()["is_paused"] is True
        if framework == "SkyRL":
            reset = await post(http, "/reset_prefix_cache", {"reset_running_requests": True})
            assert reset == {"success": True}
        await post(http, "/start_weight_update", {"is_checkpoint_format": True})
        sending = asyncio.to_thread(broadcast_tensors, trainer, tensors)
        update = post(http, "/update_weights", {"update_info": info})
        await asyncio.wait_for(asyncio.gather(sending, update), TIMEOUT_S)
        await post(http, "/finish_weight_update", {"weight_version": version})
        assert not any(task.done() for task in pending)
    finally:
        await post(http, "/resume", None)
    for answer in await asyncio.wait_for(asyncio.gather(*pending), TIMEOUT_S):
        [choice] = answer["choices"]
        assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", NUM_TOKENS)
        [*_, new] = choice["weight_versions"]
        assert (new["version"], new["end"]) == (version, NUM_TOKENS)
        assert new["start"] >= 10
        ids, at = choice["token_ids"], new["start"]
        logprobs = choice["logprobs"]["token_logprobs"]
        assert len(logprobs) == NUM_TOKENS
        await assert_scored_by_the_model(http, PROMPT_IDS + ids[:at], ids[at:], logprobs[at:])
    assert (await http.get("/weight_info")).json() == {"weight_version": version}
    await assert_alive_and_idle(server)


async def slime_generate(server: ServedEngine, sample: Sample) -> list[str]:
    """Its partial rollout: the versions that one call's tokens were sampled by."""
    body = {
        "input_ids": sample.prompt_ids + sample.ids,
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": sample.num_tokens_left,
            "ignore_eos": True,
        },
        "return_logprob": True,
    }
    result = await post(server.http, "/generate", body)
    sample.add_sglang(result)
    return [span["version"] for span in result["meta_info"]["weight_versions"]]


async def slime_update(server: ServedEngine, parts: list[dict[str, Tensor]], version: str) -> None:
    await post(server.http, "/pause_generation", {})
    flushed = await server.http.get("/flush_cache")
    assert flushed.status_code == 200, "the first of its sixty tries is enough"
    await post(server.http, "/begin_weight_update", {})
    for part in parts:
        reply = await server.http.post(
            f"/update_weights_from_tensor?weight_version={version}&flush_cache=false",
            content=save(part),
            headers=BINARY,
        )
        assert reply.json()["success"] is True, reply.text
    await post(server.http, "/end_weight_update", {})
    await post(server.http, "/continue_generation", {})
    told = (await server.http.get("/get_weight_version")).json()
    assert told["weight_version"] == version


async def test_L9_L10_slime_aborts_flushes_updates_and_goes_on_with_its_partial_samples(
    server: ServedEngine,
) -> None:
    await post(server.http, "/update_weights_from_disk", FIRST_WEIGHTS)
    samples = [Sample(PROMPT_IDS, LONG) for _ in range(NUM_PLACES + 2)]
    pending = [asyncio.create_task(slime_generate(server, sample)) for sample in samples]
    await wait_for_tokens(server.http, NUM_PLACES, at_least=5)
    names = list(tensors := trained_tensors(0.8))
    half = len(names) // 2
    parts = [{name: tensors[name] for name in each} for each in (names[:half], names[half:])]
    await slime_update(server, parts, "1")
    versions = await asyncio.wait_for(asyncio.gather(*pending), 5)
    assert sorted(versions) == [[], [], *[["0"]] * NUM_PLACES]
    assert {sample.ending for sample in samples} == {"abort"}

    begun = [(sample, len(sample.ids)) for sample in samples if sample.ids]
    for sample in samples:
        sample.max_tokens = len(sample.ids) + 10
    again = [asyncio.create_task(slime_generate(server, sample)) for sample in samples]
    assert await asyncio.wait_for(asyncio.gather(*again), 20) == [["1"]] * len(samples)
    assert {(sample.ending, sample.num_tokens_left) for sample in samples} == {("length", 0)}
    for sample, num in begun[:3]:
        known = PROMPT_IDS + sample.ids[:num]
        new = slice(num, None)
        await assert_scored_by_the_model(server.http, known, sample.ids[new], sample.logprobs[new])

    await post(server.http, "/update_weights_from_disk", FIRST_WEIGHTS)
    for sample, num in begun[:3]:
        await assert_scored_by_the_model(
            server.http, PROMPT_IDS, sample.ids[:num], sample.logprobs[:num]
        )
    await assert_alive_and_idle(server)
