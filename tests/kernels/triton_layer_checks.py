"""The Triton kernels around attention against float64, on a GPU or in Triton's interpreter.

Not collected by itself: Triton must be told to interpret before it is imported, so
test_triton_interpreted.py runs this file in processes of their own. On a machine with a GPU:
`pytest tests/kernels/triton_layer_checks.py`.

The interpreter rounds float32 to bfloat16 towards zero, so bfloat16 is for GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import triton_kernels
from kernels.triton_rotary import rotary_settings
from scripts.kernel_bench.layer import layer_cases
from tests.kernels.paged_cases import assert_agrees
from tests.kernels.poison import poison_new_tensors

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
DTYPES = [torch.float32, HALF]
EPS = 1e-5


@pytest.fixture(autouse=True)
def outputs_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that a kernel forgets to write are NaN."""
    poison_new_tensors(monkeypatch)


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of a model, in a cache of pages."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype


PAIRWISE_HEADS = [
    Heads(2, 2, 32, 16, torch.float32),
    Heads(6, 2, 48, 128, torch.float16),
    Heads(14, 2, 64, 32, HALF),
    Heads(16, 1, 80, 16, torch.float32),
    Heads(3, 3, 96, 64, HALF),
    Heads(32, 8, 128, 16, torch.float16),
    Heads(5, 1, 128, 128, HALF),
    Heads(4, 2, 192, 64, torch.float32),
    Heads(8, 4, 256, 32, torch.float16),
]


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("index", range(len(PAIRWISE_HEADS)))
def test_heads_are_normed_rotated_and_cached_and_nothing_else_changes(
    index: int, has_norms: bool
) -> None:
    heads = PAIRWISE_HEADS[index]
    generator = torch.Generator().manual_seed(index)
    num_tokens, size, num_heads, kv = 7, heads.head_size, heads.num_heads, heads.num_kv_heads

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(heads.dtype).to(DEVICE)

    width = (num_heads + 2 * kv) * size
    fused = numbers(num_tokens, width + 32)
    qkv = fused[:, 16 : 16 + width].view(num_tokens, -1, size)
    norms = [numbers(size), numbers(size)]
    positions = torch.randint(0, 50, (num_tokens,), generator=generator).to(DEVICE)
    angles = torch.rand(50, size // 2, generator=generator) * 7
    table = torch.cat((angles.cos(), angles.sin()), dim=1).to(DEVICE)
    slots = torch.randperm(4 * heads.block_size, generator=generator)[:num_tokens].to(DEVICE)
    slots[2] = slots[6] = -1
    caches = [numbers(4, kv, heads.block_size, size) for _ in range(2)]

    before = fused.clone()
    expected = [cache.clone() for cache in caches]
    query, key, value = torch.split(qkv.clone(), [num_heads, kv, kv], dim=1)
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    rotated = []
    for x, weight in ((query, norms[0]), (key, norms[1])):
        x = norm64(x.double(), weight).to(heads.dtype) if has_norms else x
        a, b = x.double().chunk(2, dim=-1)
        rotated.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(heads.dtype))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            place = (slot // heads.block_size, slice(None), slot % heads.block_size)
            expected[0][place] = rotated[1][token]
            expected[1][place] = value[token]

    query_norm, key_norm = norms if has_norms else (None, None)
    triton_kernels.rotate_and_cache(
        qkv, positions, table, caches[0], caches[1], slots, query_norm, key_norm, EPS
    )
    assert_agrees(qkv[:, :num_heads], rotated[0])
    assert_agrees(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])
    fused[:, 16 : 16 + num_heads * size] = before[:, 16 : 16 + num_heads * size]
    assert torch.equal(fused, before), "something beside the queries changed"


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (40, 8), (28, 4), (12, 4)])
def test_usual_numbers_of_heads_fill_their_programs(num_heads: int, num_kv_heads: int) -> None:
    settings = rotary_settings(num_heads, num_kv_heads, 128, 16, False)
    constants = settings.constants
    assert num_heads % constants["HEADS"] == num_kv_heads % constants["KV_HEADS"] == 0
    for heads in (constants["HEADS"], constants["KV_HEADS"]):
        assert heads * 64 / (32 * settings.num_warps) >= 8, "elements of a thread, for 16 bytes"


def test_every_row_of_the_benchmark_runs() -> None:
    cases = list(layer_cases(num_tokens=[3], num_rows=[2]))
    for case in cases:
        case.launches(torch.device(DEVICE), num_copies=1)[0]()
    assert len({(case.kernel, case.shape) for case in cases}) == len(cases) == 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [31, 64, 896, 1024])
def test_norms_agree_with_float64(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size, device=DEVICE).to(dtype) * 3
    residual = torch.randn(5, size, device=DEVICE).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    expected = norm64(x.double(), weight).to(dtype)
    assert_agrees(triton_kernels.rms_norm(x, weight, EPS), expected)
    assert_agrees(triton_kernels.rms_norm(x[0], weight, EPS), expected[0])
    x_before, residual_before = x.clone(), residual.clone()
    normed, total = triton_kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, (x.double() + residual.double()).to(dtype))
    assert_agrees(normed, norm64(total.double(), weight).to(dtype))
    assert torch.equal(x, x_before)
    assert torch.equal(residual, residual_before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [300, 1100, 1536])
def test_the_activation_agrees_with_float64(size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(5, 2 * size + 16, device=DEVICE).to(dtype) * 10)[:, : 2 * size]
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    assert_agrees(triton_kernels.silu_and_mul(gate_up), expected)
    assert_agrees(triton_kernels.silu_and_mul(gate_up.contiguous().view(5, 1, -1))[:, 0], expected)
