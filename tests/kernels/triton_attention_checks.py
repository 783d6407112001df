"""The attention kernels against float64, on a GPU or in Triton's interpreter.

Not collected by itself: Triton must be told to interpret before it is imported, so
test_triton_interpreted.py runs this file in processes of their own. On a machine with a GPU:
`pytest tests/kernels/triton_attention_checks.py`.

The interpreter computes bfloat16 products wrongly, so types there are float32 and float16.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels import triton_kernels
from kernels.triton_plan import DecodePlan, PrefillPlan
from kernels.triton_runtime import gpu_of
from kernels.triton_tuning import Tuning, decode_tuning, prefill_tuning
from kernels.triton_work import RECORD
from tests.kernels.paged_cases import (
    PAIRWISE_SHAPES,
    PagedBatch,
    Shape,
    assert_agrees,
    attention_in_float64,
    paged_batch,
    poisoned_like,
)
from tests.kernels.triton_plan_checks import DEVICE, INTERPRETED, SMALL, attention_shape, records

DTYPES = [torch.float32, torch.float16]


def borders(*steps: int) -> list[int]:
    """0, 1, and lengths around the first multiples of each step."""
    around = {count * step + off for step in steps for count in (1, 2) for off in (-1, 0, 1)}
    return sorted(around | {0, 1})


def decode(batch: PagedBatch, window: int = 0, plan: DecodePlan | None = None) -> Tensor:
    out = poisoned_like(batch.query)
    arguments = batch.decode_arguments()
    return triton_kernels.paged_decode_attention(*arguments, out, window, plan)


def prefill(batch: PagedBatch, window: int = 0, plan: PrefillPlan | None = None) -> Tensor:
    out = poisoned_like(batch.query)
    arguments = batch.prefill_arguments()
    return triton_kernels.paged_prefill_attention(*arguments, out, window, plan)


def decode_plan(batch: PagedBatch, plan: DecodePlan) -> DecodePlan:
    """The plan, updated for a batch."""
    plan.update(batch.context_lens, batch.block_tables.shape[1] * batch.key_cache.shape[2])
    return plan


def prefill_plan(batch: PagedBatch, plan: PrefillPlan) -> PrefillPlan:
    """The plan, updated for a batch."""
    sizes = (batch.max_query_len, len(batch.query))
    plan.update(batch.context_lens, batch.query_start_loc, *sizes)
    return plan


def split_finely(tuning: Tuning) -> Tuning:
    """The same with splits of a tile or little more."""
    return replace(tuning, min_keys=tuning.tile, programs_per_multiprocessor=1)


@pytest.mark.parametrize("index", range(len(PAIRWISE_SHAPES)))
@pytest.mark.parametrize("splits", ["few", "many"])
def test_decode_agrees_at_every_border(index: int, splits: str) -> None:
    shape, dtype = PAIRWISE_SHAPES[index], DTYPES[(index + (splits == "many")) % 2]
    tuning = decode_tuning(attention_shape(shape, dtype))
    lengths = borders(tuning.tile, shape.block_size)
    batch = paged_batch(shape, lengths, dtype=dtype, device=str(DEVICE), seed=index)
    if splits == "many":
        tuning = split_finely(tuning)
    plan = DecodePlan(attention_shape(shape, dtype), DEVICE, tuning=tuning)
    out = decode(batch, plan=decode_plan(batch, plan))
    assert_agrees(out, attention_in_float64(batch))


@pytest.mark.parametrize("index", range(0, len(PAIRWISE_SHAPES), 2))
def test_decode_agrees_for_long_and_ragged_contexts(index: int) -> None:
    shape, dtype = PAIRWISE_SHAPES[index], DTYPES[index // 2 % 2]
    lengths = [2048, 0, 1, 700] if dtype == torch.float16 else [1100, 0, 1]
    batch = paged_batch(shape, lengths, dtype=dtype, device=str(DEVICE))
    assert_agrees(decode(batch), attention_in_float64(batch))


@pytest.mark.parametrize("window", [1, 16, 130])
def test_decode_sees_a_window_and_touches_nothing_before_it(window: int) -> None:
    for shape, dtype in ((SMALL, torch.float32), (Shape(2, 1, 48, 128), torch.float16)):
        lengths = [0, 1, 39, 40, 41, 129, 131, 700]
        batch = paged_batch(shape, lengths, window=window, dtype=dtype, device=str(DEVICE))
        expected = attention_in_float64(batch, window)
        assert_agrees(decode(batch, window), expected)
        attention = attention_shape(shape, dtype)
        fine = split_finely(decode_tuning(attention))
        plan = DecodePlan(attention, DEVICE, window, tuning=fine)
        assert_agrees(decode(batch, window, decode_plan(batch, plan)), expected)


def test_decode_uses_a_plan_again_for_every_layer_and_step() -> None:
    attention = attention_shape(SMALL, torch.float32)
    plan = DecodePlan(attention, DEVICE, tuning=split_finely(decode_tuning(attention)))
    for seed, lengths in enumerate(([40, 200, 0, 90], [300, 1, 33, 64], [17, 50], [1, 2, 3, 500])):
        batch = paged_batch(SMALL, lengths, device=str(DEVICE), seed=seed)
        decode_plan(batch, plan)
        assert max(splits for *_, splits, _ in records(plan)) > 1
        first = decode(batch, plan=plan)
        assert_agrees(first, attention_in_float64(batch))
        assert torch.equal(decode(batch, plan=plan), first)
        assert plan.counters.count_nonzero() == 0


def test_decode_does_not_depend_on_who_comes_last() -> None:
    attention = attention_shape(SMALL, torch.float32)
    plan = DecodePlan(attention, DEVICE, tuning=split_finely(decode_tuning(attention)))
    batch = paged_batch(SMALL, [90, 0, 300, 33], device=str(DEVICE))
    expected = decode(batch, plan=decode_plan(batch, plan))
    items = int(plan.count)
    for seed in range(3):
        order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
        work = plan.work.view(-1, RECORD.value)
        work[:items] = work[:items][order.to(DEVICE)]
        assert torch.equal(decode(batch, plan=plan), expected)


def test_decode_in_deterministic_mode_is_the_same_alone_and_in_any_batch() -> None:
    attention = attention_shape(SMALL, torch.float32)
    tuning = replace(decode_tuning(attention), tokens_per_chunk=64)
    plan = DecodePlan(attention, DEVICE, deterministic=True, tuning=tuning)
    batch = paged_batch(SMALL, [500, 1, 64, 0, 130, 333], device=str(DEVICE))
    together = decode(batch, plan=decode_plan(batch, plan))
    assert_agrees(together, attention_in_float64(batch))
    assert {splits for *_, splits, _ in records(plan)} == {1, 2, 5, 8}
    for row in range(6):
        alone = replace(
            batch,
            query=batch.query[row : row + 1],
            block_tables=batch.block_tables[row : row + 1],
            context_lens=batch.context_lens[row : row + 1],
        )
        assert torch.equal(decode(alone, plan=decode_plan(alone, plan))[0], together[row])


@pytest.mark.parametrize("index", range(len(PAIRWISE_SHAPES)))
def test_prefill_agrees_for_mixed_rows(index: int) -> None:
    shape, dtype = PAIRWISE_SHAPES[index], DTYPES[index % 2]
    query_lens, context_lens = [1, 3, 0, 33, 5], [1, 3, 40, 65, 333]
    batch = paged_batch(shape, context_lens, query_lens, dtype=dtype, device=str(DEVICE))
    assert_agrees(prefill(batch), attention_in_float64(batch))


@pytest.mark.parametrize("query_len", [2, 15, 16, 17, 32, 63, 64, 65])
def test_prefill_agrees_at_the_borders_of_its_tiles(query_len: int) -> None:
    context_lens = [query_len, query_len + 47, query_len + 64]
    batch = paged_batch(Shape(2, 1, 32, 16), context_lens, [query_len] * 3, device=str(DEVICE))
    assert_agrees(prefill(batch), attention_in_float64(batch))


@pytest.mark.parametrize("index", range(0, len(PAIRWISE_SHAPES), 3))
def test_prefill_splits_short_chunks_over_long_contexts(index: int) -> None:
    shape, dtype = PAIRWISE_SHAPES[index], torch.float16
    batch = paged_batch(shape, [700, 20], [17, 20], dtype=dtype, device=str(DEVICE))
    attention = attention_shape(shape, dtype)
    tuning = split_finely(prefill_tuning(attention, gpu_of(DEVICE), 20))
    plan = prefill_plan(batch, PrefillPlan(attention, DEVICE, tuning=tuning))
    assert max(splits for *_, splits, _ in records(plan)) > 4
    assert_agrees(prefill(batch, plan=plan), attention_in_float64(batch))
    assert plan.counters.count_nonzero() == 0


@pytest.mark.parametrize("window", [1, 16, 130])
def test_prefill_sees_a_window_and_touches_nothing_before_it(window: int) -> None:
    for shape, dtype in ((SMALL, torch.float32), (Shape(2, 1, 48, 128), torch.float16)):
        query_lens, context_lens = [1, 3, 0, 50, 70, 9], [1, 3, 40, 50, 300, 600]
        batch = paged_batch(
            shape, context_lens, query_lens, window=window, dtype=dtype, device=str(DEVICE)
        )
        expected = attention_in_float64(batch, window)
        assert_agrees(prefill(batch, window), expected)
        attention = attention_shape(shape, dtype)
        fine = split_finely(prefill_tuning(attention, gpu_of(DEVICE), 70))
        plan = prefill_plan(batch, PrefillPlan(attention, DEVICE, window, tuning=fine))
        assert_agrees(prefill(batch, window, plan), expected)


def test_prefill_in_deterministic_mode_is_the_same_for_every_way_to_cut_a_prompt() -> None:
    batch = paged_batch(SMALL, [150, 90], [150, 90], device=str(DEVICE))
    plan = PrefillPlan(attention_shape(SMALL, torch.float32), DEVICE, deterministic=True)
    whole = prefill(batch, plan=prefill_plan(batch, plan))
    assert_agrees(whole, attention_in_float64(batch))
    begin = 0
    for end in (1, 40, 41, 150):
        chunk = replace(
            batch,
            query=batch.query[begin:end],
            block_tables=batch.block_tables[:1],
            context_lens=torch.tensor([end], dtype=torch.int32, device=DEVICE),
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
            max_query_len=end - begin,
        )
        assert torch.equal(prefill(chunk, plan=prefill_plan(chunk, plan)), whole[begin:end])
        begin = end


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_decode_replays_a_captured_graph_for_other_lengths() -> None:
    shape = Shape(4, 2, 128, 16)
    batches = [
        paged_batch(shape, lengths, dtype=torch.bfloat16, device="cuda", seed=seed)
        for seed, lengths in enumerate(([131_072, 5, 700], [1, 40_000, 0], [3000, 3000, 3001]))
    ]
    width = max(batch.block_tables.shape[1] for batch in batches)
    blocks = max(len(batch.key_cache) for batch in batches)
    caches = [torch.zeros(blocks, *batches[0].key_cache.shape[1:]).bfloat16() for _ in range(2)]
    key_cache, value_cache = (cache.cuda() for cache in caches)
    block_tables = torch.zeros((3, width), dtype=torch.int32, device="cuda")
    static = replace(
        batches[0],
        query=batches[0].query.clone(),
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=block_tables,
        context_lens=batches[0].context_lens.clone(),
    )
    plan = DecodePlan(attention_shape(shape, torch.bfloat16), DEVICE)
    out = decode(static, plan=decode_plan(static, plan))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_plan(static, plan)
        triton_kernels.paged_decode_attention(*static.decode_arguments(), out, 0, plan)
    for batch in batches:
        static.query.copy_(batch.query)
        key_cache[: len(batch.key_cache)].copy_(batch.key_cache)
        value_cache[: len(batch.value_cache)].copy_(batch.value_cache)
        block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        static.context_lens.copy_(batch.context_lens)
        for _ in range(2):
            out.fill_(torch.nan)
            graph.replay()
            assert_agrees(out, attention_in_float64(batch))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(
    ("head_size", "group"),
    product((32, 48, 64, 80, 96, 128, 192, 256), (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)),
)
def test_decode_and_prefill_agree_in_bfloat16_over_the_whole_matrix(
    head_size: int, group: int, window: int
) -> None:
    worst = {}
    for block_size, dtype in product((16, 32, 64, 128), (torch.bfloat16, torch.float16)):
        shape = Shape(group, 2, head_size, block_size)
        lengths = [*borders(32, 64, 128), 2048, 20_000]
        batch = paged_batch(shape, lengths, window=window, dtype=dtype, device="cuda")
        expected = attention_in_float64(batch, window)
        out = decode(batch, window)
        assert_agrees(out, expected)
        worst[f"decode {dtype} {block_size}"] = float((out - expected).abs().max())
        query_lens, context_lens = [1, 3, 0, 200, 65, 9], [1, 3, 40, 200, 2048, 20_000]
        batch = paged_batch(
            shape, context_lens, query_lens, window=window, dtype=dtype, device="cuda"
        )
        expected = attention_in_float64(batch, window)
        out = prefill(batch, window)
        assert_agrees(out, expected)
        worst[f"prefill {dtype} {block_size}"] = float((out - expected).abs().max())
    print(f"largest errors, head size {head_size}, group {group}, window {window}: {worst}")
