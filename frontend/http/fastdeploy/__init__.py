"""FastDeploy's control routes. `/v1/pause` and `/v1/resume` are also Caesura's own, and served by
`frontend.http.pauses`.
"""

from __future__ import annotations

from frontend.async_engine import AsyncEngine
from frontend.http.fastdeploy import aborts, updates
from frontend.http.router import Route


def routes(engine: AsyncEngine) -> list[Route]:
    return [*aborts.routes(engine), *updates.routes(engine)]
