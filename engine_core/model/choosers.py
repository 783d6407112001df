"""Chooses a token for each row of logits: compiled code on a CPU, tensor operations on a GPU.

Per row: the likeliest token if it is greedy, else temperature, min-p, top-k, top-p and the draw. A
row whose largest logit is no finite number (NaN and infinities are) gets NO_TOKEN.

Invariant: a row's token depends on its logits, its parameters and its position alone, never on its
neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine_core.batch import NO_TOKEN, Integers
from engine_core.model.sampling_ops import (
    pick_tokens,
    top_k_cutoffs,
    top_p_cutoffs,
    uniform_draws,
)

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowParameters:
    """How to choose, by row: [S] each."""

    temperature: Floats
    """0 for greedy rows."""
    min_p: Floats
    top_k: Integers
    """The vocabulary's size where there is no limit."""
    top_p: Floats
    seeds: NDArray[np.uint64]

    def of(self, rows: Integers) -> RowParameters:
        """Some rows, by index: those of a batch, of the parameters by slot."""
        return RowParameters(
            self.temperature[rows],
            self.min_p[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.seeds[rows],
        )


class Chooser(Protocol):
    """Of the tokens of one vocabulary."""

    def likeliest(self, logits: Tensor) -> Integers:
        """Of logits [S, V]: tokens [S]."""
        ...

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Integers) -> Integers:
        """Of logits [S, V] for tokens that will stand at `positions` [S]: tokens [S]."""
        ...


def make_chooser(vocab_size: int, device: torch.device) -> Chooser:
    """The one for logits on this device."""
    return CompiledChooser(vocab_size) if device.type == "cpu" else TensorChooser(device)


class CompiledChooser:
    """On the CPU, with `kernels.cpu_sampling`."""

    def __init__(self, vocab_size: int) -> None:
        from kernels import cpu_sampling  # A GPU engine never pays for numba.

        self._kernels = cpu_sampling
        self._scratch = np.empty((3, vocab_size), np.float32)
        cpu_sampling.prepare()

    def likeliest(self, logits: Tensor) -> Integers:
        tokens = np.empty(len(logits), np.int64)
        self._kernels.choose_likeliest(logits.contiguous().numpy(), tokens)
        return tokens

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Integers) -> Integers:
        tokens = np.empty(len(logits), np.int64)
        self._kernels.choose_tokens(
            logits.contiguous().numpy(),
            parameters.temperature,
            parameters.min_p,
            parameters.top_k,
            parameters.top_p,
            uniform_draws(parameters.seeds, positions),
            self._scratch,
            tokens,
        )
        return tokens


class TensorChooser:
    """On any device, with `engine_core.model.sampling_ops`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def likeliest(self, logits: Tensor) -> Integers:
        tokens = logits.argmax(dim=-1)  # Of a row with NaN, the first of them.
        return _checked(tokens, logits.gather(1, tokens[:, None])[:, 0])

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Integers) -> Integers:
        drawn = np.flatnonzero(parameters.temperature)
        if len(drawn) == len(logits):
            largest = logits.amax(dim=-1)  # A tenth of the time of argmax.
            return _checked(self._draw(logits, largest, parameters, positions), largest)
        tokens = logits.argmax(dim=-1)
        largest = logits.gather(1, tokens[:, None])[:, 0]
        rows = self._tensor(drawn)
        tokens[rows] = self._draw(
            logits[rows], largest[rows], parameters.of(drawn), positions[drawn]
        )
        return _checked(tokens, largest)

    def _draw(
        self, logits: Tensor, largest: Tensor, parameters: RowParameters, positions: Integers
    ) -> Tensor:
        temperature = self._tensor(parameters.temperature)
        # The likeliest has weight 1.
        weights = ((logits - largest[:, None]) / temperature[:, None]).exp_()
        self._truncate(weights, parameters)
        uniforms = uniform_draws(parameters.seeds, positions)
        return pick_tokens(weights, self._tensor(uniforms))

    def _truncate(self, weights: Tensor, parameters: RowParameters) -> None:
        """Zero the weights that min-p, top-k and top-p leave out, in this order, in place."""
        min_p, top_k, top_p = parameters.min_p, parameters.top_k, parameters.top_p
        by_k = np.flatnonzero(top_k < weights.shape[1])
        if len(by_k) or min_p.any():
            cutoffs = self._tensor(min_p).clone()
            if len(by_k):
                rows = self._tensor(by_k)
                kth = top_k_cutoffs(weights[rows], self._tensor(top_k[by_k]))
                cutoffs[rows] = cutoffs[rows].maximum(kth)
            weights.masked_fill_(weights < cutoffs[:, None], 0.0)
        by_p = np.flatnonzero(top_p < 1.0)
        if len(by_p):
            rows = self._tensor(by_p)
            candidates = weights[rows]
            targets = self._tensor(top_p[by_p]) * candidates.sum(dim=-1)
            cutoffs = top_p_cutoffs(candidates, targets)
            weights[rows] = candidates.masked_fill_(candidates < cutoffs[:, None], 0.0)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _checked(tokens: Tensor, largest: Tensor) -> Integers:
    token_ids: Integers = tokens.cpu().numpy()
    token_ids[~np.isfinite(largest.cpu().numpy())] = NO_TOKEN
    return token_ids
