"""vLLM's routes beside OpenAI's: aborts, and generation from token ids to token ids."""

from __future__ import annotations

from frontend.async_engine import AsyncEngine
from frontend.http.router import Route
from frontend.http.vllm import aborts, generate


def routes(engine: AsyncEngine, *, strict_selectors: bool = False) -> list[Route]:
    """`strict_selectors`: an abort that names nothing is refused, instead of aborting everything
    as in vLLM.
    """
    return [*generate.routes(engine), *aborts.routes(engine, strict_selectors=strict_selectors)]
