"""The Triton kernels of sampling against tensor operations and float64, on a GPU or in Triton's
interpreter.

Not collected by itself: Triton must be told to interpret before it is imported, so
test_triton_interpreted.py runs this file in processes of their own. On a machine with a GPU:
`pytest tests/kernels/triton_sampling_checks.py`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

from engine_core.model.choosers import SlotParameters, TritonChooser
from engine_core.model.sampling_ops import uniform_draws
from kernels import triton_kernels
from kernels.triton_runtime import jit
from kernels.triton_sampling import choose_likeliest, pick, uniform_draw
from kernels.triton_truncation import CAPACITY
from tests.kernels.poison import poison_new_tensors
from tests.support.tensor_chooser import TensorChooser, truncated

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def outputs_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is no token, rank, count or number of any row."""
    poison_new_tensors(monkeypatch)


def make_parameters(num_rows: int, vocab_size: int, seed: int) -> SlotParameters:
    choose, parameters = np.random.default_rng(seed), SlotParameters(num_rows)
    parameters.temperature[:] = choose.choice([0, 0.5, 1, 3], num_rows)
    parameters.min_p[:] = choose.choice([0, 0, 0.01, 0.5, 1], num_rows)
    parameters.top_k[:] = np.minimum(choose.choice([1, 20, 400, 3000, 10**6], num_rows), vocab_size)
    parameters.top_p[:] = choose.choice([1, 1, 0.5, 0.95, 1e-6], num_rows)
    parameters.seeds[:] = choose.integers(2**64, size=num_rows, dtype=np.uint64)
    return parameters


def make_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Of several kinds: smooth, with many ties, mostly forbidden, flat, peaked."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, vocab_size, generator=generator)
    logits[1::5] = logits[1::5].round()
    logits[2::5, vocab_size // 9 + 1 :] = -torch.inf
    logits[3::5] *= 0.01
    logits[4::5] *= 4
    return logits


def choose(logits: Tensor, parameters: SlotParameters, positions: Tensor) -> Tensor:
    """Of as many rows as there are slots, on the device; the tokens on the host."""
    rows = parameters.of(np.arange(len(logits)), DEVICE)
    chooser = TritonChooser(logits.shape[1], DEVICE)
    return chooser.choose(logits.to(DEVICE), rows, positions.to(DEVICE)).cpu()


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 129, 2049, 4099, 5000])
def test_tokens_are_those_of_the_tensor_operations(vocab_size: int) -> None:
    num_rows = 30
    parameters = make_parameters(num_rows, vocab_size, seed=vocab_size)
    logits, positions = make_logits(num_rows, vocab_size, seed=1), torch.arange(num_rows) * 1000
    rows = parameters.of(np.arange(num_rows), CPU)
    expected = TensorChooser().choose(logits, rows, positions)
    tokens = choose(logits, parameters, positions)
    assert tokens.min() >= 0
    assert torch.equal(tokens[rows.temperature == 0], expected[rows.temperature == 0])
    assert torch.equal(choose_likeliest(logits.to(DEVICE)).cpu(), TensorChooser().likeliest(logits))
    # A draw within rounding of the edge between two tokens may fall on either side.
    assert int((tokens != expected).sum()) <= 1


