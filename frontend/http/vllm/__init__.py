"""vLLM's routes beside OpenAI's: control, and generation from token ids to token ids."""

from __future__ import annotations

from frontend.async_engine import AsyncEngine
from frontend.http.router import Route
from frontend.http.vllm import aborts, generate, pauses, weights


def routes(
    engine: AsyncEngine, *, strict_selectors: bool = False, hold_while_paused: bool = False
) -> list[Route]:
    """`strict_selectors`: an abort that names nothing is refused, instead of aborting everything
    as in vLLM. `hold_while_paused`: every pause holds newcomers, as in vLLM 0.32.
    """
    return [
        *generate.routes(engine),
        *aborts.routes(engine, strict_selectors=strict_selectors),
        *pauses.routes(engine, hold_while_paused=hold_while_paused),
        *weights.routes(engine),
    ]
