"""Every Triton kernel compiles for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.triton_attention import attention_settings
from kernels.triton_runtime import Settings
from scripts.compile_kernels import KERNELS, SAMPLE, Build, builds, compile_one

ROOT = Path(__file__).parents[2]


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
    settings = attention_settings(128, 4, 16, 2, num_query_tokens=512)
    constants = {**settings.constants, "TILE": 256}
    report = compile_one(Build("prefill", "", "bf16", 80, Settings(constants, 8, num_stages=4)))
    assert report.error is not None
    assert "shared memory" in report.error


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
