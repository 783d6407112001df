"""The CPU's cache write, norms, rotary embedding and activation against the reference."""

from __future__ import annotations

from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from kernels import cpu_kernels, cpu_runtime, reference
from tests.kernels.paged_cases import assert_agrees

DTYPES = [torch.float32, torch.bfloat16]


def fused_projection(
    num_tokens: int, heads: tuple[int, ...], head_size: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """A tensor [T, sum(heads) * D] and its slices as [T, heads, D] views."""
    fused = torch.randn(num_tokens, sum(heads) * head_size).to(dtype)
    parts = torch.split(fused, [h * head_size for h in heads], dim=1)
    return fused, [part.view(num_tokens, -1, head_size) for part in parts]


def test_kernels_compile_without_a_folder_for_their_cache_and_the_remedy_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_njit = numba.njit

    def njit(*functions: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real_njit(*functions, **options)

    def successor(number: int) -> int:
        return number + 1

    monkeypatch.setattr(numba, "njit", njit)
    cpu_runtime._warn_of_no_cache.cache_clear()
    assert cpu_runtime.jit(successor)(1) == cpu_runtime.summing_jit(successor)(1) == 2
    [record] = caplog.records
    assert "NUMBA_CACHE_DIR" in record.getMessage()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 64, 896, 4096])
def test_norms_agree_with_the_reference(size: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, size).to(dtype) * 3, torch.randn(5, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert_agrees(cpu_kernels.rms_norm(x, weight, 1e-5), expected)
    assert_agrees(cpu_kernels.rms_norm(x[0], weight, 1e-5), expected[0])
    normed, total = cpu_kernels.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_agrees(normed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_takes_the_heads_of_a_fused_projection(dtype: torch.dtype) -> None:
    _, (query, key) = fused_projection(6, (4, 2), 48, dtype)
    weight = torch.randn(48).to(dtype)
    for x in (query, key, key.transpose(0, 1)):
        expected = reference.rms_norm(x, weight, 1e-6)
        out = cpu_kernels.rms_norm(x, weight, 1e-6)
        assert_agrees(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_the_rotary_embedding_turns_slices_in_place_and_nothing_beside_them(
    head_size: int, dtype: torch.dtype
) -> None:
    fused, (query, key, _) = fused_projection(9, (6, 2, 2), head_size, dtype)
    before = fused.clone()
    expected_query, expected_key = query.clone(), key.clone()
    positions, table = torch.randint(0, 50, (9,)), torch.randn(50, head_size)
    reference.rotary_embedding(expected_query, expected_key, positions, table)
    cpu_kernels.rotary_embedding(query, key, positions, table)
    assert_agrees(query, expected_query)
    assert_agrees(key, expected_key)
    assert torch.equal(fused[:, 8 * head_size :], before[:, 8 * head_size :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("serial_below", [0, 1 << 60], ids=["threads", "serial"])
def test_the_activation_agrees_with_the_reference_even_far_out(
    dtype: torch.dtype, serial_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_runtime, "SERIAL_BELOW_FLOP", serial_below)
    wide = torch.randn(7, 2 * 300 + 5).to(dtype) * 20
    wide[0, :4] = torch.tensor([-1e4, 1e4, -88.0, 0.0])
    gate_up = wide[:, :600]
    expected = reference.silu_and_mul(gate_up)
    out = cpu_kernels.silu_and_mul(gate_up)
    assert_agrees(out, expected)
    assert cpu_kernels.silu_and_mul(gate_up[:0]).shape == (0, 300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 128])
def test_the_cache_write_changes_its_slots_and_no_other_element(
    block_size: int, dtype: torch.dtype
) -> None:
    _, (_, key, value) = fused_projection(20, (4, 2, 2), 48, dtype)
    caches = [torch.randn(6, 2, block_size, 48).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.randperm(6 * block_size)[:20]
    slots[3] = slots[19] = -1
    reference.write_kv_cache(key, value, expected[0], expected[1], slots)
    cpu_kernels.write_kv_cache(key, value, caches[0], caches[1], slots)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_wrong_dtypes_are_refused_by_name() -> None:
    x, cache = torch.randn(2, 1, 8), torch.zeros(3, 1, 16, 8)
    with pytest.raises(TypeError, match=r"slot_mapping is torch\.int32: make it torch\.int64"):
        cpu_kernels.write_kv_cache(x, x, cache, cache, torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(TypeError, match="allocate the cache in the model's dtype"):
        cpu_kernels.write_kv_cache(x, x, cache.bfloat16(), cache, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"cos_sin_cache is torch\.bfloat16"):
        cpu_kernels.rotary_embedding(x, x, torch.tensor([0, 1]), torch.zeros(4, 8).bfloat16())


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    x = torch.randn(1, 4096) * torch.logspace(-30, 30, 4096)
    total = cpu_kernels.add_rms_norm(
        x.bfloat16(), (x * 1.7).bfloat16(), torch.ones(4096).bfloat16(), 1e-6
    )[1]
    assert torch.equal(total, x.bfloat16() + (x * 1.7).bfloat16())


def test_without_a_folder_for_the_cache_functions_still_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_function = numba.njit

    def without_folder(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_function(**options)

    monkeypatch.setattr(numba, "njit", without_folder)
    assert cpu_runtime.jit(lambda x: x + 1)(2) == 3
