"""The arithmetic of sampling, as pure functions over a batch of rows.

Invariant: a row's result depends on that row's inputs alone, never on its neighbours. In particular
truncation (top-k, top-p) compares values, so tokens of equal weight are kept or dropped together,
whichever order a sort would have put them in.

Shapes: S rows, V vocabulary. `weights` are a row's probabilities divided by its largest, so they
are float32 from 0 to 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUCLEUS_WIDTH = 256
"""Largest weights in which a top-p nucleus is looked for first."""

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


def pick_tokens(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of each row by inverting its cumulative weights: [S, V], [S] -> [S] int64."""
    cumulative = weights.cumsum(dim=-1)
    totals = cumulative[:, -1]
    thresholds = (uniforms * totals).to(weights.dtype)
    # Rounding must not lift a threshold to the total, behind which there is no token.
    thresholds = thresholds.minimum(totals.nextafter(torch.zeros_like(totals)))
    tokens = torch.searchsorted(cumulative, thresholds[:, None], right=True)
    tokens.clamp_(max=weights.shape[1] - 1)
    # A GPU sums in a tree, so the sums may rise by an ulp at a token of weight zero, which is
    # forbidden; a row that hits one, one in millions, takes its likeliest token instead.
    is_possible = weights.gather(1, tokens) > 0
    if not bool(is_possible.all()):
        tokens = torch.where(is_possible, tokens, weights.argmax(dim=-1, keepdim=True))
    return tokens[:, 0]


def top_k_cutoffs(weights: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest weight of each row: [S, V], [S] int64 (1 to V) -> [S]."""
    largest = weights.topk(int(top_k.max()), dim=-1).values
    return largest.gather(1, top_k[:, None] - 1)[:, 0]


def top_p_cutoffs(weights: Tensor, targets: Tensor) -> Tensor:
    """The smallest weight of each row's nucleus: [S, V], [S] -> [S].

    The nucleus is the smallest set of largest weights whose sum reaches `targets` (top-p times the
    row's sum), and at least one token. It is nearly always small, and found in the largest weights;
    only where it is not does a row pay for a search through all.
    """
    largest = weights.topk(min(_NUCLEUS_WIDTH, weights.shape[1]), dim=-1).values
    cumulative = largest.cumsum(dim=-1)
    num_kept = (cumulative - largest < targets[:, None]).sum(dim=-1).clamp(min=1)
    cutoffs = largest.gather(1, num_kept[:, None] - 1)[:, 0]
    if largest.shape[1] < weights.shape[1]:
        is_open = cumulative[:, -1] < targets
        if bool(is_open.any()):
            cutoffs[is_open] = _wide_nucleus_cutoffs(weights[is_open], targets[is_open])
    return cutoffs


def _wide_nucleus_cutoffs(weights: Tensor, targets: Tensor) -> Tensor:
    """What `top_p_cutoffs` answers, by radix selection: a tenth of the time of sorting.

    Floats that are not negative sort as their bits do, read as integers. So the cutoff is found ten
    bits at a time: the weights that share its bits so far are summed by their next ten, and the
    largest ten with which the sum from above reaches the target are the cutoff's.
    """
    bits = weights.contiguous().view(torch.int32)  # below 2 ** 30, for no weight is above 1
    cutoffs = torch.zeros(len(weights), 1, dtype=torch.int64, device=weights.device)
    missing = targets[:, None]
    for shift in (20, 10, 0):
        digits = (bits >> shift & 0x3FF).long()
        sums = torch.zeros(len(weights), 1 << 10, device=weights.device)
        sums.scatter_add_(1, digits, weights)
        from_here_up = sums.flip(1).cumsum(dim=-1).flip(1)
        digit = ((from_here_up >= missing).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        missing = missing - (from_here_up.gather(1, digit) - sums.gather(1, digit))
        weights = weights.masked_fill(digits != digit, 0.0)
        cutoffs |= digit << shift
    return cutoffs[:, 0].int().view(torch.float32)


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    *,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """Logits [S, V] after penalties [S], given how often each token was sampled ([S, V] integers)
    and whether it is in the prompt ([S, V] bool). Presence and frequency are OpenAI's and look at
    outputs only; repetition is CTRL's (Keskar et al., 2019) and looks at the prompt too.
    """
    was_sampled = output_counts > 0
    factor = torch.where(was_sampled | prompt_mask, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * output_counts - presence[:, None] * was_sampled


def gather_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the given tokens [S] and of the k likeliest, from logits [S, V].

    Returns token ids [S, k + 1], log-probabilities [S, k + 1] (column 0 is the given token) and the
    given tokens' ranks [S]: how many tokens are at least as likely, itself included.
    """
    chosen = logits.gather(1, tokens[:, None])
    best = logits.topk(k, dim=-1)
    if logits.device.type == "cpu":
        normalizers, ranks = _rank_on_cpu(logits, tokens)
    else:
        normalizers, ranks = logits.logsumexp(dim=-1), (logits >= chosen).sum(dim=-1)
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
