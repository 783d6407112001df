"""An event loop on a thread of its own, and ways into it from everywhere else.

Invariants
- Whoever waits for something on the loop gets an answer: a result, an error, or EngineDeadError
  once the loop stops. Nobody waits for ever on a loop that is gone.
- Giving up (Ctrl-C, a cancelled task, a reader that is closed or garbage) cancels what was waited
  for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final, Generic, TypeVar

import uvloop

from frontend.errors import EngineDeadError

T = TypeVar("T")
Emitter = Callable[[Callable[[T], object]], Coroutine[Any, Any, None]]
"""Makes a coroutine that gives out items through the function it gets."""

_LAST_WORDS_TIMEOUT_S = 1.0
_END: Final = object()


class LoopThread:
    """A uvloop event loop, running from construction until `stop`."""

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._is_stopping = False
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run_loop, args=(started,), name=name, daemon=True
        )
        self._thread.start()
        self._loop = started.result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop. Raises EngineDeadError if it has stopped."""
        with self._lock:
            if self._is_stopping:
                coroutine.close()
                raise EngineDeadError("the engine was shut down; create a new one")
            return asyncio.run_coroutine_threadsafe(self._guard(coroutine), self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it, on any other thread."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def run_from_another_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on this loop and await it on the caller's."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def stop(self) -> None:
        """End the loop and its thread; what still runs after a moment of grace is cancelled.

        Harmless to repeat.
        """
        with self._lock:
            if not self._is_stopping:
                self._is_stopping = True
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run_loop(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main(started))

    async def _main(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        self._stopping = asyncio.Event()
        started.set_result(asyncio.get_running_loop())
        await self._stopping.wait()
        # All that was ever submitted has become a task by now: the loop runs callbacks in order.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_LAST_WORDS_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _guard(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Tell those who wait that the loop stopped, rather than that somebody cancelled them."""
        try:
            return await coroutine
        except asyncio.CancelledError:
            if self._is_stopping:
                raise EngineDeadError("the engine was shut down meanwhile") from None
            raise


class _Reader(Generic[T]):
    """What a coroutine on a loop thread emits, up to its end."""

    _future: concurrent.futures.Future[None]
    _is_done = False

    def close(self) -> None:
        """Cancel the coroutine; harmless to repeat."""
        self._is_done = True
        self._future.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_future"):
            self.close()

    def _is_last(self, item: object) -> bool:
        """Whether nothing follows; raises what ended the coroutine, if it failed."""
        if item is not _END:
            return False
        self._is_done = True
        if not self._future.cancelled():
            self._future.result()
        return True


class BlockingReader(_Reader[T], Iterator[T]):
    """Reads on a thread."""

    def __init__(self, loop_thread: LoopThread, emitter: Emitter[T]) -> None:
        """Starts the coroutine. Raises EngineDeadError if the loop has stopped."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._items = items
        self._future = loop_thread.submit(emitter(items.put))
        self._future.add_done_callback(lambda _: items.put(_END))

    def __next__(self) -> T:
        if self._is_done:
            raise StopIteration
        try:
            item = self._items.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._is_last(item):
            raise StopIteration
        return item  # type: ignore[no-any-return]


class AsyncReader(_Reader[T], AsyncIterator[T]):
    """Reads on another event loop, the one on which it is created."""

    def __init__(self, loop_thread: LoopThread, emitter: Emitter[T]) -> None:
        """Starts the coroutine. Raises EngineDeadError if the loop has stopped."""
        items: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._items = items

        def put(item: object) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        def put_end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the reading loop is closed
                put(_END)

        self._future = loop_thread.submit(emitter(put))
        self._future.add_done_callback(put_end)

    async def __anext__(self) -> T:
        if self._is_done:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if self._is_last(item):
            raise StopAsyncIteration
        return item  # type: ignore[no-any-return]
