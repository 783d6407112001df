"""What a launch should take, from the formulas, and what is asked of it.

    decode:  t = t0 + max(bytes / rate, bytes of the longest program / rate of one program)
    prefill: t = t0 + max(flop / (rate * filled share of the GPU), bytes / rate of the memory)

t0 is a launch in a graph and a chain of dependent accesses: work item, block number, keys;
for split rows also the partial result, the counter, and the merge's rounds. Anchors, none of them
measured with these kernels:

- 4.40 TB/s, the slope of FlashAttention-3's decode times in vLLM #43232, whose fixed part is 10 us
  (on an H200, by its bandwidth); TileOPs #2084 states 6.9 us for one row of 1,024 keys on an H200.
- 0.7 us for an access to memory under load; 2 us for a launch in a graph.
- 450 TFLOP/s for prefill: Triton's own attention without warp specialisation reaches 407 to 487 on
  an H100, not causal, head size 128.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.triton_merge import merge_constants
from kernels.triton_runtime import H200, cdiv, padded
from kernels.triton_tuning import Tuning, decode_tuning, prefill_tuning
from kernels.triton_work import Splitting
from scripts.kernel_bench.cases import Case

MEMORY_BYTES_PER_S = 4.40e12
FLOP_PER_S = 450e12
ACCESS_US = 0.7
LAUNCH_US = 2.0

MIB = 2**20
DECODE_GOALS = ((1024 * MIB, 0.98), (512 * MIB, 0.95), (128 * MIB, 0.80), (32 * MIB, 0.50))
"""From so many bytes of keys and values a layer on: this share of the copy bandwidth."""
SMALL_DECODE_BYTES, SMALL_DECODE_US = 8 * MIB, 7.0
PREFILL_GOAL = 500e12
"""FLOP/s of a causal prompt of 8,192 tokens or more."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one launch on an H200."""

    us: float
    num_programs: int
    """That have work."""
    max_splits: int


def predict(case: Case) -> Prediction:
    """The time of one launch."""
    shape, cost = case.shape, case.cost
    if case.is_decode:
        tuning = decode_tuning(shape)
        units = [case.context_len] * case.batch
    else:
        tuning = prefill_tuning(shape, H200, case.num_queries)
        tokens = tuning.block_m // shape.group
        before = case.context_len - case.num_queries
        tiles = range(cdiv(case.num_queries, tokens))
        units = [min(before + (tile + 1) * tokens, case.context_len) for tile in tiles] * case.batch
    splits = splitting(case, tuning).splits(units)
    num_programs = sum(splits) * shape.num_kv_heads
    rows = padded(shape.group, at_least=1) if case.is_decode else tuning.block_m
    accesses = num_accesses(max(splits), rows, shape.head_size, tuning.num_warps)
    fixed_us = LAUNCH_US + accesses * ACCESS_US
    memory_us = cost.num_bytes / MEMORY_BYTES_PER_S * 1e6
    if case.is_decode:
        key_bytes = 2 * shape.head_size * shape.element_bytes
        in_flight = (tuning.num_stages - 1) * tuning.tile * key_bytes
        longest = max(keys / count for keys, count in zip(units, splits, strict=True))
        alone_us = longest * key_bytes / (in_flight / ACCESS_US)
        return Prediction(fixed_us + max(memory_us, alone_us), num_programs, max(splits))
    filled = min(1.0, num_programs / H200.num_multiprocessors)
    flop_us = cost.flop / (FLOP_PER_S * filled) * 1e6
    return Prediction(fixed_us + max(memory_us, flop_us), num_programs, max(splits))


def num_accesses(splits: int, rows: int, head_size: int, num_warps: int) -> int:
    """To memory, one after the other, in the life of a program."""
    if splits == 1:
        return 3
    merge = merge_constants(rows, head_size, num_warps)
    return 5 + cdiv(splits, merge["AT_ONCE"]) * cdiv(head_size, merge["COLUMNS"])


def splitting(case: Case, tuning: Tuning) -> Splitting:
    """As the plan splits a case on an H200."""
    num_programs = tuning.programs_per_multiprocessor * H200.num_multiprocessors
    min_keys = max(tuning.min_keys, tuning.tile)
    return Splitting.to_fill(num_programs, case.shape.num_kv_heads, min_keys)


def goal_us(case: Case, copy_bytes_per_s: float) -> float | None:
    """The time that is asked for; None if none is."""
    if case.is_decode:
        if case.kv_bytes <= SMALL_DECODE_BYTES:
            return SMALL_DECODE_US
        for least, share in DECODE_GOALS:
            if case.kv_bytes >= least:
                return case.cost.num_bytes / (share * copy_bytes_per_s) * 1e6
        return None
    if case.num_queries == case.context_len >= 8192:
        return case.cost.flop / PREFILL_GOAL * 1e6
    return None
