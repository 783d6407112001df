"""What the synchronous core must know about its engine: limits, in tokens, sequences and blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine, all resolved (a model's own limits are known by now)."""

    max_model_len: int
    """Longest prompt plus output of one request, in tokens."""
    max_num_seqs: int
    """Sequences running at once: the rows of the runner's persistent batch."""
    max_num_batched_tokens: int
    """Token budget of one step; longer prompts are prefilled in chunks."""
    block_size: int
    """Tokens a KV block."""
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below "
                f"max_num_seqs={self.max_num_seqs}, so a full batch could not decode in one step; "
                f"raise the first or lower the second"
            )
