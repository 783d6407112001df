"""Runs scenarios: life after life, in virtual time.

Invariant: nothing outside a scenario has a say in its run. The garbage collector is one such thing:
it ends streams that nobody holds, so it runs between scenarios only.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from frontend import ids
from scripts.simulation.coverage import Pair
from scripts.simulation.limits import set_limits
from scripts.simulation.scenario import Operation, Scenario
from scripts.simulation.trace import Trace, Violation
from scripts.simulation.workload import make_scenario
from scripts.simulation.world import World


@dataclass(slots=True)
class Outcome:
    """What came of a scenario."""

    seed: int
    violation: Violation | None
    checksum: int
    num_events: int
    seen: Counter[Pair] = field(default_factory=Counter)
    num_requests: int = 0
    num_steps: int = 0
    virtual_s: float = 0.0
    lines: list[str] = field(default_factory=list)


def prepare() -> None:
    """Once for each process: no logging, and no garbage collection in the midst of a run."""
    logging.disable(logging.CRITICAL)
    gc.disable()
    gc.collect()
    gc.freeze()


@contextmanager
def undisturbed() -> Iterator[None]:
    """`prepare`, for a while."""
    own_ids = ids._of_this_process, ids._count
    prepare()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
        logging.disable(logging.NOTSET)
        ids._of_this_process, ids._count = own_ids
        set_limits()


def run_seed(seed: int, *, is_detailed: bool = False) -> Outcome:
    return run_scenario(make_scenario(seed), is_detailed=is_detailed)


def run_scenario(scenario: Scenario, *, is_detailed: bool = False) -> Outcome:
    """All lives of a scenario, until the end or the first violation."""
    trace, seen = Trace(is_detailed=is_detailed), Counter[Pair]()
    outcome = Outcome(scenario.seed, None, 0, 0, seen, lines=trace.lines)
    for life, (operations, end) in enumerate(_lives(scenario)):
        world = World(scenario, life, trace, seen)
        world.live(operations, end)
        outcome.num_requests += len(world.model.requests)
        outcome.num_steps += sum(engine.core.num_steps for engine in world.fleet.engines)
        outcome.virtual_s += world.loop.time()
        del world
        gc.collect(0)
        if trace.violation is not None:
            break
    outcome.violation, outcome.checksum = trace.violation, trace.checksum
    outcome.num_events = trace.num_events
    return outcome


def _lives(scenario: Scenario) -> list[tuple[list[Operation], Operation]]:
    """The operations between restarts, and what ends each life."""
    lives: list[tuple[list[Operation], Operation]] = []
    operations: list[Operation] = []
    for operation in scenario.operations:
        if operation.kind in ("restart", "crash"):
            lives.append((operations, operation))
            operations = []
        else:
            operations.append(operation)
    last_s = operations[-1].at_s if operations else 0.0
    kind = "restart" if scenario.ends_at_once else "drain"
    lives.append(
        (
            operations,
            Operation(last_s, kind, {"grace_s": scenario.grace_s, "heals": scenario.heals}),
        )
    )
    return lives
