"""The event loop of the simulation: virtual time, two sides, and nothing that waits in vain."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from scripts.simulation import virtual_loop
from scripts.simulation.network import Link
from scripts.simulation.virtual_loop import Deadlock, Livelock, VirtualLoop


def run(main: Coroutine[Any, Any, Any], loop: VirtualLoop) -> Any:
    try:
        return loop.run(main)
    finally:
        loop.abandon()


def new_loop() -> VirtualLoop:
    return VirtualLoop(random.Random(1))


def test_a_day_passes_in_no_time() -> None:
    loop, started_s = new_loop(), time.monotonic()

    async def sleep() -> float:
        await asyncio.sleep(86_400)
        return loop.time()

    assert run(sleep(), loop) == 86_400
    assert time.monotonic() - started_s < 5


def test_asyncio_works_as_it_does_elsewhere() -> None:
    async def main() -> list[object]:
        async with asyncio.timeout(10):
            late = asyncio.create_task(asyncio.sleep(2, "late"))
            early = asyncio.create_task(asyncio.sleep(1, "early"))
            done, _ = await asyncio.wait([late, early], timeout=1.5)
            loop = asyncio.get_running_loop()
            return [
                [task.result() for task in done],
                await late,
                await loop.run_in_executor(None, max, 3, 4),
            ]

    assert run(main(), new_loop()) == [["early"], "late", 4]


def test_time_outs_pass_in_virtual_time() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.get_running_loop().create_future()

    run(main(), new_loop())


def test_whoever_waits_in_vain_is_told() -> None:
    loop = new_loop()

    async def wait() -> None:
        await loop.create_future()

    with pytest.raises(Deadlock):
        run(wait(), loop)


def test_events_without_end_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_loop, "MAX_EVENTS", 1000)

    loop = new_loop()

    def spin() -> None:
        loop.call_soon(spin)

    async def main() -> None:
        spin()
        await loop.create_future()

    with pytest.raises(Livelock):
        run(main(), loop)


def test_the_world_goes_on_while_the_front_end_is_suspended() -> None:
    loop = new_loop()
    seen: list[tuple[str, float]] = []

    async def main() -> None:
        loop.at(0.5, lambda: seen.append(("world", loop.time())))
        loop.stall(1.0)
        await asyncio.sleep(0.1)
        seen.append(("front end", loop.time()))

    run(main(), loop)
    assert seen == [("world", 0.5), ("front end", 1.0)]


def test_an_exception_that_nobody_catches_is_noted() -> None:
    loop = new_loop()

    async def main() -> None:
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)

    run(main(), loop)
    assert "ZeroDivisionError" in loop.faults[0]


def test_a_link_keeps_its_order_through_a_partition_that_heals() -> None:
    loop = new_loop()
    arrived: list[list[bytes] | None] = []
    link = Link(loop, random.Random(2), arrived.append)
    messages = [[bytes([number])] for number in range(20)]

    async def main() -> None:
        for number, message in enumerate(messages):
            if number == 5:
                link.block(100.0)
            if number == 15:
                link.heal()
            link.send(message, loop.time())
            await asyncio.sleep(0.0001)
        await asyncio.sleep(1.0)

    run(main(), loop)
    assert arrived == messages


def test_a_link_loses_the_tail_of_a_dead_sender_and_tells_of_its_end() -> None:
    loop = new_loop()
    arrived: list[list[bytes] | None] = []
    link = Link(loop, random.Random(2), arrived.append)

    async def main() -> None:
        link.send([b"early"], loop.time())
        link.send([b"late"], loop.time() + 1.0)
        link.cut(loop.time())
        await asyncio.sleep(5.0)

    run(main(), loop)
    assert arrived == [[b"early"], None]
