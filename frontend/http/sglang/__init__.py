"""SGLang's HTTP server, as far as RL frameworks and routers call it."""

from __future__ import annotations

from frontend.async_engine import AsyncEngine
from frontend.http.router import Route
from frontend.http.sglang import aborts, generate, info, pauses, weight_groups, weights


def routes(engine: AsyncEngine) -> list[Route]:
    return [
        *generate.routes(engine),
        *aborts.routes(engine),
        *pauses.routes(engine),
        *weights.routes(engine),
        *weight_groups.routes(engine),
        *info.routes(engine),
    ]
