"""The compiled decoder for CPUs without AVX-512, whose tiles are narrower and which know no
bfloat16: it runs here too, compiled for such a CPU in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FEATURES = "sse sse2 sse3 ssse3 sse4.1 sse4.2 avx avx2 fma bmi bmi2 f16c popcnt"
ENVIRONMENT = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in FEATURES.split()),
    "PYTHONPATH": str(REPOSITORY),
}


def check() -> None:
    """Runs in the child."""
    import torch

    from kernels.cpu_elements import HAS_BF16_DOT, HAS_WIDE_VECTORS
    from tests.engine_core import test_cpu_decoder as decoder_tests

    assert not HAS_WIDE_VECTORS
    assert not HAS_BF16_DOT
    name = decoder_tests.PLAIN
    for form, bound in (("float32", 1e-5), ("bfloat16", 0.05)):
        decoder = decoder_tests.make_decoder(name, form)
        ours = decoder_tests.run_of(form, decoder).all_steps()
        reference = decoder_tests.make_reference(name, form)
        theirs = decoder_tests.Run(reference, torch.float32).all_steps()
        for found, expected in zip(ours, theirs, strict=True):
            error = decoder_tests.relative_error(found, expected)
            assert error < bound, (form, error)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cpu_with_avx2_alone_computes_what_the_reference_does(tmp_path: Path) -> None:
    """Slow because both types are compiled anew."""
    program = "from tests.engine_core.test_cpu_decoder_avx2 import check; check()"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | ENVIRONMENT | {"NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
