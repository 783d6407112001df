"""Looks for a violation, seed after seed, in the code that it is run from; prints one JSON object.

python -m scripts.mutations.hunt 2000
"""

from __future__ import annotations

import json
import signal
import sys
import time
from types import FrameType

from scripts.simulation.run import prepare, run_seed

MAX_SEED_CPU_S = 20.0
"""A seed takes some milliseconds; one that takes so long hangs in a loop without events."""


class SeedHangs(Exception):
    """A seed used up its time."""


def main() -> int:
    num_seeds = int(sys.argv[1])
    prepare()
    signal.signal(signal.SIGPROF, _raise_hang)
    started_s, seed, found = time.monotonic(), -1, None
    for seed in range(num_seeds):
        if (found := _hunt(seed)) is not None:
            break
    check, violation = found or (None, None)
    seconds = round(time.monotonic() - started_s, 1)
    result = {
        "seed": None if found is None else seed,
        "num_seeds": seed + 1,
        "check": check,
        "violation": violation,
        "seconds": seconds,
    }
    print(json.dumps(result))
    return 0


def _hunt(seed: int) -> tuple[str, str] | None:
    """(check, what it saw) if a seed breaks the contract."""
    signal.setitimer(signal.ITIMER_PROF, MAX_SEED_CPU_S, 1.0)
    try:
        violation = run_seed(seed).violation
    except Exception as error:
        return "exception", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    return None if violation is None else (violation.check, str(violation))


def _raise_hang(signal_number: int, frame: FrameType | None) -> None:
    raise SeedHangs(f"a seed runs for more than {MAX_SEED_CPU_S:g} s")


if __name__ == "__main__":
    sys.exit(main())
