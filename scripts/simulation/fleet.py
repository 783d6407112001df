"""The engines of one life and their links to the front end, and what can become of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from engine_core.batch import StepBatch
from engine_core.core import Input
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.registry import Entry
from ipc.output import EngineCoreOutputs
from scripts.simulation.engine import EngineShape, PlannedFault, SimulatedEngine
from scripts.simulation.engine_pauses import Violate
from scripts.simulation.ledger import Ledger
from scripts.simulation.network import Link, SimulatedClient
from scripts.simulation.trace import Trace
from scripts.simulation.virtual_loop import VirtualLoop

NOTICED_S = 0.0005
"""So long after an engine's death the front end's socket refuses to send to it."""
REAPED_S = 0.01
"""So long after it the supervisor knows."""


class Fleet:
    """Engines by rank, each with the ledger that watches it."""

    def __init__(
        self,
        num_engines: int,
        shape: EngineShape,
        loop: VirtualLoop,
        seed: str,
        trace: Trace,
        violate: Violate,
    ) -> None:
        self._loop = loop
        self._seed = seed
        self._trace = trace
        self._violate = violate
        self.engines = [
            SimulatedEngine(rank, shape, loop, self._chance(f"engine {rank}"), self)
            for rank in range(num_engines)
        ]
        self.ledgers = [
            Ledger(engine.rank, engine.core, engine.runner, violate) for engine in self.engines
        ]
        self.dead: set[int] = set()
        """Engines that have died or ended, or were given a reason to."""
        self.corrupted: set[int] = set()
        """Engines one of whose messages was or will be damaged."""
        self._outgoing: list[Link] = []
        self._client: SimulatedClient
        self._dispatcher: Dispatcher

    def _chance(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")

    def connect(
        self, dispatcher: Dispatcher, on_send: Callable[[int, Sequence[bytes]], object]
    ) -> SimulatedClient:
        """Shake hands with a front end; `on_send` hears of each message to an engine."""
        registrations = {engine.rank: engine.registration for engine in self.engines}
        client = self._client = SimulatedClient(
            self._loop, self._chance("client"), dispatcher, registrations, on_send
        )
        self._dispatcher = dispatcher
        for engine in self.engines:
            self._link(engine, client)
        return client

    def _link(self, engine: SimulatedEngine, client: SimulatedClient) -> None:
        rank, loop = engine.rank, self._loop

        def deliver(frames: list[bytes] | None) -> None:
            client.deliver(rank, frames)

        def on_exit() -> None:
            """Everything it sent arrives, then its connection ends."""
            self._lose(rank, loop.time())

        client.links[rank] = Link(loop, self._chance(f"to engine {rank}"), engine.receive)
        outgoing = Link(loop, self._chance(f"from engine {rank}"), deliver)
        self._outgoing.append(outgoing)
        engine.send, engine.on_exit = outgoing.send, on_exit

    # -- what is asked about requests ----------------------------------------------------------

    def sampled(self, entry: Entry) -> list[int]:
        """What a request's engine has sampled for it."""
        if entry.engine_index is None:
            return []
        return self.ledgers[entry.engine_index].tokens.get(entry.internal_id, [])

    def labels(self, entry: Entry) -> list[str]:
        """Of the weights of each of these tokens."""
        if entry.engine_index is None:
            return []
        return self.ledgers[entry.engine_index].labels.get(entry.internal_id, [])

    def all_commits(self) -> list[tuple[tuple[str, ...], str | None]]:
        """Updates that took effect on any engine, also on those that died."""
        return [commit for ledger in self.ledgers for commit in ledger.weights.commits]

    def stage(self, entry: Entry) -> str:
        """Where a live request is, as its engine knows it."""
        if entry.engine_index is None:
            return "held" if entry.add_frames else "tokenizing"
        ledger = self.ledgers[entry.engine_index]
        return ledger.stage(entry.internal_id)

    @property
    def alive(self) -> list[Ledger]:
        """Those of the engines that live."""
        return [
            ledger
            for engine, ledger in zip(self.engines, self.ledgers, strict=True)
            if engine.is_alive and engine.rank not in self.dead
        ]

    def check_idle(self) -> None:
        """Nothing is in the living engines."""
        for ledger in self.alive:
            ledger.check_idle()

    # -- what engines do -----------------------------------------------------------------------

    def before_turn(
        self, rank: int, inputs: list[Input], now: float, *, is_last: bool, num_left: int
    ) -> None:
        if num_left:
            self._violate("control first", f"engine {rank} left {num_left} messages for later")
        self.ledgers[rank].before_turn(inputs, now, is_last=is_last)

    def on_step(self, rank: int, batch: StepBatch) -> None:
        self.ledgers[rank].steps.on_step(batch)

    def on_engine_output(self, rank: int, outputs: EngineCoreOutputs) -> None:
        self.ledgers[rank].on_output(outputs)
        rows = [(row.request_id, tuple(row.new_token_ids)) for row in outputs.outputs]
        reply = outputs.utility_output
        self._trace.note(self._loop.time(), "engine", rank, rows, reply and reply.call_id)

    def after_turn(self, rank: int) -> None:
        self.ledgers[rank].after_turn()

    def on_engine_fault(self, rank: int, error: Exception) -> None:
        if not isinstance(error, PlannedFault):
            self._violate("exception", f"engine {rank}: {type(error).__name__}: {error}")

    # -- what becomes of them ------------------------------------------------------------------

    def kill(self, rank: int, lost_s: float, *, exit_first: bool) -> None:
        """A process is gone, and with it what it sent in the last `lost_s`. `exit_first`: the
        supervisor knows of it before the connection ends.
        """
        engine = self.engines[rank]
        if engine.is_alive:
            engine.die()
            self._lose(rank, self._loop.time() - lost_s)
            self._loop.call_later(0.0 if exit_first else REAPED_S, self._note_exit, rank)

    def _lose(self, rank: int, sent_s: float) -> None:
        """The connection ends; what was sent after `sent_s` is lost."""
        self.dead.add(rank)
        self._outgoing[rank].cut(sent_s)
        self._loop.at(self._loop.time() + NOTICED_S, self._client.refuse, rank)

    def _note_exit(self, rank: int) -> None:
        if rank in self._dispatcher.alive_engines:
            self._dispatcher.on_engine_dead(rank, f"engine {rank} was killed")

    def fail(self, rank: int) -> None:
        """A step loop meets an error, and tells its clients."""
        if self.engines[rank].is_alive:
            self.dead.add(rank)
            self.engines[rank].fail()

    def end(self, rank: int) -> None:
        """SIGTERM."""
        self.dead.add(rank)
        self.engines[rank].terminate()

    def corrupt(self, rank: int) -> None:
        """The next message with outputs arrives damaged."""
        self.corrupted.add(rank)
        self.engines[rank].corrupt_next = True

    def part(self, rank: int, way: str, duration_s: float) -> None:
        """A partition: `in` to the engine, `out` of it, or both."""
        if way in ("in", "both"):
            self._client.links[rank].block(duration_s)
        if way in ("out", "both"):
            self._outgoing[rank].block(duration_s)

    def heal(self) -> None:
        """Faults stop."""
        for engine in self.engines:
            engine.heal()
        for link in (*self._outgoing, *self._client.links.values()):
            link.heal()

    def terminate(self) -> None:
        """As the supervisor does at a shutdown."""
        for rank in range(len(self.engines)):
            self.end(rank)
