"""Every Triton kernel compiles for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.shapes import AttentionShape
from kernels.triton_plan import decode_settings, prefill_settings
from kernels.triton_runtime import H200, Settings
from kernels.triton_tuning import decode_tuning, prefill_tuning
from scripts.compile_kernels import KERNELS, Build, builds, compile_one
from scripts.kernel_bench.generated_code import GeneratedCode
from scripts.kernel_bench.models import SAMPLE

ROOT = Path(__file__).parents[2]
LLAMA = AttentionShape(32, 8, 128, 16, 2)


@pytest.mark.timeout(300)
def test_every_kernel_compiles_for_one_target(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "scripts.compile_kernels", "--target", "90"]
    result = subprocess.run(
        [*command, "--json", str(report)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    reports = json.loads(report.read_text())
    assert {entry["kernel"] for entry in reports} == set(KERNELS)
    assert all(entry["error"] is None and entry["target"] == 90 for entry in reports)
    assert all(entry["registers"] is None or entry["registers"] > 0 for entry in reports)


def test_a_kernel_that_does_not_compile_is_reported_not_raised() -> None:
    good = next(build for build in builds(SAMPLE[1:2], [90]) if build.kernel == "decode")
    constants = {**good.settings.constants, "TILE": 24}  # no power of two
    bad = Build(good.kernel, good.shape, good.element, good.target, Settings(constants))
    report = compile_one(bad)
    assert report.error is not None
    assert "power of 2" in report.error


def test_a_kernel_that_needs_more_shared_memory_than_the_target_has_is_an_error() -> None:
    tuning = replace(prefill_tuning(LLAMA, H200, 512), tile=128, num_stages=4)
    settings = prefill_settings(LLAMA, tuning, has_window=False)
    report = compile_one(Build("prefill", "", "bf16", 80, settings))
    assert report.error is not None
    assert "shared memory" in report.error


def test_a_kernel_without_tensor_cores_or_wide_loads_is_an_error() -> None:
    exact = replace(LLAMA, element_bytes=4)
    settings = decode_settings(exact, decode_tuning(exact), has_window=False)
    report = compile_one(Build("decode", "", "fp32", 90, settings, multiplies=True))
    assert report.error is not None
    assert "no matrix instruction" in report.error
    narrow = "mma.sync.aligned.m16n8k16 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8;"
    assert GeneratedCode.of(narrow).faults() == [
        "has asynchronous loads of [8] bytes, not of 16 alone"
    ]
    assert GeneratedCode.of("wgmma.mma_async.sync").faults() == ["has no asynchronous loads"]


def test_interpreting_and_compiling_do_not_mix() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scripts.compile_kernels"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
