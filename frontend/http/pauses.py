"""Pauses over HTTP: Caesura's own routes, and what every dialect's have in common.

A dialect's pause route says how to pause and puts the `PauseReport` into its reply; the pause
itself is the engine's. `/v1/pause` and `/v1/resume` are FastDeploy's paths too: its calls have no
body, and get its defaults; the replies have its fields beside ours.

Invariants
- A pause is answered when it holds. A client that hangs up before does not take it back.
- `/v1/status` answers also while a pause drains, and where an engine does not answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta, Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import read_body, read_optional_body
from frontend.http.control import Name
from frontend.http.exchange import Exchange
from frontend.http.fastdeploy.replies import control_id, error_body
from frontend.http.router import Route
from frontend.requests.fan_out import EngineOutcome
from frontend.requests.pause_gate import NewcomerRule
from frontend.requests.pause_reports import PauseReport, ResumeReport
from ipc.lifecycle import EngineStatus
from ipc.pause import EngineState, PauseMode

PAUSE_TIMEOUT_S = 60.0
RESUME_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 1.0
"""Within a step; an engine whose step takes longer is told as unreachable."""

PauseId = Annotated[Name, Meta(max_length=256)]
Seconds = Annotated[float, Meta(ge=0.0, le=600.0)]


class PauseReply(Struct, kw_only=True):
    """What a pause did. Every pause route has these fields in its reply."""

    pause_id: str
    """To resume this pause and no other."""
    state: EngineState
    duration_s: float
    """From the call until the pause held."""
    num_aborted: int
    num_kept: int
    """Requests that are frozen with their KV."""
    num_retracted: int
    """Requests whose KV was freed; they are recomputed after the resume."""
    num_held: int
    """Newcomers that wait for the resume."""
    num_blocks_freed: int
    num_blocks_cached: int
    engines: dict[int, EngineOutcome]

    @classmethod
    def of(cls, report: PauseReport, **fields: Any) -> Self:
        """`fields` are those that a dialect's reply adds."""
        return cls(**_told(report, PauseReply), **fields)


class ResumeReply(Struct, kw_only=True):
    """What a resume ended. Every resume route has these fields in its reply."""

    was: EngineState
    """The state before: `running` if there was nothing to resume."""
    pause_id: str | None
    paused_for_s: float
    """Since it last ran, earlier pauses and their draining included."""
    num_released: int
    """Newcomers that had been held, and are on their way now."""
    engines: dict[int, EngineOutcome]

    @classmethod
    def of(cls, report: ResumeReport, **fields: Any) -> Self:
        return cls(**_told(report, ResumeReply), **fields)


def _told(report: object, reply: type[Struct]) -> dict[str, Any]:
    return {name: getattr(report, name) for name in reply.__struct_fields__}


class PauseBody(Struct, forbid_unknown_fields=True):
    """Without any body, the call is FastDeploy's: `abort`, `clear_cache` and `reject`."""

    mode: PauseMode = "abort"
    """What becomes of requests that have begun: they end with what they have (`abort`), finish
    (`wait`), freeze with their KV (`keep`), or give it up and are recomputed later (`retract`)."""
    clear_cache: bool = False
    """Empty the prefix cache; `keep` is `retract` then."""
    newcomers: NewcomerRule = "hold"
    """Whether requests that come meanwhile wait for the resume, or are refused with 503."""
    lease_s: Annotated[float, Meta(gt=0.0)] | None = None
    """After this time all engines resume by themselves."""
    pause_id: PauseId | None = None
    """A name for this pause; null makes one up."""
    timeout_s: Seconds = PAUSE_TIMEOUT_S
    """How long to wait for the pause to hold; then 504, and it goes on draining."""


FASTDEPLOYS_PAUSE = PauseBody(mode="abort", clear_cache=True, newcomers="reject")


class ResumeBody(Struct, forbid_unknown_fields=True):
    pause_id: PauseId | None = None
    """The pause to end; if another one holds, the call is refused with 409. Null ends any."""
    timeout_s: Seconds = RESUME_TIMEOUT_S
    """How long to wait for the engines to confirm; the reply names those that have not."""


class CaesuraPauseReply(PauseReply, kw_only=True):
    """The last four fields are what FastDeploy's clients read."""

    request_id: str = msgspec.field(default_factory=control_id)
    status: Literal["success"] = "success"
    error_message: None = None
    result: None = None


