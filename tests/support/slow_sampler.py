"""Sampling of one row in plain Python floats, written from the definitions and not from the engine.

It answers the probability of every token, and which token a uniform number picks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ipc.request import SamplingParams


def edited_logits(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    outputs: Sequence[int] = (),
) -> list[float]:
    """Logits after masks, bias and penalties, for the token behind `prompt` and `outputs`."""
    edited = list(logits)
    for token in range(len(edited)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            edited[token] = -math.inf
        if len(outputs) < params.min_tokens and token in params.all_stop_token_ids:
            edited[token] = -math.inf
        edited[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in outputs:
            if edited[token] > 0:
                edited[token] /= params.repetition_penalty
            else:
                edited[token] *= params.repetition_penalty
        edited[token] -= params.frequency_penalty * outputs.count(token)
        edited[token] -= params.presence_penalty * (token in outputs)
    return edited


def probabilities(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Probability of each token under temperature, min-p, top-k and top-p, in this order."""
    largest = max(logits)
    if params.temperature < 1e-5:
        winner = list(logits).index(largest)
        return [float(token == winner) for token in range(len(logits))]
    weights = [math.exp((logit - largest) / params.temperature) for logit in logits]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    ranked = sorted(weights, reverse=True)
    if 0 < params.top_k < len(weights):
        ranked = ranked[: params.top_k]
    cutoff = ranked[-1]
    weights = [weight if weight >= cutoff else 0.0 for weight in weights]
    if params.top_p < 1.0:
        target, reached = params.top_p * sum(weights), 0.0
        for weight in ranked:
            cutoff = weight
            reached += weight
            if reached >= target:
                break
        weights = [weight if weight >= cutoff else 0.0 for weight in weights]
    total = sum(weights)
    return [weight / total for weight in weights]


def pick(distribution: Sequence[float], uniform: float) -> tuple[int, float]:
    """The token at which the cumulated probabilities pass `uniform`, and by how much they miss or
    pass it at the nearer side: within rounding of zero, a neighbour is as good.
    """
    before = 0.0
    for token, probability in enumerate(distribution):
        after = before + probability
        if after > uniform:
            return token, min(uniform - before, after - uniform)
        before = after
    return max(range(len(distribution)), key=distribution.__getitem__), 0.0


def chi_square_limit(degrees: int) -> float:
    """The value that chi-square exceeds once in a thousand draws (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3
