"""One life of a front end and its engines, from their start to a shutdown or a crash.

The model hears of each end and of each event that a reader takes; the ledgers see each input and
output of their engines; the departures are every frame that leaves the front end. Between them
what the contract promises is checked while it happens, and once more when everything has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from traceback import format_exception
from typing import Any, cast

from frontend import ids
from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.engines.engine_client import EngineClient
from frontend.engines.supervisor import EngineSupervisor
from frontend.outputs import AbortCause, Stage
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.registry import Entry
from frontend.requests.request_log import RequestLog
from frontend.requests.stream import RequestStream
from frontend.text.tokenizer import Tokenizer
from ipc.engine_config import EngineConfig
from ipc.output import EngineCoreOutputs
from ipc.weights import CAESURA_COMMIT_WEIGHTS
from scripts.simulation.aborting import Aborting
from scripts.simulation.actors import Actor
from scripts.simulation.clients import Clients
from scripts.simulation.closing import Closing
from scripts.simulation.coverage import ENDING_OPERATIONS, Pair
from scripts.simulation.departures import Departures
from scripts.simulation.faults import Faults
from scripts.simulation.fleet import Fleet
from scripts.simulation.limits import set_limits
from scripts.simulation.model import Model
from scripts.simulation.model_request import ModelRequest
from scripts.simulation.network import SimulatedClient
from scripts.simulation.pause_watch import PauseWatch
from scripts.simulation.pausing import Pausing
from scripts.simulation.scenario import Operation, Scenario
from scripts.simulation.tokenizer import FakeTokenizer
from scripts.simulation.trace import Trace
from scripts.simulation.updating import Updating
from scripts.simulation.virtual_loop import Deadlock, Livelock, VirtualLoop

MAX_LOOKS = 20
_CONFIG = EngineConfig(model="fake", runner="fake")


class World:
    """A front end, its engines and its clients."""

    def __init__(self, scenario: Scenario, life: int, trace: Trace, seen: Counter[Pair]) -> None:
        """`life` counts the restarts before; `seen` counts (operation, stage)."""
        self.scenario = scenario
        self.trace = trace
        self.seen = seen
        seed = f"{scenario.seed}/{life}"
        self.loop = VirtualLoop(random.Random(f"{seed}/loop"))
        self.max_model_len = scenario.shape.max_model_len
        self.tasks: list[asyncio.Task[Any]] = []
        """Of clients and operators."""
        self._seed = seed
        self._clock_offset_s = 0.0
        self._registered: dict[str, Entry] = {}
        """By request id, those whose streams were not returned yet."""
        self._is_over = False
        self.frontend: AsyncEngine
        self.dispatcher: Dispatcher
        self.client: SimulatedClient
        self.fleet: Fleet
        self.model: Model
        self.departures: Departures
        self.watch: PauseWatch
        self.had_faults = False
        """Engines, the network or the front end stood still or died."""
        self.is_shutting_down = False

    # -- start ---------------------------------------------------------------------------------

    def _boot(self) -> None:
        ids._of_this_process, ids._count = "x", itertools.count(1)
        scenario = self.scenario
        set_limits(scenario.max_num_held, scenario.max_ids_per_frame)
        fleet = self.fleet = Fleet(
            scenario.num_engines, scenario.shape, self.loop, self._seed, self.trace, self.violate
        )
        self.model = Model(self.max_model_len, fleet, self.violate)
        dispatcher = self.dispatcher = Dispatcher(scenario.num_engines)
        dispatcher.clock = self.clock
        dispatcher.request_log = _Ends(self)
        self._register = dispatcher.registry.register
        dispatcher.registry.register = self._on_register  # type: ignore[method-assign]
        self._mark_sent = dispatcher.registry.mark_sent
        dispatcher.registry.mark_sent = self._on_sent  # type: ignore[method-assign]
        self._take_outputs = dispatcher.on_outputs
        dispatcher.on_outputs = self._on_outputs  # type: ignore[method-assign]
        self.departures = Departures(
            dispatcher.registry,
            self.clock,
            fleet.corrupted,
            self.violate,
            lambda entry: self._count("deadline", entry),
        )
        self.client = fleet.connect(dispatcher, self._on_send)
        dispatcher.client = cast(EngineClient, self.client)
        config = FrontendConfig(
            engine=_CONFIG,
            data_parallel_size=scenario.num_engines,
            stream_interval=scenario.stream_interval,
            max_num_queued_requests=scenario.max_num_queued_requests,
            max_num_queued_tokens=scenario.max_num_queued_tokens,
        )
        self.frontend = AsyncEngine(
            config,
            cast(Tokenizer, FakeTokenizer()),
            dispatcher,
            cast(EngineSupervisor, fleet),
        )
        self.watch = PauseWatch(self, self.frontend._pauses)
        self.model.may_refuse = self.watch.may_refuse

    def clock(self) -> float:
        """The dispatcher's."""
        return self.loop.time() + self._clock_offset_s

    def jump_clock(self, by_s: float) -> None:
        self._clock_offset_s += by_s

    # -- a life --------------------------------------------------------------------------------

    def live(self, operations: Sequence[Operation], end: Operation) -> None:
        """Boot, let the operations happen, and end as told: drain, restart or crash."""
        try:
            self.loop.run(self._main(operations, end), self._after_event)
        except (Deadlock, Livelock) as error:
            self.violate("liveness", str(error))
        except Exception as error:
            self.violate("exception", "".join(format_exception(error)))
        self._is_over = True
        self.loop.abandon()

    async def _main(self, operations: Sequence[Operation], end: Operation) -> None:
        self._boot()
        updating = Updating(self)
        actors = (Clients(self), Aborting(self), Faults(self), Pausing(self), updating)
        closing = Closing(self, updating)
        for operation in operations:
            await self._sleep_until(operation.at_s)
            if operation.when is not None:
                await self._await_stage(operation.when)
            self.trace.note(self.loop.time(), "operation", operation.kind)
            _method(actors, operation.kind)(**operation.args)
            self.watch.look()
        if end.kind == "drain":
            self.heal()
            await closing.settle()
        else:
            await self._sleep_until(end.at_s)
        if end.kind == "crash":
            self.count_all("frontend crash")
            self.loop.should_stop = True
            return
        await closing.shut_down(end.args.get("grace_s", 0.0), heals=end.args.get("heals", True))

    async def _sleep_until(self, when_s: float) -> None:
        if (left_s := when_s - self.loop.time()) > 0:
            await asyncio.sleep(left_s)

    async def _await_stage(self, stage: str) -> None:
        """Until a request is in this stage, for a while."""
        for _ in range(MAX_LOOKS):
            if any(stage in self.stages(request) for request in self.model.live()):
                return
            await asyncio.sleep(self.scenario.shape.step_time_s)

    def heal(self) -> None:
        """Faults stop."""
        self.loop.heal()
        self.fleet.heal()

    # -- what is checked -----------------------------------------------------------------------

    def violate(self, check: str, what: str) -> None:
        """The contract is broken. Only the first time counts."""
        if not self._is_over:
            self.trace.violate(self.loop.time(), check, what)
            self.loop.should_stop = True

    def _after_event(self) -> None:
        if self.loop.faults:
            self.violate("exception", self.loop.faults[0])

    # -- what is heard -------------------------------------------------------------------------

    def _on_register(self, entry: Entry) -> None:
        self._register(entry)
        self._registered[entry.request_id] = entry

    def _on_sent(self, entry: Entry, engine_index: int) -> None:
        self.watch.on_sent(entry)
        self._mark_sent(entry, engine_index)

    def _on_outputs(self, rank: int, outputs: EngineCoreOutputs) -> None:
        self.watch.on_outputs(outputs)
        for row in outputs.outputs:
            self.model.num_arrived[row.request_id] += len(row.new_token_ids)
        self._take_outputs(rank, outputs)

    def entry_of(self, stream: RequestStream) -> Entry:
        """The front end's entry of a stream that it has just returned."""
        return self._registered.pop(stream.request_id)

    def _on_send(self, rank: int, frames: Sequence[bytes]) -> None:
        if not self._is_over:
            what = self.departures.on_send(rank, frames)
            self.trace.note(self.loop.time(), "send", rank, what)
            if what == CAESURA_COMMIT_WEIGHTS:
                self.watch.on_commit()

    def on_end(self, entry: Entry, cause: AbortCause | None) -> None:
        """The front end ended a request."""
        if self._is_over:
            return
        self.trace.note(self.loop.time(), "end", entry.internal_id, str(entry.terminal))
        self.model.on_end(entry, self.loop.time())
        request = self.model.by_entry.get(entry)
        if request is not None and request.held_s is not None and entry.engine_index is None:
            self.watch.check_hold(request)
        if cause is AbortCause.STOP_STRING:
            self._count("stop string", entry)
        elif cause is AbortCause.DEADLINE and entry.engine_index is None:
            self._count("deadline", entry)

    # -- where requests are --------------------------------------------------------------------

    def stages(self, request: ModelRequest) -> list[str]:
        """Where a request is."""
        entry = request.entry
        if request.is_live:
            unread = ["unread"] if entry.mailbox.num_unread_tokens else []
            return [self.fleet.stage(entry), *unread]
        rank = entry.engine_index
        registry = self.dispatcher.registry
        is_ending = rank is not None and registry.get_ending(entry.internal_id, rank) is not None
        return ["ending" if is_ending else "finished"]

    def count_all(self, operation: str) -> None:
        """An operation meets every request."""
        for request in self.model.requests:
            self.count(operation, request)

    def count(self, operation: str, request: ModelRequest) -> None:
        """An operation meets a request."""
        stages = self.stages(request)
        if request.is_live and operation in ENDING_OPERATIONS:
            request.met_in = stages[0]
        for stage in stages:
            self.seen[operation, stage] += 1

    def _count(self, operation: str, entry: Entry) -> None:
        """Something meets a request whose end is under way."""
        self.seen[operation, self.fleet.stage(entry)] += 1
        if entry.mailbox.num_unread_tokens:
            self.seen[operation, "unread"] += 1


def _method(actors: Sequence[Actor], name: str) -> Any:
    for actor in actors:
        if (method := getattr(actor, name, None)) is not None:
            return method
    raise ValueError(f"operation {name!r}: nobody performs such a thing")


class _Ends(RequestLog):
    """Hears of each end, as the request log does."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def note_end(self, entry: Entry, cause: AbortCause | None, stage: Stage, age_s: float) -> None:
        self._world.on_end(entry, cause)
