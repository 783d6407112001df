"""A thousand clients hang up at once: how fast their engines hear of it, and who else feels it.

    python -m scripts.bench_storm --server caesura --server 'vllm-rs=/opt/vllm-rs serve {model}'

While the clients stream (or wait, for the share that does not stream) from two made-up engines, the
client process resets all their connections in one tight loop. Measured: how many ABORT frames each
engine gets, with how many ids; the time from the first reset and from the last one until the last
id is at its engine; the latency of bystanders' tokens in the second before and the second after;
whether later requests complete; what is left live at the engines; the server's memory.

The default step makes a load that two cores can bear; with too short a step the server is behind
before the storm begins, which then measures its backlog. The exit status is 1 if an id was not
aborted, something stays live, or a later request fails. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scripts.http_bench.bench_engine import AbortFrame, Engines
from scripts.http_bench.client import Call, Connection, Reply, closed_loop, gaps_s, run_clients
from scripts.http_bench.figures import percentile, print_table, write_json
from scripts.http_bench.servers import (
    RunningServer,
    default_servers,
    make_parser,
    with_engines,
)

NUM_CONNECTING = 100
"""Connections being opened at a time, fewer than any server's backlog."""
ENDLESS_TOKENS = 8000
"""More than a request gets before its client hangs up."""
CALM_S = 2.0
"""From the last client's first token to the storm."""
WINDOW_S = 1.0
SETTLE_S = 5.0
"""For what should have ended to end."""
LATER_TOKENS = 16
MUST_BE_ZERO = (
    "lost bystanders",
    "clients not aborted",
    "later requests failed",
    "left live at engines",
)


@dataclass(frozen=True, slots=True)
class Storm:
    """What the client process saw."""

    first_reset_s: float
    last_reset_s: float
    bystanders_left_s: float
    gaps_before_s: list[float]
    gaps_during_s: list[float]
    num_lost_bystanders: int
    num_failed_later: int


async def storm(
    call: Call,
    *,
    num_clients: int,
    num_not_streaming: int,
    num_bystanders: int,
    num_later: int,
) -> Storm:
    """Runs in the client process."""
    bystanders = await _begin(call, num_bystanders, first_number=0)
    not_streaming = await _begin(
        call, num_not_streaming, first_number=num_bystanders, stream=False, reset=True
    )
    clients = not_streaming + await _begin(
        call, num_clients - num_not_streaming, first_number=num_bystanders + 1, reset=True
    )
    await asyncio.sleep(CALM_S)
    first_reset_s = time.monotonic()
    for connection in clients:
        connection.close()
    await asyncio.sleep(0)  # the event loop's next turn closes them
    last_reset_s = time.monotonic()
    await asyncio.sleep(WINDOW_S)
    later_call = Call(call.port, call.model, LATER_TOKENS)
    later = await closed_loop(later_call, num_requests=num_later, concurrency=50)
    await asyncio.sleep(WINDOW_S)
    seen: list[Reply] = [connection.reply for connection in bystanders]
    lost = [reply for reply in seen if not reply.arrivals_s or reply.end_s]
    left_s = time.monotonic()
    for connection in bystanders:
        connection.close()
    return Storm(
        first_reset_s=first_reset_s,
        last_reset_s=last_reset_s,
        bystanders_left_s=left_s,
        gaps_before_s=gaps_s(seen, first_reset_s - WINDOW_S, first_reset_s),
        gaps_during_s=gaps_s(seen, first_reset_s, first_reset_s + WINDOW_S),
        num_lost_bystanders=len(lost),
        num_failed_later=num_later - sum(reply.is_good for reply in later),
    )


async def _begin(
    call: Call, number: int, *, first_number: int, stream: bool = True, reset: bool = False
) -> list[Connection]:
    """So many clients whose requests are sent; the streaming ones have their first token."""
    is_free = asyncio.Semaphore(NUM_CONNECTING)

    async def begin(index: int) -> Connection:
        async with is_free:
            connection = await Connection.open(call.port, reset_on_close=reset)
            connection.send(call.request(first_number + index, stream=stream))
            if stream:
                await connection.first_event
                if connection.reply.status != 200:
                    raise RuntimeError(f"a client got {connection.reply}")
            return connection

    return list(await asyncio.gather(*map(begin, range(number))))


