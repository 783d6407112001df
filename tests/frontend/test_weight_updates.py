"""Weight updates of real engine processes with the arithmetic runner, whose tokens tell the weights
that made them: all engines or none, old weights until the commit, and always running afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine_core.fake_runner import expected_tokens, salt_of
from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.errors import (
    InvalidRequestError,
    PauseInterruptedError,
    PauseTimeoutError,
    WeightUpdateConflictError,
    WeightUpdateError,
)
from frontend.sampling_params import SamplingParams
from frontend.weights import tensor_file
from ipc.engine_config import EngineConfig
from ipc.weights import CAESURA_JOIN_WEIGHTS_GROUP, CAESURA_STAGE_WEIGHTS

PROMPT = [3, 5, 7]
NUM_TOKENS = 8


@contextlib.asynccontextmanager
async def running(num_engines: int = 1, step_time_ms: float = 0.0) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model="none",
        runner="fake",
        max_model_len=2048,
        num_gpu_blocks_override=512,
        block_size=16,
        fake_step_time_ms=step_time_ms,
    )
    async with asyncio.timeout(60):
        engine = await AsyncEngine.start(
            FrontendConfig(engine=config, data_parallel_size=num_engines)
        )
        try:
            yield engine
            assert engine.pause_state.state == "running", "an update left the engines paused"
            await assert_nothing_staged(engine)
        finally:
            await engine.shutdown()


async def assert_nothing_staged(engine: AsyncEngine) -> None:
    """A new update can begin and be dropped on every engine."""
    await engine.begin_weight_update()
    await engine.update_weights_from_disk("probe")
    assert await engine.discard_weight_update() is True


async def until_state(engine: AsyncEngine, state: str) -> None:
    while engine.pause_state.state != state:  # noqa: ASYNC110  # no event to await
        await asyncio.sleep(0.002)


async def outputs(engine: AsyncEngine, num: int = 1) -> list[list[int]]:
    """What so many fresh requests get, over all engines."""
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    streams = [engine.generate(prompt_token_ids=PROMPT, sampling_params=params) for _ in range(num)]
    return [list((await asyncio.wait_for(one.result(), 10)).token_ids) for one in streams]


def of_weights(*paths: str) -> list[int]:
    return expected_tokens(PROMPT, NUM_TOKENS, salt=salt_of(*paths) if paths else 0)


async def test_L10_an_update_takes_effect_on_every_engine_with_its_label() -> None:
    async with running(2) as engine:
        assert engine.weight_version == "default"
        assert await outputs(engine, 4) == [of_weights()] * 4
        report = await engine.update_weights_from_disk("step-1", version="v1")
        assert (report.version, report.num_tensors, report.engines) == ("v1", 1, {0: "ok", 1: "ok"})
        assert engine.weight_version == "v1"
        assert await outputs(engine, 4) == [of_weights("step-1")] * 4
        unnamed = await engine.update_weights_from_disk("step-2")
        assert unnamed.version == "v1"
        statuses = (await engine.status()).values()
        assert [(one.weight_version, one.weight_epoch) for one in statuses] == [("v1", 2)] * 2
        assert engine.metrics.num_weight_updates["committed"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"path": "missing"}, "engine 0: .*there are no such weights.*nothing was changed"),
        ({"path": "p", "checksum": "wrong"}, "checksum='wrong'"),
    ],
)
async def test_L10_an_update_that_fails_changes_nothing_and_pauses_nothing(
    arguments: dict[str, Any], told: str
) -> None:
    async with running() as engine:
        with pytest.raises(WeightUpdateError, match=told):
            await engine.update_weights_from_disk(**arguments, version="v1")
        assert engine.weight_version == "default"
        assert sum(engine.metrics.pause_time.counts) == 0
        assert engine.metrics.num_weight_updates["failed"] == 1
        assert await outputs(engine) == [of_weights()]
        await engine.update_weights_from_disk("good", version="v2")
        assert await outputs(engine) == [of_weights("good")]


async def test_L10_requests_go_on_over_an_update_and_newcomers_wait_for_it() -> None:
    async with running(step_time_ms=2.0) as engine:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        await anext(stream)
        report = await engine.update_weights_from_disk("w", mode="keep")
        assert report.paused_s > 0
        result = await asyncio.wait_for(stream.result(), 10)
        assert (result.finish_reason, len(result.token_ids)) == ("length", 100)
        assert await outputs(engine) == [of_weights("w")]


async def test_L10_engines_that_were_paused_stay_paused() -> None:
    async with running() as engine:
        await engine.pause("keep", pause_id="mine")
        held = asyncio.create_task(outputs(engine))
        report = await engine.update_weights_from_disk("w", version="v")
        assert report.paused_s == 0
        assert (engine.pause_state.state, engine.pause_state.pause_id) == ("paused", "mine")
        await asyncio.sleep(0.02)
        assert not held.done()
        await engine.resume("mine")
        assert await held == [of_weights("w")]


async def test_L10_the_parts_of_a_session_take_effect_together() -> None:
    async with running(2) as engine:
        await engine.begin_weight_update()
        for index, path in enumerate(("a", "b", "c")):
            part = await engine.update_weights_from_disk(path)
            assert (part.num_tensors, part.version, part.paused_s) == (index + 1, None, 0.0)
        assert await outputs(engine, 2) == [of_weights()] * 2
        report = await engine.end_weight_update(version="abc")
        assert (report.num_tensors, report.version) == (3, "abc")
        assert await outputs(engine, 2) == [of_weights("a", "b", "c")] * 2


async def test_L10_a_session_that_fails_or_is_discarded_changes_nothing() -> None:
    async with running() as engine:
        await engine.begin_weight_update()
        await engine.update_weights_from_disk("a", version="lost")
        with pytest.raises(WeightUpdateError):
            await engine.update_weights_from_disk("missing")
        with pytest.raises(WeightUpdateConflictError, match="none of it takes effect"):
            await engine.update_weights_from_disk("behind")
        with pytest.raises(WeightUpdateConflictError, match="none of it takes effect"):
            await engine.end_weight_update()
        await engine.begin_weight_update()
        await engine.update_weights_from_disk("b")
        assert await engine.discard_weight_update() is True
        assert await engine.discard_weight_update() is False
        assert (engine.weight_version, await outputs(engine)) == ("default", [of_weights()])


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": "half a pair: \ud800"},
        {"path": "a", "version": "\ud800"},
        {"path": "a", "mode": "x"},
    ],
)
async def test_L10_L12_an_update_that_no_frame_can_carry_is_refused_and_the_next_one_is_not(
    arguments: dict[str, Any],
) -> None:
    async with running() as engine:
        with pytest.raises(InvalidRequestError):
            await engine.update_weights_from_disk(**arguments)
        assert engine.pause_state.state == "running"
        await engine.update_weights_from_disk("a", version="good")
        assert (engine.weight_version, await outputs(engine)) == ("good", [of_weights("a")])


async def test_an_update_begun_twice_or_ended_without_a_part_is_a_conflict() -> None:
    async with running() as engine:
        with pytest.raises(WeightUpdateConflictError):
            await engine.end_weight_update()
        await engine.begin_weight_update()
        with pytest.raises(WeightUpdateConflictError, match="has begun already"):
            await engine.begin_weight_update()
        with pytest.raises(WeightUpdateConflictError, match="has no part yet"):
            await engine.end_weight_update()
        await engine.discard_weight_update()


async def test_of_two_concurrent_updates_one_is_refused() -> None:
    async with running() as engine:
        done = await asyncio.gather(
            engine.update_weights_from_disk("first"),
            engine.update_weights_from_disk("second"),
            return_exceptions=True,
        )
        assert isinstance(done[1], WeightUpdateConflictError)
        assert not isinstance(done[0], BaseException)
        assert await outputs(engine) == [of_weights("first")]


async def test_L10_a_pause_that_times_out_leaves_the_old_weights_and_running_engines() -> None:
    async with running(step_time_ms=5.0) as engine:
        params = SamplingParams(max_tokens=1500, ignore_eos=True)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        await anext(stream)
        with pytest.raises(PauseTimeoutError):
            await engine.update_weights_from_disk("w", mode="wait", timeout_s=0.2)
        assert engine.pause_state.state == "running"
        assert engine.num_live_requests == 1
        stream.close()
        assert await outputs(engine) == [of_weights()]


async def test_L10_a_resume_in_the_midst_of_an_update_drops_the_update() -> None:
    async with running(step_time_ms=5.0) as engine:
        params = SamplingParams(max_tokens=1500, ignore_eos=True)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        await anext(stream)
        updating = asyncio.create_task(engine.update_weights_from_disk("w", mode="wait"))
        await until_state(engine, "draining")
        await engine.resume()
        with pytest.raises(PauseInterruptedError):
            await updating
        stream.close()
        assert await outputs(engine) == [of_weights()]


async def test_L10_a_caller_that_gives_up_late_stops_nothing() -> None:
    async with running(step_time_ms=2.0) as engine:
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        await anext(stream)
        updating = asyncio.create_task(engine.update_weights_from_disk("w", mode="wait"))
        await until_state(engine, "draining")
        updating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await updating
        assert (await asyncio.wait_for(stream.result(), 10)).finish_reason == "length"
        await until_state(engine, "running")
        assert await outputs(engine) == [of_weights("w")]


async def test_tensors_travel_through_a_file_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 3)
    files_before = set(os.listdir("/proc/self/fd"))
    async with tensor_file.tensor_file(b"safetensors") as path:
        assert path.is_file()
        assert path.read_bytes() == b"safetensors"
    await asyncio.sleep(0)
    assert set(os.listdir("/proc/self/fd")) <= files_before
    async with running(2) as engine:
        report = await engine.update_weights_from_tensors(b"tensors", version="t")
        assert (report.version, report.num_tensors) == ("t", 1)
        with pytest.raises(WeightUpdateError):
            await engine.update_weights_from_tensors(b"tensors", checksum="wrong")
        missing = tmp_path / "missing.safetensors"
        with pytest.raises(WeightUpdateError, match="missing"):
            await engine.update_weights_from_tensors(missing)
        await engine.update_weights_from_tensors(tmp_path / "given.safetensors")
        assert await outputs(engine) == [of_weights(str(tmp_path / "given.safetensors"))]


async def test_tensors_that_do_not_fit_shared_memory_are_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_room(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "_write", no_room)
    with pytest.raises(WeightUpdateError, match=r"No space left.*update from disk"):
        async with tensor_file.tensor_file(b"safetensors"):
            pass


async def test_a_label_changes_nothing_else() -> None:
    async with running(2, step_time_ms=2.0) as engine:
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        stream = engine.generate(prompt_token_ids=PROMPT, sampling_params=params)
        await anext(stream)
        await engine.set_weight_version("named")
        assert engine.weight_version == "named"
        result = await asyncio.wait_for(stream.result(), 10)
        assert result.finish_reason == "length"
        statuses = (await engine.status()).values()
        assert [(one.weight_version, one.weight_epoch) for one in statuses] == [("named", 0)] * 2
        assert await outputs(engine) == [of_weights()]
        with pytest.raises(InvalidRequestError, match="version=''"):
            await engine.set_weight_version("")


async def test_L10_engines_await_a_trainer_no_longer_than_the_caller_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as engine:
        sent: dict[str, Any] = {}
        client = engine._dispatcher.client
        start_call = client.start_call

        def recording(rank: int, method: str, *arguments: Any) -> Any:
            sent[method] = arguments[-1]
            return start_call(rank, method, *arguments)

        monkeypatch.setattr(client, "start_call", recording)
        with pytest.raises(WeightUpdateError, match="joins no group"):
            await engine.init_weights_update_group(
                master_address="127.0.0.1",
                master_port=1,
                world_size=2,
                rank_offset=1,
                timeout_s=7.0,
            )
        with pytest.raises(WeightUpdateError, match="no broadcast"):
            await engine.update_weights_from_distributed(["w"], ["float32"], [[2]], timeout_s=8.0)
        assert sent[CAESURA_JOIN_WEIGHTS_GROUP]["timeout_s"] == 7.0
        assert sent[CAESURA_STAGE_WEIGHTS]["timeout_s"] == 8.0


async def test_a_group_that_cannot_be_joined_is_told() -> None:
    async with running() as engine:
        group = {"master_address": "127.0.0.1", "master_port": 1, "world_size": 2}
        with pytest.raises(InvalidRequestError, match="rank 0 is the trainer's"):
            await engine.init_weights_update_group(**group, rank_offset=0)  # type: ignore[arg-type]
        with pytest.raises(WeightUpdateError, match="joins no group"):
            await engine.init_weights_update_group(**group, rank_offset=1)  # type: ignore[arg-type]
        with pytest.raises(WeightUpdateError, match="no broadcast"):
            await engine.update_weights_from_distributed(["w"], ["bfloat16"], [[2, 2]])
        with pytest.raises(InvalidRequestError, match="1 names, 2 dtypes"):
            await engine.update_weights_from_distributed(["w"], ["a", "b"], [[1]])
