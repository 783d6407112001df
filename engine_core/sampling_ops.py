"""The arithmetic of sampling, as pure functions over a batch of rows.

Invariant: a row's result depends on that row's inputs alone, never on its neighbours. In particular
truncation (top-k, top-p) compares values, so tokens of equal weight are kept or dropped together,
whichever order a sort would have put them in.

Shapes: S rows, V vocabulary. `weights` are probabilities up to a factor of the row's own, and not
negative.
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
    """What `top_p_cutoffs` answers, in two passes: some twenty times as fast as sorting.

    Floats that are not negative sort as their bits do, read as integers. So the weights are summed
    by their upper 16 bits, which finds those of the cutoff, and then, of the weights that share
    them, by the lower 16.
    """
    bits = weights.contiguous().view(torch.int32)
    upper_bits = (bits >> 16).long()
    upper, heavier = _bin_of_cutoff(upper_bits, weights, targets)
    sharing = weights.masked_fill(upper_bits != upper[:, None], 0.0)
    lower, _ = _bin_of_cutoff((bits & 0xFFFF).long(), sharing, targets - heavier)
    return (upper << 16 | lower).int().view(torch.float32)


def _bin_of_cutoff(bins: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bin (of 65,536) with which the weights in it and above sum to the target.

    Takes [S, V], [S, V], [S]; returns the bin and the sum of the weights above it, both [S].
    """
    sums = torch.zeros(len(weights), 1 << 16, device=weights.device).scatter_add_(1, bins, weights)
    from_bin_on = sums.flip(1).cumsum(dim=-1).flip(1)
    chosen = ((from_bin_on >= targets[:, None]).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    above = from_bin_on.gather(1, chosen) - sums.gather(1, chosen)
    return chosen[:, 0], above[:, 0]


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
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])
    best = logprobs.topk(k, dim=-1)
    ranks = (logprobs >= chosen).sum(dim=-1)
    return (
        torch.cat((tokens[:, None], best.indices), dim=-1),
        torch.cat((chosen, best.values), dim=-1),
        ranks,
    )
