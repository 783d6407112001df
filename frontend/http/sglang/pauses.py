"""SGLang's routes for pausing, and for its prefix cache.

A pause is answered when it holds, in every mode; newcomers are held. Nothing deadlocks: an `abort`
after an `in_place` ends what that one holds.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from msgspec import Meta, Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import read_optional_body, read_query
from frontend.http.exchange import TEXT, Exchange
from frontend.http.pauses import PauseReply, ResumeReply
from frontend.http.router import Route
from ipc.pause import PauseMode

SglangMode = Literal["abort", "retract", "in_place"]
_MODES: dict[SglangMode, PauseMode] = {"abort": "abort", "retract": "retract", "in_place": "keep"}
_FLUSH_RETRY_S = 0.05


class SglangPauseBody(Struct, forbid_unknown_fields=True):
    mode: SglangMode = "abort"
    """`in_place` keeps the KV of requests that have begun, `retract` frees it."""


class SglangContinueBody(Struct, forbid_unknown_fields=True):
    torch_empty_cache: bool = True
    """Has no effect."""


class SglangPauseReply(PauseReply, kw_only=True):
    status: Literal["ok"] = "ok"
    message: str = "Generation paused successfully."


class SglangContinueReply(ResumeReply, kw_only=True):
    status: Literal["ok"] = "ok"
    message: str = "Generation continued successfully."


class FlushQuery(Struct, forbid_unknown_fields=True):
    timeout: Annotated[float, Meta(ge=0.0, le=600.0)] = 0.0
    """How many seconds to wait for the engines to be idle."""


def routes(engine: AsyncEngine) -> list[Route]:
    async def pause(exchange: Exchange) -> None:
        body = read_optional_body(exchange.body, SglangPauseBody)
        exchange.respond_json(SglangPauseReply.of(await engine.pause(_MODES[body.mode])))

    async def resume(exchange: Exchange) -> None:
        read_optional_body(exchange.body, SglangContinueBody)
        exchange.respond_json(SglangContinueReply.of(await engine.resume()))

    async def flush_cache(exchange: Exchange) -> None:
        query = read_query(exchange.query, FlushQuery)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + query.timeout
        is_flushed = await engine.flush_cache()
        while not is_flushed and loop.time() < deadline_s:
            await asyncio.sleep(_FLUSH_RETRY_S)
            is_flushed = await engine.flush_cache()
        if is_flushed:
            exchange.respond(200, b"Cache flushed.\n", TEXT)
        else:
            exchange.respond(400, _busy(engine.num_live_requests).encode(), TEXT)

    return [
        Route(
            method="POST",
            path="/pause_generation",
            handler=pause,
            summary="Pause all engines; answers when nothing is in flight",
            tag="SGLang",
            access=Access.ADMIN,
            body=SglangPauseBody,
            body_is_optional=True,
            reply=SglangPauseReply,
        ),
        Route(
            method="POST",
            path="/continue_generation",
            handler=resume,
            summary="Resume all engines, from any state",
            tag="SGLang",
            access=Access.ADMIN,
            body=SglangContinueBody,
            body_is_optional=True,
            reply=SglangContinueReply,
        ),
        *(
            Route(
                method=method,
                path="/flush_cache",
                handler=flush_cache,
                summary="Empty the prefix cache, unless requests hold blocks; answers in text",
                tag="SGLang",
                access=Access.ADMIN,
                query=FlushQuery,
            )
            for method in ("GET", "POST")
        ),
    ]


def _busy(num_requests: int) -> str:
    return (
        f"The cache was not flushed: {num_requests} requests are live, and some hold KV blocks. "
        "Abort or retract them, or wait for them with ?timeout=SECONDS.\n"
    )
