"""Our server with a real model, and what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from frontend.config import BUNDLED_MODEL_DIRECTORY
from scripts.control_bench.client import Answer, Control
from scripts.http_bench.servers import CAESURA, RunningServer, Server, serving

IDLE_READS = 200


@contextlib.contextmanager
def own_server(*flags: str, model: str = str(BUNDLED_MODEL_DIRECTORY)) -> Iterator[RunningServer]:
    """`caesura serve` in float32, with one engine of its own. Raises RuntimeError."""
    command = [sys.executable, "-P", "-m", "frontend.cli", "serve", "{model}", "--port", "{port}"]
    command += ["--dtype", "float32", *flags]
    text = " ".join(each if "{" in each else shlex.quote(each) for each in command)
    with serving(Server(CAESURA, text), model, 1, 0) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Books:
    """What `/v1/status` says of the engine, at one boundary between two of its steps."""

    state: str
    num_held: int
    """Newcomers that the front end holds."""
    num_live: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_steps: int
    integrity_errors: tuple[str, ...]

    @classmethod
    def of(cls, answer: Answer) -> Books:
        """Raises RuntimeError if that was no success, or an engine did not answer."""
        status = answer.checked()
        engine: dict[str, Any] = status["engines"]["0"]
        if "num_blocks" not in engine:
            raise RuntimeError(f"the engine did not say how it is: {status}")
        return cls(
            state=status["state"],
            num_held=status["num_held"],
            num_live=status["num_live_requests"],
            integrity_errors=tuple(engine.get("integrity_errors") or ()),
            **{name: engine[name] for name in cls.__slots__ if name in _ENGINES_OWN},
        )

    @property
    def num_blocks_held(self) -> int:
        """By requests."""
        return self.num_blocks - self.num_free_blocks - self.num_cached_blocks

    @property
    def is_idle(self) -> bool:
        """Nothing is left of any request."""
        return not (self.num_live or self.num_blocks_held or self.integrity_errors)


_ENGINES_OWN = {
    "num_running",
    "num_waiting",
    "num_blocks",
    "num_free_blocks",
    "num_cached_blocks",
    "num_steps",
}


async def read_books(control: Control) -> Books:
    """Raises RuntimeError."""
    return Books.of(await control.get("/v1/status"))


async def read_counters(control: Control) -> dict[str, float]:
    """`/metrics`: series, as they are written there, to values."""
    page = (await control.get("/metrics")).body
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in lines}


async def until_idle(control: Control) -> Books:
    """The books when nothing is live any more, or after two seconds all the same."""
    for _ in range(IDLE_READS):
        books = await read_books(control)
        if books.is_idle:
            break
        await asyncio.sleep(2.0 / IDLE_READS)
    return books
