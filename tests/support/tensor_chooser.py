"""Choosing tokens with plain tensor operations: what the compiled choosers are compared with.

Truncation (top-k, top-p) compares values, so tokens of equal weight are kept or dropped together,
whichever order a sort put them in.

Shapes: S rows, V vocabulary. `weights` are a row's probabilities divided by its largest, so they
are float32 from 0 to 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine_core.batch import NO_TOKEN
from engine_core.model.choosers import RowParameters
from engine_core.model.sampling_ops import uniform_draws


class TensorChooser:
    """A `Chooser` for a CPU."""

    def likeliest(self, logits: Tensor) -> Tensor:
        tokens = logits.argmax(dim=-1)  # Of a row with NaN, the first of them.
        is_finite = logits.gather(1, tokens[:, None])[:, 0].isfinite()
        return torch.where(is_finite, tokens, NO_TOKEN)

    def choose(self, logits: Tensor, parameters: RowParameters, positions: Tensor) -> Tensor:
        tokens, is_drawn = self.likeliest(logits), parameters.temperature > 0
        largest = logits.amax(dim=-1, keepdim=True)
        # The likeliest has weight 1.
        weights = ((logits - largest) / parameters.temperature[:, None]).exp()
        weights = truncated(weights, parameters)
        seeds = parameters.seeds.numpy().view(np.uint64)
        uniforms = torch.from_numpy(uniform_draws(seeds, positions.numpy()))
        return torch.where(is_drawn & (tokens >= 0), pick_tokens(weights, uniforms), tokens)


def truncated(weights: Tensor, parameters: RowParameters) -> Tensor:
    """The weights, 0 where min-p, top-k and top-p, in this order, leave tokens out."""
    ranked = weights.sort(dim=-1, descending=True).values
    cutoffs = ranked.gather(1, parameters.top_k[:, None] - 1).maximum(parameters.min_p[:, None])
    weights = weights.masked_fill(weights < cutoffs, 0.0)
    ranked = ranked.masked_fill(ranked < cutoffs, 0.0)
    # The nucleus is the smallest set of largest weights that reaches its share, and not empty.
    targets = parameters.top_p[:, None] * weights.sum(dim=-1, keepdim=True)
    num_kept = (ranked.cumsum(dim=-1) - ranked < targets).sum(dim=-1, keepdim=True).clamp(min=1)
    cutoffs = ranked.gather(1, num_kept - 1).masked_fill(parameters.top_p[:, None] >= 1, 0.0)
    return weights.masked_fill(weights < cutoffs, 0.0)


def pick_tokens(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of each row by inverting its cumulative weights: [S, V], [S] -> [S] int64."""
    cumulative = weights.cumsum(dim=-1)
    totals = cumulative[:, -1]
    thresholds = (uniforms * totals).to(weights.dtype)
    # Rounding must not lift a threshold to the total, behind which there is no token.
    thresholds = thresholds.minimum(totals.nextafter(torch.zeros_like(totals)))
    tokens = torch.searchsorted(cumulative, thresholds[:, None], right=True)
    return tokens.clamp(max=weights.shape[1] - 1)[:, 0]
