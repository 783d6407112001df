"""What an HTTP server costs for each streamed token, and how many requests it serves a second.

    python -m scripts.bench_http --server caesura --server 'vllm-rs=/opt/vllm-rs serve {model}'

Servers get made-up engines that cost next to nothing, so the figures are the server's own. Each
round measures all servers, one after the other, in two ways:

- paced: 256 streams of 128 tokens at once, a step every 10 ms. CPU time of the server's processes
  for each token, latencies as a client sees them, events for each token (below 1: joined tokens).
- unpaced: 2,000 streams of 128 tokens, 256 at a time, the engine faster than any server. Requests
  a second and CPU time for each request. Where clients and server share few cores, CPU time is
  the steadier figure.

Figures are medians over the rounds. A request that does not end as asked is an error (exit
status 1). Linux only.
"""

from __future__ import annotations

import contextlib
import os
import sys

from scripts.http_bench.bench_engine import Engines
from scripts.http_bench.client import Call, Reply, closed_loop, gaps_s, run_clients
from scripts.http_bench.figures import medians, percentile, print_table, write_json
from scripts.http_bench.servers import (
    RunningServer,
    default_servers,
    make_parser,
    with_engines,
)

OUTRUNNING_STEP_MS = 1.0


def measure(
    server: RunningServer,
    engines: Engines,
    *,
    step_ms: float,
    num_requests: int,
    concurrency: int,
    max_tokens: int,
) -> dict[str, float]:
    """One load on one server."""
    engines.pace(step_ms)
    call = Call(server.port, server.model_name, max_tokens)
    tree = server.tree()
    cpu_before_s = server.cpu_time_s()
    replies: list[Reply] = run_clients(
        closed_loop, call, num_requests=num_requests, concurrency=concurrency
    )
    cpu_s = server.cpu_time_s() - cpu_before_s
    assert tree == server.tree(), f"{server.name}: processes came or went; CPU time is unknown"
    wall_s = max(reply.end_s for reply in replies) - min(reply.sent_s for reply in replies)
    good = [reply for reply in replies if reply.is_good]
    num_tokens = len(good) * max_tokens
    gaps = gaps_s(good)
    waits = [reply.arrivals_s[0] - reply.sent_s for reply in good]
    return {
        "CPU us/token": cpu_s / max(1, num_tokens) * 1e6,
        "CPU ms/request": cpu_s / max(1, len(good)) * 1e3,
        "CPU cores busy": cpu_s / wall_s,
        "requests/s": len(good) / wall_s,
        "tokens/s": num_tokens / wall_s,
        "TTFT p50 ms": percentile(waits, 50) * 1e3,
        "TTFT p99 ms": percentile(waits, 99) * 1e3,
        "ITL p50 ms": percentile(gaps, 50) * 1e3,
        "ITL p99 ms": percentile(gaps, 99) * 1e3,
        "events/token": sum(len(reply.arrivals_s) for reply in good) / max(1, num_tokens),
        "step late by, max ms": max(report.most_late_ms for report in engines.report()),
        "failed requests": num_requests - len(good),
    }


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--engines", type=int, default=1, help="made-up engines (default 1)")
    parser.add_argument("--streams", type=int, default=256, help="at once (default 256)")
    parser.add_argument("--requests", type=int, default=2000, help="unpaced ones (default 2000)")
    parser.add_argument("--tokens", type=int, default=128, help="of each request (default 128)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="paced step (default 10)")
    arguments = parser.parse_args()
    loads = {
        "paced": {"step_ms": arguments.step_ms, "num_requests": arguments.streams},
        "unpaced": {"step_ms": OUTRUNNING_STEP_MS, "num_requests": arguments.requests},
    }
    shape = {"concurrency": arguments.streams, "max_tokens": arguments.tokens}
    runs: dict[str, dict[str, list[dict[str, float]]]] = {load: {} for load in loads}
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(with_engines(server, arguments.model, arguments.engines))
            for server in default_servers(arguments.servers)
        ]
        for repeat in range(-1, arguments.repeats):
            for server, engines in running:
                for load, options in loads.items():
                    figures = measure(server, engines, **options, **shape)
                    if repeat >= 0:  # the round before is for warming up
                        runs[load].setdefault(server.name, []).append(figures)
    for load, by_server in runs.items():
        print_table(load, {name: medians(of_server) for name, of_server in by_server.items()})
    if arguments.json is not None:
        write_json(arguments.json, {"cores": os.cpu_count(), "settings": loads, "runs": runs})
    rounds = [figures for by in runs.values() for of in by.values() for figures in of]
    return 1 if any(figures["failed requests"] for figures in rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
