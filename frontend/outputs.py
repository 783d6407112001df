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
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    finish_reason: FinishReasonName | None = None
    stop_reason: int | str | None = None
    abort_cause: AbortCause | None = None
    error: OutputError | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first event, if asked for: one for each prompt token but the first."""


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


Stage = Literal["tokenizing", "waiting", "prefill", "decode", "preempted", "ending"]
"""Where a request is. `ending`: it has ended here, and its engine has not yet said so."""


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
    """Where the abort found it: tokenizing, waiting, prefill, decode or preempted."""


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
