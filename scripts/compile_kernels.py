"""Compile every Triton kernel ahead of time, for GPUs this machine need not have.

    python -m scripts.compile_kernels [--target 80 90 100] [--all] [--json FILE] [--markdown FILE]

Prints one line a binary: kernel, shape, target, registers a thread, bytes of stack a thread,
shared memory, and what was found in the generated code. Exits with 1 if a kernel

- fails to compile,
- uses stack, so registers were spilled,
- needs more shared memory than its target has, which would only show at the first launch,
- lacks what its builds demand of the code: matrix instructions of the tensor cores, and loads of
  keys and values that are asynchronous, all 16 bytes wide.

The default sample takes a few models' shapes; `--all` sweeps head sizes, groups, page sizes and
types. The kernels' own `*_settings` functions say what to compile, as they do at launch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.shapes import AttentionShape
from kernels.triton_decode import decode_kernel
from kernels.triton_logits import (
    penalize_kernel,
    penalize_settings,
    rank_kernel,
    rank_settings,
)
from kernels.triton_plan import decode_settings, prefill_settings
from kernels.triton_pointwise import norm_kernel, norm_settings, silu_kernel, silu_settings
from kernels.triton_prefill import prefill_kernel
from kernels.triton_rotary import rotary_kernel, rotary_settings
from kernels.triton_runtime import A100, B200, H200, Gpu, Settings
from kernels.triton_sampling import choose_kernel, choose_settings
from kernels.triton_tuning import decode_tuning, prefill_tuning
from kernels.triton_work import plan_kernel, plan_settings
from scripts.kernel_bench.generated_code import GeneratedCode, resource_usage
from scripts.kernel_bench.models import ELEMENT_BYTES, SAMPLE, Model, sweep

KERNELS = {
    "decode": decode_kernel,
    "prefill": prefill_kernel,
    "plan": plan_kernel,
    "norm": norm_kernel,
    "rotary": rotary_kernel,
    "silu": silu_kernel,
    "choose": choose_kernel,
    "penalize": penalize_kernel,
    "rank": rank_kernel,
}
GPUS = {gpu.capability: gpu for gpu in (A100, H200, B200)}
ARGUMENT_TYPES = {
    "block_tables": "*i32",
    "context_lens": "*i32",
    "query_start_loc": "*i32",
    "work": "*i32",
    "count": "*i32",
    "counters": "*i32",
    "slot_mapping": "*i64",
    "positions": "*i64",
    "cos_sin_cache": "*fp32",
    "partial": "*fp32",
    "lse": "*fp32",
    "scale": "fp32",
    "eps": "fp32",
    "tokens": "*i64",
    "logits": "*fp32",
    "candidates": "*fp32",
    "temperature": "*fp32",
    "min_p": "*fp32",
    "top_p": "*fp32",
    "top_k": "*i64",
    "seeds": "*i64",
    "rows": "*i64",
    "slots": "*i64",
    "output_counts": "*i32",
    "prompt_mask": "*i8",
    "presence": "*fp32",
    "frequency": "*fp32",
    "repetition": "*fp32",
    "normalizers": "*fp32",
    "ranks": "*i64",
    "window": "i32",
    "num_rows": "i32",
    "max_tiles": "i32",
    "min_keys": "i32",
    "budget": "i32",
}
"""By name; a `*_stride` is an i32, and everything else points to elements."""


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel to compile for one shape, type and target."""

    kernel: str
    shape: str
    element: str
    target: int
    settings: Settings
    multiplies: bool = False
    """Whether its code must have matrix instructions, fed by asynchronous 16-byte loads."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a build. `registers` and `stack_bytes` are per thread."""

    kernel: str
    shape: str
    element: str
    target: int
    seconds: float
    registers: int | None = None
    stack_bytes: int | None = None
    shared_bytes: int | None = None
    num_warps: int | None = None
    found: str = ""
    """Matrix instructions and loads in the generated code."""
    error: str | None = None


def builds(models: list[Model], targets: list[int]) -> Iterator[Build]:
    """What to compile for some models, without repetitions."""
    seen = set()
    for model, target in product(models, targets):
        families = (attention_builds(model, GPUS[target]), pointwise_builds(model, target))
        for build in (build for family in families for build in family):
            key = (build.kernel, build.shape, build.element, build.target)
            if key not in seen:
                seen.add(key)
                yield build


def attention_builds(model: Model, gpu: Gpu) -> Iterator[Build]:
    """Decode and prefill, for a few tokens and for many; windows for one of the shapes."""
    shape = AttentionShape(
        model.num_heads,
        model.num_kv_heads,
        model.head_size,
        model.block_size,
        ELEMENT_BYTES[model.element],
    )
    multiplies = model.element != "fp32"
    decode = decode_tuning(shape)
    windows = (False, True) if model.group == 4 else (False,)
    for has_window in windows:
        settings = decode_settings(shape, decode, has_window=has_window)
        yield _build("decode", model, gpu.capability, settings, multiplies)
        for max_query_len in (4, 4096):
            prefill = prefill_tuning(shape, gpu, max_query_len)
            settings = prefill_settings(shape, prefill, has_window=has_window)
            yield _build("prefill", model, gpu.capability, settings, multiplies)
            tokens = prefill.block_m // shape.group
            yield _plan_build(model, gpu, tokens, prefill.tile, has_starts=True)
    yield _plan_build(model, gpu, 1, decode.tile, has_starts=False)


