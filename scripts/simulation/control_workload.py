"""Makes up what operators and trainers do: pauses, resumes, weight updates, labels, flushes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from engine_core.fake_runner import salt_of
from scripts.simulation.engine_weights import MISSING
from scripts.simulation.tokenizer import VOCAB_SIZE

Written = tuple[str, dict[str, Any]]
"""The kind of an operation, and its arguments."""

_MODES = ("abort", "wait", "keep", "keep", "retract")


class ControlAuthor:
    """The part of a scenario's author that stops engines and changes their weights."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._paths = _paths()
        self._num_versions = 0
        zeal = chance.choice((0.0, 0.0, 1.5, 4.0))
        """How often somebody pauses."""
        trainers = chance.choice((0.0, 0.0, 0.5, 1.5))
        self.control_weights = {
            "pause": zeal,
            "resume": 0.8 * zeal,
            "flush": 0.3 * zeal * chance.random(),
            "linger": 0.2 * zeal * (chance.random() < 0.25),
            "update": trainers,
            "session": 0.3 * trainers * chance.random(),
            "cancel_update": 0.5 * trainers * chance.random(),
            "label": 0.3 * trainers,
            "resume_from": chance.choice((0.0, 2.0, 5.0)),
        }

    # -- pauses --------------------------------------------------------------------------------

    def _pause(self) -> Written:
        chance = self._chance
        args: dict[str, Any] = {"mode": chance.choice(_MODES)}
        if chance.random() < 0.3:
            args["clear_cache"] = True
        if chance.random() < 0.2:
            args["newcomers"] = "reject"
        if chance.random() < 0.25:
            args["lease_s"] = chance.choice((0.002, 0.01, 0.05, 0.5))
        if chance.random() < 0.4:
            args["pause_id"] = chance.choice(("mine", "yours"))
        if chance.random() < 0.15:
            args["timeout_s"] = chance.choice((0.0005, 0.003, 0.02))
        return "pause", args

    def _resume(self) -> Written:
        args: dict[str, Any] = {}
        if self._chance.random() < 0.4:
            args["whose"] = self._chance.choice(("newest", "newest", "another"))
        if self._chance.random() < 0.1:
            args["timeout_s"] = 0.0005
        return "resume", args

    def _flush(self) -> Written:
        return "flush", {"resets_running": self._chance.random() < 0.5}

    # -- weights -------------------------------------------------------------------------------

    def _update(self) -> Written:
        chance = self._chance
        path = next(self._paths)
        return "update", {
            "path": f"{path}-{MISSING}" if chance.random() < 0.15 else path,
            "version": self._version() if chance.random() < 0.8 else None,
            "mode": chance.choice(("keep", "keep", *_MODES)),
            "timeout_s": chance.choice((600.0, 600.0, 600.0, 0.005)),
            "kind": chance.choice(("disk", "file")),
        }

    def _version(self) -> str:
        self._num_versions += 1
        return f"v{self._num_versions}"

    def session(self) -> list[Written]:
        """Parts that take effect together, or not."""
        chance = self._chance
        parts = [self._update() for _ in range(chance.randint(1, 3))]
        end: Written = (
            "end_update",
            {
                "version": self._version() if chance.random() < 0.5 else None,
                "mode": chance.choice(("keep", *_MODES)),
            },
        )
        if chance.random() < 0.2:
            end = ("discard_update", {})
        written = [("begin_update", {}), *parts, end]
        if chance.random() < 0.1:
            del written[chance.randrange(len(written))]
        return written

    def _cancel_update(self) -> Written:
        return "cancel_update", {}

    def _label(self) -> Written:
        return "label", {"version": self._version()}


def _paths() -> Iterator[str]:
    """Paths of weights that give different tokens, each other and the first ones included."""
    seen = {0}
    for number in count():
        path = f"weights-{number}"
        if len(seen) == VOCAB_SIZE:
            seen = {0}
        if (residue := salt_of(path) % VOCAB_SIZE) not in seen:
            seen.add(residue)
            yield path
