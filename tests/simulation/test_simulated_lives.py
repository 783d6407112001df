"""Whole lives of a front end and its engines, in virtual time: the contract holds in each of them,
and the simulation itself can be trusted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from engine_core.aborts import Aborts
from engine_core.outbox import Outbox
from engine_core.scheduler import Scheduler
from ipc.abort import Abort
from scripts.simulation import coverage
from scripts.simulation.run import Outcome, run_scenario, run_seed, undisturbed
from scripts.simulation.scenario import Scenario
from scripts.simulation.shrink import shrink
from scripts.simulation.workload import make_scenario

ROOT = Path(__file__).parents[2]
NUM_SEEDS = 1000
RARE = set(
    product(
        (
            *("forget", "abort batch", "abort prefix", "abort tag", "abort all", "stop string"),
            *("engine crash", "engine shutdown", "corrupt frame", "frontend crash", "lease end"),
            *("pause abort", "pause wait", "label", "resume_from"),
        ),
        ("held", "prefill", "kept", "preempted", "retracted", "leaving", "ending"),
    )
)
"""Pairs that so few seeds need not meet; longer runs do."""
TRACED_SEEDS = range(40)
CHECKSUMS = """
import json
from scripts.simulation.run import prepare, run_seed
prepare()
print(json.dumps([run_seed(seed).checksum for seed in range(40)]))
"""


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with undisturbed():
        yield


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    with undisturbed():
        return [run_seed(seed) for seed in range(NUM_SEEDS)]


def test_the_contract_holds_in_every_simulated_life(outcomes: list[Outcome]) -> None:
    broken = [f"seed {one.seed}: {one.violation}" for one in outcomes if one.violation is not None]
    assert not broken


def test_every_operation_meets_requests_in_every_stage(outcomes: list[Outcome]) -> None:
    seen: Counter[coverage.Pair] = Counter()
    for outcome in outcomes:
        seen += outcome.seen
    assert set(coverage.missing(seen)) <= RARE, coverage.table(seen)


def test_lives_are_full_of_requests_and_steps(outcomes: list[Outcome]) -> None:
    assert sum(one.num_requests for one in outcomes) > 8 * NUM_SEEDS
    assert sum(one.num_steps for one in outcomes) > 30 * NUM_SEEDS


def test_a_seed_lives_the_same_life_again() -> None:
    for seed in TRACED_SEEDS:
        first, second = (run_seed(seed, is_detailed=True) for _ in range(2))
        assert first.lines == second.lines
        assert first.checksum == second.checksum


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_seed_lives_the_same_life_in_another_process(hash_seed: str) -> None:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CHECKSUMS],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert json.loads(done.stdout) == [run_seed(seed).checksum for seed in TRACED_SEEDS]


def test_a_broken_promise_is_found_and_told_in_few_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that is deaf to ABORT frames, but says that it heard."""

    def silent(self: Aborts, client_index: int, message: Abort, outbox: Outbox) -> None:
        for internal_id in message.request_ids:
            outbox.confirm_end(client_index, internal_id)

    monkeypatch.setattr(Aborts, "silent", silent)
    found = next(one for one in map(run_seed, range(100)) if one.violation is not None)
    assert found.violation is not None
    scenario = make_scenario(found.seed)
    shorter = shrink(scenario, found.violation.check)
    assert len(shorter.operations) <= 3 < len(scenario.operations)
    again = run_scenario(Scenario.from_json(shorter.to_json())).violation
    assert again is not None
    assert again.check == found.violation.check
    monkeypatch.undo()
    assert run_scenario(shorter).violation is None


@pytest.mark.parametrize(
    ("method", "checks"),
    [
        ("begin_weight_epoch", {"stale prefix", "crossing", "status"}),
        ("hold_newcomers", {"pause answer", "stillness"}),
        ("release_newcomers", {"liveness", "order"}),
    ],
)
def test_a_pause_or_an_update_that_leaves_something_out_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str, checks: set[str]
) -> None:
    monkeypatch.setattr(Scheduler, method, lambda self: None)
    violations = (run_seed(seed).violation for seed in range(200))
    found = next(one for one in violations if one is not None)
    assert found.check in checks, found


def test_the_command_line_runs_seeds_on_several_processes(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/simulate.py", "--seeds", "100", "--jobs", "2"]
    command += ["--failures", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 seeds (" in done.stdout
    assert "0 seeds broke the contract" in done.stdout
