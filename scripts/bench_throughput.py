"""Offline throughput of engines, side by side: prefill and decode, in tokens a second.

    python -m scripts.bench_throughput --model qwen3-0.6b --engine caesura \\
        --engine 'int8=caesura --quantization int8' --engine vllm@/opt/vllm/bin/python

A load N:PROMPT:OUTPUT is N requests handed over at once, each with a prompt of so many random token
ids and exactly so many output tokens, greedy. All engines get the same prompts, and no two rounds
the same ones; prefix caches are off. Every round measures all engines, one after the other, while
the others are loaded and stopped. Figures of one run:

- decode tokens/s: tokens that arrived after the last request's first token, over the time from that
  moment to the last token.
- prefill tokens/s: all prompts' tokens, over the time until every request has its first token.
- output tokens/s: all output tokens, over the time to the last.
- first token, ms: median over the requests.
- resident MiB, of all the engine's processes, at the end.
- cores busy, by the engine's own processes and elsewhere. A run during which others kept more than
  0.15 cores busy is repeated, for up to --retry-s, and the least disturbed attempt counts.
- first tokens alike: the share of requests whose first token is the one of the first engine. It
  tells whether the engines compute the same; random weights make close calls, so some differ.

The table shows medians over the rounds and, for each further engine, how many times its figure the
first engine has, as the median of the rounds' ratios. More ways to write an engine: see
scripts/perf_bench/engines.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.http_bench.figures import print_table, write_json
from scripts.perf_bench.command_line import find_model, make_parser
from scripts.perf_bench.engines import EngineError, EngineSpec, RunningEngine, running
from scripts.perf_bench.machine import busy_s, describe_machine
from scripts.perf_bench.models import vocabulary_size
from scripts.perf_bench.stopping import stopped

DEFAULT_LOADS = ("1:64:128", "4:64:128", "16:64:128", "64:64:128", "1:1024:1", "4:1024:1")
WARM_UP_TOKENS = 8
DISTURBED_CORES = 0.15
ELSEWHERE = "cores busy elsewhere"
IS_BETTER_LOWER = {"first token, ms", "resident MiB"}


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests at once, each of so many prompt and output tokens."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Load:
        """Raises ArgumentTypeError."""
        try:
            load = cls(*map(int, text.split(":")))
        except (TypeError, ValueError):
            load = cls(0, 0, 0)
        if min(load.num_requests, load.num_prompt_tokens, load.num_output_tokens) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no load; write REQUESTS:PROMPT:OUTPUT")
        return load

    def __str__(self) -> str:
        return f"{self.num_requests} x {self.num_prompt_tokens}+{self.num_output_tokens}"

    def prompts(self, vocab_size: int, seed: str) -> list[list[int]]:
        draw = random.Random(f"{seed} {self}").randrange
        return [
            [draw(vocab_size) for _ in range(self.num_prompt_tokens)]
            for _ in range(self.num_requests)
        ]


def figures_of(num_prompt_tokens: int, arrivals_s: Sequence[Sequence[float]]) -> dict[str, float]:
    """From when each request's tokens arrived, and how long each prompt was."""
    firsts_s = [arrivals[0] for arrivals in arrivals_s]
    prefilled_s = max(firsts_s)
    end_s = max(arrivals[-1] for arrivals in arrivals_s)
    num_decoded = sum(arrival > prefilled_s for arrivals in arrivals_s for arrival in arrivals)
    return {
        "decode tokens/s": num_decoded / (end_s - prefilled_s) if num_decoded else math.nan,
        "prefill tokens/s": len(arrivals_s) * num_prompt_tokens / prefilled_s,
        "output tokens/s": sum(map(len, arrivals_s)) / end_s,
        "first token, ms": median(firsts_s) * 1e3,
    }


def measure(
    engines: Sequence[RunningEngine],
    loads: Sequence[Load],
    *,
    rounds: int,
    vocab_size: int,
    retry_s: float,
) -> list[dict[str, Any]]:
    """All rounds: one entry for each load, engine and round, in the order of measuring."""
    runs: list[dict[str, Any]] = []
    for load in loads:
        for number in range(-1, rounds):  # the round before is for warming up, and short
            prompts = load.prompts(vocab_size, f"round {number}")
            length = min(load.num_output_tokens, WARM_UP_TOKENS if number < 0 else sys.maxsize)
            outputs: dict[str, list[list[int]]] = {}
            figures: dict[str, dict[str, float]] = {}
            # Each second round goes backwards, lest one engine always follows the same other.
            for engine in engines if number % 2 == 0 else reversed(engines):
                with stopped(other.pid for other in engines if other is not engine):
                    figures[engine.name], outputs[engine.name] = run_undisturbed(
                        engine, prompts, length, retry_s=retry_s if number >= 0 else 0.0
                    )
            for engine in engines if number >= 0 else ():
                alike = _share_alike(outputs[engine.name], outputs[engines[0].name])
                of_engine = figures[engine.name] | {"first tokens alike": alike}
                runs.append({"load": str(load), "engine": engine.name, "round": number} | of_engine)
                print(f"{load!s:>14} {engine.name}: {_brief(of_engine)}", file=sys.stderr)
    return runs


