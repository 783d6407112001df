"""A server's way from idle through a load, a pause, a resume and another load, back to idle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ipc.pause import PauseMode
from scripts.control_bench.client import Answer, Control, TokenStream, make_prompt
from scripts.control_bench.server import Books, read_books, read_counters, until_idle

PROMPT_TOKENS = 64
NEWCOMER_TOKENS = 32
QUIET_S = 0.15
"""Nothing may happen for so long, twice, while it is paused."""
PATIENCE_S = 120.0
"""For requests to end that should."""

NewcomerRule = Literal["hold", "reject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """How large a life is."""

    num_running: int
    """Sequences that run at a time, as the server was told."""
    num_streams: int
    num_tokens: int
    """Of each stream."""
    num_newcomers: int
    """While it drains, and as many while it is paused."""
    num_later: int
    num_later_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One, as its clients saw it."""

    mode: PauseMode
    rule: NewcomerRule
    pause: Answer
    resume: Answer
    before: Books
    """An instant before the pause."""
    paused: Books
    """At once after its answer."""
    still: Books
    """At its end."""
    after: Books
    """When all is over."""
    probes: tuple[int, int]
    """/ready and /health while it was paused."""
    streams: list[TokenStream]
    newcomers: list[TokenStream]
    later: list[TokenStream]
    counters: dict[str, float]
    """By how much the server's own rose."""


async def live(port: int, scene: Scene, mode: PauseMode, rule: NewcomerRule, number: int) -> Life:
    """`number` makes the life's prompts and its moment of the pause its own."""
    chance = random.Random(f"{mode} {rule} {number}")
    control, probe = await Control.open(port), await Control.open(port)
    prompts = (make_prompt(1000 * number + place, PROMPT_TOKENS) for place in range(1000))
    streams = await _open(port, prompts, scene.num_streams, scene.num_tokens)
    draining = await _open(port, prompts, scene.num_newcomers, NEWCOMER_TOKENS)
    late = await _open(port, prompts, scene.num_newcomers, NEWCOMER_TOKENS)
    later = await _open(port, prompts, scene.num_later, scene.num_later_tokens)
    counters = await read_counters(control)

    _send(streams)
    first_tokens = [stream.connection.first_event for stream in streams]
    for beginning in islice(asyncio.as_completed(first_tokens), scene.num_running):
        await beginning
    await asyncio.sleep(chance.uniform(0.05, 0.1))
    before = await read_books(control)
    pausing = asyncio.create_task(control.post("/v1/pause", {"mode": mode, "newcomers": rule}))
    await _until_not_ready(probe)
    _send(draining)
    pause = await pausing
    paused = await read_books(control)
    await asyncio.sleep(QUIET_S)
    _send(late)
    await asyncio.sleep(QUIET_S)
    still = await read_books(control)
    probes = (await probe.get("/ready")).status, (await probe.get("/health")).status

    resume = await control.post("/v1/resume")
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(stream.ended for stream in (*streams, *draining, *late)))
        _send(later)
        await asyncio.gather(*(stream.ended for stream in later))
    after = await until_idle(control)
    told = await read_counters(control)
    control.close()
    probe.close()
    for stream in (*streams, *draining, *late, *later):
        stream.close()
    return Life(
        mode=mode,
        rule=rule,
        pause=pause,
        resume=resume,
        before=before,
        paused=paused,
        still=still,
        after=after,
        probes=probes,
        streams=streams,
        newcomers=[*draining, *late],
        later=later,
        counters={series: value - counters.get(series, 0.0) for series, value in told.items()},
    )


async def _open(
    port: int, prompts: Iterator[list[int]], how_many: int, num_tokens: int
) -> list[TokenStream]:
    """Connected, so that sending them later takes no time."""
    return [await TokenStream.open(port, next(prompts), num_tokens) for _ in range(how_many)]


def _send(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.send()


async def _until_not_ready(probe: Control) -> None:
    """The pause has begun. Raises RuntimeError."""
    for _ in range(1000):
        if (await probe.get("/ready")).status == 503:
            return
    raise RuntimeError("/ready is 200 although a pause was asked for")
