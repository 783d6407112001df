"""An event loop without a clock: time stands still while anything can run, then leaps to whatever
comes next.

Two kinds of things happen in it. asyncio's own callbacks and timers are the front end's process;
`at` adds what happens elsewhere: a network delivers, an engine takes a turn, a machine dies. A
suspended front end (`stall`) lets the world go on without it.

Invariants
- The same calls happen in the same order for the same program: nothing depends on real time,
  threads, hashes or addresses.
- Whoever waits for what can never come is told: `Deadlock`, and `Livelock` if there is no end.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

_Result = TypeVar("_Result")

MAX_LAST_TURNS = 50
MAX_EVENTS = 300_000
"""A run of a few dozen operations has a few thousand."""
EXECUTOR_DELAYS_S = (0.0001, 0.0005, 0.002, 0.01)


class Deadlock(Exception):
    """Nothing is left to happen, and the main task waits."""


class Livelock(Exception):
    """Events without end."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs one main task to its end, in virtual time."""

    def __init__(self, chance: random.Random, *, start_s: float = 0.0) -> None:
        super().__init__()
        self._chance = chance
        self._now = start_s
        self._soon: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._world: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._num_scheduled = 0
        self._stalled_until = -math.inf
        self.faults: list[str] = []
        """Exceptions that nobody caught, each as a line."""
        self.should_stop = False
        """Ends `run` at the next event, as a crash does."""

    # -- asyncio's side ------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]  # typeshed's is generic over the arguments
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if self.is_closed():
            raise RuntimeError("the loop is closed")
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_scheduled += 1
        heapq.heappush(self._timers, (when, self._num_scheduled, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It falls out when its time comes."""

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """The function runs a while later, at one moment, as if on a thread."""
        future = self.create_future()

        def settle(result: object, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def work() -> None:
            result, failure = None, None
            try:
                result = func(*args)
            except Exception as error:
                failure = error
            self.call_soon(settle, result, failure)

        self.at(self._now + self._chance.choice(EXECUTOR_DELAYS_S), work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.is_closed():
            return
        error = context.get("exception")
        what = f"{type(error).__name__}: {error}" if error is not None else "no exception"
        self.faults.append(f"{context.get('message')} ({what})")

    # -- the world's side ----------------------------------------------------------------------

    def at(self, when: float, function: Callable[..., object], *args: Any) -> None:
        """Something happens outside the front end's process."""
        self._num_scheduled += 1
        heapq.heappush(self._world, (max(when, self._now), self._num_scheduled, function, args))

    def stall(self, duration_s: float) -> None:
        """The front end's process is suspended for so long."""
        self._stalled_until = max(self._stalled_until, self._now + duration_s)

    @property
    def is_stalled(self) -> bool:
        return self._now < self._stalled_until

    def heal(self) -> None:
        """A suspended front end goes on at once."""
        self._stalled_until = -math.inf

    # -- running -------------------------------------------------------------------------------

    def run(
        self,
        main: Coroutine[Any, Any, _Result],
        after_event: Callable[[], object] = lambda: None,
    ) -> _Result | None:
        """Run until `main` ends, and return its result; None if `should_stop` came first.

        `after_event` is called after each event of either side. Raises Deadlock or Livelock.
        """
        asyncio._set_running_loop(self)
        try:
            task = asyncio.Task(main, loop=self)
            for _ in range(MAX_EVENTS):
                if self.should_stop:
                    return None
                if task.done():
                    return task.result()
                self._run_next()
                after_event()
            raise Livelock(f"more than {MAX_EVENTS} events")
        finally:
            asyncio._set_running_loop(None)

    def abandon(self) -> None:
        """The process is gone. Its tasks end so that Python has nothing to complain about; what
        they do then counts no more.
        """
        asyncio._set_running_loop(self)
        try:
            tasks = asyncio.all_tasks(self)
            for _ in range(MAX_LAST_TURNS):
                for task in tasks:
                    task.cancel()
                self.heal()
                if self._soon:
                    self._run_next()
                if all(task.done() for task in tasks):
                    break
        finally:
            asyncio._set_running_loop(None)
            self.close()

    def _run_next(self) -> None:
        world, timers = self._world, self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        front_s = math.inf
        if self._soon:
            front_s = max(self._now, self._stalled_until)
        elif timers:
            front_s = max(timers[0][0], self._now, self._stalled_until)
        if world and world[0][0] <= front_s and (not self._soon or world[0][0] < front_s):
            when, _, function, args = heapq.heappop(world)
            self._now = when
            function(*args)
            return
        if front_s == math.inf:
            raise Deadlock("nothing is left to happen, and somebody waits")
        self._now = front_s
        while timers and timers[0][0] <= front_s:
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                self._soon.append(timer)
        for _ in range(len(self._soon)):
            handle = self._soon.popleft()
            if not handle.cancelled():
                handle._run()