def _plan_build(model: Model, gpu: Gpu, tokens: int, tile: int, *, has_starts: bool) -> Build:
    plan = plan_settings(tokens, tile)
    constants = {"HAS_STARTS": has_starts, **plan.constants}
    settings = Settings(constants, plan.num_warps, plan.num_stages)
    return _build("plan", model, gpu.capability, settings)


def pointwise_builds(model: Model, target: int) -> Iterator[Build]:
    """Cache write, norms, rotary embedding and activation."""
    norm = norm_settings(model.hidden_size)
    for has_residual in (False, True):
        constants = {"HAS_RESIDUAL": has_residual, **norm.constants}
        settings = Settings(constants, norm.num_warps, norm.num_stages)
        yield _build("norm", model, target, settings)
    heads = (model.num_heads, model.num_kv_heads, model.head_size, model.block_size)
    for has_norms in (False, True):
        yield _build("rotary", model, target, rotary_settings(*heads, has_norms))
    yield _build("silu", model, target, silu_settings(model.intermediate_size))
    for is_greedy in (False, True):
        yield _build("choose", model, target, choose_settings(model.vocab_size, is_greedy))
    yield _build("penalize", model, target, penalize_settings(model.vocab_size))
    yield _build("rank", model, target, rank_settings(model.vocab_size))


def _build(
    kernel: str, model: Model, target: int, settings: Settings, multiplies: bool = False
) -> Build:
    constants = settings.constants.items()
    shape = " ".join(f"{name.lower()}={value}" for name, value in constants)
    return Build(kernel, shape, model.element, target, settings, multiplies)


def compile_one(build: Build) -> Report:
    """Compile; never raises for what a kernel or the compiler does wrong."""
    begin = time.perf_counter()
    head = (build.kernel, build.shape, build.element, build.target)
    function = KERNELS[build.kernel]
    constants = dict(build.settings.constants)
    signature = {
        name: "constexpr" if name in constants else _type(name, build.element)
        for name in function.arg_names
    }
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, (parameter, kind) in enumerate(
            zip(function.params, signature.values(), strict=True)
        )
        if (kind.startswith("*") or kind == "i32") and not parameter.do_not_specialize
    }
    try:
        binary = triton.compile(
            ASTSource(function, signature, constants, divisible),
            target=GPUTarget("cuda", build.target, 32),
            options=build.settings.options(),
        )
    except Exception as raised:  # whatever it is, it is this build's result
        error: BaseException = raised
        while error.__cause__ is not None:  # at the end of the chain is the reason
            error = error.__cause__
        text = " ".join(str(error).split())[-300:]
        return Report(*head, time.perf_counter() - begin, error=f"{type(error).__name__}: {text}")
    registers, stack_bytes = resource_usage(binary.asm["cubin"])
    code = GeneratedCode.of(binary.asm["ptx"])
    shared, limit = binary.metadata.shared, GPUS[build.target].shared_bytes
    faults = []
    if stack_bytes:
        faults.append(f"uses {stack_bytes} bytes of stack")
    if shared > limit:
        faults.append(f"needs {shared} bytes of shared memory, has {limit}")
    if build.multiplies:
        faults += code.faults()
    return Report(
        *head,
        time.perf_counter() - begin,
        registers,
        stack_bytes,
        shared,
        build.settings.num_warps,
        str(code) if build.multiplies else "",
        "; ".join(faults) or None,
    )


def _type(name: str, element: str) -> str:
    return "i32" if name.endswith("stride") else ARGUMENT_TYPES.get(name, f"*{element}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    targets = sorted(GPUS)
    parser.add_argument("--target", type=int, nargs="+", choices=targets, default=targets)
    parser.add_argument("--all", action="store_true", help="sweep all supported shapes (long)")
    parser.add_argument("--kernel", nargs="+", choices=sorted(KERNELS), default=sorted(KERNELS))
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--markdown", type=Path, help="also write them there, as a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: unset it, an interpreted kernel is not compiled")

    models = sweep() if options.all else SAMPLE
    wanted = [build for build in builds(models, options.target) if build.kernel in options.kernel]
    reports: list[Report] = []
    with ProcessPoolExecutor() as pool:
        for report in pool.map(compile_one, wanted):
            reports.append(report)
            print(line(report), flush=True)
    failures = sum(report.error is not None for report in reports)
    print(f"{len(reports)} binaries, {failures} failures")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    if options.markdown is not None:
        options.markdown.write_text(markdown(reports))
    return 1 if failures or not reports else 0


def line(report: Report) -> str:
    """A report as a line of the table."""
    result: Any = report.error
    if result is None:
        result = (
            f"{report.registers} registers, {report.stack_bytes} B stack, "
            f"{report.shared_bytes} B shared, {report.num_warps} warps {report.found}"
        )
    return f"sm_{report.target:<4}{report.kernel:8} {report.element:5} {result:78} {report.shape}"


def markdown(reports: list[Report]) -> str:
    """A table, one row a binary; of the shapes, what the others follow from."""
    lines = [
        "| target | kernel | type | shape | warps | registers | stack, B | shared, B | code |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    derived = re.compile(r" ?\b(head_low|head_high|at_once|columns|num_kv_heads|block)=\S+")
    for report in reports:
        cells = [
            f"sm_{report.target}",
            report.kernel,
            report.element,
            derived.sub("", report.shape),
            report.num_warps,
            report.registers,
            report.stack_bytes,
            report.shared_bytes,
            report.error or report.found,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