TRUNCATIONS: dict[str, dict[str, float]] = {
    "top-k among the candidates": {"top_k": 30},
    "top-k beyond them": {"top_k": CAPACITY + 100},
    "a nucleus among the candidates": {"top_p": 0.05},
    "a nucleus beyond them": {"top_p": 0.9},
    "a nucleus of the k": {"top_k": 1000, "top_p": 0.5},
    "a nucleus of min-p's": {"min_p": 0.5, "top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "all": {"min_p": 0.02, "top_k": 60, "top_p": 0.9},
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_every_truncation_keeps_what_sorting_would_at_both_ends_of_the_unit_interval(
    name: str,
) -> None:
    vocab_size, seeds = 6000, np.arange(4000, dtype=np.uint64)
    uniforms = uniform_draws(seeds, np.zeros(len(seeds), np.int64))
    ends = [int(uniforms.argmin()), int(uniforms.argmax())]
    parameters = SlotParameters(6)
    parameters.temperature[:], parameters.top_p[:], parameters.top_k[:] = 1, 1, vocab_size
    for field, value in TRUNCATIONS[name].items():
        getattr(parameters, field)[:] = value
    parameters.seeds[:] = ends * 3
    logits = make_logits(5, vocab_size, seed=7)[[0, 0, 1, 1, 3, 3]]
    rows = parameters.of(np.arange(6), CPU)
    weights = (logits - logits.amax(dim=1, keepdim=True)).exp()
    is_kept = truncated(weights, rows) > 0
    positions = torch.zeros(6, dtype=torch.int64)
    tokens = choose(logits, parameters, positions)
    assert torch.equal(tokens, TensorChooser().choose(logits, rows, positions))
    assert is_kept.gather(1, tokens[:, None]).all()


def test_rows_that_are_not_finite_get_no_token_and_leave_their_neighbours_alone() -> None:
    logits, parameters = make_logits(8, 300, seed=3), make_parameters(8, 300, seed=3)
    parameters.temperature[:4] = 1
    healthy = choose(logits, parameters, torch.arange(8))
    logits[0, 299] = torch.nan
    logits[2] = torch.nan
    logits[4] = -torch.inf
    logits[6, 0] = torch.inf
    tokens = choose(logits, parameters, torch.arange(8))
    assert tokens[::2].tolist() == [-1] * 4
    assert tokens[1::2].tolist() == healthy[1::2].tolist()
    assert choose_likeliest(logits.to(DEVICE))[::2].tolist() == [-1] * 4


@jit
def pick_kernel(
    out: tl.tensor, row: tl.tensor, uniform: tl.tensor, SIZE: tl.constexpr, STEP: tl.constexpr
) -> None:
    uniform = tl.load(uniform)
    token = pick(row, 1e-30, uniform, 0.0, 1.0, SIZE, 4, 4 * STEP, STEP, 16, 4 * STEP)
    tl.store(out, token)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_token_of_weight_zero_is_never_picked(uniform: float) -> None:
    """The first and the last of three tokens, at both ends of the unit interval."""
    for tokens in ([0, 500, 999], [3, 4, 5], [63, 64, 128], [996, 997, 998]):
        row = torch.full((1000,), -torch.inf, device=DEVICE)
        row[tokens] = torch.tensor([0.0, -1e-3, -2e-3], device=DEVICE)
        out = torch.full((1,), -77, device=DEVICE)
        at = torch.full((1,), uniform, dtype=torch.float64, device=DEVICE)
        pick_kernel[(1,)](out, row, at, SIZE=1000, STEP=64)
        assert int(out) == tokens[int(3 * uniform)]


@jit
def draw_kernel(out: tl.tensor, seeds: tl.tensor, positions: tl.tensor) -> None:
    index = tl.program_id(0)
    tl.store(out + index, uniform_draw(tl.load(seeds + index), tl.load(positions + index)))


def test_uniform_draws_are_the_bits_of_those_on_the_host() -> None:
    generator = np.random.default_rng(0)
    seeds = generator.integers(2**64, size=40, dtype=np.uint64)
    seeds[:4] = 0, 1, 2**63, 2**64 - 1
    positions = generator.integers(2**40, size=40)
    positions[:2] = 0, 1
    out = torch.full((40,), torch.nan, dtype=torch.float64, device=DEVICE)
    on_device = [torch.from_numpy(array).to(DEVICE) for array in (seeds.view(np.int64), positions)]
    draw_kernel[(40,)](out, *on_device)
    assert out.tolist() == uniform_draws(seeds, positions).tolist()


@pytest.mark.parametrize("vocab_size", [1, 300, 2500])
def test_penalties_agree_with_float64_and_touch_their_rows_alone(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = make_logits(6, vocab_size, seed=0)
    rows, slots = torch.tensor([4, 0, 5]), torch.tensor([3, 9, 9, 9, 0, 6])
    counts = torch.randint(0, 3, (8, vocab_size), generator=generator, dtype=torch.int32)
    mask = torch.rand(8, vocab_size, generator=generator) < 0.3
    presence, frequency, repetition = torch.rand(3, 6, generator=generator) * 2 + 0.1
    expected = logits.double()
    for row in rows.tolist():
        was_sampled = counts[slots[row]] > 0
        factor = torch.where(was_sampled | mask[slots[row]], repetition[row].double(), 1.0)
        x = expected[row]
        x = torch.where(x > 0, x / factor, x * factor)
        expected[row] = x - frequency[row] * counts[slots[row]] - presence[row] * was_sampled
    found = logits.to(DEVICE)
    arguments = (rows, slots, counts, mask, presence, frequency, repetition)
    triton_kernels.penalize(found, *(argument.to(DEVICE) for argument in arguments))
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-5, atol=1e-5)
    others = [1, 2, 3]
    assert torch.equal(found.cpu()[others], logits[others])


@pytest.mark.parametrize("vocab_size", [1, 300, 4097, 9000])
def test_ranks_and_normalizers_agree_with_float64(vocab_size: int) -> None:
    logits = make_logits(10, vocab_size, seed=vocab_size)
    logits[4] += 1e4
    tokens = torch.randint(0, vocab_size, (10,), generator=torch.Generator().manual_seed(0))
    tokens[2] = 0
    normalizers, ranks = triton_kernels.rank(logits.to(DEVICE), tokens.to(DEVICE))
    expected = logits.double().logsumexp(dim=1)
    torch.testing.assert_close(normalizers.cpu(), expected.float(), rtol=1e-6, atol=1e-5)
    assert ranks.tolist() == (logits >= logits.gather(1, tokens[:, None])).sum(dim=1).tolist()
