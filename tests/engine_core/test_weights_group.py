"""Weights that a trainer broadcasts over a process group, from threads and from other processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine_core.model.checksum import weights_checksum
from engine_core.model.loader import load_runner
from engine_core.model.runner import TorchModelRunner
from engine_core.model.weights_group import TrainerGroup
from ipc.engine_config import EngineConfig
from ipc.weights import WeightsGroup, WeightSource
from scripts.trainer_group import broadcast_tensors, described, init_trainer_group
from tests.support.scripted_batching import ScriptedBatching
from tests.support.tiny_models import CONFIGS, assert_greedy, load_reference, save_model

NAME = "weight_update_group"
TIMEOUT_S = 60.0
PROMPT = [9, 80, 21, 190]

SGLANG_STYLE_TRAINER = """
import sys
from datetime import timedelta
from safetensors.torch import load_file
import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world
from torch.distributed.rendezvous import rendezvous

port, world_size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
timeout = timedelta(seconds=60)
store, rank, size = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=timeout))
store.set_timeout(timeout)
store = dist.PrefixStore("weight_update_group", store)
backend = dist.Backend("gloo")
group, _ = _new_process_group_helper(
    size, rank, [], backend, store, group_name="weight_update_group", timeout=timeout
)
_world.pg_group_ranks[group] = {i: i for i in range(world_size)}
for name, tensor in load_file(path).items():
    dist.broadcast(tensor, src=0, group=group)
print("sent")
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def group_at(port: int, rank: int, world_size: int = 2, **changes: Any) -> WeightsGroup:
    fields: dict[str, Any] = {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank": rank,
        "world_size": world_size,
        "group_name": NAME,
        "backend": "gloo",
    }
    return WeightsGroup(**fields | changes)


def source_of(tensors: Mapping[str, Tensor], **changes: Any) -> WeightSource:
    names, dtypes, shapes = described(tensors)
    fields: dict[str, Any] = {
        "kind": "broadcast",
        "group_name": NAME,
        "names": tuple(names),
        "dtypes": tuple(dtypes),
        "shapes": tuple(tuple(shape) for shape in shapes),
    }
    return WeightSource(**fields | changes)


def make_runner(directory: Path) -> TorchModelRunner:
    config = EngineConfig(
        model=str(directory),
        block_size=8,
        max_num_seqs=4,
        max_model_len=64,
        num_gpu_blocks_override=64,
        num_threads=1,
        device="cpu",
    )
    return load_runner(config)[0]


def outputs_of(runner: TorchModelRunner) -> list[int]:
    runs = ScriptedBatching(runner, 8, 4)
    sequence = runs.join(PROMPT)
    runs.run(16)
    return sequence.outputs


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return save_model(tmp_path / "old", CONFIGS["qwen3, heads of 128"](), seed=0)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return save_model(tmp_path / "new", CONFIGS["qwen3, heads of 128"](), seed=1)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def join_all(threads: ThreadPoolExecutor, *runners: TorchModelRunner) -> TrainerGroup:
    """A group of a trainer and some runners."""
    port, world_size = free_port(), 1 + len(runners)
    trainer = threads.submit(init_trainer_group, "127.0.0.1", port, world_size)
    joins = [
        threads.submit(runner.join_group, group_at(port, rank, world_size))
        for rank, runner in enumerate(runners, start=1)
    ]
    for join in joins:
        join.result(TIMEOUT_S)
    return trainer.result(TIMEOUT_S)


def test_two_engines_take_over_what_a_trainer_broadcasts(
    old: Path, new: Path, threads: ThreadPoolExecutor
) -> None:
    runners = [make_runner(old), make_runner(old)]
    group = join_all(threads, *runners)
    tensors = load_file(new / "model.safetensors")
    source = source_of(tensors, checksum=weights_checksum(tensors))
    stages = [threads.submit(runner.stage, source, None) for runner in runners]
    threads.submit(broadcast_tensors, group, tensors).result(TIMEOUT_S)
    for runner, stage in zip(runners, stages, strict=True):
        before = outputs_of(runner)
        runner.commit(stage.result(TIMEOUT_S))
        assert_greedy(load_reference(new), PROMPT, outputs_of(runner))
        assert outputs_of(runner) != before
        runner.leave_group(NAME)
        with pytest.raises(ValueError, match=f"'{NAME}' was not joined; joined groups: none"):
            runner.leave_group(NAME)


