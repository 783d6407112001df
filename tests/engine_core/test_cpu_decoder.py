"""The compiled decoder against the one in PyTorch, with the same weights in float32."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine_core.model.config import ModelConfig, read_model_config
from engine_core.model.cpu_decoder import CpuDecoder
from engine_core.model.cpu_linear import PackedLinear
from engine_core.model.decoder import Decoder
from engine_core.model.linear import Linear, TorchLinear
from engine_core.model.loader import load_parts
from engine_core.model.parts import EMBEDDING, Parts, PartsForm
from engine_core.model.rope import cos_sin_table
from kernels.cpu_kv_cache import plain_keys, plain_values
from kernels.cpu_team import Team
from tests.support.model_steps import MIXED_STEPS, Chunk, StepMaker, poisoned_cache, random_tokens
from tests.support.tiny_models import CONFIGS, save_model

CPU = torch.device("cpu")
FORMS = {
    "float32": PartsForm(dtype=torch.float32, device=CPU),
    "bfloat16": PartsForm(dtype=torch.bfloat16, device=CPU),
    "int8": PartsForm(dtype=torch.bfloat16, device=CPU, to_int8=True),
}
LENGTH = 200
BLOCK_SIZE = 16
PLAIN = "llama, heads of 32, grouped"
ALL_BIASES = "llama, tied, heads of 48, all biases"

forms = pytest.mark.parametrize("form", FORMS)


@functools.cache
def team(num_threads: int) -> Team:
    return Team(num_threads)


@functools.cache
def load(name: str, form: str, seed: int) -> tuple[ModelConfig, Parts, Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        path = save_model(Path(directory), CONFIGS[name](), seed=seed)
        config = read_model_config(path)
        parts = load_parts(config, path, FORMS[form])
    return config, parts, cos_sin_table(config.rope, config.head_size, LENGTH, CPU)


def make_decoder(name: str, form: str, *, num_threads: int = 2, seed: int = 0) -> CpuDecoder:
    config, parts, cos_sin = load(name, form, seed)
    return CpuDecoder(config, parts, cos_sin, team(num_threads))


def torch_linear(linear: Linear, dtype: torch.dtype) -> TorchLinear:
    """The layer that is multiplied by, to the bit in float32."""
    assert isinstance(linear, PackedLinear)
    packed = linear.packed
    rows = packed.numbers.float().transpose(2, 3).flatten(3).flatten(1, 2)
    if packed.scales is not None:
        rows = rows * packed.scales[:, :, None]
    weight = rows[:, : packed.num_outputs].flatten(0, 1).to(dtype)
    return TorchLinear(weight, None if linear.bias is None else linear.bias.to(dtype))


def make_reference(name: str, form: str, dtype: torch.dtype = torch.float32) -> Decoder:
    config, parts, cos_sin = load(name, form, 0)
    tensors = {name: tensor.to(dtype) for name, tensor in parts.tensors.items()}
    linears: dict[str, Linear] = {
        name: torch_linear(linear, dtype) for name, linear in parts.linears.items()
    }
    tensors.setdefault(EMBEDDING, linears["lm_head"].weight)
    return Decoder(config, Parts(tensors, linears), cos_sin)


class Run:
    """A decoder with a cache and sequences of its own."""

    def __init__(self, decoder: CpuDecoder | Decoder, dtype: torch.dtype) -> None:
        self.decoder = decoder
        config = decoder.config
        self.maker = StepMaker(random_tokens(config.vocab_size, 5, LENGTH), BLOCK_SIZE)
        self.caches = poisoned_cache(config, self.maker.num_blocks, BLOCK_SIZE, dtype)

    def step(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """States and logits of the wanted tokens."""
        states = self.decoder.forward(self.maker.step(chunks), self.caches)
        return states, self.decoder.logits(states).clone()

    def all_steps(self) -> tuple[Tensor, Tensor]:
        states, logits = zip(*(self.step(chunks) for chunks in MIXED_STEPS), strict=True)
        return torch.cat(states), torch.cat(logits)


def run_of(form: str, decoder: CpuDecoder) -> Run:
    return Run(decoder, FORMS[form].dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = found.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_logits_in_float32_are_those_of_the_reference(name: str) -> None:
    ours = run_of("float32", make_decoder(name, "float32"))
    theirs = Run(make_reference(name, "float32"), torch.float32)
    for chunks in MIXED_STEPS:
        for found, expected in zip(ours.step(chunks), theirs.step(chunks), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == torch.float32
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_states_and_logits_are_as_near_the_reference_as_those_of_pytorch(
    name: str, form: str
) -> None:
    ours = run_of(form, make_decoder(name, form)).all_steps()
    exact = Run(make_reference(name, form), torch.float32).all_steps()
    rounded = Run(make_reference(name, form, torch.bfloat16), torch.bfloat16).all_steps()
    for found, expected, of_pytorch in zip(ours, exact, rounded, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == of_pytorch.dtype
        error = relative_error(found, expected)
        assert error < min(0.05, 1.2 * relative_error(of_pytorch, expected))


@forms
def test_keys_and_values_land_in_their_slots_and_nowhere_else(form: str) -> None:
    ours = run_of(form, make_decoder(PLAIN, form))
    theirs = Run(make_reference(PLAIN, form), torch.float32)
    for chunks in MIXED_STEPS:
        ours.step(chunks)
        theirs.step(chunks)
    for (keys, values), expected in zip(ours.caches, theirs.caches, strict=True):
        for found, cache in zip((plain_keys(keys), plain_values(values)), expected, strict=True):
            is_written = cache.isfinite()
            assert torch.equal(found.isfinite(), is_written)
            error = relative_error(found[is_written], cache[is_written])
            assert error < (1e-5 if form == "float32" else 0.03)


@forms
def test_any_number_of_threads_gives_the_same_bits(form: str) -> None:
    runs = [run_of(form, make_decoder(ALL_BIASES, form, num_threads=n)) for n in (1, 2, 3)]
    for chunks in MIXED_STEPS:
        first, *others = [run.step(chunks) for run in runs]
        for states, logits in others:
            assert torch.equal(states, first[0])
            assert torch.equal(logits, first[1])


@forms
def test_a_row_gets_the_same_bits_whatever_else_is_in_its_steps(form: str) -> None:
    alone, crowded = (run_of(form, make_decoder(PLAIN, form)) for _ in range(2))
    for length in (20, 1, 17, 1):
        states, logits = alone.step([Chunk(1, length)])
        others = [Chunk(0, 3), Chunk(2, 30), Chunk(3, 1)]
        crowd, crowd_logits = crowded.step([*others, Chunk(1, length), Chunk(4, 2)])
        assert torch.equal(crowd[3:4], states)
        assert torch.equal(crowd_logits[3:4], logits)


@pytest.mark.parametrize("name", [PLAIN, ALL_BIASES])
@forms
def test_with_parts_computes_with_the_new_ones_and_leaves_the_old_decoder_as_it_was(
    form: str, name: str
) -> None:
    changed = ["model.layers.1.mlp.gate_up_proj", "model.layers.0.self_attn.qkv_proj"]
    (_, old, _), (config, new, cos_sin) = load(name, form, 0), load(name, form, 1)
    norm = "model.layers.1.post_attention_layernorm.weight"
    update = Parts({norm: new.tensors[norm]}, {part: new.linears[part] for part in changed})
    before = make_decoder(name, form)
    after = before.with_parts(update)
    assert after._rooms is before._rooms
    for part, linear in old.linears.items():
        assert (after.parts.linears[part] is linear) == (part not in changed)
    fresh = CpuDecoder(config, old.with_parts(update), cos_sin, team(2))
    runs = [run_of(form, decoder) for decoder in (before, after, fresh, make_decoder(name, form))]
    for chunks in MIXED_STEPS[:4]:
        states, new_states, expected, old_states = (run.step(chunks)[0] for run in runs)
        assert torch.equal(new_states, expected)
        assert torch.equal(states, old_states)
        if len(states):
            assert relative_error(new_states, states) > 0.1


@forms
def test_a_tied_embedding_is_held_once_unless_the_output_matrix_is_rounded(form: str) -> None:
    config, parts, cos_sin = load(ALL_BIASES, form, 0)
    assert (EMBEDDING in parts.tensors) == (form == "int8")
    embedding = parts.tensors.get(EMBEDDING, parts.linears["lm_head"].weight)
    twice = CpuDecoder(config, parts.with_parts(Parts({EMBEDDING: embedding})), cos_sin, team(2))
    for found, expected in zip(
        run_of(form, make_decoder(ALL_BIASES, form)).all_steps(),
        run_of(form, twice).all_steps(),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_a_decoder_goes_on_in_the_cache_that_another_filled() -> None:
    """As after a weight update: the successor meets the cache for the first time."""
    run = run_of("float32", make_decoder(PLAIN, "float32"))
    whole = run_of("float32", make_decoder(PLAIN, "float32"))
    for chunks in MIXED_STEPS:
        states, expected = run.step(chunks)[0], whole.step(chunks)[0]
        assert torch.equal(states, expected)
        assert isinstance(run.decoder, CpuDecoder)
        run.decoder = run.decoder.with_parts(Parts())


def test_a_step_may_want_no_states() -> None:
    run = run_of("float32", make_decoder(PLAIN, "float32"))
    states, logits = run.step([Chunk(0, 9, False), Chunk(1, 1, False)])
    assert states.shape == (0, 128)
    assert logits.shape == (0, 211)


def test_states_outlive_the_steps_behind_them() -> None:
    run = run_of("float32", make_decoder(PLAIN, "float32"))
    first = run.decoder.forward(run.maker.step([Chunk(0, 9)]), run.caches)
    kept = first.clone()
    run.step([Chunk(1, 150)])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 24, 25, 100])
@forms
def test_logits_of_any_number_of_rows_are_those_of_each_alone(form: str, num_rows: int) -> None:
    decoder = make_decoder(PLAIN, form)
    states = torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(0))
    states = states.to(FORMS[form].dtype)
    together = decoder.logits(states).clone()
    for row in range(num_rows):
        assert torch.equal(decoder.logits(states[row : row + 1]), together[row : row + 1])
