"""Chooses a token for each row of logits: compiled code on a CPU, Triton kernels on a GPU.

Per row: the likeliest token if it is greedy, else temperature, min-p, top-k, top-p and the draw. A
row whose largest logit is no finite number (NaN and infinities are) gets NO_TOKEN.

Invariants
- A row's token depends on its logits, its parameters and its position alone, never on its
  neighbours.
- Tokens come as a tensor on the logits' device; on a GPU nothing waits for them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine_core.batch import Integers
from engine_core.model.sampling_ops import uniform_draws
from engine_core.model.transfers import to_device


@dataclass(frozen=True, slots=True)
class RowParameters:
    """How to choose, by row: [S] each, contiguous, on the device of the logits."""

    temperature: Tensor
    """float32; 0 for greedy rows."""
    min_p: Tensor
    top_p: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    top_k: Tensor
    """int64; the vocabulary's size where there is no limit."""
    seeds: Tensor
    """int64: the bits of unsigned integers."""


class SlotParameters:
    """How to choose, by slot: arrays on the host to write to, of which a batch's rows are taken."""

    def __init__(self, max_num_seqs: int) -> None:
        # Packed, so that rows come to a device in two copies.
        self._floats = np.zeros((6, max_num_seqs), np.float32)
        self._integers = np.zeros((2, max_num_seqs), np.int64)
        self.temperature, self.min_p, self.top_p = self._floats[:3]
        self.presence, self.frequency, self.repetition = self._floats[3:]
        self.top_k = self._integers[0]
        self.seeds = self._integers[1].view(np.uint64)

    def of(self, slots: Integers, device: torch.device) -> RowParameters:
        """Those of the rows of a batch."""
        num_rows = len(slots)
        # Each starts at a multiple of 16 bytes: for addresses that do not, Triton would compile
        # its kernels once more.
        slots = np.append(slots, np.zeros(-num_rows % 4, np.int64))
        floats = to_device(self._floats.take(slots, axis=1), device)[:, :num_rows]
        integers = to_device(self._integers.take(slots, axis=1), device)[:, :num_rows]
        return RowParameters(*floats, *integers)


class Chooser(Protocol):
    """Of the tokens of one vocabulary."""

    def likeliest(self, logits: Tensor) -> Tensor:
        """Of logits [S, V]: tokens [S] int64."""
        ...

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Tensor) -> Tensor:
        """Of logits [S, V] for tokens that will stand at `positions` [S]: tokens [S] int64."""
        ...


def make_chooser(vocab_size: int, device: torch.device) -> Chooser:
    """The one for logits on this device."""
    return (
        CompiledChooser(vocab_size) if device.type == "cpu" else TritonChooser(vocab_size, device)
    )


class CompiledChooser:
    """On the CPU, with `kernels.cpu_sampling`."""

    def __init__(self, vocab_size: int) -> None:
        from kernels import cpu_sampling  # A GPU engine never pays for numba.

        self._kernels = cpu_sampling
        self._scratch = np.empty((3, vocab_size), np.float32)
        cpu_sampling.prepare()

    def likeliest(self, logits: Tensor) -> Tensor:
        tokens = np.empty(len(logits), np.int64)
        self._kernels.choose_likeliest(logits.contiguous().numpy(), tokens)
        return torch.from_numpy(tokens)

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Tensor) -> Tensor:
        tokens = np.empty(len(logits), np.int64)
        self._kernels.choose_tokens(
            logits.contiguous().numpy(),
            parameters.temperature.numpy(),
            parameters.min_p.numpy(),
            parameters.top_k.numpy(),
            parameters.top_p.numpy(),
            uniform_draws(parameters.seeds.numpy().view(np.uint64), positions.numpy()),
            self._scratch,
            tokens,
        )
        return torch.from_numpy(tokens)


class TritonChooser:
    """On a GPU, with `kernels.triton_sampling`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        from kernels import triton_sampling  # A CPU engine never pays for Triton.

        self._kernels = triton_sampling
        triton_sampling.prepare(vocab_size, device)

    def likeliest(self, logits: Tensor) -> Tensor:
        return self._kernels.choose_likeliest(logits)

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Tensor) -> Tensor:
        return self._kernels.choose_tokens(
            logits,
            parameters.temperature,
            parameters.min_p,
            parameters.top_k,
            parameters.top_p,
            parameters.seeds,
            positions,
        )
