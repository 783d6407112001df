"""What a client gets: deltas while a request runs, totals at its end, receipts for aborts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from ipc.output import OutputError

FinishReasonName = Literal["stop", "length", "abort", "error", "repetition"]


class AbortCause(StrEnum):
    """Why a request was aborted; the names appear in outputs, logs and receipts."""

    EXPLICIT = "explicit"
    DROPPED_STREAM = "dropped_stream"
    STOP_STRING = "stop_string"
    DEADLINE = "deadline"
    """It reached the age that its caller set (`timeout_s`)."""
    SLOW_READER = "slow_reader"
    """Its client took so little of the output that too much of it waited."""
    REFUSED = "refused"
    """Another request of the same call could not be accepted."""
    PAUSE = "pause"
    SHUTDOWN = "shutdown"
    ENGINE_FAULT = "engine_fault"
    FRONTEND_FAULT = "frontend_fault"
    ENGINE = "engine"
    """The engine ended it of its own accord, as when it shuts down."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, of the model's raw distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the most likely tokens, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Output tokens `start` to `end - 1` were sampled with weights of this label."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeFrom:
    """Where an aborted request stopped, ready to be sent back and continued from there.

    A request with it goes on as if it had never stopped: penalties count all its outputs, seeded
    draws go on at their position, and `min_tokens` and `max_tokens` count from the first start. Its
    result is about new tokens only. Where an engine is plain vLLM, all count the earlier outputs as
    part of the prompt: penalties then differ.
    """

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    """All of them, also those that the aborted request brought along itself."""
    num_output_tokens_left: int
    """What `max_tokens`, cut to the model's context, leaves; at least 1."""
    position: int
    """Of the next token: the number of prompt and output tokens."""
    seed: int | None = None
    """As the request gave it."""
    min_tokens_left: int = 0
    stop_tail_text: str = ""
    """The end of the text so far that may be the beginning of a stop string."""
    weight_spans: tuple[WeightSpan, ...] = ()
    """Over `output_token_ids`."""


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a request ended. Every accepted request gets exactly one."""

    finish_reason: FinishReasonName
    stop_reason: int | str | None = None
    """The stop token id or stop string that matched."""
    abort_cause: AbortCause | None = None
    error: OutputError | None = None


class RequestOutput(NamedTuple):
    """One event of a stream. `text`, `token_ids` and `logprobs` are what is new since the event
    before. A named tuple and no dataclass: one a token, and several times cheaper to make.

    The last event has `finish_reason` set, and nothing comes after it.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token, if asked for."""
    num_prompt_tokens: int = 0
    """Without the outputs that a resumed request brought along."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    finish_reason: FinishReasonName | None = None
    stop_reason: int | str | None = None
    abort_cause: AbortCause | None = None
    error: OutputError | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first event, if asked for: one for each prompt token but the first."""
    weight_spans: tuple[WeightSpan, ...] = ()
    """With the last event: which weights sampled the request's new tokens."""
    resume_from: ResumeFrom | None = None
    """With the last event of a request that was aborted, or lost with its engine, unless its
    prompt's tokens were not known yet or nothing is left to be sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """A request's whole outcome. An aborted one carries what was generated until then."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    finish_reason: FinishReasonName
    stop_reason: int | str | None = None
    abort_cause: AbortCause | None = None
    error: OutputError | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    weight_spans: tuple[WeightSpan, ...] = ()
    """Over `token_ids`, in order; none where the engine does not label its weights."""
    resume_from: ResumeFrom | None = None
    """Of a request that was aborted, or lost with its engine, unless its prompt's tokens were not
    known yet or nothing is left to be sampled."""


Stage = Literal["tokenizing", "held", "waiting", "prefill", "decode", "preempted", "ending"]
"""Where a request is. `held`: it waits here for a pause to end. `ending`: it has ended here, and
its engine has not yet said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """A request that holds something, here or in an engine."""

    request_id: str
    aliases: tuple[str, ...] = ()
    """Further names, that of its batch among them."""
    tags: tuple[str, ...] = ()
    stage: Stage
    age_s: float
    """Since it was accepted."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    engine_index: int | None = None
    priority: int = 0
    aborting_cause: AbortCause | None = None
    """Set while an abort is under way."""
    aborting_for_s: float | None = None


ReceiptStatus = Literal["aborted", "finished", "unknown", "pending", "engine_error"]


@dataclass(frozen=True, slots=True)
class AbortedRequest:
    """What became of one request that an abort named."""

    status: ReceiptStatus
    num_output_tokens: int = 0
    stage: str = ""
    """Where the abort found it: tokenizing, held, waiting, prefill, decode or preempted."""


@dataclass(slots=True)
class AbortReceipt:
    """The answer to an explicit abort, given after its effect.

    `requests` is keyed by request id. Blocks that left the requests are counted as freed, or as
    cached if their contents stay in the prefix cache. `engines` says which engines answered.
    """

    requests: dict[str, AbortedRequest] = field(default_factory=dict)
    num_blocks_freed: int = 0
    num_blocks_cached: int = 0
    engines: dict[int, Literal["ok", "timeout", "error"]] = field(default_factory=dict)

    @property
    def num_aborted(self) -> int:
        return sum(request.status == "aborted" for request in self.requests.values())
