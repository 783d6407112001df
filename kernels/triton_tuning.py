"""How the attention kernels are cut, by a model's shapes and the GPU: a table written by hand.

No row is chosen by the lengths of a batch, and nothing is tried out while serving.

Where the numbers come from. None was measured on a GPU by us yet; `scripts.bench_kernels --sweep`
measures the neighbours of each row. They follow from what a kernel needs:

- Decode waits for memory. 4.8 TB/s (H200) times a latency of 0.7 us over 132 multiprocessors keeps
  26 KB of each in flight. A tile of 16 KB of keys and as much of values, two tiles ahead (three
  stages) and two programs a multiprocessor, is 128 KB: enough also while a program computes.
- A split costs about a microsecond (its partial result, the counter, the merge), in which a program
  reads some 40 KB, 80 keys of 128 in 16 bits; so one of less than 256 keys is not worth it. Public
  measurements agree: splitting a batch that fills the GPU loses, and so does leaving one that
  doesn't unsplit (vLLM #48076, SGLang #27786, TileOPs #2136).
- Prefill waits for the tensor cores. 128 queries are two warp groups of a Hopper multiplication of
  64 rows each; accumulators of 128 x 128 in float32 take 64 registers of each of 256 threads.
- float32 has no tensor cores here (exact products are asked for): its operands lie in registers,
  and tiles must be small. It is for exactness, not for speed.

What the compiler makes of each row, registers and spills, is in docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kernels.shapes import AttentionShape
from kernels.triton_runtime import Gpu, Settings, padded


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel is cut for some shape."""

    block_m: int
    """Rows of a query tile: tokens times heads of a group."""
    tile: int
    """Keys of a step."""
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int
    """Programs that work is split into, so that each multiprocessor has so many."""
    min_keys: int
    """No split gets fewer keys than about so many."""
    tokens_per_chunk: int = 1024
    """Keys of a split in the deterministic mode, where the batch must not choose."""


_DECODE = {
    # head size, up to: (tile, warps, stages)
    64: (128, 4, 3),
    128: (64, 4, 3),
    256: (32, 4, 3),
}
_DECODE_EXACT = {64: (16, 4, 2), 256: (16, 8, 2)}
_PREFILL = {
    # head size, up to: (most rows, tile, stages)
    48: (128, 128, 2),
    80: (128, 128, 3),
    128: (128, 64, 3),
    192: (128, 32, 3),
    256: (64, 32, 3),
}
_PREFILL_AMPERE = {
    32: (128, 64, 3),
    48: (128, 128, 2),
    64: (128, 64, 3),
    80: (128, 128, 2),
    96: (128, 64, 3),
    128: (64, 64, 3),
    192: (32, 64, 2),
    256: (64, 32, 2),
}
"""Before Hopper, multiplications take their operands from registers: less is left for tiles. The
part of a head that is 16 wide needs tiles of 128, so that each of 256 threads loads 16 bytes."""
_FEW_ROWS = (16, 64)
"""Tiles for a few query tokens. Each is a kernel to compile, so there aren't more."""
_PREFILL_EXACT = {256: (32, 16, 2)}


def decode_tuning(shape: AttentionShape) -> Tuning:
    """For one query token a row. All of it fits every GPU since the A100. Raises ValueError for a
    head size that is not in the table."""
    table = _DECODE_EXACT if shape.element_bytes == 4 else _DECODE
    tile, num_warps, num_stages = _row(table, shape)
    return Tuning(padded(shape.group), tile, num_warps, num_stages, 2, min_keys=256)


def prefill_tuning(shape: AttentionShape, gpu: Gpu, max_query_len: int) -> Tuning:
    """For rows of up to `max_query_len` query tokens. Raises ValueError likewise."""
    table = _PREFILL if gpu.capability >= 90 else _PREFILL_AMPERE
    if shape.element_bytes == 4:
        table = _PREFILL_EXACT
    most_rows, tile, num_stages = _row(table, shape)
    rows = max_query_len * shape.group
    block_m = min(most_rows, next((few for few in _FEW_ROWS if rows <= few), most_rows))
    while num_stages > 2 and _shared_bytes(shape, block_m, tile, num_stages) > gpu.shared_bytes:
        num_stages -= 1
    num_warps, programs = (4, 2) if block_m == 16 else (8, 1)
    return Tuning(block_m, tile, num_warps, num_stages, programs, min_keys=1024)


def _row(table: Mapping[int, tuple[int, int, int]], shape: AttentionShape) -> tuple[int, int, int]:
    for most, row in table.items():
        if 16 <= shape.head_size <= most:  # a matrix product needs 16
            return row
    raise ValueError(f"head size {shape.head_size} is not supported on a GPU: use 16 to 256")


def _shared_bytes(shape: AttentionShape, block_m: int, tile: int, num_stages: int) -> int:
    """An upper bound: keys and values of the stages, the queries, the weights."""
    head = shape.head_low + shape.head_high
    return shape.element_bytes * (2 * num_stages * tile * head + block_m * (head + tile))


def attention_settings(
    shape: AttentionShape, tuning: Tuning, merge: Mapping[str, int | bool], has_window: bool
) -> Settings:
    """How an attention kernel runs."""
    constants = {
        "GROUP": shape.group,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_SIZE": shape.head_size,
        "HEAD_LOW": shape.head_low,
        "HEAD_HIGH": shape.head_high,
        "BLOCK_SIZE": shape.block_size,
        "BLOCK_M": tuning.block_m,
        "TILE": tuning.tile,
        **merge,
        "HAS_WINDOW": has_window,
    }
    return Settings(constants, tuning.num_warps, tuning.num_stages, max_registers=255)
