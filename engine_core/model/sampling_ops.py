"""Draws and log-probabilities, as pure functions over a batch of rows.

Invariant: a row's result depends on that row's inputs alone, never on its neighbours.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import ops

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform_draws(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each (seed, position) and nothing else: [S].

    The generator is counter based (SplitMix64's mixer, Steele et al., 2014, applied to the seed and
    then to the seed's stream at `position`), so draws need no state that batching could disturb.
    """
    counters = positions.astype(np.uint64) + np.uint64(1)
    mixed = _mix(_mix(seeds) + counters * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gather_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the given tokens [S] and of the k likeliest, from logits [S, V].

    Returns token ids [S, k + 1], log-probabilities [S, k + 1] (column 0 is the given token) and the
    given tokens' ranks [S]: how many tokens are at least as likely, itself included.
    """
    chosen = logits.gather(1, tokens[:, None])
    best = logits.topk(k, dim=-1)
    rank = _rank_on_cpu if logits.device.type == "cpu" else ops.rank
    normalizers, ranks = rank(logits, tokens)
    return (
        torch.cat((tokens[:, None], best.indices), dim=-1),
        torch.cat((chosen, best.values), dim=-1) - normalizers[:, None],
        ranks,
    )


def _rank_on_cpu(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    from kernels import cpu_sampling  # A GPU engine never pays for numba.

    rows, scratch = logits.contiguous().numpy(), np.empty(logits.shape[1], np.float32)
    normalizers, ranks = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
    cpu_sampling.rank(rows, tokens.numpy(), scratch, normalizers, ranks)
    return torch.from_numpy(normalizers), torch.from_numpy(ranks)
