"""vLLM's routes for pausing, and for its prefix cache. Fields are in the query, or in a JSON body.

`keep` holds newcomers. `abort` and `wait` refuse them with 503, as vLLM does since 0.33; as in 0.32
they are held too if the server is told so.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import read_optional_body, read_query_or_body
from frontend.http.exchange import Exchange
from frontend.http.pauses import PauseReply, ResumeReply
from frontend.http.router import Route
from ipc.pause import EngineState


class VllmPauseQuery(Struct, forbid_unknown_fields=True):
    mode: Literal["abort", "wait", "keep"] = "abort"
    clear_cache: bool = True
    """Empty the prefix cache; with `keep`, requests that have begun are recomputed after the
    resume."""
    wait_for_inflight_requests: bool = False
    """vLLM's older word for the mode `wait`; counts where no other mode is given."""


class VllmResumeBody(Struct, forbid_unknown_fields=True):
    """It has no fields, and refuses those that would mean something elsewhere."""


class VllmPauseReply(PauseReply, kw_only=True):
    status: Literal["paused"] = "paused"


class VllmResumeReply(ResumeReply, kw_only=True):
    status: Literal["resumed"] = "resumed"


class IsPausedReply(Struct):
    is_paused: bool
    """False while a pause drains."""
    state: EngineState


class ResetQuery(Struct, forbid_unknown_fields=True):
    reset_running_requests: bool = False
    """Have requests that have begun recomputed; without it, they prevent the reset."""
    reset_external: bool = False
    """Has no effect: there is no cache outside the engines."""


class ResetReply(Struct):
    success: bool
    message: str | UnsetType = UNSET
    """If not, why."""


_REFUSAL = (
    "The cache was not emptied: %d requests are live, and some hold KV blocks. Abort or retract "
    "them, wait for them, or have them recomputed with ?reset_running_requests=true."
)


def routes(engine: AsyncEngine, *, hold_while_paused: bool) -> list[Route]:
    async def pause(exchange: Exchange) -> None:
        query = read_query_or_body(exchange.query, exchange.body, VllmPauseQuery)
        waits = query.mode == "abort" and query.wait_for_inflight_requests
        report = await engine.pause(
            "wait" if waits else query.mode,
            clear_cache=query.clear_cache,
            newcomers="hold" if query.mode == "keep" or hold_while_paused else "reject",
        )
        exchange.respond_json(VllmPauseReply.of(report))

    async def resume(exchange: Exchange) -> None:
        read_optional_body(exchange.body, VllmResumeBody)
        exchange.respond_json(VllmResumeReply.of(await engine.resume()))

    def is_paused(exchange: Exchange) -> None:
        state = engine.pause_state.state
        exchange.respond_json(IsPausedReply(state == "paused", state))

    async def reset_prefix_cache(exchange: Exchange) -> None:
        query = read_query_or_body(exchange.query, exchange.body, ResetQuery)
        success = await engine.flush_cache(reset_running_requests=query.reset_running_requests)
        message = UNSET if success else _REFUSAL % engine.num_live_requests
        exchange.respond_json(ResetReply(success, message))

    return [
        Route(
            method="POST",
            path="/pause",
            handler=pause,
            summary="Pause all engines; answers when nothing is in flight",
            tag="vLLM",
            access=Access.ADMIN,
            query=VllmPauseQuery,
            reply=VllmPauseReply,
        ),
        Route(
            method="POST",
            path="/resume",
            handler=resume,
            summary="Resume all engines, from any state",
            tag="vLLM",
            access=Access.ADMIN,
            reply=VllmResumeReply,
        ),
        Route(
            method="GET",
            path="/is_paused",
            handler=is_paused,
            summary="Whether a pause holds; answers at once",
            tag="vLLM",
            access=Access.ADMIN,
            reply=IsPausedReply,
        ),
        Route(
            method="POST",
            path="/reset_prefix_cache",
            handler=reset_prefix_cache,
            summary="Empty the prefix cache, unless requests hold blocks",
            tag="vLLM",
            access=Access.ADMIN,
            query=ResetQuery,
            reply=ResetReply,
        ),
    ]
