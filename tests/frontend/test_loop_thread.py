"""The loop on a thread of its own: everybody who waits on it gets an answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
from collections.abc import Callable, Iterator

import pytest

from frontend.errors import EngineDeadError
from frontend.sync.loop_thread import AsyncReader, BlockingReader, LoopThread

WAIT_S = 10.0


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop")
    yield thread
    thread.stop()


async def sleep_for_ever() -> None:
    await asyncio.Event().wait()


class Emitter:
    """Emits `items` and then waits, until it is cancelled."""

    def __init__(self, *items: int, ends: bool = True, error: Exception | None = None) -> None:
        self._items, self._ends, self._error = items, ends, error
        self.was_cancelled = threading.Event()

    async def __call__(self, emit: Callable[[int], object]) -> None:
        for item in self._items:
            emit(item)
        if self._error is not None:
            raise self._error
        try:
            if not self._ends:
                await sleep_for_ever()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise


def test_results_and_errors_come_back(loop_thread: LoopThread) -> None:
    assert loop_thread.run(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        loop_thread.run(_divide())


async def _divide() -> float:
    return 1 / 0


def test_who_waits_when_the_loop_stops_is_told_so(loop_thread: LoopThread) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = [pool.submit(loop_thread.run, sleep_for_ever()) for _ in range(4)]
        reader = BlockingReader(loop_thread, Emitter(1, ends=False))
        loop_thread.stop()
        for future in waiting:
            with pytest.raises(EngineDeadError):
                future.result(WAIT_S)
    assert next(reader) == 1
    with pytest.raises(EngineDeadError):
        next(reader)
    with pytest.raises(EngineDeadError):
        loop_thread.run(sleep_for_ever())


async def test_who_awaits_on_another_loop_is_told_so_and_not_cancelled(
    loop_thread: LoopThread,
) -> None:
    waiting = asyncio.ensure_future(loop_thread.run_from_another_loop(sleep_for_ever()))
    reader = AsyncReader(loop_thread, Emitter(1, ends=False))
    await asyncio.sleep(0)
    await asyncio.to_thread(loop_thread.stop)
    with pytest.raises(EngineDeadError):
        await waiting
    assert await anext(reader) == 1
    with pytest.raises(EngineDeadError):
        await anext(reader)


def test_what_is_nearly_done_may_end_before_the_loop_does(loop_thread: LoopThread) -> None:
    future = loop_thread.submit(asyncio.sleep(0.05, "done"))
    loop_thread.stop()
    assert future.result(0) == "done"


def test_a_reader_yields_everything_and_then_the_error(loop_thread: LoopThread) -> None:
    assert list(BlockingReader(loop_thread, Emitter(1, 2, 3))) == [1, 2, 3]
    failing = BlockingReader(loop_thread, Emitter(1, error=ValueError("bad")))
    assert next(failing) == 1
    with pytest.raises(ValueError, match="bad"):
        next(failing)
    assert list(failing) == []


async def test_an_async_reader_yields_everything_and_then_the_error(
    loop_thread: LoopThread,
) -> None:
    assert [item async for item in AsyncReader(loop_thread, Emitter(1, 2, 3))] == [1, 2, 3]
    failing = AsyncReader(loop_thread, Emitter(1, error=ValueError("bad")))
    assert await anext(failing) == 1
    with pytest.raises(ValueError, match="bad"):
        await anext(failing)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
async def test_a_reader_that_is_given_up_cancels_what_it_reads(
    loop_thread: LoopThread, how: str
) -> None:
    for kind in (BlockingReader, AsyncReader):
        emitter = Emitter(1, ends=False)
        reader: BlockingReader[int] | AsyncReader[int] = kind(loop_thread, emitter)
        await asyncio.sleep(0.02)
        if how == "closed":
            reader.close()
            reader.close()
        del reader
        gc.collect()
        assert await asyncio.to_thread(emitter.was_cancelled.wait, WAIT_S)


def test_stopping_twice_and_from_several_threads_is_harmless(loop_thread: LoopThread) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for future in [pool.submit(loop_thread.stop) for _ in range(4)]:
            future.result(WAIT_S)
    loop_thread.stop()
