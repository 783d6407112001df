"""Plants known bugs, one at a time, and has the simulation look for each: how much does it see?

    python scripts/mutate.py --jobs 2                # all of them
    python scripts/mutate.py --list                  # what they are, and who had them
    python scripts/mutate.py --only match_by_prefix  # some of them, by name or topic

Each bug is planted in a copy of the code. The same seeds are run on an unchanged copy first, where
there must be nothing to find. The status is 1 if less than 95 % of the bugs are found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.mutations.catalogue import ALL, BY_TOPIC
from scripts.mutations.mutation import Mutation, MutationError

ROOT = Path(__file__).parent.parent
COPIED = ("engine_core", "frontend", "ipc", "scripts/mutations", "scripts/simulation")
NEEDED_SHARE = 0.95
HUNT_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a hunt for one bug."""

    seed: int | None
    """The first seed that it breaks; None if it was not found."""
    num_seeds: int
    """That were run."""
    check: str | None
    violation: str | None
    seconds: float


class HuntError(Exception):
    """A hunt could not be carried out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--only", nargs="+", default=[], help="names or topics")
    parser.add_argument("--list", action="store_true", help="say what the bugs are")
    parser.add_argument("--seeds", type=int, default=2000, help="at most, for each bug")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the findings there")
    args = parser.parse_args()
    try:
        chosen = _choose(args.only)
        if args.list:
            for one in chosen:
                print(f"{one.name:<36}{one.what}" + (f" ({one.origin})" if one.origin else ""))
            return 0
        with _tree(ROOT) as base:
            findings = _hunt_all(base, chosen, args.seeds, args.jobs)
    except (HuntError, MutationError) as error:
        print(error, file=sys.stderr)
        return 2
    num_found = sum(finding.seed is not None for finding in findings.values())
    share = num_found / len(findings)
    total_s = sum(finding.seconds for finding in findings.values())
    print(
        f"{num_found} of {len(findings)} bugs were found ({share:.1%}) in {total_s:.0f} s of runs"
    )
    if args.json is not None:
        args.json.write_text(_as_json(chosen, findings, share))
    return 0 if share >= NEEDED_SHARE else 1


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _choose(only: Iterable[str]) -> list[Mutation]:
    """The named ones, in the catalogue's order. Raises HuntError."""
    wanted = set(only)
    by_name = {mutation.name: mutation for mutation in ALL}
    if unknown := wanted - by_name.keys() - BY_TOPIC.keys():
        raise HuntError(f"no bug or topic is called {', '.join(sorted(unknown))}; see --list")
    topical = {one.name for topic in wanted & BY_TOPIC.keys() for one in BY_TOPIC[topic]}
    return [one for one in ALL if not wanted or one.name in wanted | topical]


def _hunt_all(
    base: Path, chosen: list[Mutation], num_seeds: int, num_jobs: int
) -> dict[str, Finding]:
    """Hunt for each bug, and print its row when all before it are done. Raises HuntError."""
    control = _hunt(base, {}, num_seeds)
    if control.seed is not None:
        raise HuntError(f"without any bug, seed {control.seed} breaks: {control.violation}")
    print(f"without a bug: nothing in {num_seeds} seeds ({control.seconds:.0f} s)")
    print(f"{'bug':<36}{'seed':>6}  {'check':<18}{'s':>6}  what it is", flush=True)
    findings: dict[str, Finding] = {}
    with ThreadPoolExecutor(num_jobs) as pool:
        hunts = [pool.submit(_hunt, base, one.apply(base), num_seeds) for one in chosen]
        for one, hunt in zip(chosen, hunts, strict=True):
            try:
                found = findings[one.name] = hunt.result()
            except HuntError as error:
                pool.shutdown(cancel_futures=True)
                raise HuntError(f"mutation {one.name}: {error}") from None
            seed = "-" if found.seed is None else str(found.seed)
            check = found.check or "NOT FOUND"
            print(
                f"{one.name:<36}{seed:>6}  {check:<18}{found.seconds:>6.1f}  {one.what}", flush=True
            )
    return findings


def _hunt(base: Path, changed: Mapping[str, str], num_seeds: int) -> Finding:
    """Run seeds on a copy of `base` with changed files, until one breaks. Raises HuntError."""
    with _tree(base) as tree:
        for file, source in changed.items():
            (tree / file).write_text(source)
        command = [sys.executable, "-m", "scripts.mutations.hunt", str(num_seeds)]
        try:
            done = subprocess.run(
                command, cwd=tree, capture_output=True, text=True, timeout=HUNT_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise HuntError(f"{num_seeds} seeds took more than {HUNT_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise HuntError(f"the simulation does not run:\n{done.stderr[-2000:]}")
    return Finding(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _tree(root: Path) -> Iterator[Path]:
    """A copy of as much code as the simulation needs."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        tree = Path(directory)
        for package in COPIED:
            for source in (root / package).rglob("*.py"):
                copy = tree / source.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
        yield tree


def _as_json(chosen: list[Mutation], findings: Mapping[str, Finding], share: float) -> str:
    rows = [
        {"name": one.name, "what": one.what, "origin": one.origin, **asdict(findings[one.name])}
        for one in chosen
    ]
    return json.dumps({"share_found": share, "mutations": rows}, indent=1)


if __name__ == "__main__":
    sys.exit(main())
