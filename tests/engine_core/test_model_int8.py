"""Weights as 8-bit integers, from the engine's configuration to answers and weight updates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine_core.model.cpu_linear import PackedLinear
from engine_core.model.errors import ModelError
from engine_core.model.loader import load_runner
from engine_core.model.runner import TorchModelRunner
from frontend.config import BUNDLED_MODEL_DIRECTORY
from ipc.engine_config import EngineConfig
from ipc.request import SamplingParams
from ipc.weights import WeightSource
from tests.support.model_steps import Chunk, StepMaker, poisoned_cache, random_tokens
from tests.support.scripted_batching import ScriptedBatching
from tests.support.tiny_models import CONFIGS, save_model

BLOCK_SIZE = 16
PLAIN, TIED = "llama, heads of 32, grouped", "llama, tied, heads of 48, all biases"


def make_runner(directory: Path, **changes: Any) -> TorchModelRunner:
    settings: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 8,
        "max_model_len": 512,
        "num_gpu_blocks_override": 256,
        "num_threads": 2,
        "device": "cpu",
        "quantization": "int8",
    }
    runner, resolved = load_runner(EngineConfig(model=str(directory), **settings | changes))
    assert resolved.dtype == "bfloat16"
    return runner


@functools.cache
def bundled_runner(quantization: str | None) -> TorchModelRunner:
    return make_runner(BUNDLED_MODEL_DIRECTORY, quantization=quantization)


def generate(runner: TorchModelRunner, num_prompts: int, num_outputs: int) -> list[list[int]]:
    """Prompts with answers that the runner draws."""
    runs = ScriptedBatching(runner, BLOCK_SIZE, num_prompts)
    sequences = [
        runs.join(prompt, SamplingParams(temperature=1.0, seed=seed))
        for seed, prompt in enumerate(random_tokens(runner.vocab_size, num_prompts, 8))
    ]
    runs.run(num_outputs)
    return [sequence.token_ids for sequence in sequences]


def logits_of(runner: TorchModelRunner, token_ids: list[list[int]]) -> Tensor:
    """Behind every token: [sequences * tokens, V]."""
    model, length = runner.model, len(token_ids[0])
    maker = StepMaker(token_ids, BLOCK_SIZE)
    caches = poisoned_cache(model.config, maker.num_blocks, BLOCK_SIZE, torch.bfloat16)
    steps = ([Chunk(slot, 1) for slot in range(len(token_ids))] for _ in range(length))
    logits = [model.logits(model.forward(maker.step(step), caches)).clone() for step in steps]
    return torch.stack(logits, dim=1).flatten(0, 1)


def test_logits_are_near_those_of_bfloat16_and_the_likeliest_token_mostly_the_same() -> None:
    texts = generate(bundled_runner(None), 8, 120)
    exact, rounded = (logits_of(bundled_runner(each), texts) for each in (None, "int8"))
    agreement = (exact.argmax(dim=1) == rounded.argmax(dim=1)).float().mean()
    logs = exact.log_softmax(dim=1)
    divergence = (logs.exp() * (logs - rounded.log_softmax(dim=1))).sum(dim=1).mean()
    print(f"top-1 agreement {agreement:.4f}, divergence {divergence:.5f} nats")
    assert agreement > 0.96
    assert divergence < 0.002


def test_all_linear_layers_are_int8_and_take_half_the_memory() -> None:
    for name, linear in bundled_runner("int8").model.parts.linears.items():
        other = bundled_runner(None).model.parts.linears[name]
        assert isinstance(linear, PackedLinear)
        assert isinstance(other, PackedLinear)
        assert linear.packed.numbers.dtype == torch.int8
        assert 2 * linear.packed.numbers.nbytes == other.packed.numbers.nbytes


# -- weight updates ------------------------------------------------------------------------------


class Models:
    """A model that is served, and one of the same shape with other weights."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.old = save_model(directory / "old", CONFIGS[name](), seed=0, dtype=torch.bfloat16)
        self.new = save_model(directory / "new", CONFIGS[name](), seed=1, dtype=torch.bfloat16)
        self.weights: dict[str, Tensor] = load_file(self.new / "model.safetensors")

    def file_of(self, *endings: str) -> WeightSource:
        """Some of the new tensors."""
        path = self._directory / "update.safetensors"
        save_file({n: t for n, t in self.weights.items() if n.endswith(endings)}, path)
        return WeightSource(kind="file", path=str(path))

    def fresh_runner(self, *endings: str) -> TorchModelRunner:
        """One that is started with the old tensors but for some new ones."""
        mixed = self._directory / "mixed"
        mixed.mkdir()
        (mixed / "config.json").write_bytes((self.old / "config.json").read_bytes())
        tensors = load_file(self.old / "model.safetensors")
        tensors |= {n: t for n, t in self.weights.items() if n.endswith(endings)}
        save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
        return make_runner(mixed)