def measure(
    server: RunningServer,
    engines: Engines,
    arguments: argparse.Namespace,
) -> dict[str, float | str]:
    """One storm."""
    engines.pace(arguments.step_ms)
    resident_before = server.resident_bytes()
    seen: Storm = run_clients(
        storm,
        Call(server.port, server.model_name, ENDLESS_TOKENS),
        num_clients=arguments.clients,
        num_not_streaming=round(arguments.clients * arguments.non_streaming_share),
        num_bystanders=arguments.bystanders,
        num_later=arguments.later,
    )
    time.sleep(SETTLE_S)
    reports = engines.report()
    by_rank: dict[int, list[AbortFrame]] = defaultdict(list)
    for report in reports:
        by_rank[report.rank] += [
            frame
            for frame in report.aborts
            if seen.first_reset_s <= frame.arrived_s < seen.bystanders_left_s
        ]
    of_storm = [frame for frames in by_rank.values() for frame in frames]
    num_aborted = sum(frame.num_ended for frame in of_storm)
    last_arrival_s = max((frame.arrived_s for frame in of_storm), default=math.nan)
    before, during = seen.gaps_before_s, seen.gaps_during_s
    return {
        "clients": arguments.clients,
        "resets took ms": (seen.last_reset_s - seen.first_reset_s) * 1e3,
        "abort frames per engine": _listed(len(frames) for frames in by_rank.values()),
        "ids per engine": _listed(
            sum(frame.num_ids for frame in frames) for frames in by_rank.values()
        ),
        "first reset to last id ms": (last_arrival_s - seen.first_reset_s) * 1e3,
        "last reset to last id ms": (last_arrival_s - seen.last_reset_s) * 1e3,
        "bystander ITL before, p50 ms": percentile(before, 50) * 1e3,
        "bystander ITL before, p99 ms": percentile(before, 99) * 1e3,
        "bystander ITL during, p99 ms": percentile(during, 99) * 1e3,
        "bystander ITL during, max ms": max(during, default=math.nan) * 1e3,
        "lost bystanders": seen.num_lost_bystanders,
        "clients not aborted": arguments.clients - num_aborted,
        "later requests failed": seen.num_failed_later,
        "left live at engines": sum(report.num_live for report in reports),
        "memory before MB": resident_before / 1e6,
        "memory after MB": server.resident_bytes() / 1e6,
        "step late by, max ms": max(report.most_late_ms for report in reports),
    }


def _listed(counts: Iterable[int]) -> str:
    return ", ".join(map(str, counts))


def _is_clean(figures: Mapping[str, float | str]) -> bool:
    return not any(figures[name] for name in MUST_BE_ZERO)


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=1000, help="that hang up (default 1000)")
    parser.add_argument(
        "--non-streaming-share",
        type=float,
        default=0.0,
        help="of them, that await a whole answer (default 0)",
    )
    parser.add_argument("--bystanders", type=int, default=64, help="streams that stay (default 64)")
    parser.add_argument("--later", type=int, default=300, help="requests after it (default 300)")
    parser.add_argument("--engines", type=int, default=2, help="made-up engines (default 2)")
    parser.add_argument("--step-ms", type=float, default=50.0, help="of an engine (default 50)")
    arguments = parser.parse_args()
    # Inherited by the servers and the clients, whose connections are files.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    columns: dict[str, dict[str, float | str]] = {}
    for server in default_servers(arguments.servers):
        with with_engines(server, arguments.model, arguments.engines) as (running, engines):
            columns[server.name] = measure(running, engines, arguments)
    print_table(f"{arguments.clients} clients hang up", columns)
    if arguments.json is not None:
        settings = {"step_ms": arguments.step_ms, "share": arguments.non_streaming_share}
        write_json(arguments.json, {"cores": os.cpu_count(), **settings, "servers": columns})
    return 0 if all(map(_is_clean, columns.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
