"""One utility call to each of several engines, and what became of them.

An engine that dies has answered, in a way: it is no failure of the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Literal

from frontend.engines.engine_client import EngineClient
from frontend.errors import EngineDeadError, EngineTimeoutError, UtilityCallError

EngineOutcome = Literal["ok", "timeout", "error"]


class FanOut:
    """Calls by rank, all of them sent."""

    def __init__(self, calls: Mapping[int, asyncio.Future[object]]) -> None:
        self.calls = dict(calls)

    @classmethod
    def start(
        cls, client: EngineClient, ranks: Collection[int], method: str, *arguments: object
    ) -> FanOut:
        """Send the same call to all."""
        return cls({rank: client.start_call(rank, method, *arguments) for rank in sorted(ranks)})

    def on_result(self, note: Callable[[int, object], object]) -> None:
        """Have `note(rank, result)` called for each engine as soon as it has answered."""

        def pass_on(rank: int, call: asyncio.Future[object]) -> None:
            if not call.cancelled() and call.exception() is None:
                note(rank, call.result())

        for rank, call in self.calls.items():
            call.add_done_callback(partial(pass_on, rank))

    async def wait(self, timeout_s: float, *, until_failure: bool = False) -> None:
        """Return when all have answered or died, or after `timeout_s`; with `until_failure` at the
        first failure already. Calls without an answer stay open.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while pending := [call for call in self.calls.values() if not call.done()]:
            left_s = deadline_s - loop.time()
            if left_s <= 0 or (until_failure and self.failures):
                return
            when = asyncio.FIRST_EXCEPTION if until_failure else asyncio.ALL_COMPLETED
            await asyncio.wait(pending, timeout=left_s, return_when=when)

    def give_up(self) -> None:
        """Nobody waits for the missing answers any more."""
        for call in self.calls.values():
            call.cancel()

    @property
    def unanswered(self) -> list[int]:
        return [rank for rank, call in self.calls.items() if not call.done()]

    @property
    def results(self) -> dict[int, object]:
        """Of those that succeeded."""
        return {
            rank: call.result()
            for rank, call in self.calls.items()
            if call.done() and not call.cancelled() and call.exception() is None
        }

    @property
    def failures(self) -> list[str]:
        """What engines that live said instead, such as "engines 0, 1: no such file"."""
        speakers: dict[str, list[int]] = {}
        for rank, call in self.calls.items():
            if call.done() and not call.cancelled():
                error = call.exception()
                if isinstance(error, UtilityCallError):
                    speakers.setdefault(str(error), []).append(rank)
        return [f"{name_engines(ranks)}: {reason}" for reason, ranks in speakers.items()]

    @property
    def outcomes(self) -> dict[int, EngineOutcome]:
        results, unanswered = self.results, self.unanswered
        return {
            rank: "ok" if rank in results else "timeout" if rank in unanswered else "error"
            for rank in self.calls
        }

    def answers(self, what: str) -> dict[int, object]:
        """The results of all that live. `what` was asked for, as in "the flush".

        Raises UtilityCallError, EngineTimeoutError or, if none lives, EngineDeadError.
        """
        if failures := self.failures:
            raise UtilityCallError("; ".join(failures))
        if late := self.unanswered:
            raise EngineTimeoutError(f"{name_engines(late)} did not answer {what} in time")
        if not (results := self.results):
            raise EngineDeadError(f"no engine lived to answer {what}")
        return results


def name_engines(ranks: Collection[int]) -> str:
    """Such as "engines 0, 2"."""
    names = ", ".join(map(str, ranks))
    return f"engine {names}" if len(ranks) == 1 else f"engines {names}"
