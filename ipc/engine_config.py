"""The configuration of one engine process, as it crosses from the launcher to the engine.

It travels as one JSON object on the engine's command line, so a launcher and an engine of different
versions meet here: unknown keys are refused by name, and so are values out of range. Field names
follow vLLM's flags where vLLM has them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
RunnerKind = Literal["model", "fake"]

SETUP_ERROR_PREFIX = "cannot start: "
"""Begins the last line on stderr of an engine that cannot start as configured (exit status 2)."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("int8",),
    "runner": ("model", "fake"),
}
_POSITIVE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "num_threads",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine process needs besides its addresses and rank."""

    model: str
    """A directory in Hugging Face's layout, or a hub id."""
    runner: RunnerKind = "model"
    """`fake` computes arithmetic tokens instead of running a model: for tests and load tests."""
    device: Device = "auto"
    dtype: DType = "auto"
    quantization: Quantization | None = None
    """`int8`: linear layers' weights as 8-bit integers, computed with in bfloat16. On the CPU
    only."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None takes the model's own limit."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    """Tokens a KV block."""
    kv_cache_memory_bytes: int | None = None
    """KV cache of this engine; None sizes it from the free memory."""
    num_gpu_blocks_override: int | None = None
    """Exact number of KV blocks (vLLM's name; it holds on a CPU as well)."""
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    """Compute threads on a CPU; None shares the cores among the engines of one launcher."""
    seed: int = 0
    """Seeds the draws of requests that bring no seed of their own."""
    deterministic: bool = False
    """A row's tokens and log-probabilities are the same bits whatever it is batched or chunked
    with. On the CPU only, where it costs nothing: all kernels are made so."""
    fake_step_time_ms: float = 0.0
    """How long a step of the fake runner takes."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "quantization" and value is None):
                raise ValueError(
                    f"{name}={value!r} is not supported; choose one of {', '.join(choices)}"
                )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must not be negative")
        if self.fake_step_time_ms < 0:
            raise ValueError(f"fake_step_time_ms={self.fake_step_time_ms!r} must not be negative")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """Parse what `to_json` wrote. Raises ValueError naming the first thing that is wrong."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the engine configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"the engine configuration must be a JSON object, not {text[:80]!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown engine configuration key {unknown[0]!r}; "
                f"known keys: {', '.join(sorted(known))}"
            )
        if "model" not in values:
            raise ValueError(
                "the engine configuration lacks 'model', the model's directory or hub id"
            )
        return cls(**values)
