"""The Triton kernels of everything but attention, beside the reference: on a GPU or interpreted.

Not collected by itself: Triton must be told to interpret before it is imported, so
test_triton_interpreted.py runs this file in processes of their own. On a machine with a GPU:
`pytest tests/kernels/triton_checks.py`.

The interpreter computes bfloat16 products wrongly, so types here are float32 and float16.
"""

from __future__ import annotations

import os

import pytest
import torch

from kernels import reference, triton_kernels
from tests.kernels.paged_cases import assert_agrees

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.float16]


def test_pointwise_cache_write_changes_its_slots_and_no_other_element() -> None:
    for num_heads, head_size in ((2, 48), (12, 96)):
        fused = torch.randn(20, 3 * num_heads * head_size, device=DEVICE)
        _, key, value = (part.view(20, num_heads, head_size) for part in fused.chunk(3, dim=1))
        caches = [torch.randn(6, num_heads, 16, head_size, device=DEVICE) for _ in range(2)]
        expected = [cache.clone() for cache in caches]
        slots = torch.randperm(96)[:20].to(DEVICE)
        slots[3] = slots[19] = -1
        reference.write_kv_cache(key, value, expected[0], expected[1], slots)
        triton_kernels.write_kv_cache(key, value, caches[0], caches[1], slots)
        assert torch.equal(caches[0], expected[0])
        assert torch.equal(caches[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [31, 64, 896])
def test_pointwise_norms_agree_with_the_reference(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size, device=DEVICE).to(dtype) * 3
    residual = torch.randn(5, size, device=DEVICE).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert_agrees(triton_kernels.rms_norm(x, weight, 1e-5), expected)
    assert_agrees(triton_kernels.rms_norm(x[0], weight, 1e-5), expected[0])
    normed, total = triton_kernels.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_agrees(normed, expected)


@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_pointwise_norm_and_rotary_take_the_heads_of_a_fused_projection(head_size: int) -> None:
    fused = torch.randn(5, 10 * head_size, device=DEVICE)
    query = fused[:, : 6 * head_size].view(5, 6, head_size)
    key = fused[:, 6 * head_size : 8 * head_size].view(5, 2, head_size)
    untouched = fused[:, 8 * head_size :].clone()
    weight = torch.randn(head_size, device=DEVICE)
    expected = reference.rms_norm(key, weight, 1e-6)
    assert_agrees(triton_kernels.rms_norm(key, weight, 1e-6), expected)

    positions = torch.randint(0, 50, (5,), device=DEVICE)
    table = torch.randn(50, head_size, device=DEVICE)
    expected_query, expected_key = query.clone(), key.clone()
    reference.rotary_embedding(expected_query, expected_key, positions, table)
    triton_kernels.rotary_embedding(query, key, positions, table)
    assert_agrees(query, expected_query)
    assert_agrees(key, expected_key)
    assert torch.equal(fused[:, 8 * head_size :], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_activation_agrees_with_the_reference(dtype: torch.dtype) -> None:
    gate_up = (torch.randn(5, 2 * 1100 + 5, device=DEVICE).to(dtype) * 10)[:, :2200]
    expected = reference.silu_and_mul(gate_up)
    out = triton_kernels.silu_and_mul(gate_up)
    assert_agrees(out, expected)
