"""Chooses the engine for a new request: the least loaded, and among equals the one that knows its
prompt's beginning.

An engine's load is the larger of two counts: what this front end sent it and has not seen end,
which is always fresh, and what the engine last reported, which includes the requests of other front
ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

AFFINITY_TOKENS = 32
"""How much of a prompt's beginning is compared."""
MAX_REMEMBERED_PREFIXES = 8192


class Balancer:
    """Remembers reported loads and where prompts went."""

    def __init__(self, num_engines: int) -> None:
        self._reported = [0] * num_engines
        self._engine_by_prefix: OrderedDict[int, int] = OrderedDict()
        self._next = 0

    def report(self, engine_index: int, num_requests: int) -> None:
        """An engine told how many requests it runs or queues."""
        self._reported[engine_index] = num_requests

    def choose(
        self,
        prompt_token_ids: Sequence[int],
        num_in_flight: Sequence[int],
        alive: Iterable[int],
    ) -> int:
        """The engine for this prompt, among those alive (at least one)."""
        loads = {index: max(num_in_flight[index], self._reported[index]) for index in alive}
        lightest = min(loads.values())
        candidates = [index for index, load in loads.items() if load == lightest]
        prefix = hash(tuple(prompt_token_ids[:AFFINITY_TOKENS]))
        chosen = self._engine_by_prefix.get(prefix)
        if chosen not in candidates:
            chosen = min(candidates, key=lambda index: (index - self._next) % len(num_in_flight))
            self._next = chosen + 1
        self._engine_by_prefix[prefix] = chosen
        self._engine_by_prefix.move_to_end(prefix)
        if len(self._engine_by_prefix) > MAX_REMEMBERED_PREFIXES:
            self._engine_by_prefix.popitem(last=False)
        return chosen
