"""The reference against the definitions, written out in float64 one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.kernels.paged_cases import (
    PagedBatch,
    Shape,
    attention_in_float64,
    paged_batch,
    poisoned_like,
)


def naive_attention(
    batch: PagedBatch, token: int, row: int, visible: int, head: int, first: int = 0
) -> list[float]:
    """One query head's result over the row's keys first .. visible - 1."""
    block_size = batch.key_cache.shape[2]
    group = batch.query.shape[1] // batch.key_cache.shape[1]
    places = [
        (int(batch.block_tables[row, j // block_size]), head // group, j % block_size)
        for j in range(first, visible)
    ]
    query = batch.query[token, head].double()
    scores = [float(query @ batch.key_cache[place].double()) * batch.scale for place in places]
    weights = [math.exp(score - max(scores)) for score in scores]
    values = torch.stack([batch.value_cache[place].double() for place in places])
    weighted = torch.tensor(weights, dtype=torch.float64) @ values
    result: list[float] = (weighted / sum(weights)).tolist()
    return result


def test_decode_attends_to_every_key_of_its_row_and_to_nothing_else() -> None:
    lengths = [1, 5, 16, 37]
    batch = paged_batch(Shape(3, 2, 8, 16), lengths)
    out = reference.paged_decode_attention(*batch.decode_arguments(), poisoned_like(batch.query))
    for row, length in enumerate(lengths):
        for head in range(6):
            expected = naive_attention(batch, row, row, length, head)
            assert out[row, head].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_prefill_lets_each_query_see_the_keys_up_to_its_own_position() -> None:
    lengths, query_lens = [7, 20, 33], [7, 1, 5]
    batch = paged_batch(Shape(2, 2, 8, 16), lengths, query_lens)
    out = reference.paged_prefill_attention(*batch.prefill_arguments(), poisoned_like(batch.query))
    token = 0
    for row, (length, num_queries) in enumerate(zip(lengths, query_lens, strict=True)):
        for i in range(num_queries):
            expected = naive_attention(batch, token, row, length - num_queries + i + 1, head=3)
            assert out[token, 3].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
            token += 1
    assert not out.isnan().any()


@pytest.mark.parametrize("window", [1, 5, 16, 100])
def test_a_window_hides_all_but_the_last_keys(window: int) -> None:
    lengths, query_lens = [7, 20, 37], [7, 1, 5]
    batch = paged_batch(Shape(2, 2, 8, 16), lengths, query_lens, window=window)
    out = poisoned_like(batch.query)
    reference.paged_prefill_attention(*batch.prefill_arguments(), out, window)
    expected = attention_in_float64(batch, window)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6)
    token = 7 + 1 + 4
    alone = naive_attention(batch, token, 2, 37, head=3, first=max(0, 37 - window))
    assert out[token, 3].tolist() == pytest.approx(alone, rel=1e-5, abs=1e-6)
    decoding = paged_batch(Shape(2, 2, 8, 16), lengths, window=window)
    out = poisoned_like(decoding.query)
    reference.paged_decode_attention(*decoding.decode_arguments(), out, window)
    assert torch.allclose(out.double(), attention_in_float64(decoding, window), atol=1e-5)


def test_a_row_of_length_zero_gives_zeros() -> None:
    batch = paged_batch(Shape(2, 1, 8, 16), [0, 3])
    out = reference.paged_decode_attention(*batch.decode_arguments(), poisoned_like(batch.query))
    assert out[0].count_nonzero() == 0
    assert out[1].count_nonzero() > 0


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> list[float]:
    mean = sum(float(a) ** 2 for a in x) / len(x)
    return [float(a) / math.sqrt(mean + eps) * float(w) for a, w in zip(x, weight, strict=True)]


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    out = reference.rms_norm(x, weight, 1e-3)
    assert out[1, 2].tolist() == pytest.approx(naive_rms_norm(x[1, 2], weight, 1e-3), rel=1e-5)


def test_add_rms_norm_normalises_the_rounded_sum_and_leaves_its_inputs_alone() -> None:
    x, residual = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    x_before, residual_before = x.clone(), residual.clone()
    weight = torch.randn(8).bfloat16()
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, (x_before.float() + residual_before.float()).bfloat16())
    expected = naive_rms_norm(total[2].double(), weight.double(), 1e-6)
    assert normed[2].tolist() == pytest.approx(expected, rel=2**-8)
    assert torch.equal(x, x_before)
    assert torch.equal(residual, residual_before)


def rotate_and_cache(
    qkv: Tensor, slots: list[int], positions: list[int], table: Tensor, norms: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """The caches of two heads in five pages of 16."""
    size = qkv.shape[2]
    key_cache, value_cache = torch.zeros(5, 2, 16, size), torch.zeros(5, 2, 16, size)
    at = (torch.tensor(positions), table, key_cache, value_cache, torch.tensor(slots))
    query_norm, key_norm = norms or (None, None)
    reference.rotate_and_cache(qkv, *at, query_norm, key_norm, eps=1e-3)
    return key_cache, value_cache


def test_keys_and_values_go_to_their_slots_and_minus_one_is_skipped() -> None:
    qkv, table = torch.randn(3, 3 + 4, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    before = qkv.clone()
    key_cache, value_cache = rotate_and_cache(qkv, [35, -1, 0], [0, 0, 0], table)
    assert torch.equal(key_cache[2, :, 3], before[0, 3:5])
    assert torch.equal(value_cache[0, :, 0], before[2, 5:7])
    assert key_cache.count_nonzero() == value_cache.count_nonzero() == 2 * 2 * 4


def test_queries_and_keys_are_normed_if_weights_are_given_and_turned_by_their_angles() -> None:
    half = 4
    angles = torch.rand(6, half) * 7
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    qkv, norms = torch.randn(3, 2 + 4, 2 * half), (torch.randn(2 * half), torch.randn(2 * half))
    for weights in ((), norms):
        rotated = qkv.clone()
        key_cache, value_cache = rotate_and_cache(rotated, [0, 1, 2], [0, 5, 2], table, weights)
        for head, found in ((0, rotated[1, 0]), (3, key_cache[0, 1, 1])):
            x = qkv[1, head].tolist()
            if weights:
                x = naive_rms_norm(qkv[1, head], weights[head // 2], 1e-3)
            pair = complex(x[3], x[3 + half])
            turned = pair * complex(math.cos(angles[5, 3]), math.sin(angles[5, 3]))
            assert float(found[3]) == pytest.approx(turned.real, abs=1e-5)
            assert float(found[3 + half]) == pytest.approx(turned.imag, abs=1e-5)
        assert torch.equal(value_cache[0, 1, 1], qkv[1, 5])


def test_silu_and_mul_multiplies_the_activated_gate_with_up() -> None:
    gate_up = torch.randn(2, 6) * 5
    out = reference.silu_and_mul(gate_up)
    for i in range(3):
        gate, up = float(gate_up[1, i]), float(gate_up[1, 3 + i])
        assert float(out[1, i]) == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=1e-5)
