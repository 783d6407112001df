"""The kernel benchmark measures what it says: its loop runs in Triton's interpreter on tiny shapes,
and its arithmetic is checked by hand. Times of the interpreter mean nothing and are not looked at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.shapes import AttentionShape, decode_cost, prefill_cost
from scripts.bench_kernels import PREDICTED_MEMORY_BYTES
from scripts.kernel_bench.cases import LLAMA, Case, decode_cases, prefill_cases
from scripts.kernel_bench.layer import layer_cases
from scripts.kernel_bench.predictions import MIB, goal_us, predict

ROOT = Path(__file__).parents[2]

TINY_RUN = """
import torch
import scripts.kernel_bench.cases as cases
import scripts.kernel_bench.sweeping as sweeping
from kernels.shapes import AttentionShape
import scripts.kernel_bench.layer as layer
from scripts.bench_kernels import print_roofs, run_cases, run_layer, run_sweep
from scripts.kernel_bench.clocks import HostClock
from scripts.kernel_bench.roofs import measure_roofs

cases.COLD_BYTES = layer.COLD_BYTES = 1
sweeping.TILES, sweeping.WARPS, sweeping.STAGES = (16, 32), (4,), (2,)
sweeping.PAGE_SIZES, sweeping.CHUNKS = (16, 32), (64,)
clock = HostClock()
roofs = measure_roofs(clock, num_bytes=2**16, gemm_size=32)
print_roofs("interpreter", roofs)
shape = AttentionShape(4, 2, 32, 16, 4)
tiny = [cases.Case(2, 40, shape=shape), cases.Case(1, 20, 20, shape), cases.Case(1, 50, 3, shape)]
for figures in run_cases(tiny, clock, roofs, torch.float32):
    assert figures["largest_error"] < 1e-5, figures
assert len(run_layer(list(layer.layer_cases([3], [])), clock, roofs)) == 5
trials = run_sweep(tiny[:1], clock, torch.float32)
assert len(trials) == 2 + 2 * 2, trials
assert all(trial["us"] is not None for trial in trials), trials
"""


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_part_of_a_run_works_on_tiny_shapes_in_the_interpreter() -> None:
    result = run("-W", "ignore", "-c", TINY_RUN, interpret="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 x 40 " in result.stdout
    assert "1 x 50, 3 queries each" in result.stdout
    assert "FlashInfer not installed" in result.stdout
    assert "cuDNN front end not installed" in result.stdout
    assert "2 x 40" in result.stdout.splitlines()[-1], "the sweep ends with a trial"


def test_without_a_gpu_it_says_so_and_ends_with_an_error() -> None:
    result = run("-m", "scripts.bench_kernels")
    assert result.returncode == 2
    assert "no CUDA device here" in result.stderr


def test_predictions_are_printed_as_predictions(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = run("-m", "scripts.bench_kernels", "--predict", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "nothing here was measured" in result.stdout
    predictions = json.loads(file.read_text())["predictions"]
    attention = [entry for entry in predictions if "case" in entry]
    assert len(attention) == len(decode_cases(PREDICTED_MEMORY_BYTES)) + len(prefill_cases())
    assert all(entry["us"] > 4 for entry in attention)
    layer = [entry for entry in predictions if "kernel" in entry]
    assert len(layer) == len(predictions) - len(attention) == len(list(layer_cases()))
    assert all(entry["num_bytes"] / entry["predicted_us"] < 4.4e6 for entry in layer)


def test_decode_costs_the_cache_once_and_two_products_of_each_key() -> None:
    cost = decode_cost(LLAMA, [1000, 0, 24])
    assert cost.num_bytes == 2 * (2 * 1024 * 8 * 128 + 2 * 3 * 32 * 128)
    assert cost.flop == 4 * 1024 * 32 * 128
    windowed = decode_cost(LLAMA, [1000, 0, 24], window=100)
    assert windowed.flop == 4 * 124 * 32 * 128


@pytest.mark.parametrize("window", [0, 1, 7, 100])
def test_prefill_costs_what_each_query_sees(window: int) -> None:
    shape = AttentionShape(2, 1, 16, 16, 2)
    context_lens, query_lens = [5, 30, 40, 9], [5, 1, 12, 0]
    seen_by = [
        [min(length - num_queries + i + 1, window or length) for i in range(num_queries)]
        for length, num_queries in zip(context_lens, query_lens, strict=True)
    ]
    cost = prefill_cost(shape, context_lens, query_lens, window)
    assert cost.flop == 4 * 2 * 16 * sum(map(sum, seen_by))


def test_goals_follow_the_bytes_of_keys_and_values() -> None:
    copy = 4.3e12
    assert goal_us(Case(1, 1024), copy) == 7.0
    assert goal_us(Case(4, 1024), copy) is None
    for case, share in ((Case(8, 1024), 0.5), (Case(8, 4096), 0.8), (Case(1, 131072), 0.95)):
        assert goal_us(case, copy) == pytest.approx(case.cost.num_bytes / (share * copy) * 1e6)
    assert Case(256, 1024).kv_bytes == 1024 * MIB
    assert goal_us(Case(1, 8192, 8192), copy) == pytest.approx(
        Case(1, 8192, 8192).cost.flop / 500e6
    )


def test_predictions_grow_with_the_bytes_and_never_beat_the_memory() -> None:
    times = [predict(Case(batch, 4096)).us for batch in (1, 8, 64, 256)]
    assert times == sorted(times)
    for case in decode_cases(PREDICTED_MEMORY_BYTES):
        assert case.cost.num_bytes / (predict(case).us * 1e-6) < 4.4e12
