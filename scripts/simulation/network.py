"""The network between a front end and its engines: bytes that take a while, and are lost only with
the machine that sent them.

Invariants
- One link is one direction of one connection: what was sent on it arrives once and in order.
- A partition is a long delay, as it is for TCP.
- What a dead machine had sent before still arrives, but for a tail; then its end is seen.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

from frontend.engines.engine_calls import EngineCalls, EngineEvents
from frontend.errors import EngineDeadError
from ipc.handshake import Registration
from scripts.simulation.virtual_loop import VirtualLoop

Frames = list[bytes]
DELAYS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.003)
DRAIN_DELAYS_S = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0005, 0.002, 0.006)
MESSAGES_PER_TURN = 64


class Link:
    """One direction of a connection."""

    def __init__(
        self, loop: VirtualLoop, chance: random.Random, deliver: Callable[[Frames | None], object]
    ) -> None:
        """`deliver` gets each message, and None when the sender is gone."""
        self._loop = loop
        self._chance = chance
        self._deliver = deliver
        self._under_way: deque[tuple[Frames | None, float]] = deque()
        self._last_arrival_s = 0.0
        self._blocked_until_s = 0.0
        self._is_cut = False

    def send(self, frames: Frames | None, sent_s: float) -> None:
        if self._is_cut:
            return
        arrival_s = max(
            sent_s + self._chance.choice(DELAYS_S), self._last_arrival_s, self._blocked_until_s
        )
        self._last_arrival_s = arrival_s
        self._under_way.append((frames, sent_s))
        self._loop.at(arrival_s, self._arrive)

    def _arrive(self) -> None:
        """The next message is there, unless a partition or its sender takes longer."""
        if self._under_way:
            earliest_s = max(self._blocked_until_s, self._under_way[0][1])
            if self._loop.time() < earliest_s:
                self._loop.at(earliest_s, self._arrive)
            else:
                self._deliver(self._under_way.popleft()[0])

    def block(self, duration_s: float) -> None:
        """A partition."""
        self._blocked_until_s = max(self._blocked_until_s, self._loop.time() + duration_s)

    def heal(self) -> None:
        """The partition ends: what is under way arrives now."""
        self._blocked_until_s = self._last_arrival_s = 0.0
        for _ in self._under_way:
            self._loop.at(self._loop.time(), self._arrive)

    def cut(self, sent_s: float) -> None:
        """The sender is gone: what it sent after `sent_s` is lost. None comes behind the rest."""
        while self._under_way and self._under_way[-1][1] > sent_s:
            self._under_way.pop()
        self.send(None, self._loop.time())
        self._is_cut = True


class SimulatedClient:
    """Takes the place of `EngineClient`: the same calls and order, over links."""

    def __init__(
        self,
        loop: VirtualLoop,
        chance: random.Random,
        events: EngineEvents,
        registrations: dict[int, Registration],
        on_send: Callable[[int, Sequence[bytes]], object],
    ) -> None:
        """`on_send(rank, frames)` hears of each message that leaves."""
        self.registrations = registrations
        self.is_up = True
        self.links: dict[int, Link] = {}
        """To the engines; set before the first request."""
        self._loop = loop
        self._chance = chance
        self._events = events
        self._on_send = on_send
        self._calls = {rank: EngineCalls(rank, events, self.send) for rank in registrations}
        self._connected = set(registrations)
        self._unreachable: set[int] = set()
        self._inboxes: dict[int, deque[Frames | None]] = {rank: deque() for rank in registrations}
        self._is_draining: set[int] = set()

    # -- what the dispatcher uses --------------------------------------------------------------

    def send(self, rank: int, frames: Sequence[bytes]) -> None:
        if rank not in self._connected:
            raise EngineDeadError(f"engine {rank} is dead")
        if rank in self._unreachable:
            reason = f"engine {rank} cannot be reached: Host unreachable"
            self._loop.call_soon(self._events.on_engine_dead, rank, reason)
            raise EngineDeadError(reason)
        self._on_send(rank, frames)
        self.links[rank].send(list(frames), self._loop.time())

    def start_call(self, rank: int, method: str, *args: object) -> object:
        return self._calls[rank].start(method, *args)

    def disconnect(self, rank: int, reason: str) -> None:
        if rank in self._connected:
            self._connected.discard(rank)
            self._calls[rank].fail(reason)

    def close(self) -> None:
        for rank in self._calls:
            self.disconnect(rank, "the front end is shutting down")

    def num_calls(self) -> int:
        """Calls that have not ended."""
        return sum(len(calls) for calls in self._calls.values())

    # -- what the network does -----------------------------------------------------------------

    def refuse(self, rank: int) -> None:
        """From now on the sender learns that the peer is not there."""
        self._unreachable.add(rank)

    def deliver(self, rank: int, frames: Frames | None) -> None:
        """A message arrived, or (None) the end of the connection."""
        self._inboxes[rank].append(frames)
        if rank not in self._is_draining:
            self._is_draining.add(rank)
            delay_s = self._chance.choice(DRAIN_DELAYS_S)
            if delay_s:
                self._loop.call_later(delay_s, self._drain, rank)
            else:
                self._loop.call_soon(self._drain, rank)

    def _drain(self, rank: int) -> None:
        """As `SocketReader` does: some messages, then the end of the turn."""
        self._is_draining.discard(rank)
        inbox, calls = self._inboxes[rank], self._calls[rank]
        for _ in range(min(MESSAGES_PER_TURN, len(inbox))):
            frames = inbox.popleft()
            if rank not in self._connected:
                continue
            if frames is not None:
                calls.on_frames(frames)
            else:
                self._events.on_turn_end()
                self._events.on_engine_dead(rank, f"engine {rank} closed its connection")
        if inbox:
            self._is_draining.add(rank)
            self._loop.call_soon(self._drain, rank)
        self._events.on_turn_end()
