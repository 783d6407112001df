"""Sampling on the CPU: from a row of logits to its token in two or three passes, on one thread.

A row's passes run one after the other, so all but the first find it in the core's own cache. One
thread does it all: a step's rows are a small part of a millisecond's work, less than it takes to
find out whether other threads are awake.

Invariants
- A row's result depends on that row's inputs alone, bit for bit: every sum is over the row, in an
  order that the vocabulary's size determines.
- Truncation (min-p, top-k, top-p) compares weights with a cutoff, so tokens of equal weight are
  kept or dropped together.
- A row whose largest logit is no finite number (NaN and infinities are) gets token -1.

Shapes: S rows, V vocabulary; logits [S, V] are float32 and contiguous. A row's weights are its
probabilities divided by its largest, so the likeliest token has weight 1; a weight below 2**-126
is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core.types import float32
from numba.extending import intrinsic

from kernels.cpu_runtime import LOG2_E, exp2, jit, summing_jit

_CHUNK = 256
"""Neighbouring tokens whose largest logit, or sum of weights, is looked at first."""
_NUCLEUS_WIDTH = 256
"""Largest weights in which a top-p nucleus is looked for first."""
_LEAST = np.float32(2.0**-126)
"""No weight but 0 is smaller."""
_LEAST_EXPONENT = np.float32(-126)
_LOG2_E = np.float32(LOG2_E)
_INFINITY = np.float32(np.inf)


def _maximum(typing_context: Any, one: Any, other: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        function_type = ir.FunctionType(kind, [kind, kind])
        function = builder.module.declare_intrinsic("llvm.maximum", [kind], function_type)
        return builder.call(function, arguments)

    return float32(float32, float32), generate


maximum: Any = intrinsic(_maximum)
"""The larger of two float32; NaN if either is. Loops over it vectorise, unlike over `max`."""


@jit
def _largest(values: Any) -> Any:
    result = -_INFINITY
    for i in range(len(values)):
        result = maximum(result, values[i])
    return result


@jit
def _find(values: Any, value: Any) -> int:
    """The first index of a value that is there."""
    for i in range(len(values)):
        if values[i] == value:
            return i
    return -1


@jit
def _argmax(row: Any) -> Any:
    """The largest of a row, and its first index, or -1 where it is no finite number."""
    best, chunk = -_INFINITY, 0
    for start in range(0, len(row), _CHUNK):
        largest = _largest(row[start : start + _CHUNK])
        if not largest <= best:
            best, chunk = largest, start
        if best != best:
            return best, -1
    if abs(best) == _INFINITY:
        return best, -1
    return best, chunk + _find(row[chunk : chunk + _CHUNK], best)


@jit
def _weigh(row: Any, best: Any, scale: Any, weights: Any) -> None:
    """weights = 2**((row - best) * scale)."""
    for i in range(len(row)):
        exponent = (row[i] - best) * scale
        weights[i] = exp2(exponent) if exponent >= _LEAST_EXPONENT else np.float32(0)


@summing_jit
def _sum(weights: Any, cutoff: Any) -> Any:
    """Of the weights from `cutoff` up."""
    total = np.float32(0)
    for i in range(len(weights)):
        total += weights[i] if weights[i] >= cutoff else np.float32(0)
    return total


@jit
def _total(weights: Any, cutoff: Any) -> Any:
    """Of the weights from `cutoff` up; beyond a chunk in float64."""
    total = 0.0
    for start in range(0, len(weights), _CHUNK):
        total += _sum(weights[start : start + _CHUNK], cutoff)
    return total


@summing_jit
def _count(weights: Any, cutoff: Any) -> Any:
    """How many weights are not below `cutoff`."""
    count = np.int32(0)
    for i in range(len(weights)):
        count += np.int32(1) if weights[i] >= cutoff else np.int32(0)
    return count


@jit
def _as_bits(value: Any) -> Any:
    """Positive floats sort as their bits do, read as integers."""
    return np.int64(np.float32(value).view(np.int32))


@jit
def _as_float(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@jit
def _top_k_cutoff(weights: Any, k: int, cutoff: Any) -> Any:
    """The largest cutoff, not below the given one, with k weights from it up; by bisection."""
    low, high = _as_bits(cutoff), _as_bits(np.float32(1)) + 1
    num_low = _count(weights, cutoff)
    if num_low <= k:
        return cutoff
    while high - low > 1 and num_low > k:
        middle = (low + high) // 2
        num_middle = _count(weights, _as_float(middle))
        if num_middle >= k:
            low, num_low = middle, num_middle
        else:
            high = middle
    return _as_float(low)


@jit
def _top_p_cutoff(weights: Any, target: float, cutoff: Any) -> Any:
    """The largest cutoff, not below the given one, from which up the weights sum to `target`; by
    bisection."""
    low, high = _as_bits(cutoff), _as_bits(np.float32(1)) + 1
    num_low, num_high = _count(weights, cutoff), 0
    while high - low > 1 and num_low - num_high > 1:
        middle = (low + high) // 2
        num_middle = _count(weights, _as_float(middle))
        if _total(weights, _as_float(middle)) >= target:
            low, num_low = middle, num_middle
        else:
            high, num_high = middle, num_middle
    return _as_float(low)


@jit
def _largest_weights(weights: Any, count: int, cutoff: Any, maxima: Any, found: Any) -> Any:
    """Gather at least the `count` largest weights, of those from `cutoff` up, in `found`; returns
    how many they are, and the cutoff that they share.

    As many chunks have a maximum from some bound up, which is found by looking at the maxima alone.
    """
    num_chunks = len(maxima)
    for chunk in range(num_chunks):
        maxima[chunk] = _largest(weights[chunk * _CHUNK : (chunk + 1) * _CHUNK])
    bound = _top_k_cutoff(maxima, count, cutoff)
    num_found = 0
    for chunk in range(num_chunks):
        if maxima[chunk] >= bound:
            for weight in weights[chunk * _CHUNK : (chunk + 1) * _CHUNK]:
                if weight >= bound:
                    found[num_found] = weight
                    num_found += 1
    return num_found, bound


@jit
def _truncate(weights: Any, min_p: Any, top_k: int, top_p: Any, scratch: Any) -> Any:
    """The cutoff that min-p, top-k and top-p set, in this order."""
    cutoff = max(min_p, _LEAST)
    candidates, found = weights, scratch[0]
    maxima = scratch[1, : (len(weights) + _CHUNK - 1) // _CHUNK]
    is_narrow = top_k <= len(maxima)
    if is_narrow:
        num_found, cutoff = _largest_weights(weights, top_k, cutoff, maxima, found)
        candidates = found[:num_found]
    if top_k < len(weights):
        cutoff = _top_k_cutoff(candidates, top_k, cutoff)
    if top_p < 1:
        target = top_p * _total(candidates, cutoff)
        if not is_narrow and len(maxima) > _NUCLEUS_WIDTH:
            num_found, bound = _largest_weights(weights, _NUCLEUS_WIDTH, cutoff, maxima, found)
            if _total(found[:num_found], bound) >= target:
                candidates, cutoff = found[:num_found], bound
        cutoff = _top_p_cutoff(candidates, target, cutoff)
    return cutoff


@jit
def _pick(weights: Any, cutoff: Any, uniform: float) -> int:
    """The token at which the cumulated weights from `cutoff` up pass `uniform` of their sum."""
    threshold = uniform * _total(weights, cutoff)
    reached, last = 0.0, -1
    for start in range(0, len(weights), _CHUNK):
        chunk = weights[start : start + _CHUNK]
        behind = reached + _sum(chunk, cutoff)
        if behind > threshold:
            # Added one by one they may round to less than the chunk's sum: the last will do then.
            for i in range(len(chunk)):
                if chunk[i] >= cutoff:
                    reached += chunk[i]
                    last = start + i
                    if reached > threshold:
                        break
            return last
        reached = behind
    last = len(weights) - 1  # The threshold was rounded up to the sum.
    while weights[last] < cutoff:
        last -= 1
    return last


@jit
def _choose(
    row: Any, temperature: Any, min_p: Any, top_k: int, top_p: Any, uniform: float, scratch: Any
) -> Any:
    best, token = _argmax(row)
    if token < 0 or temperature == 0:
        return token
    weights = scratch[0]
    _weigh(row, best, _LOG2_E / temperature, weights)
    return _pick(weights, _truncate(weights, min_p, top_k, top_p, scratch[1:]), uniform)


@jit
def choose_tokens(
    logits: Any,
    temperature: Any,
    min_p: Any,
    top_k: Any,
    top_p: Any,
    uniforms: Any,
    scratch: Any,
    tokens: Any,
) -> None:
    """Choose a token for each row: tokens [S] int64.

    The likeliest at temperature 0, else one drawn after min-p, top-k and top-p, in this order.
    `temperature`, `min_p` and `top_p` are float32, `top_k` int64 (V for no limit), `uniforms`
    float64 from 0 to 1; all [S]. `scratch` [3, V] float32 is overwritten.
    """
    for i in range(len(logits)):
        tokens[i] = _choose(
            logits[i], temperature[i], min_p[i], top_k[i], top_p[i], uniforms[i], scratch
        )


@jit
def choose_likeliest(logits: Any, tokens: Any) -> None:
    """The likeliest token of each row: tokens [S] int64."""
    for i in range(len(logits)):
        _, tokens[i] = _argmax(logits[i])


@jit
def rank(logits: Any, tokens: Any, weights: Any, normalizers: Any, ranks: Any) -> None:
    """For each row, what to subtract from its logits to get log-probabilities (normalizers [S]
    float32), and how many tokens are at least as likely as the given one (ranks [S] int64).

    `weights` [V] float32 is overwritten. Raises nothing for rows with no finite largest logit.
    """
    for i in range(len(logits)):
        best, _ = _argmax(logits[i])
        _weigh(logits[i], best, _LOG2_E, weights)
        normalizers[i] = best + np.log(_total(weights, _LEAST))
        ranks[i] = _count(logits[i], logits[i, tokens[i]])


def prepare() -> None:
    """Compile the kernels, or load them: better now than in someone's first request."""
    logits, tokens = np.zeros((1, 1), np.float32), np.zeros(1, np.int64)
    zeros, scratch = np.zeros(1, np.float32), np.empty((3, 1), np.float32)
    choose_likeliest(logits, tokens)
    choose_tokens(logits, zeros, zeros, tokens, zeros, np.zeros(1), scratch, tokens)
    rank(logits, tokens, scratch[0], zeros, tokens)
