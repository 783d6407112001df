"""Makes a failing scenario shorter: fewer operations, fewer engines, the same broken promise.

Whole halves are left out first, then quarters, down to single operations, as in delta debugging
(Zeller and Hildebrandt, 2002); then the scenario's other choices are made plain, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from scripts.simulation.run import run_scenario
from scripts.simulation.scenario import Operation, Scenario

MAX_RUNS = 600


def shrink(scenario: Scenario, check: str, *, max_runs: int = MAX_RUNS) -> Scenario:
    """The shortest scenario found that still breaks `check`."""
    shrinker = _Shrinker(check, max_runs)
    while True:
        shorter = shrinker.fewer_operations(scenario)
        shorter = shrinker.plainer(shorter)
        if shorter == scenario:
            return scenario
        scenario = shorter


class _Shrinker:
    def __init__(self, check: str, num_runs_left: int) -> None:
        self._check = check
        self._num_runs_left = num_runs_left

    def _still_fails(self, scenario: Scenario) -> bool:
        if self._num_runs_left <= 0:
            return False
        self._num_runs_left -= 1
        violation = run_scenario(scenario).violation
        return violation is not None and violation.check == self._check

    def fewer_operations(self, scenario: Scenario) -> Scenario:
        size = max(1, len(scenario.operations) // 2)
        while True:
            start = 0
            while start < len(scenario.operations):
                kept = scenario.operations[:start] + scenario.operations[start + size :]
                shorter = replace(scenario, operations=kept)
                if self._still_fails(shorter):
                    scenario = shorter
                else:
                    start += size
            if size == 1:
                return scenario
            size //= 2

    def plainer(self, scenario: Scenario) -> Scenario:
        for change in _plain_choices(scenario):
            plain = change(scenario)
            if plain != scenario and self._still_fails(plain):
                scenario = plain
        for index in range(len(scenario.operations)):
            for operation in _plain_operations(scenario.operations[index]):
                operations = list(scenario.operations)
                operations[index] = operation
                plain = replace(scenario, operations=tuple(operations))
                if self._still_fails(plain):
                    scenario = plain
        return scenario


def _plain_choices(scenario: Scenario) -> list[Callable[[Scenario], Scenario]]:
    return [
        lambda one: replace(one, num_engines=1),
        lambda one: replace(one, stream_interval=1),
        lambda one: replace(one, max_num_queued_requests=None, max_num_queued_tokens=None),
        lambda one: replace(one, ends_at_once=False, grace_s=0.0),
    ]


def _plain_operations(operation: Operation) -> Iterator[Operation]:
    """The same with one thing less."""
    if operation.when is not None:
        yield replace(operation, when=None)
    for name, value in operation.args.items():
        if operation.kind in _WITH_OPTIONS and name in _OPTIONAL_ARGUMENTS:
            args = {key: value for key, value in operation.args.items() if key != name}
            yield replace(operation, args=args)
        elif name in ("readers", "targets") and len(value) > 1:
            yield replace(operation, args=operation.args | {name: value[:1]})


_WITH_OPTIONS = ("add", "pause", "resume", "resume_from")
_OPTIONAL_ARGUMENTS = (
    *("clear_cache", "newcomers", "lease_s", "pause_id", "whose", "max_tokens", "as_json"),
    *("aliases", "tags", "tenant", "priority", "timeout_s", "final_only", "name_of"),
    *("stop", "stop_token_ids", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
    *("detokenize", "include_stop"),
)
