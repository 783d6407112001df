"""Draws depend on (seed, position) alone, and look random along either."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine_core.batch import JoinedSequence
from engine_core.model.sampler import Sampler
from engine_core.model.sampling_ops import uniform_draws
from ipc.request import SamplingParams
from kernels import cpu_sampling
from tests.support.slow_sampler import chi_square_limit

CPU = torch.device("cpu")
NUM_BINS = 64


def chi_square(values: NDArray[np.float64]) -> float:
    counts = np.histogram(values, bins=NUM_BINS, range=(0.0, 1.0))[0]
    expected = len(values) / NUM_BINS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("fixed", [0, 1, 2**32, 2**63 + 11])
def test_draws_are_uniform_along_positions_and_along_seeds(fixed: int) -> None:
    run = np.arange(20_000)
    along_positions = uniform_draws(np.full(20_000, fixed, np.uint64), run)
    along_seeds = uniform_draws(run.astype(np.uint64), np.full(20_000, fixed % 2**31))
    for values in (along_positions, along_seeds):
        assert values.min() >= 0.0
        assert values.max() < 1.0
        assert chi_square(values) < chi_square_limit(NUM_BINS - 1)
        for lag in (1, 2, 7):
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 0.03


def test_neighbouring_seeds_do_not_repeat_each_others_draws() -> None:
    """Seed 6 is not seed 5 read one position later, as a plain counter would make it."""
    positions = np.arange(1000)
    draws = [uniform_draws(np.full(1000, seed, np.uint64), positions) for seed in range(50)]
    assert len(np.unique(np.concatenate(draws))) == 50_000


def test_draws_are_pinned() -> None:
    """A changed generator would break every seed that users have noted down."""
    draws = uniform_draws(np.array([0, 1, 42], np.uint64), np.array([0, 1, 1000]))
    assert draws.tolist() == [0.7012121095215252, 0.04525699773739167, 0.8461873100634668]


def make_sampler(params: list[SamplingParams], seed: int = 0, vocab_size: int = 50) -> Sampler:
    sampler = Sampler(len(params), vocab_size, CPU, seed)
    for slot, sampling in enumerate(params):
        sampler.join(
            JoinedSequence(
                slot=slot, token_ids=[0], num_prompt_tokens=1, block_ids=[], sampling=sampling
            )
        )
    return sampler


def test_a_seeded_draw_does_not_depend_on_slot_neighbours_or_their_parameters() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    subject = SamplingParams(seed=9, temperature=1.3, top_k=20, top_p=0.9)
    neighbours = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, seed=9),
        SamplingParams(top_p=0.999, temperature=4.0),
        SamplingParams(frequency_penalty=1.0, logprobs=5),
        SamplingParams(min_p=0.5),
    ]
    alone = make_sampler([subject])
    crowded = make_sampler([*neighbours, subject])
    for position in range(1, 64):
        row = logits[position : position + 1]
        expected, _ = alone.sample(row.clone(), np.array([0]), np.array([position]))
        rows = torch.cat((logits[:6], row))
        order = np.random.default_rng(position).permutation(7)
        tokens, _ = crowded.sample(rows[order].clone(), order, np.full(7, position))
        assert tokens[order == 6] == expected


def test_sequences_without_a_seed_differ_but_repeat_with_the_engines_seed() -> None:
    logits = torch.zeros(40, 50)
    slots, positions = np.arange(40), np.ones(40, np.int64)
    params = [SamplingParams()] * 40
    first, _ = make_sampler(params, seed=1).sample(logits.clone(), slots, positions)
    again, _ = make_sampler(params, seed=1).sample(logits.clone(), slots, positions)
    other, _ = make_sampler(params, seed=2).sample(logits.clone(), slots, positions)
    assert first.tolist() == again.tolist()
    assert len(set(first.tolist())) > 15
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_token_of_weight_zero_is_never_picked(uniform: float) -> None:
    logits = np.full((3, 1000), -np.inf, np.float32)
    logits[0, 500] = -70.0
    logits[1, [3, 996]] = 0.7
    logits[2, 10:20] = np.random.default_rng(0).random(10)
    ones, tokens = np.ones(3, np.float32), np.empty(3, np.int64)
    limits = (ones, 0 * ones, np.full(3, 1000), ones)  # temperature, min-p, top-k, top-p
    scratch = np.empty((3, 1000), np.float32)
    cpu_sampling.choose_tokens(logits, *limits, np.full(3, uniform), scratch, tokens)
    assert np.isfinite(logits[np.arange(3), tokens]).all()
    assert tokens[1] == (3 if uniform < 0.5 else 996)
