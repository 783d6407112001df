"""How the server is: for load balancers, orchestrators and Prometheus.

`/health` is 503 when restarting the process would help, `/ready` when requests should go elsewhere:
a server that shuts down or is paused is healthy, but not ready.
"""

from __future__ import annotations

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.errors import ENGINE_PAUSED
from frontend.http.access import Access
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Handler, Route
from frontend.metrics.exposition import Exposition
from frontend.version import version

_STATUS_TIMEOUT_S = 0.5


class VersionReply(msgspec.Struct):
    version: str


class LoadReply(msgspec.Struct):
    server_load: int
    """Requests that were accepted and have not ended."""


def routes(engine: AsyncEngine) -> list[Route]:
    exposition = Exposition(
        engine.metrics,
        engine,
        num_engines=engine.config.data_parallel_size,
        model_name=engine.served_model_name,
        version=version(),
    )

    def health(exchange: Exchange) -> None:
        if not engine.is_healthy:
            raise ApiError(503, "no engine can serve; restart the server", code="engine_dead")
        exchange.respond(200)

    def ready(exchange: Exchange) -> None:
        if not engine.is_ready:
            if not engine.alive_engines:
                raise ApiError(503, "no engine can serve", code="engine_dead")
            state = engine.pause_state.state
            if state != "running":
                raise ApiError(503, f"the server is {state}; resume it", code=ENGINE_PAUSED)
            raise ApiError(503, "the server is shutting down", code="shutdown")
        exchange.respond(200)

    def tell_version(exchange: Exchange) -> None:
        exchange.respond_json(VersionReply(version()))

    def load(exchange: Exchange) -> None:
        exchange.respond_json(LoadReply(engine.num_live_requests))

    async def metrics(exchange: Exchange) -> None:
        await engine.status(
            _STATUS_TIMEOUT_S, check_integrity=False
        )  # It brings the engines' own counters.
        body, content_type = exposition.render(exchange.headers.get("accept", ""))
        exchange.respond(200, body, content_type)

    return [
        _open("/health", health, "Whether an engine can serve: 200 or 503", tag="Caesura"),
        _open("/ping", health, "The same as /health, for SageMaker", tag="vLLM"),
        _open("/ready", ready, "Whether requests are accepted now: 200 or 503", tag="Caesura"),
        _open("/version", tell_version, "The server's version", tag="vLLM", reply=VersionReply),
        _open("/load", load, "How many requests are live", tag="vLLM", reply=LoadReply),
        _open("/metrics", metrics, "Prometheus metrics", tag="Caesura"),
    ]


def _open(
    path: str,
    handler: Handler,
    summary: str,
    *,
    tag: str,
    reply: type[msgspec.Struct] | None = None,
) -> Route:
    return Route(
        method="GET",
        path=path,
        handler=handler,
        summary=summary,
        tag=tag,
        access=Access.OPEN,
        reply=reply,
    )
