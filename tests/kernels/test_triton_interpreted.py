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
PARTS = [
    ("triton_attention_checks.py", "test_decode"),
    ("triton_attention_checks.py", "test_prefill"),
    ("triton_plan_checks.py", "test_plan"),
    ("triton_checks.py", "test_pointwise"),
]


def run_checks(file: str, part: str, *, interpreted: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part]
    result = subprocess.run(
        [*command, str(HERE / file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("file", "part"), PARTS)
def test_interpreted_kernels_agree_with_the_reference(file: str, part: str) -> None:
    run_checks(file, part, interpreted=True)


@pytest.mark.gpu
@pytest.mark.timeout(180)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("file", "part"), PARTS)
def test_compiled_kernels_agree_with_the_reference(file: str, part: str) -> None:
    run_checks(file, part, interpreted=False)
