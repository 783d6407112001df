"""The Triton kernels against the reference, in processes of their own: in Triton's interpreter,
which needs no GPU, and compiled where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = {
    "decode": ("triton_attention_checks.py", "-k", "test_decode"),
    "prefill": ("triton_attention_checks.py", "-k", "test_prefill"),
    "plan": ("triton_plan_checks.py",),
    "layer": ("triton_layer_checks.py",),
    "sampling": ("triton_sampling_checks.py",),
}
SAMPLER = (
    "mixtures or not_finite or forgets or logprobs or penalties or waits or outside or held_back"
)


def run(file: str, *selection: str, interpreted: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *selection, str(HERE / file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.timeout(180)
def test_the_sampler_with_interpreted_kernels_passes_its_own_tests() -> None:
    run("../engine_core/test_sampler.py", "-k", SAMPLER, interpreted=True)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("part", PARTS)
def test_interpreted_kernels_agree_with_the_reference(part: str) -> None:
    run(*PARTS[part], interpreted=True)


@pytest.mark.gpu
@pytest.mark.timeout(180)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", PARTS)
def test_compiled_kernels_agree_with_the_reference(part: str) -> None:
    run(*PARTS[part], interpreted=False)
