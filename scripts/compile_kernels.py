"""Compile every Triton kernel ahead of time, for GPUs this machine need not have.

    python -m scripts.compile_kernels [--target 80 90 100] [--all] [--json FILE]

Prints one line a binary: kernel, shape, target, registers a thread, bytes of stack a thread (more
than a few mean that registers were spilled), shared memory. Exits with 1 if any fails to compile,
or needs more shared memory than its target has, which would only show at the first launch.

The default sample takes a few models' shapes; `--all` sweeps head sizes, groups, page sizes and
types. The kernels' own `*_settings` functions say what to compile, as they do at launch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
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

from kernels.triton_attention import attention_settings
from kernels.triton_decode import decode_kernel, decode_settings, merge_kernel, merge_settings
from kernels.triton_logits import (
    penalize_kernel,
    penalize_settings,
    rank_kernel,
    rank_settings,
)
from kernels.triton_pointwise import norm_kernel, norm_settings, silu_kernel, silu_settings
from kernels.triton_prefill import prefill_kernel
from kernels.triton_rotary import rotary_kernel, rotary_settings
from kernels.triton_runtime import Settings
from kernels.triton_sampling import choose_kernel, choose_settings

KERNELS = {
    "decode": decode_kernel,
    "merge": merge_kernel,
    "prefill": prefill_kernel,
    "norm": norm_kernel,
    "rotary": rotary_kernel,
    "silu": silu_kernel,
    "choose": choose_kernel,
    "penalize": penalize_kernel,
    "rank": rank_kernel,
}
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ARGUMENT_TYPES = {
    "block_tables": "*i32",
    "context_lens": "*i32",
    "query_start_loc": "*i32",
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
}
"""By name; a `*_stride` is an i32, and everything else points to elements."""


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of a model that kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    element: str
    block_size: int
    hidden_size: int = 4096
    intermediate_size: int = 14336
    vocab_size: int = 128256


SAMPLE = [
    Model(32, 8, 128, "bf16", 16),
    Model(14, 2, 64, "fp16", 32, 896, 4864, 151936),
    Model(8, 4, 32, "fp32", 16, 256, 768, 4096),
    Model(32, 32, 96, "bf16", 128, 3072, 8192, 32064),
    Model(8, 1, 256, "bf16", 64, 2048, 16384, 256000),
]


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel to compile for one shape, type and target."""

    kernel: str
    shape: str
    element: str
    target: int
    settings: Settings


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
    error: str | None = None


def sweep() -> list[Model]:
    """Every head size, group, page size and type the kernels support, at one size of model."""
    return [
        Model(group, 1, head_size, element, block_size, 1024, 4096)
        for head_size, group, block_size, element in product(
            (32, 48, 64, 80, 96, 128, 192, 256), (1, 3, 8, 16), (16, 128), ELEMENT_BYTES
        )
    ]


def builds(models: list[Model], targets: list[int]) -> Iterator[Build]:
    """What to compile for some models, without repetitions."""
    seen = set()
    for model, target in product(models, targets):
        for kernel, settings in _settings(model):
            constants = settings.constants
            shape = " ".join(f"{name.lower()}={value}" for name, value in constants.items())
            key = (kernel, shape, model.element, target)
            if key not in seen:
                seen.add(key)
                yield Build(kernel, shape, model.element, target, settings)


def _settings(model: Model) -> Iterator[tuple[str, Settings]]:
    group, size = model.num_heads // model.num_kv_heads, model.head_size
    attention = (size, group, model.block_size, ELEMENT_BYTES[model.element])
    for num_splits in (1, 8):
        yield "decode", decode_settings(*attention, num_splits)
    yield "merge", merge_settings(size, num_splits=8)
    for num_query_tokens in (4, 512):
        yield "prefill", attention_settings(*attention, num_query_tokens)
    norm = norm_settings(model.hidden_size)
    for has_residual in (False, True):
        constants = {"HAS_RESIDUAL": has_residual, **norm.constants}
        yield "norm", Settings(constants, norm.num_warps, norm.num_stages)
    heads = (model.num_heads, model.num_kv_heads, size, model.block_size)
    for has_norms in (False, True):
        yield "rotary", rotary_settings(*heads, has_norms)
    yield "silu", silu_settings(model.intermediate_size)
    for is_greedy in (False, True):
        yield "choose", choose_settings(model.vocab_size, is_greedy)
    yield "penalize", penalize_settings(model.vocab_size)
    yield "rank", rank_settings(model.vocab_size)


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
        for index, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
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
    shared = binary.metadata.shared
    limit = SHARED_MEMORY_BYTES[build.target]
    excess = f"needs {shared} bytes of shared memory, has {limit}" if shared > limit else None
    return Report(*head, time.perf_counter() - begin, registers, stack_bytes, shared, excess)


def _type(name: str, element: str) -> str:
    return "i32" if name.endswith("stride") else ARGUMENT_TYPES.get(name, f"*{element}")


def resource_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack bytes a thread, by Triton's own cuobjdump; None without it."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not program.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    targets = sorted(SHARED_MEMORY_BYTES)
    parser.add_argument("--target", type=int, nargs="+", choices=targets, default=targets)
    parser.add_argument("--all", action="store_true", help="sweep all supported shapes (long)")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: unset it, an interpreted kernel is not compiled")

    wanted = list(builds(sweep() if options.all else SAMPLE, options.target))
    reports: list[Report] = []
    with ProcessPoolExecutor() as pool:
        for report in pool.map(compile_one, wanted):
            reports.append(report)
            print(line(report), flush=True)
    failures = sum(report.error is not None for report in reports)
    print(f"{len(reports)} binaries, {failures} failures")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if failures or not reports else 0


def line(report: Report) -> str:
    """A report as a line of the table."""
    result: Any = report.error
    if result is None:
        result = (
            f"{report.registers} registers, {report.stack_bytes} B stack, "
            f"{report.shared_bytes} B shared"
        )
    return f"sm_{report.target:<4}{report.kernel:8} {report.element:5} {result:45} {report.shape}"


if __name__ == "__main__":
    sys.exit(main())
