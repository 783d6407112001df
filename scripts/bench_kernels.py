"""How near the kernels come to what a GPU can do.

    python -m scripts.bench_kernels [--only roofs decode prefill layer] [--json FILE]    on a GPU
    python -m scripts.bench_kernels --sweep [--json FILE]                                on a GPU
    python -m scripts.bench_kernels --predict                                            anywhere

In one run: the bandwidth of a copy (read and written bytes counted) and of a reduction, which only
reads; a bfloat16 matrix product; then, for 32 query and 8 key/value heads of 128 in bfloat16,

- decode, batch 1 to 256 by context 1k to 128k as far as they fit into memory: microseconds a layer,
  share of the copy bandwidth, and of the reduction's;
- prefill, prompts and short chunks over long contexts: TFLOP/s;
- the rest of a layer, and sampling: microseconds and share of the copy bandwidth (these have
  predictions, and neither rivals nor goals).

Launches are captured in a CUDA graph and replayed, pages lie in random order, and each launch reads
pages that the cache has not (see scripts/kernel_bench/clocks.py and cases.py). Beside each: the
same by PyTorch's attention over gathered keys and values, by FlashInfer and by cuDNN's front end,
or why not; the largest error; the goal, met or missed; the prediction from the formulas.

--predict prints the predictions alone: they are arithmetic, not measurements. --sweep measures the
neighbours of the table in kernels/triton_tuning.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from scripts.http_bench.figures import write_json
from scripts.kernel_bench import sweeping
from scripts.kernel_bench.cases import Case, decode_cases, prefill_cases
from scripts.kernel_bench.clocks import Clock, GraphClock
from scripts.kernel_bench.layer import LayerCase, layer_cases
from scripts.kernel_bench.measuring import Measurement, measure
from scripts.kernel_bench.predictions import goal_us, predict
from scripts.kernel_bench.rivals import RIVALS
from scripts.kernel_bench.roofs import Roofs, measure_roofs

PARTS = ("roofs", "decode", "prefill", "layer")
MEMORY_SHARE = 0.3
"""Of the free memory, for pages; gathering them for rivals takes up to twice as much again."""
PREDICTED_MEMORY_BYTES = int(MEMORY_SHARE * 139 * 2**30)
"""As on an H200."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--sweep", action="store_true", help="measure the table's neighbours")
    parser.add_argument("--predict", action="store_true", help="print predictions; needs no GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    if options.predict:
        figures: dict[str, object] = {"predictions": print_predictions()}
    elif not torch.cuda.is_available():
        print(
            "no CUDA device here, so there is nothing to measure; "
            "--predict prints what the formulas expect of an H200",
            file=sys.stderr,
        )
        return 2
    elif options.sweep:
        cases = [*sweeping.DECODE, *sweeping.PREFILL]
        figures = {"sweep": run_sweep(cases, GraphClock(), torch.bfloat16)}
    else:
        free_bytes, _ = torch.cuda.mem_get_info()
        cases = []
        if "decode" in options.only:
            cases += decode_cases(int(free_bytes * MEMORY_SHARE))
        if "prefill" in options.only:
            cases += prefill_cases()
        clock = GraphClock()
        roofs = measure_roofs(clock)
        figures = {"device": torch.cuda.get_device_name(), "roofs": asdict(roofs)}
        print_roofs(torch.cuda.get_device_name(), roofs)
        figures["cases"] = run_cases(cases, clock, roofs, torch.bfloat16)
        if "layer" in options.only:
            figures["layer"] = run_layer(list(layer_cases()), clock, roofs)
    if options.json is not None:
        write_json(options.json, figures)
    return 0


def print_roofs(device: str, roofs: Roofs) -> None:
    """What the machine can do."""
    print(f"{device}, PyTorch {torch.__version__}")
    print(f"copy {roofs.copy_bytes_per_s / 1e12:.2f} TB/s, read and written")
    print(f"read {roofs.read_bytes_per_s / 1e12:.2f} TB/s, a sum")
    print(f"bfloat16 product {roofs.gemm_flop_per_s / 1e12:.0f} TFLOP/s", flush=True)


def run_cases(
    cases: Sequence[Case], clock: Clock, roofs: Roofs, dtype: torch.dtype
) -> list[dict[str, object]]:
    """Measure and print each; -> all figures."""
    figures: list[dict[str, object]] = []
    num_missed = num_goals = 0
    for case in cases:
        measured = measure(case, clock, dtype, RIVALS)
        goal = goal_us(case, roofs.copy_bytes_per_s)
        num_goals += goal is not None
        num_missed += goal is not None and measured.us > goal
        print(line(measured, roofs, goal), flush=True)
        figures.append(
            {
                **asdict(measured),
                "kv_bytes": case.kv_bytes,
                "bytes_per_s": measured.bytes_per_s,
                "flop_per_s": measured.flop_per_s,
                "goal_us": goal,
                "predicted_us": predict(case).us,
            }
        )
    print(f"{num_goals - num_missed} of {num_goals} goals met")
    return figures


def run_layer(cases: Sequence[LayerCase], clock: Clock, roofs: Roofs) -> list[dict[str, object]]:
    """Measure and print each of the kernels around attention; -> all figures."""
    figures: list[dict[str, object]] = []
    for case in cases:
        us = clock.time_us(case.launches(clock.device))
        share = case.num_bytes / (us * 1e-6) / roofs.copy_bytes_per_s
        print(
            f"{case.kernel:28} {case.shape:28} {case.num_bytes / 2**20:8.1f} MiB {us:9.1f} us  "
            f"{share:6.1%} of copy  predicted {case.predicted_us:.1f} us",
            flush=True,
        )
        figures.append({**_of(case), "us": us})
    return figures


def _of(case: LayerCase) -> dict[str, object]:
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "num_bytes": case.num_bytes,
        "predicted_us": case.predicted_us,
    }