class CaesuraResumeReply(ResumeReply, kw_only=True):
    """The last four fields are what FastDeploy's clients read."""

    request_id: str = msgspec.field(default_factory=control_id)
    status: Literal["success"] = "success"
    error_message: None = None
    result: None = None


class EngineCard(Struct, kw_only=True, omit_defaults=True):
    """What an engine says of itself; one that is `dead` or `unreachable` says nothing."""

    state: EngineState | Literal["dead", "unreachable"]
    pause_id: str | None = None
    num_running: int | None = None
    num_waiting: int | None = None
    num_blocks: int | None = None
    """All of them: free, cached or held by requests."""
    num_free_blocks: int | None = None
    num_cached_blocks: int | None = None
    num_steps: int | None = None
    weight_version: str | None = None
    weight_epoch: int | None = None
    """How many weight updates took effect."""
    integrity_errors: tuple[str, ...] | None = None
    """What is wrong in its books; it should be empty."""


class StatusReply(Struct, kw_only=True):
    state: EngineState
    for_s: float
    """How long it has been in this state."""
    pause_id: str | None
    mode: PauseMode | None
    newcomers: NewcomerRule | None
    num_held: int
    """Newcomers that wait for the resume."""
    lease_left_s: float | None
    """When it resumes by itself; null is never."""
    shutdown_left_s: float | None
    """How long requests may still run; null unless the server is shutting down."""
    weight_version: str | None
    """Null if engines differ, or nobody has named it."""
    num_live_requests: int
    engines: dict[int, EngineCard]


def pause_routes(engine: AsyncEngine) -> list[Route]:
    """Caesura's own, two of them shared with FastDeploy."""

    async def pause(exchange: Exchange) -> None:
        body = FASTDEPLOYS_PAUSE
        if exchange.body.strip():
            body = read_body(exchange.body, PauseBody)
        report = await engine.pause(
            body.mode,
            clear_cache=body.clear_cache,
            newcomers=body.newcomers,
            lease_s=body.lease_s,
            pause_id=body.pause_id,
            timeout_s=body.timeout_s,
        )
        exchange.respond_json(CaesuraPauseReply.of(report))

    async def resume(exchange: Exchange) -> None:
        body = read_optional_body(exchange.body, ResumeBody)
        report = await engine.resume(body.pause_id, timeout_s=body.timeout_s)
        exchange.respond_json(CaesuraResumeReply.of(report))

    async def status(exchange: Exchange) -> None:
        statuses = await engine.status(STATUS_TIMEOUT_S)
        pause = engine.pause_state
        reply = StatusReply(
            state=pause.state,
            for_s=pause.for_s,
            pause_id=pause.pause_id,
            mode=pause.mode,
            newcomers=pause.newcomers,
            num_held=pause.num_held,
            lease_left_s=pause.lease_left_s,
            shutdown_left_s=engine.shutdown_left_s,
            weight_version=engine.weight_version,
            num_live_requests=engine.num_live_requests,
            engines={
                rank: _card(statuses.get(rank), is_alive=rank in engine.alive_engines)
                for rank in range(engine.config.data_parallel_size)
            },
        )
        exchange.respond_json(reply)

    return [
        Route(
            method="POST",
            path="/v1/pause",
            handler=pause,
            summary="Pause all engines; answers when nothing is in flight",
            tag="Caesura",
            access=Access.ADMIN,
            body=PauseBody,
            body_is_optional=True,
            reply=CaesuraPauseReply,
            error_body=error_body,
        ),
        Route(
            method="POST",
            path="/v1/resume",
            handler=resume,
            summary="Resume all engines, from any state",
            tag="Caesura",
            access=Access.ADMIN,
            body=ResumeBody,
            body_is_optional=True,
            reply=CaesuraResumeReply,
            error_body=error_body,
        ),
        Route(
            method="GET",
            path="/v1/status",
            handler=status,
            summary="Whether the server runs, drains or is paused, and each engine's own word",
            tag="Caesura",
            access=Access.ADMIN,
            reply=StatusReply,
        ),
    ]


def _card(status: EngineStatus | None, *, is_alive: bool) -> EngineCard:
    if status is None:
        return EngineCard(state="unreachable" if is_alive else "dead")
    return EngineCard(**_told(status, EngineCard))
