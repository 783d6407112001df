"""The work list of attention steps against a few lines of Python, and the engine's use of plans.

Run like triton_attention_checks.py, by test_triton_interpreted.py.
"""

from __future__ import annotations

import os

import pytest
import torch

from engine_core.model.attention import PagedAttention
from engine_core.model.step_inputs import StepInputs
from kernels import ops, triton_kernels
from kernels.shapes import AttentionShape
from kernels.triton_plan import DecodePlan, PrefillPlan, TritonPlan
from kernels.triton_runtime import gpu_of
from kernels.triton_tuning import Tuning, decode_tuning, prefill_tuning
from kernels.triton_work import CLASSES, RECORD, Splitting
from tests.kernels.paged_cases import Shape, assert_agrees, attention_in_float64, paged_batch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL = Shape(3, 2, 32, 16)


def attention_shape(shape: Shape, dtype: torch.dtype) -> AttentionShape:
    heads = (shape.num_heads, shape.num_kv_heads)
    return AttentionShape(*heads, shape.head_size, shape.block_size, dtype.itemsize)


def records(plan: TritonPlan) -> list[list[int]]:
    """The work list: row, query tile, first key, end, split, splits, first part."""
    items: list[list[int]] = plan.work.view(-1, RECORD.value)[: int(plan.count), :7].tolist()
    return items


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(
    "lengths", [[0], [1], [5000], [700, 0, 64, 3000, 1], [300] * 300, [1] * 40 + [100_000]]
)
def test_plan_deals_every_key_of_a_decode_step_once(lengths: list[int], window: int) -> None:
    attention = AttentionShape(32, 8, 128, 16, 2)
    plan = DecodePlan(attention, DEVICE, window)
    plan.update(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), max(lengths))
    tuning = decode_tuning(attention)
    starts = [max(0, n - window) // tuning.tile * tuning.tile if window else 0 for n in lengths]
    check_work(plan, tuning, [(row, 0, starts[row], n) for row, n in enumerate(lengths)])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1], [1]), ([512], [20_000]), ([8, 0, 300, 1], [5000, 0, 300, 9]), ([2000] * 3, [2000] * 3)],
)
def test_plan_deals_every_key_of_a_prefill_step_once(
    query_lens: list[int], context_lens: list[int], window: int
) -> None:
    attention = AttentionShape(32, 8, 128, 16, 2)
    plan = PrefillPlan(attention, DEVICE, window)
    starts = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).to(torch.int32)
    lengths = torch.tensor(context_lens, dtype=torch.int32, device=DEVICE)
    plan.update(lengths, starts, max(query_lens), sum(query_lens))
    tuning = prefill_tuning(attention, gpu_of(DEVICE), max(query_lens))
    tokens = tuning.block_m // attention.group
    units = []
    for tile in reversed(range(-(-max(query_lens) // tokens))):
        for row, (num_queries, length) in enumerate(zip(query_lens, context_lens, strict=True)):
            if tile * tokens < num_queries:
                before = length - num_queries + tile * tokens
                seen = max(0, before + 1 - window) // tuning.tile * tuning.tile if window else 0
                units.append((row, tile, seen, min(before + tokens, length)))
    check_work(plan, tuning, units)


def check_work(plan: TritonPlan, tuning: Tuning, units: list[tuple[int, int, int, int]]) -> None:
    """Units (row, query tile, start, end) are in the work list, split as said: heavy ones first,
    those of a class in this order."""
    longest = max(end - start for _, _, start, end in units)

    def weight_class(unit: tuple[int, int, int, int]) -> int:
        num_keys = unit[3] - unit[2]
        return next((n for n in range(CLASSES.value - 1) if num_keys > longest >> (n + 1)), 3)

    units = sorted(units, key=weight_class)
    splitting = plan.splitting(tuning)
    wanted = splitting.splits([end - start for _, _, start, end in units])
    items = records(plan)
    assert len(items) == sum(wanted) <= plan.num_items
    part = 0
    for (row, tile, start, end), splits in zip(units, wanted, strict=True):
        of_unit, items = items[:splits], items[splits:]
        for split, (*unit, begin, stop, at, count, first_part) in enumerate(of_unit):
            assert (unit, at, count) == ([row, tile], split, splits)
            assert begin % tuning.tile == 0
            assert begin == start, "splits follow one another"
            assert begin < stop or end == 0
            assert first_part == part
            start = stop
        assert start == end
        part += splits if splits > 1 else 0
    assert part <= splitting.max_parts


def test_plan_of_a_step_serves_both_kinds_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "implementation", lambda device_type: triton_kernels)
    batch = paged_batch(SMALL, [40, 700, 20, 33], [1, 1, 20, 3], device=str(DEVICE))
    step = StepInputs(
        token_ids=torch.zeros(25, dtype=torch.int64, device=DEVICE),
        positions=torch.zeros(25, dtype=torch.int64, device=DEVICE),
        slot_mapping=torch.zeros(25, dtype=torch.int64, device=DEVICE),
        block_tables=batch.block_tables,
        context_lens=batch.context_lens,
        num_decode_rows=2,
        prefill_start_loc=batch.query_start_loc[2:] - 2,
        max_prefill_len=20,
        wanted_tokens=None,
    )
    attention = PagedAttention(SMALL.num_heads, SMALL.num_kv_heads, SMALL.head_size)
    attention.begin(step, batch.key_cache)
    for _ in range(2):
        out = attention(batch.query, (batch.key_cache, batch.value_cache), step)
        assert_agrees(out, attention_in_float64(batch))


def test_plan_for_another_window_or_an_odd_head_is_refused() -> None:
    batch = paged_batch(SMALL, [40], device=str(DEVICE))
    plan = DecodePlan(attention_shape(SMALL, torch.float32), DEVICE, window=8)
    plan.update(batch.context_lens, 40)
    with pytest.raises(AssertionError, match="a plan for window 8, used for 0"):
        triton_kernels.paged_decode_attention(*batch.decode_arguments(), plan=plan)
    for head_size in (8, 320):
        with pytest.raises(ValueError, match=f"head size {head_size} is not supported"):
            DecodePlan(AttentionShape(2, 1, head_size, 16, 2), DEVICE)


def test_plan_splits_fill_the_gpu_and_leave_full_batches_alone() -> None:
    splitting = Splitting.to_fill(264, num_kv_heads=8, min_keys=256)
    assert splitting.splits([1024]) == [4]
    assert splitting.splits([131072]) == [33]
    assert splitting.splits([4096] * 8) == [4] * 8
    assert splitting.splits([4096] * 32) == [1] * 32
    assert splitting.splits([1024] * 63 + [131072]) == [1] * 63 + [22]
    fixed = Splitting.fixed(1024, num_units=3, max_context_len=5000)
    assert fixed.splits([5000, 5000, 1]) == [5, 5, 1]
    assert fixed.splits([5000]) == [5]
