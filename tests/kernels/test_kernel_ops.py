"""The public door: who answers for which device, and what is imported for it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import ops, reference, triton_kernels

ROOT = Path(__file__).parents[2]
FUNCTIONS = sorted(name for name in vars(ops.Implementation) if not name.startswith("_"))


def test_cpu_tensors_go_to_the_reference() -> None:
    assert ops.implementation("cpu") is reference
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_cuda_tensors_go_to_the_triton_kernels() -> None:
    assert ops.implementation("cuda") is triton_kernels


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for device type 'meta'"):
        ops.rms_norm(torch.empty(2, 8, device="meta"), torch.empty(8, device="meta"), 1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_implementation_takes_the_same_parameters(name: str) -> None:
    wanted = list(inspect.signature(getattr(ops, name)).parameters)
    for module in (reference, triton_kernels):
        found = list(inspect.signature(getattr(module, name)).parameters)
        assert found[: len(wanted)] == wanted


def test_the_door_itself_imports_neither_numba_nor_triton() -> None:
    program = (
        "import sys, kernels.ops; "
        "print(sorted({'numba', 'triton'} & set(sys.modules) - set(before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, torch; before = set(sys.modules); {program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.strip() == "[]", result.stderr
