"""Whoever does something in a life: the base of clients, operators and fate.

Invariant: whatever an operation does is in its arguments; where they name a request by its stage
and a number, the same life has the same request there.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from scripts.simulation.model_request import ModelRequest

if TYPE_CHECKING:
    from scripts.simulation.world import World

Target = dict[str, Any]
"""A number, and the stage of the request that is meant, if it matters."""


class Actor:
    """Performs operations on a world: its public methods, by name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.model = world.model

    def count(self, operation: str, requests: Iterable[ModelRequest]) -> None:
        """An operation meets requests in their present stages."""
        for request in requests:
            self.world.count(operation, request)

    def start(self, name: str, coroutine: Coroutine[Any, Any, None]) -> None:
        """Go on as a task."""
        tasks = self.world.tasks
        tasks.append(self.world.loop.create_task(coroutine, name=f"{name} {len(tasks)}"))

    def find(
        self,
        targets: Iterable[Target],
        fits: Callable[[ModelRequest], bool] = lambda request: True,
    ) -> list[ModelRequest]:
        """One request for each target, each once."""
        found: dict[int, ModelRequest] = {}
        candidates = [one for one in self.model.requests if fits(one)]
        for target in targets:
            pool = candidates
            if (stage := target["stage"]) is not None:
                wanted = [one for one in pool if stage in self.world.stages(one)]
                pool = wanted or [one for one in pool if one.is_live] or pool
            if pool:
                request = pool[target["pick"] % len(pool)]
                found[request.number] = request
        return list(found.values())
