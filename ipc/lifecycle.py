"""The payloads of Caesura's own utilities: receipts of aborts, an engine's status, its requests.

They travel as results of utility calls, so their wire form is plain data, keyed by field name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from ipc import expect
from ipc.errors import mismatch, shorten

CAESURA_ABORT = "caesura_abort"
"""Arguments: request ids, cause. Result: AbortReceipt."""
CAESURA_STATUS = "caesura_status"
"""Argument: whether to check the books, by default true. Result: EngineStatus."""
CAESURA_REQUESTS = "caesura_requests"
"""No arguments. Result: LiveRequests, those of the calling client."""

AbortStatus = Literal["aborted", "finished", "unknown", "pending", "engine_error"]


@dataclass(frozen=True, slots=True)
class RequestReceipt:
    """What an abort found of one request."""

    status: AbortStatus
    num_output_tokens: int = 0
    stage: str | None = None
    """Where the request was: waiting, prefill, decode or preempted; None if unknown."""

    def to_wire(self) -> dict[str, object]:
        return {
            "status": self.status,
            "num_output_tokens": self.num_output_tokens,
            "stage": self.stage,
        }

    @classmethod
    def from_wire(cls, value: object, path: str = "receipt") -> RequestReceipt:
        fields = expect.mapping(value, path)
        status = expect.text(fields.get("status"), f"{path}.status")
        if status not in get_args(AbortStatus):
            raise mismatch(f"{path}.status", status, f"one of {', '.join(get_args(AbortStatus))}")
        return cls(
            cast(AbortStatus, status),
            expect.count(fields.get("num_output_tokens", 0), f"{path}.num_output_tokens"),
            expect.optional(expect.text, fields.get("stage"), f"{path}.stage"),
        )


@dataclass(frozen=True, slots=True)
class AbortReceipt:
    """What an abort did, by request id. Of the blocks it took from requests, the cached ones still
    hold a prefix."""

    requests: dict[str, RequestReceipt] = field(default_factory=dict)
    num_blocks_freed: int = 0
    num_blocks_cached: int = 0

    def to_wire(self) -> dict[str, object]:
        return {
            "requests": {
                request_id: receipt.to_wire() for request_id, receipt in self.requests.items()
            },
            "num_blocks_freed": self.num_blocks_freed,
            "num_blocks_cached": self.num_blocks_cached,
        }

    @classmethod
    def from_wire(cls, value: object, path: str = "abort_receipt") -> AbortReceipt:
        fields = expect.mapping(value, path)
        requests = expect.mapping(fields.get("requests"), f"{path}.requests")
        return cls(
            {
                expect.text(request_id, f"{path}.requests"): RequestReceipt.from_wire(
                    receipt, f"{path}.requests[{shorten(request_id)}]"
                )
                for request_id, receipt in requests.items()
            },
            expect.count(fields.get("num_blocks_freed", 0), f"{path}.num_blocks_freed"),
            expect.count(fields.get("num_blocks_cached", 0), f"{path}.num_blocks_cached"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """An engine's state between two steps. Blocks are free, or cached, or held by requests."""

    state: str
    """running, draining or paused."""
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_steps: int = 0
    pause_id: str | None = None
    pause_mode: str | None = None
    state_for_ms: int = 0
    """How long it has been in this state."""
    weight_version: str | None = None
    weight_epoch: int = 0
    """How many weight updates took effect."""
    integrity_errors: tuple[str, ...] = ()
    """What `check_integrity` found wrong; empty is healthy."""
    counters: dict[str, int] = field(default_factory=dict)
    """Since the engine started: requests_added, requests_refused, requests_aborted,
    duplicate_ids_ignored, abort_frames, malformed_messages, integrity_violations, preemptions,
    retractions; tokens_computed (run through the model, recomputed ones again),
    prefix_cache_queried_tokens (of prompts) and, of these, prefix_cache_hit_tokens."""

    def to_wire(self) -> dict[str, object]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"integrity_errors": list(self.integrity_errors)}

    @classmethod
    def from_wire(cls, value: object, path: str = "engine_status") -> EngineStatus:
        fields = expect.mapping(value, path)
        counts: dict[str, Any] = {
            name: expect.count(fields.get(name, 0), f"{path}.{name}")
            for name in cls.__slots__
            if name.startswith("num_") or name in ("state_for_ms", "weight_epoch")
        }
        names: dict[str, Any] = {
            name: expect.optional(expect.text, fields.get(name), f"{path}.{name}")
            for name in ("pause_id", "pause_mode", "weight_version")
        }
        counters = expect.mapping(fields.get("counters", {}), f"{path}.counters")
        return cls(
            state=expect.text(fields.get("state"), f"{path}.state"),
            integrity_errors=tuple(
                expect.texts(fields.get("integrity_errors", []), f"{path}.integrity_errors")
            ),
            counters={
                expect.text(name, f"{path}.counters"): expect.integer(
                    count, f"{path}.counters[{shorten(name)}]"
                )
                for name, count in counters.items()
            },
            **counts,
            **names,
        )


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that an engine has not ended yet."""

    stage: str
    """waiting, prefill, decode or preempted."""
    num_output_tokens: int
    num_preemptions: int = 0

    def to_wire(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, value: object, path: str = "live_request") -> LiveRequest:
        fields = expect.mapping(value, path)
        return cls(
            expect.text(fields.get("stage"), f"{path}.stage"),
            expect.count(fields.get("num_output_tokens"), f"{path}.num_output_tokens"),
            expect.count(fields.get("num_preemptions", 0), f"{path}.num_preemptions"),
        )


@dataclass(frozen=True, slots=True)
class LiveRequests:
    """A client's live requests in one engine, by id, in order of arrival."""

    requests: dict[str, LiveRequest] = field(default_factory=dict)

    def to_wire(self) -> dict[str, object]:
        return {request_id: request.to_wire() for request_id, request in self.requests.items()}

    @classmethod
    def from_wire(cls, value: object, path: str = "live_requests") -> LiveRequests:
        return cls(
            {
                expect.text(request_id, path): LiveRequest.from_wire(
                    request, f"{path}[{shorten(request_id)}]"
                )
                for request_id, request in expect.mapping(value, path).items()
            }
        )
