"""The sampler on a GPU beside the one on a CPU, and what it waits for."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine_core.model.sampler import Sampler
from tests.support.sampler_cases import join, make_logits, random_params

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_draws_what_a_cpu_draws_and_waits_at_the_end_of_a_step_alone() -> None:
    num_rows, vocab_size, choose = 60, 5000, random.Random(1)
    devices = [torch.device("cpu"), torch.device("cuda", torch.cuda.current_device())]
    samplers = [Sampler(num_rows, vocab_size, device, seed=0) for device in devices]
    for slot in range(num_rows):
        params = replace(random_params(choose, vocab_size), seed=slot)
        for sampler in samplers:
            join(sampler, slot, params, prompt=[1, 2, 3])
    slots, num_different, num_steps = np.arange(num_rows), 0, 5
    for step in range(num_steps):
        logits = make_logits(num_rows, vocab_size, seed=step)
        positions = np.full(num_rows, 3 + step)
        expected, reports = samplers[0].sample(logits.clone(), slots, positions)
        on_device = logits.to(devices[1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, of_rows = samplers[1].sample(on_device, slots, positions)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        num_different += int((tokens != expected).sum())
        for slot, report in reports.items():
            found = of_rows[slot]
            np.testing.assert_allclose(found.logprobs[:, 1:], report.logprobs[:, 1:], atol=1e-5)
            if tokens[slot] == expected[slot]:
                assert found.ranks.tolist() == report.ranks.tolist()
    # A draw within rounding of the edge between two tokens may fall on either side, and what is
    # penalized from then on is another's.
    assert num_different <= 0.02 * num_rows * num_steps
