"""What `load_runner` settles: device, dtype, context length, end tokens and size of the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_core.model.errors import ModelError
from engine_core.model.loader import ResolvedModel, load_runner
from ipc.engine_config import EngineConfig
from kernels import cpu_team
from kernels.cpu_team import Team
from tests.support.tiny_models import CONFIGS, VOCAB_SIZE, save_model

BLOCK_BYTES = 2 * 2 * 2 * 16 * 32 * 4
"""Keys and values, 2 layers, 2 heads, 16 tokens, 32 numbers of 4 bytes."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama, heads of 32, grouped"]())


def resolve(directory: Path, **settings: Any) -> ResolvedModel:
    given: dict[str, Any] = {"block_size": 16, "num_threads": 1, "device": "cpu"}
    config = EngineConfig(model=str(directory), **given | settings)
    runner, resolved = load_runner(config)
    assert runner.num_blocks == resolved.num_blocks
    assert runner.vocab_size == resolved.vocab_size == VOCAB_SIZE
    return resolved


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def test_the_models_own_limits_are_the_defaults(llama: Path) -> None:
    resolved = resolve(llama)
    assert resolved.max_model_len == 512
    assert resolved.dtype == "float32"
    assert resolved.eos_token_ids == (2,)


def test_a_context_beyond_the_models_is_refused_naming_both(llama: Path) -> None:
    assert resolve(llama, max_model_len=512).max_model_len == 512
    with pytest.raises(ModelError, match=r"max_model_len=513 exceeds .* 512 .*positions end at"):
        resolve(llama, max_model_len=513)


def test_the_shortest_context_holds_one_token_of_prompt_and_one_of_output(llama: Path) -> None:
    assert resolve(llama, max_model_len=2).max_model_len == 2
    with pytest.raises(ModelError, match="max_model_len=1 leaves no room"):
        resolve(llama, max_model_len=1)


def test_a_context_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["mistral, four query heads a key head"]()
    config.sliding_window = 48
    directory = save_model(tmp_path, config)
    assert resolve(directory).max_model_len == 48
    with pytest.raises(ModelError, match=r"max_model_len=49 exceeds .* 48 .*sliding window"):
        resolve(directory, max_model_len=49)


def test_blocks_follow_the_override_then_the_bytes_then_what_can_be_used(llama: Path) -> None:
    assert resolve(llama, num_gpu_blocks_override=99, kv_cache_memory_bytes=1).num_blocks == 99
    enough = 40 * BLOCK_BYTES
    assert resolve(llama, kv_cache_memory_bytes=enough).num_blocks == 40
    assert resolve(llama, kv_cache_memory_bytes=enough - 1).num_blocks == 39
    assert resolve(llama, max_num_seqs=3).num_blocks == 3 * 32
    assert resolve(llama, max_num_seqs=3, max_model_len=40).num_blocks == 3 * 3


def test_a_cache_too_small_for_one_sequence_is_refused(llama: Path) -> None:
    assert resolve(llama, num_gpu_blocks_override=32).num_blocks == 32
    with pytest.raises(ModelError, match=r"num_gpu_blocks_override=31 .*=512 tokens needs 32"):
        resolve(llama, num_gpu_blocks_override=31)
    with pytest.raises(ModelError, match=r"kv_cache_memory_bytes=1000 gives 0 .*lower max_model"):
        resolve(llama, kv_cache_memory_bytes=1000)


def test_a_cache_larger_than_any_memory_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"more than can be allocated; lower kv_cache_memory"):
        resolve(llama, kv_cache_memory_bytes=2**60)


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtype_on_a_cpu(stored: str, asked: str, computed: str, tmp_path: Path) -> None:
    config = CONFIGS["llama, heads of 32, grouped"]()
    directory = save_model(tmp_path, config, dtype=getattr(torch, stored))
    assert resolve(directory, dtype=asked).dtype == computed
    edit_config(directory, dtype=None, torch_dtype=None)
    assert resolve(directory, dtype=asked).dtype == computed


def test_float16_is_refused_on_a_cpu(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype='float16'.*'bfloat16' or 'float32'"):
        resolve(llama, dtype="float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"device='cuda', but.*use device='cpu'"):
        resolve(llama, device="cuda")


def test_engines_of_one_host_share_its_cores(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[int]]] = []

    def make_team(num_threads: int, cores: Sequence[int]) -> Team:
        asked.append((num_threads, list(cores)))
        return Team(1)

    monkeypatch.setattr(cpu_team, "Team", make_team)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for num_threads, *place in (
        (None, 1, 0),
        (None, 3, 0),
        (None, 3, 2),
        (None, 100, 7),
        (5, 3, 1),
    ):
        config = EngineConfig(
            model=str(llama), device="cpu", num_threads=num_threads, max_num_seqs=1
        )
        load_runner(config, *place)
    # A lone thread may go anywhere, and so may threads that are more than their cores.
    assert asked == [(8, [*range(8)]), (2, [0, 1]), (3, [5, 6, 7]), (1, []), (5, [])]
