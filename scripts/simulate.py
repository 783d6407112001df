"""Simulates whole lives of a front end, its engines and their network, by the thousand.

    python scripts/simulate.py --seeds 10000 --jobs 2     # what breaks, and what met what
    python scripts/simulate.py --minutes 60 --jobs 2      # as many seeds as fit
    python scripts/simulate.py --seed 1234 --trace        # one seed, event by event
    python scripts/simulate.py --replay failure.json      # a scenario that was made shorter

Real code on both sides, one process, one seeded scheduler and no clock: a seed's run is the same
every time. A seed that breaks the life-cycle contract is made shorter and stored; the status is
then 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.simulation import coverage
from scripts.simulation.run import Outcome, prepare, run_scenario, run_seed
from scripts.simulation.scenario import Scenario
from scripts.simulation.shrink import shrink
from scripts.simulation.workload import make_scenario

SEEDS_PER_PART = 50
MAX_FAILURES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--seeds", type=_positive, default=1000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=_positive, default=1, help="processes")
    parser.add_argument("--minutes", type=float, help="run for so long, in place of --seeds")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--replay", type=Path, help="run a stored scenario")
    parser.add_argument("--trace", action="store_true", help="print every event of that one run")
    parser.add_argument("--failures", type=Path, default=Path("."), help="where to store them")
    args = parser.parse_args()
    prepare()
    if args.replay is not None:
        try:
            scenario = Scenario.from_json(args.replay.read_text())
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"argument --replay: {args.replay} is no stored scenario: {error!r}")
        return _run_one(scenario, trace=True)
    if args.seed is not None:
        return _run_one(make_scenario(args.seed), trace=args.trace)
    return _run_many(args)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _run_one(scenario: Scenario, *, trace: bool) -> int:
    for operation in scenario.operations:
        print(operation)
    outcome = run_scenario(scenario, is_detailed=trace)
    print(*outcome.lines, sep="\n")
    print(f"{outcome.num_events} events, checksum {outcome.checksum:08x}")
    print(outcome.violation or "nothing is broken")
    return 1 if outcome.violation is not None else 0


def _run_many(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    ends_s = None if args.minutes is None else started_s + 60 * args.minutes
    num_seeds = 0
    failed: list[Outcome] = []
    totals, seen = Counter[str](), Counter[coverage.Pair]()
    for outcomes in _parts(args.start, None if ends_s else args.seeds, args.jobs, ends_s):
        for outcome in outcomes:
            num_seeds += 1
            seen += outcome.seen
            totals.update(
                requests=outcome.num_requests,
                steps=outcome.num_steps,
                events=outcome.num_events,
                virtual_s=int(outcome.virtual_s),
            )
            if outcome.violation is not None:
                failed.append(outcome)
                print(f"seed {outcome.seed}: {outcome.violation}", flush=True)
        if len(failed) >= MAX_FAILURES:
            break
    took_s = time.monotonic() - started_s
    print(coverage.table(seen))
    if missing := coverage.missing(seen):
        print("never met:", "; ".join(f"{operation} while {stage}" for operation, stage in missing))
    figures = ", ".join(f"{number} {name}" for name, number in totals.items())
    print(f"{num_seeds} seeds ({figures}) in {took_s:.1f} s: {num_seeds / took_s:.0f} a second")
    for outcome in failed[:MAX_FAILURES]:
        _store(outcome, args.failures)
    print(f"{len(failed)} seeds broke the contract")
    return 1 if failed else 0


def _parts(
    start: int, num_seeds: int | None, num_jobs: int, ends_s: float | None
) -> Iterator[list[Outcome]]:
    """Outcomes of seeds in order of their completion, until all have run or time is over."""
    starts = (
        count(start, SEEDS_PER_PART)
        if num_seeds is None
        else iter(range(start, start + num_seeds, SEEDS_PER_PART))
    )
    last = None if num_seeds is None else start + num_seeds
    if num_jobs == 1:
        for part_start in starts:
            if ends_s is not None and time.monotonic() > ends_s:
                return
            yield _run_part(part_start, last)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_jobs, mp_context=context, initializer=prepare) as pool:
        running: set[Future[list[Outcome]]] = set()
        while True:
            while len(running) < 2 * num_jobs and (ends_s is None or time.monotonic() < ends_s):
                if (first := next(starts, None)) is None:
                    break
                running.add(pool.submit(_run_part, first, last))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for part in done:
                yield part.result()


def _run_part(first: int, last: int | None) -> list[Outcome]:
    end = first + SEEDS_PER_PART if last is None else min(first + SEEDS_PER_PART, last)
    return [run_seed(seed) for seed in range(first, end)]


def _store(outcome: Outcome, directory: Path) -> None:
    assert outcome.violation is not None
    shorter = shrink(make_scenario(outcome.seed), outcome.violation.check)
    path = directory / f"failure-{outcome.seed}.json"
    path.write_text(shorter.to_json())
    print(f"\nseed {outcome.seed}, made shorter (replay it with --replay {path}):")
    for operation in shorter.operations:
        print(f"  {operation}")
    print(f"  {run_scenario(shorter).violation}")


if __name__ == "__main__":
    sys.exit(main())
