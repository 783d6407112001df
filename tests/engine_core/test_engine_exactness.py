"""Greedy outputs of the whole engine core, scheduler and model together, equal transformers'.

Each case is run the way serving would run it: alone, thirty-two mixed lengths in one batch, prompts
cut into tiny chunks, prompts found in the prefix cache, and requests preempted and recomputed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine_core.model.loader import load_runner
from frontend.config import BUNDLED_MODEL_DIRECTORY
from ipc.engine_config import EngineConfig
from ipc.output import EventType
from tests.support.core_driver import CoreDriver
from tests.support.tiny_models import CONFIGS, assert_greedy, load_reference, save_model

NUM_OUTPUTS = 64
MAX_MODEL_LEN = 192
BLOCK_SIZE = 8
MODELS = ["bundled", *CONFIGS]


class Case:
    """A model on disk and what transformers makes of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reference = load_reference(directory)
        self.vocab_size: int = self.reference.config.vocab_size

    def driver(self, *, num_blocks: int = 1024, **limits: Any) -> CoreDriver:
        settings = {"max_num_seqs": 32, "max_num_batched_tokens": 512} | limits
        runner, _ = load_runner(
            EngineConfig(
                model=str(self.directory),
                dtype="float32",
                device="cpu",
                num_threads=1,
                block_size=BLOCK_SIZE,
                max_model_len=MAX_MODEL_LEN,
                num_gpu_blocks_override=num_blocks,
                **settings,
            )
        )
        return CoreDriver(
            runner=runner, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, **settings
        )

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        rng = random.Random(f"{length} {seed}")
        return [rng.randrange(3, self.vocab_size) for _ in range(length)]

    def check(self, driver: CoreDriver, prompts: dict[str, list[int]]) -> None:
        driver.run()
        for request_id, prompt in prompts.items():
            assert len(driver.tokens[request_id]) == NUM_OUTPUTS
            assert_greedy(self.reference, prompt, driver.tokens[request_id])


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "bundled":
        return Case(BUNDLED_MODEL_DIRECTORY)
    return Case(save_model(tmp_path_factory.mktemp("model"), CONFIGS[request.param]()))


def add_all(driver: CoreDriver, prompts: dict[str, list[int]]) -> None:
    for request_id, prompt in prompts.items():
        driver.add(request_id, prompt, max_tokens=NUM_OUTPUTS, temperature=0.0)


def test_requests_one_by_one(case: Case) -> None:
    driver = case.driver()
    for length in (1, 8, 45):
        prompts = {f"alone-{length}": case.prompt(length)}
        add_all(driver, prompts)
        case.check(driver, prompts)


def test_thirty_two_mixed_lengths_in_one_batch_and_again_from_the_prefix_cache(case: Case) -> None:
    driver = case.driver()
    prompts = {f"r{n}": case.prompt(1 + 3 * n, seed=n) for n in range(32)}
    add_all(driver, prompts)
    case.check(driver, prompts)
    again = {f"again-{n}": prompts[f"r{n}"] for n in range(8, 32, 6)}
    add_all(driver, again)
    case.check(driver, again)
    for request_id, prompt in again.items():
        stats = driver.outputs[request_id][0].prefill_stats
        assert stats is not None
        assert stats.num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_prompts_cut_into_tiny_chunks(case: Case) -> None:
    driver = case.driver(max_num_seqs=4, max_num_batched_tokens=7)
    prompts = {f"r{n}": case.prompt(20 + 11 * n, seed=n) for n in range(5)}
    add_all(driver, prompts)
    case.check(driver, prompts)


def test_requests_that_are_preempted_and_recomputed(case: Case) -> None:
    driver = case.driver(num_blocks=MAX_MODEL_LEN // BLOCK_SIZE + 4)
    prompts = {f"r{n}": case.prompt(20, seed=n) for n in range(5)}
    add_all(driver, prompts)
    case.check(driver, prompts)
    events = [e.type for o in driver.outputs.values() for out in o for e in out.events or ()]
    assert EventType.PREEMPTED in events