def line(measured: Measurement, roofs: Roofs, goal: float | None) -> str:
    """A case and what it is compared with."""
    case = measured.case
    if case.is_decode:
        copy = measured.bytes_per_s / roofs.copy_bytes_per_s
        read = measured.bytes_per_s / roofs.read_bytes_per_s
        rate = f"{copy:6.1%} of copy {read:6.1%} of read"
    else:
        rate = f"{measured.flop_per_s / 1e12:6.0f} TFLOP/s"
    verdict = ""
    if goal is not None:
        verdict = f"goal {goal:.1f} us {'met' if measured.us <= goal else 'MISSED'}"
    rivals = ", ".join(
        f"{name} {result if isinstance(result, str) else f'{result:.1f} us'}"
        for name, result in measured.rivals_us.items()
    )
    return (
        f"{case!s:32} {case.kv_bytes / 2**20:8.0f} MiB {measured.us:9.1f} us  {rate}  {verdict}\n"
        f"    predicted {predict(case).us:.1f} us; plan {measured.plan_us:.1f} us a step; "
        f"error {measured.largest_error:.1e}; {rivals}"
    )


def run_sweep(cases: Sequence[Case], clock: Clock, dtype: torch.dtype) -> list[dict[str, object]]:
    """Measure and print each trial; -> all figures."""
    figures = []
    for trial in sweeping.sweep(cases, clock, dtype):
        print(trial, flush=True)
        figures.append(trial.as_json())
    return figures


def print_predictions() -> list[dict[str, object]]:
    """Print what the formulas say of an H200; -> the figures."""
    print("predicted for an H200 from the formulas of scripts/kernel_bench/predictions.py;")
    print("nothing here was measured")
    print(f"{'batch x context':32} {'KV, MiB':>8} {'us':>9} {'TB/s':>6} {'TFLOP/s':>8} programs")
    figures: list[dict[str, object]] = []
    for case in [*decode_cases(PREDICTED_MEMORY_BYTES), *prefill_cases()]:
        predicted, cost = predict(case), case.cost
        bytes_per_s, flop_per_s = (x / (predicted.us * 1e-6) for x in (cost.num_bytes, cost.flop))
        print(
            f"{case!s:32} {case.kv_bytes / 2**20:8.0f} {predicted.us:9.1f} "
            f"{bytes_per_s / 1e12:6.2f} {flop_per_s / 1e12:8.0f} "
            f"{predicted.num_programs} in {predicted.max_splits} splits at most"
        )
        figures.append({"case": asdict(case), **asdict(predicted)})
    print(f"{'the rest of a layer, sampling':57} {'MiB':>8} {'us':>9} {'TB/s':>6}")
    for kernel in layer_cases():
        rate = kernel.num_bytes / kernel.predicted_us / 1e6
        print(
            f"{kernel.kernel:28} {kernel.shape:28} {kernel.num_bytes / 2**20:8.1f} "
            f"{kernel.predicted_us:9.1f} {rate:6.2f}"
        )
        figures.append(_of(kernel))
    return figures


if __name__ == "__main__":
    sys.exit(main())
