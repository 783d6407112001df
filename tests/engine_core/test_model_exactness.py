"""Greedy outputs of the model runner equal those of transformers, token for token, in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_core.batch import ModelRunner, StepBatch
from engine_core.model.loader import load_runner
from ipc.engine_config import EngineConfig
from ipc.request import SamplingParams
from tests.support.scripted_batching import ScriptedBatching
from tests.support.tiny_models import (
    CONFIGS,
    VOCAB_SIZE,
    assert_greedy,
    load_reference,
    reference_logits,
    reference_tokens,
    save_model,
)

BLOCK_SIZE = 8
MAX_NUM_SEQS = 32
MAX_MODEL_LEN = 256
NUM_OUTPUTS = 64


def make_runner(directory: Path, **changes: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": MAX_MODEL_LEN,
        "num_threads": 1,
        "device": "cpu",
    }
    runner, _ = load_runner(EngineConfig(model=str(directory), **settings | changes))
    return runner


def batching(runner: ModelRunner, block_size: int = BLOCK_SIZE) -> ScriptedBatching:
    return ScriptedBatching(runner, block_size, MAX_NUM_SEQS)


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{length} {seed}").randrange(VOCAB_SIZE) for _ in range(length)]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), CONFIGS["qwen3, heads of 128"]())


@pytest.fixture(scope="module")
def qwen3_reference(qwen3: Path) -> Any:
    return load_reference(qwen3)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_answers_as_transformers_generate_does(name: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path, CONFIGS[name]())
    runs = batching(make_runner(directory))
    prompt = make_prompt(37)
    sequence = runs.join(prompt)
    runs.run(NUM_OUTPUTS)
    reference = load_reference(directory)
    expected = reference_tokens(reference, prompt, NUM_OUTPUTS)
    if sequence.outputs != expected:
        assert_greedy(reference, prompt, sequence.outputs)
    assert len(set(expected)) > 15, "a model that repeats itself proves little"


@pytest.mark.parametrize("block_size", [4, 12, 32])
def test_any_block_size_gives_the_same_tokens(
    block_size: int, qwen3: Path, qwen3_reference: Any
) -> None:
    runs = batching(make_runner(qwen3, block_size=block_size), block_size)
    prompts = [make_prompt(length) for length in (1, 31, 32, 33)]
    sequences = [runs.join(prompt) for prompt in prompts]
    runs.run(NUM_OUTPUTS)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert_greedy(qwen3_reference, prompt, sequence.outputs)


def test_thirty_two_prompts_of_mixed_length_in_one_batch(qwen3: Path, qwen3_reference: Any) -> None:
    runs = batching(make_runner(qwen3))
    prompts = [make_prompt(1 + 5 * i, seed=i) for i in range(MAX_NUM_SEQS)]
    sequences = [runs.join(prompt) for prompt in prompts]
    runs.run(NUM_OUTPUTS)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert len(sequence.outputs) == NUM_OUTPUTS
        assert_greedy(qwen3_reference, prompt, sequence.outputs)


@pytest.mark.parametrize("max_chunk", [1, 3, 8, 13])
def test_chunked_prefill_changes_nothing(max_chunk: int, qwen3: Path, qwen3_reference: Any) -> None:
    runs = batching(make_runner(qwen3))
    prompts = [make_prompt(length) for length in (40, 7, 24)]
    sequences = [runs.join(prompt) for prompt in prompts]
    runs.run(NUM_OUTPUTS, max_chunk)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert_greedy(qwen3_reference, prompt, sequence.outputs)


def test_sequences_that_join_and_leave_while_others_decode(
    qwen3: Path, qwen3_reference: Any
) -> None:
    """Chunks of prefill and decodes share steps; slots and blocks are reused at once."""
    runs = batching(make_runner(qwen3))
    choose = random.Random(1)
    everyone = []
    for index in range(40):
        prompt = make_prompt(choose.randrange(1, 60), seed=index)
        everyone.append((prompt, runs.join(prompt)))
        for _ in range(choose.randrange(1, 4)):
            runs.step(max_chunk=16)
        if len(runs.running) > 6:
            runs.leave(choose.choice(runs.running))
    assert runs.running
    runs.run(NUM_OUTPUTS)
    for prompt, sequence in everyone:
        if sequence.outputs:
            assert_greedy(qwen3_reference, prompt, sequence.outputs)


def test_a_preempted_sequence_continues_where_it_was(qwen3: Path, qwen3_reference: Any) -> None:
    runs = batching(make_runner(qwen3))
    prompts = [make_prompt(length) for length in (20, 33, 5)]
    sequences = [runs.join(prompt) for prompt in prompts]
    for _ in range(20):
        runs.step()
    victim = sequences[1]
    runs.leave(victim)
    newcomer = runs.join(make_prompt(50))  # takes over the victim's slot and blocks
    for _ in range(5):
        runs.step()
    runs.rejoin(victim)
    runs.run(NUM_OUTPUTS, max_chunk=7)
    for prompt, sequence in zip([*prompts, make_prompt(50)], [*sequences, newcomer], strict=True):
        assert len(sequence.outputs) == NUM_OUTPUTS
        assert_greedy(qwen3_reference, prompt, sequence.outputs)


def test_a_sequence_may_fill_the_context_to_its_last_token(
    qwen3: Path, qwen3_reference: Any
) -> None:
    runs = batching(make_runner(qwen3, max_model_len=50))
    prompt = make_prompt(20)
    sequence = runs.join(prompt)
    runs.run(30)
    assert len(sequence.token_ids) == 50
    assert_greedy(qwen3_reference, prompt, sequence.outputs)


def test_a_model_with_a_sliding_window_is_exact_up_to_the_window(tmp_path: Path) -> None:
    config = CONFIGS["mistral, four query heads a key head"]()
    config.sliding_window = 48
    directory = save_model(tmp_path, config)
    runs = batching(make_runner(directory, max_model_len=48))
    prompt = make_prompt(16)
    sequence = runs.join(prompt)
    runs.run(32)
    assert_greedy(load_reference(directory), prompt, sequence.outputs)


def test_float32_logprobs_equal_the_reference_to_rounding(
    qwen3: Path, qwen3_reference: Any
) -> None:
    prompt, logprobs = whole_vocabulary_logprobs(make_runner(qwen3))
    expected = reference_logits(qwen3_reference, prompt)[34:].log_softmax(dim=-1).numpy()
    assert np.abs(logprobs - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["llama, heads of 32, grouped", "qwen3, heads of 128"])
def test_bfloat16_logprobs_are_as_near_to_float32_as_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """Log-probabilities, whose spread is 1.5, differ by 0.04 on average at most, 0.4 at worst."""
    directory = save_model(tmp_path, CONFIGS[name](), dtype=torch.bfloat16)
    prompt, logprobs = whole_vocabulary_logprobs(make_runner(directory))
    reference = load_reference(directory)
    expected = reference_logits(reference, prompt)[34:].log_softmax(dim=-1).numpy()
    rival = reference_logits(reference.bfloat16(), prompt)[34:].log_softmax(dim=-1).numpy()
    difference = np.abs(logprobs - expected)
    assert difference.max() < 0.4
    assert difference.mean() < 0.04
    assert difference.mean() < 1.5 * np.abs(rival - expected).mean()


def whole_vocabulary_logprobs(runner: ModelRunner) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Some 50 tokens, and the log-probabilities [15, V] behind the last 15, in id order."""
    runs = batching(runner)
    sequence = runs.join(make_prompt(35), SamplingParams(temperature=0.0, logprobs=-1))
    runs.run(15, max_chunk=16)
    rows = []
    for lists in sequence.logprobs:
        ids, values = lists.token_ids[0, 1:], lists.logprobs[0, 1:]
        assert sorted(ids.tolist()) == list(range(VOCAB_SIZE))
        rows.append(values[np.argsort(ids)])
    return sequence.token_ids[:-1], np.array(rows)


def test_seeded_sampling_does_not_depend_on_batching(qwen3: Path) -> None:
    """Alone, in a crowd, in chunks, and preempted: the same tokens."""
    runner = make_runner(qwen3)
    prompt, sampling = make_prompt(30), SamplingParams(temperature=0.9, top_p=0.95, seed=11)
    outputs = []
    for crowd, max_chunk, preempts in ((0, None, False), (9, None, False), (3, 4, True)):
        runs = batching(runner)
        for index in range(crowd):
            runs.join(make_prompt(10 + index), SamplingParams(seed=index, top_k=5))
        sequence = runs.join(prompt, sampling)
        if preempts:
            for _ in range(20):
                runs.step(max_chunk)
            runs.leave(sequence)
            runs.step(max_chunk)
            runs.rejoin(sequence)
        runs.run(40, max_chunk)
        outputs.append(sequence.outputs)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0])) > 15


def test_a_step_with_no_rows_only_applies_its_changes(qwen3: Path) -> None:
    result = make_runner(qwen3).execute(StepBatch(left=[3]))
    assert len(result.token_ids) == 0
    assert result.logprobs == {}
