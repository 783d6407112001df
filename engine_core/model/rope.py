"""Rotary position embeddings: their parameters in `config.json`, and the table of the angles.

Invariants
- Whatever a configuration says about its rotary embedding is either honoured or refused by name;
  an unknown key could change the meaning of every position, so none is ignored.
- The frequencies are computed in float32, step by step as the models' training code did:
  float64 would differ in the last bits and, at large positions, in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from engine_core.model.errors import ModelError

RopeKind = Literal["default", "linear", "llama3", "yarn"]

_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    ),
}
_REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions become angles. Fields beyond `theta` matter only to the kinds that use them."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    """Context length of the pre-training, which llama3 and yarn stretch."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    """Scale of cosines and sines under yarn; None takes 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def parse_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Read the rotary embedding of a `config.json`, in the old spelling (`rope_theta` beside
    `rope_scaling`) or in transformers 5's (`rope_parameters`). Raises ModelError.
    """
    entry = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(entry, Mapping):
        raise ModelError(f"rope_parameters={entry!r} in config.json must be an object")
    given = {key: value for key, value in entry.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _SCALING_KEYS:
        raise ModelError(
            f"rope type {kind!r} is not supported; supported: {', '.join(get_args(RopeKind))}"
        )
    if unknown := sorted(set(given) - {*_COMMON_KEYS, *_SCALING_KEYS[kind]}):
        raise ModelError(
            f"rope parameter {unknown[0]}={given[unknown[0]]!r} is not supported with rope type "
            f"{kind!r}; supported: {', '.join(_SCALING_KEYS[kind]) or 'rope_theta'}"
        )
    if missing := [key for key in _REQUIRED_KEYS[kind] if key not in given]:
        raise ModelError(f"rope type {kind!r} needs {missing[0]!r}, which config.json lacks")
    rotary_factor = given.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if rotary_factor != 1.0:
        raise ModelError(
            f"partial_rotary_factor={rotary_factor!r} is not supported; "
            f"only models that rotate the whole head (1.0) are"
        )
    return RopeConfig(
        kind=kind,
        theta=float(given.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        factor=float(given.get("factor", 1.0)),
        original_max_positions=int(
            raw.get("original_max_position_embeddings")
            or given.get("original_max_position_embeddings")
            or max_position_embeddings
        ),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        attention_factor=given.get("attention_factor"),
        beta_fast=float(given.get("beta_fast", 32.0)),
        beta_slow=float(given.get("beta_slow", 1.0)),
        truncate=bool(given.get("truncate", True)),
    )


def context_limit(rope: RopeConfig, max_position_embeddings: int) -> int:
    """Positions the model is meant for, scaling included.

    A linear scaling leaves `max_position_embeddings` at the length before the stretch; llama3's
    configurations give the stretched length; yarn's give one or the other.
    """
    if rope.kind == "linear":
        return int(max_position_embeddings * rope.factor)
    if rope.kind == "yarn":
        return max(max_position_embeddings, int(rope.original_max_positions * rope.factor))
    return max_position_embeddings


def cos_sin_table(
    rope: RopeConfig, head_size: int, num_positions: int, device: torch.device
) -> Tensor:
    """What the rotary kernel reads: [num_positions, head_size] float32, cosines | sines."""
    frequencies = _inverse_frequencies(rope, head_size)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    scale = 1.0
    if rope.kind == "yarn":
        stretch = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        scale = stretch if rope.attention_factor is None else rope.attention_factor
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=-1).to(device)


def _inverse_frequencies(rope: RopeConfig, head_size: int) -> Tensor:
    """Radians per position of each rotated pair: [head_size / 2] float32, fastest first."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    periods = rope.theta**exponents
    if rope.kind == "linear":
        return 1.0 / periods / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, 1.0 / periods)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, periods, head_size)
    return 1.0 / periods


def _llama3_frequencies(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: waves long against the original context are slowed by `factor`, short ones kept,
    and those between are a mixture.
    """
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / rope.factor
    turns = rope.original_max_positions / wavelengths  # in the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - keep) * frequencies / rope.factor + keep * frequencies
    result = torch.where(
        wavelengths > rope.original_max_positions / rope.low_freq_factor, slowed, mixed
    )
    return torch.where(
        wavelengths < rope.original_max_positions / rope.high_freq_factor, frequencies, result
    )


def _yarn_frequencies(rope: RopeConfig, periods: Tensor, head_size: int) -> Tensor:
    """YaRN (Peng et al., 2023): pairs that turn more than `beta_fast` times in the original context
    keep their speed, those below `beta_slow` turns are slowed by `factor`, with a ramp between.
    """

    def pair_with_turns(turns: float) -> float:
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    keep = 1 - ramp
    return (1.0 / (rope.factor * periods)) * (1 - keep) + (1.0 / periods) * keep
