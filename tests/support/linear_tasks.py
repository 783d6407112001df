"""Multiplies by packed weights outside a decoder, on a team, with rows packed by PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cpu_elements import STEP_BYTES
from kernels.cpu_linear import (
    choose_block_rows,
    project,
    project_gated,
    scratch_bytes,
)
from kernels.cpu_runtime import record_at, zero_of
from kernels.cpu_team import TASK_SIGNATURE, Team
from kernels.cpu_weights import MATRIX, PackedWeight

_CALL = np.dtype(
    [
        ("matrix", MATRIX),
        ("up", MATRIX),
        ("is_gated", np.int64),
        ("adds", np.int64),
        ("x", np.int64),
        ("block_rows", np.int64),
        ("num_rows", np.int64),
        ("out", np.int64),
        ("out_stride", np.int64),
        ("scratch", np.int64),
        ("scratch_bytes", np.int64),
    ],
    align=True,
)


@functools.cache
def _task(activations: torch.dtype, weights: torch.dtype) -> Any:
    x_element, w_element = zero_of(activations), zero_of(weights)

    def multiply(address: int, team: int, member: int) -> None:
        call = numba.carray(record_at(address, _CALL), (1,))[0]
        scratch = call.scratch + member * call.scratch_bytes
        if call.is_gated != 0:
            project_gated(
                x_element,
                w_element,
                team,
                call.matrix,
                call.up,
                call.x,
                call.block_rows,
                call.num_rows,
                call.out,
                scratch,
            )
        else:
            project(
                x_element,
                w_element,
                team,
                call.matrix,
                call.x,
                call.block_rows,
                call.num_rows,
                call.out,
                call.out_stride,
                call.adds != 0,
                scratch,
            )

    # Not from a cache, which would not notice a change of what it calls.
    return numba.cfunc(TASK_SIGNATURE, error_model="numpy")(multiply)


def pack_rows(x: Tensor, block_rows: int) -> Tensor:
    """[S, inputs] as packed blocks; rows past the end are NaN."""
    p = STEP_BYTES // x.dtype.itemsize
    num_rows, num_inputs = x.shape
    filled = torch.full((-(-num_rows // block_rows) * block_rows, num_inputs), torch.nan)
    filled = filled.to(x.dtype)
    filled[:num_rows] = x
    return filled.view(-1, block_rows, num_inputs // p, p).transpose(1, 2).contiguous()


def unpack_rows(packed: Tensor, num_rows: int) -> Tensor:
    """The inverse of `pack_rows`."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:num_rows]


def multiply(
    team: Team,
    weight: PackedWeight,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
    block_rows: int | None = None,
) -> Tensor:
    """`project`: [S, inputs] -> [S, outputs] float32."""
    rows = block_rows or choose_block_rows(len(x))
    out = torch.full((len(x), weight.num_outputs), torch.nan) if add_to is None else add_to.clone()
    matrix = weight.matrix(bias)
    _run(team, weight, matrix, matrix, False, add_to is not None, pack_rows(x, rows), len(x), out)
    return out


def multiply_gated(team: Team, weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """`project_gated` by a weight of two groups: [S, inputs] -> [S, outputs] like x."""
    rows = choose_block_rows(len(x))
    out = pack_rows(torch.zeros(len(x), weight.num_outputs, dtype=x.dtype), rows)
    matrices = weight.matrix(bias, 0), weight.matrix(bias, 1)
    _run(team, weight, *matrices, True, False, pack_rows(x, rows), len(x), out)
    return unpack_rows(out, len(x))


def _run(
    team: Team,
    weight: PackedWeight,
    matrix: tuple[int, ...],
    up: tuple[int, ...],
    is_gated: bool,
    adds: bool,
    x: Tensor,
    num_rows: int,
    out: Tensor,
) -> None:
    of_member = scratch_bytes(2 * weight.numbers.shape[2])
    scratch = torch.full((team.num_threads * of_member,), 0xFF, dtype=torch.uint8)  # NaN
    call = np.zeros(1, _CALL)
    call[0] = (
        matrix,
        up,
        is_gated,
        adds,
        x.data_ptr(),
        x.shape[2],
        num_rows,
        out.data_ptr(),
        weight.num_outputs,
        scratch.data_ptr(),
        of_member,
    )
    task = _task(weight.dtype, weight.numbers.dtype)
    team.run(task.address, call.ctypes.data)
