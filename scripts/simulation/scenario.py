"""What happens in one simulated life, as plain data: it can be stored, replayed and made shorter.

Invariant: a scenario and its code are all that a run depends on. Every choice of the operations is
written down in them; the network's and the engines' own dice are drawn from the seed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.simulation.engine import EngineShape


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a client, an operator or fate does."""

    at_s: float
    """Since the beginning of the life, or since the last restart in it."""
    kind: str
    """A method of `Operator`, or `restart`, `crash`: the end of one life and the next one's
    beginning."""
    args: dict[str, Any] = field(default_factory=dict)
    when: str | None = None
    """It waits, for a while, until a request is in this stage."""

    def __str__(self) -> str:
        args = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        when = "" if self.when is None else f", when one is {self.when}"
        return f"{self.at_s * 1000:8.2f} ms  {self.kind}({args}){when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A seed's whole story."""

    seed: int
    num_engines: int
    shape: EngineShape
    stream_interval: int = 1
    max_num_queued_requests: int | None = None
    max_num_queued_tokens: int | None = None
    max_num_held: int | None = None
    """Fewer requests than usual may be held by a pause."""
    max_ids_per_frame: int | None = None
    """Aborts are split into smaller frames than usual."""
    ends_at_once: bool = False
    """The last life ends by a shutdown in its midst, not when everything has ended."""
    heals: bool = True
    """Faults have stopped by then."""
    grace_s: float = 0.0
    """Of that shutdown."""
    operations: tuple[Operation, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Scenario:
        """Raises ValueError, KeyError or TypeError for what no `to_json` wrote."""
        fields = json.loads(text)
        shape = EngineShape(**fields.pop("shape"))
        operations = tuple(Operation(**one) for one in fields.pop("operations"))
        return cls(shape=shape, operations=operations, **fields)
