"""The table's neighbours, measured: tile, warps and stages, then page size and tokens per chunk.

It tells which row `kernels.triton_tuning` should have; nothing of it runs while serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from kernels.triton_runtime import gpu_of
from kernels.triton_tuning import Tuning, decode_tuning, prefill_tuning
from scripts.kernel_bench.cases import Case, Tensors
from scripts.kernel_bench.clocks import Clock
from scripts.kernel_bench.measuring import make_plan

TILES, WARPS, STAGES = (32, 64, 128), (2, 4, 8), (2, 3, 4, 5)
PAGE_SIZES = (16, 32, 64, 128)
CHUNKS = (256, 512, 1024, 2048, 4096)
DECODE = [Case(1, 1024), Case(1, 32768), Case(8, 4096), Case(32, 4096), Case(64, 8192)]
PREFILL = [Case(1, 8192, 8192), Case(1, 32768, 512), Case(1, 32768, 128)]


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to run a case. `us` is None where it didn't compile or fit."""

    case: str
    block_size: int
    tuning: Tuning
    fixed_chunks: bool
    us: float | None

    def __str__(self) -> str:
        tuning = self.tuning
        chunk = f"{tuning.tokens_per_chunk} a chunk" if self.fixed_chunks else "chunks by the plan"
        result = "-" if self.us is None else f"{self.us:9.1f} us"
        return (
            f"{self.case:28} page {self.block_size:3}  tile {tuning.tile:3}  "
            f"{tuning.num_warps} warps  {tuning.num_stages} stages  {chunk:18} {result}"
        )

    def as_json(self) -> dict[str, object]:
        """Of plain values."""
        return asdict(self)


def sweep(cases: Sequence[Case], clock: Clock, dtype: torch.dtype) -> Iterator[Trial]:
    """Trials of each case: first all tiles, warps and stages, then the rest with the best."""
    for case in cases:
        table = (
            decode_tuning(case.shape)
            if case.is_decode
            else prefill_tuning(case.shape, gpu_of(clock.device), case.num_queries)
        )
        tensors = Tensors(case, dtype, clock.device)
        best, best_us = table, float("inf")
        for tile, num_warps, num_stages in product(TILES, WARPS, STAGES):
            tuning = replace(table, tile=tile, num_warps=num_warps, num_stages=num_stages)
            trial = run_trial(tensors, clock, tuning, fixed_chunks=False)
            yield trial
            if trial.us is not None and trial.us < best_us:
                best, best_us = tuning, trial.us
        del tensors
        for block_size in PAGE_SIZES:
            paged = replace(case, shape=replace(case.shape, block_size=block_size))
            tensors = Tensors(paged, dtype, clock.device)
            yield run_trial(tensors, clock, best, fixed_chunks=False)
            for chunk in CHUNKS if case.is_decode else ():
                chunked = replace(best, tokens_per_chunk=chunk)
                yield run_trial(tensors, clock, chunked, fixed_chunks=True)


def run_trial(tensors: Tensors, clock: Clock, tuning: Tuning, *, fixed_chunks: bool) -> Trial:
    """Run a case one way. A way that can't run is a result, not an error."""
    case = tensors.case
    plan = make_plan(case, clock.device, tuning, deterministic=fixed_chunks)
    us: float | None = None
    try:
        tensors.update(plan)
        us = clock.time_us(tensors.launches(plan))
    except Exception as raised:  # out of registers or shared memory, mostly
        print(f"  {type(raised).__name__}: {' '.join(str(raised).split())[:100]}")
    return Trial(str(case), case.shape.block_size, tuning, fixed_chunks, us)
