"""Makes up scenarios: what clients, operators and fate do in one seed's life.

Each seed has a character of its own (how crowded, how unlucky), so that a few thousand of them see
quiet lives and wild ones. Everything is small: a dozen requests over engines of a dozen blocks meet
every stage within a few hundred steps.
"""

from __future__ import annotations

import random
from typing import Any

from scripts.simulation.control_workload import ControlAuthor
from scripts.simulation.coverage import STAGES
from scripts.simulation.request_workload import TAGS, RequestAuthor
from scripts.simulation.scenario import Operation, Scenario

PART_DELAYS_S = (0.001, 0.02, 0.06)
"""Between the parts of an update; each is staged for up to 50 ms."""
LINGER_S = 450.0
"""Long enough to be held for too long."""
_WANTED_STAGES = (None, None, *(stage for stage in STAGES if stage != "unknown"))
_AWAITED_STAGES = (
    *("preempted", "preempted", "prefill", "leaving", "unread", "waiting"),
    *("held", "kept", "retracted"),
)


def make_scenario(seed: int) -> Scenario:
    """The scenario of a seed; the same for ever, as long as this code is."""
    return _Author(seed).write()


class _Author(RequestAuthor, ControlAuthor):
    """The dice and the character of one scenario."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        RequestAuthor.__init__(self, chance)
        ControlAuthor.__init__(self, chance)
        self._seed = seed
        self._num_engines = chance.choice((1, 1, 2, 2, 3))
        self._haste_s = chance.choice((0.0005, 0.002, 0.005, 0.012))
        self._at_s = 0.0
        self._awaited: str | None = None
        """The stage that the operation being written waits for."""
        self._expected: str | None = None
        """A stage that comes of the last pause."""
        self._weights = {
            "add": 10.0,
            "close": 2.0 * chance.random(),
            "cancel": 1.5 * chance.random(),
            "forget": 1.0 * chance.random(),
            "abort": 4.0 * chance.random(),
            "duplicate": 0.5,
            "look": 0.4,
            "trickle": 0.2 * (chance.random() < 0.05),
            "fault": chance.choice((0.0, 0.0, 0.5, 2.0)),
            "restart": chance.choice((0.0, 0.0, 0.0, 0.3)),
        } | self.control_weights

    def write(self) -> Scenario:
        chance = self._chance
        operations: list[Operation] = []
        for _ in range(chance.randint(8, 30)):
            if chance.random() > 0.15:  # Else in the same turn as the one before.
                self._at_s += chance.expovariate(1 / self._haste_s)
            operations += self._next()
        return Scenario(
            seed=self._seed,
            num_engines=self._num_engines,
            shape=self._shape,
            stream_interval=chance.choice((1, 1, 1, 2, 5)),
            max_num_queued_requests=chance.choice((None, None, None, 6)),
            max_num_queued_tokens=chance.choice((None, None, None, 60)),
            max_num_held=chance.choice((None, None, None, 3)),
            max_ids_per_frame=chance.choice((None, None, None, 2)),
            heals=chance.random() < 0.6,
            ends_at_once=chance.random() < 0.2,
            grace_s=self._grace_s(),
            operations=tuple(operations),
        )

    def _next(self) -> list[Operation]:
        """What somebody does next; mostly it is one operation."""
        chance = self._chance
        [kind] = chance.choices(list(self._weights), list(self._weights.values()))
        if kind == "linger":
            self._at_s += LINGER_S * chance.random()
            return []
        if kind == "session":
            operations = []
            for kind, args in self.session():
                operations.append(Operation(self._at_s, kind, args))
                self._at_s += chance.choice(PART_DELAYS_S)
            return operations
        when = None if kind == "add" else self._when(kind)
        if kind == "restart":
            args = {"grace_s": self._grace_s(), "heals": chance.random() < 0.6}
            kind = chance.choice(("restart", "crash"))
            restart = Operation(self._at_s, kind, args, when)
            self._at_s = 0.0
            return [restart]
        self._awaited = when
        kind, args = getattr(self, f"_{kind}")()
        if kind == "pause" and chance.random() < 0.7:
            self._expected = {"keep": "kept", "retract": "retracted"}.get(args["mode"])
        written = [Operation(self._at_s, kind, args, when)]
        if kind == "kill_engine" and chance.random() < 0.6:
            # Its clients hang up with those of others before the front end knows.
            unseen = {"rank": args["rank"], "way": "out", "duration_s": 0.02}
            killed = Operation(self._at_s, kind, args | {"exit_first": False})
            written = [Operation(self._at_s, "partition", unseen), killed]
            self._at_s += chance.choice((0.0006, 0.0015, 0.004))
            stages = ("decode", "prefill", "waiting", "preempted")
            targets = [{"pick": pick, "stage": stage} for stage in stages for pick in range(6)]
            written.append(Operation(self._at_s, "close", {"targets": targets}))
        if args.get("duration_s", 0.0) >= 1.0 and chance.random() < 0.5:
            self._at_s += args["duration_s"] + 1.0
        return written

    def _grace_s(self) -> float:
        return self._chance.choice((0.0, 0.0, 0.01, 1.0))

    def _when(self, kind: str) -> str | None:
        """What stage an operation waits for."""
        chance = self._chance
        expected, self._expected = self._expected, None
        if expected is not None:
            return expected
        if kind == "pause" and chance.random() < 0.6:
            return chance.choice(("decode", "decode", "prefill"))
        return chance.choice(_AWAITED_STAGES) if chance.random() < 0.2 else None

    # -- ends ----------------------------------------------------------------------------------

    def _target(self) -> dict[str, Any]:
        """Which request: one in a stage, if there is one, else any."""
        chance = self._chance
        if self._awaited is not None and chance.random() < 0.5:
            return {"pick": chance.randrange(1000), "stage": self._awaited}
        return {"pick": chance.randrange(1000), "stage": chance.choice(_WANTED_STAGES)}

    def _targets(self) -> list[dict[str, Any]]:
        return [self._target() for _ in range(self._chance.choice((1, 1, 1, 2, 6)))]

    def _close(self) -> tuple[str, dict[str, Any]]:
        return "close", {"targets": self._targets()}

    def _cancel(self) -> tuple[str, dict[str, Any]]:
        return "cancel", {"targets": self._targets()}

    def _forget(self) -> tuple[str, dict[str, Any]]:
        return "forget", {"targets": self._targets()}

    def _abort(self) -> tuple[str, dict[str, Any]]:
        chance = self._chance
        args: dict[str, Any] = {
            "wait": chance.random() < 0.7,
            "timeout_s": chance.choice((5.0, 5.0, 5.0, 0.002)),
        }
        match chance.randrange(10):
            case 0 | 1 | 2 | 3:
                args["targets"] = [self._target()]
            case 4 | 5:
                args["targets"] = self._targets()
                args["unknown"] = [self._name()]
            case 6:
                args["targets"] = [self._target()]
                args["by"] = "batch"
            case 7:
                args["prefix"] = chance.choice(("a", "b", "a1", "b1", "a2"))
            case 8:
                args["tag"] = chance.choice(TAGS)
            case _:
                args["everything"] = True
        return "abort", args

    def _trickle(self) -> tuple[str, dict[str, Any]]:
        return "trickle", {"num_requests": 22, "every_s": 0.0006}

    def _look(self) -> tuple[str, dict[str, Any]]:
        return self._chance.choice(("list", "status")), {}

    # -- faults --------------------------------------------------------------------------------

    def _fault(self) -> tuple[str, dict[str, Any]]:
        chance = self._chance
        rank = chance.randrange(self._num_engines)
        long_s = chance.choice((0.005, 0.02, 0.1, 1.0, 6.0))
        match chance.randrange(14):
            case 0 | 12:
                return "kill_engine", {
                    "rank": rank,
                    "lost_s": chance.choice((0.0, 0.0, 0.002)),
                    "exit_first": chance.random() < 0.3,
                }
            case 1:
                return "fail_engine", {"rank": rank}
            case 2:
                return "terminate_engine", {"rank": rank}
            case 3 | 4:
                return "stall_engine", {"rank": rank, "duration_s": long_s}
            case 5 | 6:
                return "stall_frontend", {"duration_s": min(long_s, 0.1)}
            case 7 | 8 | 9:
                way = chance.choice(("in", "out", "both"))
                return "partition", {"rank": rank, "way": way, "duration_s": long_s}
            case 10:
                return "jump_clock", {"by_s": chance.choice((0.5, 30.0, 86_400.0))}
            case _:
                return "corrupt_frame", {"rank": rank}
