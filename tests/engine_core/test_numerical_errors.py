"""A request whose logits are not finite ends with an error; no token is made up for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine_core.batch import NO_TOKEN, StepBatch, StepResult
from engine_core.core import NUMERICAL_ERROR
from engine_core.fake_runner import FakeRunner, expected_tokens
from engine_core.model.loader import load_runner
from engine_core.model.parts import EMBEDDING, Parts
from engine_core.model.updates import StagedParts
from ipc.engine_config import EngineConfig
from ipc.output import FinishReason
from ipc.weights import WeightSource
from tests.support.core_driver import CoreDriver
from tests.support.tiny_models import CONFIGS, assert_greedy, load_reference, save_model

BLOCK_SIZE = 4
POISON = 17


class FailingRunner(FakeRunner):
    """Has no token for the slots in `broken`."""

    broken: frozenset[int] = frozenset()

    def execute(self, batch: StepBatch) -> StepResult:
        result = super().execute(batch)
        sampling = [
            slot for slot, samples in zip(batch.slots, batch.samples, strict=True) if samples
        ]
        token_ids = [
            NO_TOKEN if slot in self.broken else token_id
            for slot, token_id in zip(sampling, result.token_ids, strict=True)
        ]
        return StepResult(np.array(token_ids), result.logprobs, result.prompt_logprobs)


def test_L1_L2_L5_a_request_without_logits_ends_with_an_error_and_frees_what_it_held() -> None:
    runner = FailingRunner(num_blocks=64, block_size=BLOCK_SIZE, max_num_seqs=8, max_model_len=256)
    driver = CoreDriver(runner=runner)
    driver.add("bad", [1, 2, 3], max_tokens=9, logprobs=1)
    driver.add("good", [4, 5, 6], max_tokens=9)
    for _ in range(3):
        driver.step()
    (bad,) = (one for one in driver.core.scheduler.running if one.request_id == "bad")
    runner.broken = frozenset({bad.slot})
    driver.step()
    terminal = driver.outputs["bad"][-1]
    assert (terminal.finish_reason, terminal.new_token_ids) == (FinishReason.ERROR, ())
    assert terminal.error is not None
    assert (terminal.error.code, terminal.error.retryable) == (NUMERICAL_ERROR, False)
    assert driver.tokens["bad"] == expected_tokens([1, 2, 3], 3)
    assert driver.confirmed == [(0, "bad")]
    assert list(driver.live_requests()) == ["good"]
    assert driver.core.scheduler.check_integrity() == []
    runner.broken = frozenset()
    driver.run()
    assert driver.tokens["good"] == expected_tokens([4, 5, 6], 9)
    assert driver.core.counters["integrity_violations"] == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_L2_one_broken_row_of_a_model_ends_alone_and_leaves_no_trace(
    deterministic: bool, tmp_path: Path
) -> None:
    """What it wrote into the KV cache was not finite either; its blocks go to others."""
    directory = save_model(tmp_path, CONFIGS["llama, heads of 32, grouped"]())
    runner, _ = load_runner(
        EngineConfig(
            model=str(directory),
            block_size=BLOCK_SIZE,
            max_num_seqs=4,
            max_model_len=48,
            num_gpu_blocks_override=24,
            num_threads=1,
            device="cpu",
            deterministic=deterministic,
        )
    )
    embedding = runner.model.parts.tensors[EMBEDDING].clone()
    embedding[POISON] = torch.nan
    runner.commit(StagedParts(parts=Parts({EMBEDDING: embedding})))
    driver = CoreDriver(runner=runner, block_size=BLOCK_SIZE, max_model_len=48, max_num_seqs=4)
    good, bad = [5, 80, 21, 190, 33, 7], [5, 80, 21, 190, POISON, *range(30, 60)]
    driver.add("good", good, temperature=0.0, max_tokens=20)
    for number, temperature in enumerate((0.0, 1.0)):
        driver.add(f"bad-{number}", bad, temperature=temperature, max_tokens=9)
    driver.run()
    for number in range(2):
        (output,) = driver.outputs[f"bad-{number}"]
        assert (output.finish_reason, output.new_token_ids) == (FinishReason.ERROR, ())
    assert_greedy(load_reference(directory), good, driver.tokens["good"])
    runner.commit(runner.stage(WeightSource(kind="disk", path=str(directory)), None))
    driver.core.scheduler.begin_weight_epoch()
    for number in range(4):
        driver.add(f"after-{number}", [*good[number:], *good], temperature=0.0, max_tokens=20)
    driver.run()
    for number in range(4):
        prompt, tokens = [*good[number:], *good], driver.tokens[f"after-{number}"]
        assert len(tokens) == 20
        assert_greedy(load_reference(directory), prompt, tokens)
