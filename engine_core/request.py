"""One request's state inside the engine.

Invariants
- `token_ids` is the prompt followed by every sampled token; nothing is ever removed from it.
- KV of the first `num_computed_tokens` tokens lies in `block_ids`; a waiting or preempted request
  holds no blocks. Between steps a decoding request lacks the KV of its last token, and no other.
- The scheduler is the only one that changes a request; a finished request is forgotten at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from engine_core.prompt_logprobs import join_logprobs
from ipc.output import EngineCoreEvent, FinishReason, LogprobsLists, PrefillStats
from ipc.request import SamplingParams


class Stage(StrEnum):
    """Where in its life a request is; the names appear in receipts and logs."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"


@dataclass(slots=True, eq=False)
class Request:
    """A live request. Created by the core, owned by the scheduler."""

    request_id: str
    client_index: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_output_tokens: int
    """`max_tokens`, cut to what the context leaves."""
    order: tuple[int, int]
    """(priority, arrival number): lower runs first and is preempted last."""
    cache_salt: str | None = None
    num_resumed_tokens: int = 0
    """Outputs that it brought along: another request sampled them before it was aborted."""

    stage: Stage = Stage.WAITING
    num_prefilled_tokens: int = 0
    """`num_computed_tokens` as long as it does not decode."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first scheduled."""
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of the full blocks of `token_ids`, as far as they were needed."""
    num_published_blocks: int = 0
    is_of_one_epoch: bool = True
    """Whether all its KV was computed under the present weights; else others must not share it."""
    num_preemptions: int = 0
    slot: int = -1
    prompt_logprobs: list[LogprobsLists] = field(default_factory=list)
    """Of the prompt's positions computed so far, if they are wanted; until the first output."""
    events: list[EngineCoreEvent] = field(default_factory=list)
    """Not yet reported; they leave with the next output."""
    ending_token_ids: frozenset[int] = frozenset()
    """EOS, if it counts, and the request's own stop tokens."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is in its blocks, between steps."""
        is_decoding = self.stage is Stage.DECODE
        return len(self.token_ids) - 1 if is_decoding else self.num_prefilled_tokens

    @property
    def num_output_tokens(self) -> int:
        """All of them, those that it brought along included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Tokens sampled here."""
        return self.num_output_tokens - self.num_resumed_tokens

    def append_token(self, token_id: int) -> tuple[FinishReason, int | None] | None:
        """Add a sampled token. Returns (finish reason, stop reason) if it ends the request.

        The stop reason is the token id when one of the request's own `stop_token_ids` matched, as
        in vLLM; an end-of-sequence token has none.
        """
        self.token_ids.append(token_id)
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self.ending_token_ids and num_output_tokens >= self.sampling.min_tokens:
            return FinishReason.STOP, None if token_id == self.sampling.eos_token_id else token_id
        if num_output_tokens >= self.max_output_tokens:
            return FinishReason.LENGTH, None
        return None

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether every position of the prompt must be computed for it, cached or not."""
        return self.sampling.prompt_logprobs is not None and self.num_new_tokens == 0

    def take_prompt_logprobs(self) -> LogprobsLists | None:
        """Those of the whole prompt, with the first token only; None if they are not wanted."""
        if not self.prompt_logprobs:
            return None
        parts, self.prompt_logprobs = self.prompt_logprobs, []
        return join_logprobs(parts)

    def prefill_stats(self) -> PrefillStats | None:
        """How the prompt was computed; told with the first token only."""
        if self.num_new_tokens != 1:
            return None
        num_cached, num_known = self.num_cached_tokens, len(self.token_ids) - 1
        return PrefillStats(
            num_prompt_tokens=num_known,
            num_computed_tokens=num_known - num_cached,
            num_cached_tokens=num_cached,
            num_local_cached_tokens=num_cached,
        )
