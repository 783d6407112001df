"""What all compiled kernels stand on: compiling without a cache, bfloat16, exp2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import pytest
import torch
from numba.core import types

from kernels import cpu_runtime
from kernels.cpu_runtime import compile_task, exp2, jit, narrow, summing_jit, widen, zero_of

F = TypeVar("F", bound=Callable[..., Any])


def without_a_folder(compile_function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler that fails as numba's does where no cache can be written."""

    def compile_uncached(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_function(*arguments, **options)

    return compile_uncached


def test_kernels_compile_without_a_folder_for_their_cache_and_the_remedy_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def successor(number: int) -> int:
        return number + 1

    def task(number: int) -> None:
        pass

    for name in ("njit", "cfunc"):
        monkeypatch.setattr(numba, name, without_a_folder(getattr(numba, name)))
    cpu_runtime._warn_of_no_cache.cache_clear()
    assert jit(successor)(1) == summing_jit(successor)(1) == 2
    assert compile_task(task, types.void(types.int64)).address
    [record] = caplog.records
    assert "NUMBA_CACHE_DIR" in record.getMessage()


def compiled(function: F) -> F:
    """Compiled anew in each run: a cache would not notice a change of what the function calls."""
    return cast(F, numba.njit(function))


@compiled
def narrow_all(numbers: Any, element: Any, out: Any) -> None:
    for i in range(numbers.size):
        out[i] = narrow(numbers[i], element)


@compiled
def widen_all(elements: Any, out: Any) -> None:
    for i in range(elements.size):
        out[i] = widen(elements[i])


@compiled
def exp2_all(numbers: Any, out: Any) -> None:
    for i in range(numbers.size):
        out[i] = exp2(numbers[i])


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    numbers = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    ties = torch.arange(1, 257, dtype=torch.float32) * (1 + 2**-8)
    numbers = torch.cat([numbers, ties, torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    narrowed, widened = np.empty(len(numbers), np.uint16), np.empty(len(numbers), np.float32)
    narrow_all(numbers.numpy(), zero_of(torch.bfloat16), narrowed)
    expected = numbers.bfloat16()
    assert np.array_equal(narrowed, expected.view(torch.uint16).numpy())
    widen_all(narrowed, widened)
    assert np.array_equal(widened, expected.float().numpy())


def test_exp2_is_right_to_a_few_roundings_and_stays_finite() -> None:
    numbers = np.linspace(-126, 127, 100_001, dtype=np.float32)
    out = np.empty_like(numbers)
    exp2_all(numbers, out)
    expected = np.exp2(numbers.astype(np.float64))
    assert np.abs(out / expected - 1).max() < 3e-7
    far = np.array([-1e9, -200, 0, 128, 1e9], np.float32)
    exp2_all(far, out[:5])
    assert np.isfinite(out[:5]).all()
    assert out[2] == 1


def test_an_element_type_without_kernels_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"no CPU kernels for torch\.float16: load the model as"):
        zero_of(torch.float16)