def update(runner: TorchModelRunner, source: WeightSource) -> None:
    runner.commit(runner.stage(source, None))


def assert_same_parts(runner: TorchModelRunner, fresh: TorchModelRunner) -> None:
    """To the bit; and so are logits."""
    expected = fresh.model.parts
    for name, tensor in runner.model.parts.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name
    for name, linear in runner.model.parts.linears.items():
        other = expected.linears[name]
        assert isinstance(linear, PackedLinear)
        assert isinstance(other, PackedLinear)
        assert torch.equal(linear.packed.numbers, other.packed.numbers), name
        assert linear.packed.scales is not None
        assert other.packed.scales is not None
        assert torch.equal(linear.packed.scales, other.packed.scales), name
    tokens = random_tokens(runner.vocab_size, 3, 20)
    assert torch.equal(logits_of(runner, tokens), logits_of(fresh, tokens))


@pytest.mark.parametrize("name", [PLAIN, TIED])
def test_a_directory_of_new_weights_gives_what_a_start_with_them_gives(
    name: str, tmp_path: Path
) -> None:
    models = Models(tmp_path, name)
    runner = make_runner(models.old)
    update(runner, WeightSource(kind="disk", path=str(models.new)))
    assert_same_parts(runner, make_runner(models.new))


@pytest.mark.parametrize(
    "endings",
    [
        ("k_proj.weight",),
        ("0.mlp.up_proj.weight", "1.mlp.gate_proj.weight"),
        ("v_proj.bias", "down_proj.weight"),
        ("embed_tokens.weight",),
    ],
    ids=lambda endings: endings[0],
)
def test_new_rows_of_a_stacked_weight_leave_its_other_rows_as_they_were(
    endings: tuple[str, ...], tmp_path: Path
) -> None:
    models = Models(tmp_path, TIED)
    runner = make_runner(models.old)
    update(runner, models.file_of(*endings))
    assert_same_parts(runner, models.fresh_runner(*endings))


def test_rows_that_come_one_after_the_other_add_up(tmp_path: Path) -> None:
    models = Models(tmp_path, PLAIN)
    runner = make_runner(models.old)
    endings = [f"{name}_proj.weight" for name in ("k", "q", "up", "v", "gate")]
    for ending in endings:
        update(runner, models.file_of(ending))
    assert_same_parts(runner, models.fresh_runner(*endings))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_than_bfloat16_is_refused_with_the_remedy(dtype: Any) -> None:
    with pytest.raises(ModelError, match=r"dtype='float(32|16)'.*(leave dtype out|use 'bfloat16')"):
        make_runner(BUNDLED_MODEL_DIRECTORY, dtype=dtype)


def test_an_unknown_quantization_is_refused_with_the_choices() -> None:
    unknown: Any = "int4"
    with pytest.raises(
        ValueError, match="quantization='int4' is not supported; choose one of int8"
    ):
        EngineConfig(model="m", quantization=unknown)


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = EngineConfig(model=str(BUNDLED_MODEL_DIRECTORY), quantization="int8")
    with pytest.raises(ModelError, match=r"quantization='int8'.*use device='cpu'"):
        load_runner(config)