def run_undisturbed(
    engine: RunningEngine, prompts: list[list[int]], num_output_tokens: int, *, retry_s: float
) -> tuple[dict[str, float], list[list[int]]]:
    """`run_once`, again if other processes were busy; the least disturbed attempt counts."""
    deadline_s = time.monotonic() + retry_s
    attempts = [run_once(engine, prompts, num_output_tokens)]
    while attempts[-1][0][ELSEWHERE] > DISTURBED_CORES and time.monotonic() < deadline_s:
        attempts.append(run_once(engine, prompts, num_output_tokens))
    return min(attempts, key=lambda attempt: attempt[0][ELSEWHERE])


def run_once(
    engine: RunningEngine, prompts: list[list[int]], num_output_tokens: int
) -> tuple[dict[str, float], list[list[int]]]:
    """Figures and output tokens of one engine under one load."""
    cpu_s, all_cpu_s = engine.cpu_time_s(), busy_s()
    arrivals_s, tokens = engine.run(prompts, num_output_tokens)
    cpu_s, all_cpu_s = engine.cpu_time_s() - cpu_s, busy_s() - all_cpu_s
    wall_s = max(arrivals[-1] for arrivals in arrivals_s)
    cost = {
        "resident MiB": engine.resident_mib(),
        "cores busy": cpu_s / wall_s,
        ELSEWHERE: (all_cpu_s - cpu_s) / wall_s,
    }
    return figures_of(len(prompts[0]), arrivals_s) | cost, tokens


def _share_alike(tokens: list[list[int]], others: list[list[int]]) -> float:
    """How many of the requests begin their output alike: the models are the same, so it is most."""
    pairs = zip(tokens, others, strict=True)
    return sum(ours[0] == theirs[0] for ours, theirs in pairs) / len(tokens)


def _brief(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def print_tables(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One table for each figure: a column for each engine, a row for each load."""
    loads = list(dict.fromkeys(run["load"] for run in runs))
    for figure in (key for key in runs[0] if key not in ("load", "engine", "round")):
        by: dict[tuple[str, str], list[float]] = {}
        for run in sorted(runs, key=lambda run: int(run["round"])):
            by.setdefault((run["load"], run["engine"]), []).append(run[figure])
        columns = {name: {load: median(by[load, name]) for load in loads} for name in names}
        if not figure.startswith(("cores", "first tokens")):
            for name in names[1:]:
                columns[f"x {name}"] = {
                    load: median(
                        ours / theirs if figure not in IS_BETTER_LOWER else theirs / ours
                        for ours, theirs in zip(by[load, names[0]], by[load, name], strict=True)
                    )
                    for load in loads
                }
        print_table(figure, columns)


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--engine", action="append", dest="engines", metavar="ENGINE")
    parser.add_argument("--loads", type=Load.parse, nargs="+", metavar="N:PROMPT:OUTPUT")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--kv-cache-gib", type=int, default=4, help="of each engine (default 4)")
    parser.add_argument("--retry-s", type=float, default=20.0, help="of a run (default 20)")
    arguments = parser.parse_args()
    loads = arguments.loads or [Load.parse(text) for text in DEFAULT_LOADS]
    try:
        specs = [EngineSpec.parse(text) for text in arguments.engines or ["caesura"]]
    except ValueError as error:
        parser.error(str(error))
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        parser.error(f"names of engines repeat: {', '.join(names)}")
    directory = find_model(parser, arguments)
    room = max(load.num_prompt_tokens + load.num_output_tokens for load in loads)
    settings = {
        "model": str(directory),
        "max_model_len": max(room, WARM_UP_TOKENS + 8),
        "max_num_seqs": max(256, *(load.num_requests for load in loads)),
        "kv_cache_gib": arguments.kv_cache_gib,
    }
    try:
        with contextlib.ExitStack() as stack:
            engines = []
            for spec in specs:
                print(f"starting {spec.name}", file=sys.stderr)
                engines.append(stack.enter_context(running(spec, settings)))
            versions = {engine.name: engine.version for engine in engines}
            vocab_size = vocabulary_size(directory)
            runs = measure(
                engines,
                loads,
                rounds=arguments.rounds,
                vocab_size=vocab_size,
                retry_s=arguments.retry_s,
            )
    except EngineError as error:
        print(f"bench_throughput: error: {error}", file=sys.stderr)
        return 1
    print_tables(runs, names)
    if arguments.json is not None:
        given = {"engines": arguments.engines, "versions": versions, "settings": settings}
        write_json(arguments.json, describe_machine() | given | {"runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
