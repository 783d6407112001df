"""Log-probabilities of prompts by a real model: those of transformers, in bounded memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_core.model import runner as runner_module
from engine_core.model.cpu_decoder import CpuDecoder
from engine_core.model.loader import load_runner
from ipc.engine_config import EngineConfig
from ipc.output import LogprobsLists
from tests.support.core_driver import CoreDriver
from tests.support.tiny_models import (
    CONFIGS,
    VOCAB_SIZE,
    assert_greedy,
    load_reference,
    reference_logits,
    save_model,
)

TOLERANCE = 1e-4
LENGTHS = {"one": 1, "two": 2, "short": 9, "block": 16, "chunks": 61}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), CONFIGS["qwen3, heads of 128"]())


@pytest.fixture(scope="module")
def reference(qwen3: Path) -> Any:
    return load_reference(qwen3)


def make_driver(directory: Path, budget: int) -> CoreDriver:
    limits = {
        "block_size": 8,
        "max_num_seqs": 8,
        "max_model_len": 128,
        "max_num_batched_tokens": budget,
    }
    config = EngineConfig(model=str(directory), num_threads=1, device="cpu", **limits)  # type: ignore[arg-type]
    return CoreDriver(runner=load_runner(config)[0], **limits)


def make_prompt(length: int) -> list[int]:
    return [random.Random(f"prompt {length}").randrange(VOCAB_SIZE) for _ in range(length)]


def assert_right(received: LogprobsLists, reference: Any, prompt: list[int], k: int) -> None:
    expected = reference_logits(reference, prompt)[:-1].log_softmax(dim=-1).numpy()
    rows = np.arange(len(prompt) - 1)
    assert received.token_ids.shape == received.logprobs.shape == (len(rows), k + 1)
    assert received.token_ids[:, 0].tolist() == prompt[1:]
    at_ids = expected[rows[:, None], received.token_ids]
    np.testing.assert_allclose(received.logprobs, at_ids, atol=TOLERANCE)
    best = -np.sort(-expected, axis=1)[:, :k]
    np.testing.assert_allclose(received.logprobs[:, 1:], best, atol=TOLERANCE)
    own = at_ids[:, :1]
    assert (received.ranks >= (expected > own + TOLERANCE).sum(axis=1) + 1).all()
    assert (received.ranks <= (expected >= own - TOLERANCE).sum(axis=1)).all()


@pytest.mark.parametrize("budget", [8, 16, 128])
def test_prompt_logprobs_equal_those_of_transformers_alone_batched_and_chunked(
    budget: int, qwen3: Path, reference: Any
) -> None:
    driver = make_driver(qwen3, budget)
    prompts = {name: make_prompt(length) for name, length in LENGTHS.items()}
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=12, temperature=0.0, prompt_logprobs=4)
    driver.add("silent", make_prompt(30), max_tokens=12, temperature=0.0)
    driver.run()
    for name, prompt in prompts.items():
        received = driver.outputs[name][0].prompt_logprobs
        assert received is not None
        assert_right(received, reference, prompt, 4)
        assert_greedy(reference, prompt, driver.tokens[name])
    assert_greedy(reference, make_prompt(30), driver.tokens["silent"])
    assert driver.outputs["silent"][0].prompt_logprobs is None


def test_logits_of_a_long_prompt_are_made_a_few_rows_at_a_time_and_only_if_wanted(
    qwen3: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(qwen3, budget=128)
    num_rows: list[int] = []
    compute = CpuDecoder.logits

    def count(model: CpuDecoder, states: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(states))
        return compute(model, states)

    monkeypatch.setattr(CpuDecoder, "logits", count)
    monkeypatch.setattr(runner_module, "_MAX_PROMPT_LOGITS", 7 * VOCAB_SIZE + 1)
    prompt = make_prompt(60)
    driver.add("silent", prompt, max_tokens=2)
    driver.run()
    assert num_rows == [1, 1]
    num_rows.clear()
    driver.add("told", prompt, max_tokens=2, prompt_logprobs=-1)
    driver.run()
    assert num_rows == [7] * 8 + [3] + [1, 1]
    received = driver.outputs["told"][0].prompt_logprobs
    assert received is not None
    assert_right(received, reference, prompt, VOCAB_SIZE)