def test_a_group_made_as_sglangs_trainers_make_it_is_joined(
    old: Path, new: Path, threads: ThreadPoolExecutor
) -> None:
    runner, port = make_runner(old), free_port()
    path = new / "model.safetensors"
    trainer = subprocess.Popen(
        [sys.executable, "-c", SGLANG_STYLE_TRAINER, str(port), "2", str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        threads.submit(runner.join_group, group_at(port, 1)).result(TIMEOUT_S)
        staged = threads.submit(runner.stage, source_of(load_file(path)), None).result(TIMEOUT_S)
        output, _ = trainer.communicate(timeout=TIMEOUT_S)
    finally:
        trainer.kill()
        trainer.wait(TIMEOUT_S)
    assert output == "sent\n"
    runner.commit(staged)
    assert_greedy(load_reference(new), PROMPT, outputs_of(runner))


def test_a_broadcast_that_does_not_fit_is_received_to_its_end(
    old: Path, new: Path, threads: ThreadPoolExecutor
) -> None:
    """So the trainer is not left hanging, and the next update may use the group."""
    runner = make_runner(old)
    before = outputs_of(runner)
    group = join_all(threads, runner)
    tensors = load_file(new / "model.safetensors")
    misnamed = {f"_{name}": tensor for name, tensor in tensors.items()}
    stage = threads.submit(runner.stage, source_of(misnamed), None)
    threads.submit(broadcast_tensors, group, misnamed).result(TIMEOUT_S)
    with pytest.raises(ValueError, match="_lm_head"):
        stage.result(TIMEOUT_S)
    assert outputs_of(runner) == before
    stage = threads.submit(runner.stage, source_of(tensors), None)
    threads.submit(broadcast_tensors, group, tensors).result(TIMEOUT_S)
    runner.commit(stage.result(TIMEOUT_S))
    assert_greedy(load_reference(new), PROMPT, outputs_of(runner))


def test_L10_values_that_are_not_finite_are_refused_once_all_tensors_came(
    old: Path, new: Path, threads: ThreadPoolExecutor
) -> None:
    """The trainer of a run that diverged is not left hanging either."""
    runner = make_runner(old)
    group = join_all(threads, runner)
    tensors = load_file(new / "model.safetensors")
    first = next(iter(tensors))
    diverged = tensors | {first: torch.full_like(tensors[first], torch.nan)}
    stage = threads.submit(runner.stage, source_of(diverged), None)
    threads.submit(broadcast_tensors, group, diverged).result(TIMEOUT_S)
    with pytest.raises(ValueError, match=f"'{first}' holds .* not finite"):
        stage.result(TIMEOUT_S)
    stage = threads.submit(runner.stage, source_of(tensors), None)
    threads.submit(broadcast_tensors, group, tensors).result(TIMEOUT_S)
    runner.commit(stage.result(TIMEOUT_S))
    assert_greedy(load_reference(new), PROMPT, outputs_of(runner))


def test_a_trainer_that_sends_nothing_is_waited_for_no_longer_than_the_update_says(
    old: Path, threads: ThreadPoolExecutor
) -> None:
    runner = make_runner(old)
    trainer = join_all(threads, runner)
    source = source_of({"model.norm.weight": torch.zeros(128)}, timeout_s=0.5)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' was not received.*which was left"):
        threads.submit(runner.stage, source, None).result(TIMEOUT_S)
    with pytest.raises(ValueError, match="was not joined"):
        runner.leave_group(NAME)
    del trainer


def test_all_tensors_of_an_update_share_its_time(old: Path, threads: ThreadPoolExecutor) -> None:
    """A trainer that sends one now and then does not stretch it."""
    runner = make_runner(old)
    group = join_all(threads, runner)
    names = ("model.layers.0.input_layernorm.weight", "model.norm.weight")
    source = source_of({name: torch.ones(128) for name in names}, timeout_s=0.5)
    stage = threads.submit(runner.stage, source, None)
    broadcast_tensors(group, {names[0]: torch.ones(128)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' was not received"):
        stage.result(TIMEOUT_S)


def test_a_join_that_fails_leaves_nothing_behind(old: Path, threads: ThreadPoolExecutor) -> None:
    runner = make_runner(old)
    late = group_at(free_port(), 1, timeout_s=0.5)
    with pytest.raises(ValueError, match=r"not all 2 members met at .* within 0.5 s"):
        threads.submit(runner.join_group, late).result(TIMEOUT_S)
    join_all(threads, runner)
    with pytest.raises(ValueError, match="is joined already"):
        runner.join_group(group_at(free_port(), 1))


def test_L10_an_address_that_is_silent_is_not_awaited_for_ever(
    old: Path, threads: ThreadPoolExecutor
) -> None:
    """Such as a wrong port, or a trainer that was stopped: it takes the connection, that is all."""
    runner = make_runner(old)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        group = group_at(mute.getsockname()[1], 1, timeout_s=0.5)
        with pytest.raises(ValueError, match=r"not all 2 members met .* within 0.5 s: .+"):
            threads.submit(runner.join_group, group).result(TIMEOUT_S)
        join_all(threads, runner)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "mpi"}, "backend='mpi' is not supported; choose one of gloo, nccl"),
        ({"rank": 2}, "rank=2 of world_size=2"),
        ({"world_size": 1, "rank": 0}, "at least 2"),
    ],
)
def test_a_group_that_cannot_be_is_refused_at_once(
    changes: dict[str, Any], reason: str, old: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        make_runner(old).join_group(group_at(free_port(), **{"rank": 1} | changes))


def test_a_dtype_that_no_weight_has_is_refused(old: Path) -> None:
    source = source_of({"model.norm.weight": torch.zeros(128)}, dtypes=("int4",))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is announced as 'int4'"):
        make_runner(old).stage(source, None)
