"""From a client's hang-up to the return of its KV blocks, with a real model.

    python -m scripts.bench_hang_up
    python -m scripts.bench_hang_up --server 'vllm-rs=/opt/vllm-rs serve {model}'

A client process closes one connection after the other, each at a random moment of a stage:
streaming, awaiting a whole answer, queued, or in chunked prefill. Between the server and its engine
sits a tap on the wire, on the way back only: the engine's frames say which requests have given up
their blocks, at which time of the same clock that the client reads before it closes. So nothing is
added to what is measured, and server and engine run as they always do.

The goal is one step plus 2 ms: the step in flight at the hang-up keeps the blocks to its end. So
each hang-up is held against the whole duration of its own such step, and `beyond it` is what came
on top (below 0: the hang-up was heard within the step). `steps` counts those that ended before the
blocks were free; 1 is the best there is. Wasted tokens are those sampled for the request after the
hang-up. A bystander streams all the while, so that the engine is never idle.

The exit status is 1 if a hang-up was missed or met its request at another stage. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import sys
import time
from bisect import bisect
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from statistics import mean

from scripts.http_bench.client import Call, Connection, run_clients
from scripts.http_bench.figures import percentile, print_table, write_json
from scripts.http_bench.servers import (
    HOST,
    Server,
    default_servers,
    free_port,
    launched,
    make_parser,
    serving,
)
from scripts.http_bench.tap import Frame, Tap

MAX_NUM_SEQS = 4
MAX_NUM_BATCHED_TOKENS = 256
"""A long prompt takes dozens of steps."""
LONG_PROMPT_TOKENS = 7000
VICTIM_TOKENS = 500
BYSTANDER_TOKENS = 8000
REST_S = 0.05
"""Between two hang-ups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where a hang-up is to find its request."""

    name: str
    stream: bool = True
    num_prompt_tokens: int = 16
    num_running: int = 1
    """Endless streams beside it; with as many as run at once, the request stays queued."""
    delay_s: tuple[float, float]
    """From sending (streams that decode: from the first token) to the hang-up, at random."""
    has_tokens: bool = True


STAGES = (
    Stage(name="streaming", delay_s=(0.01, 0.05)),
    Stage(name="non-streaming", stream=False, delay_s=(0.05, 0.1)),
    Stage(name="queued", num_running=MAX_NUM_SEQS, delay_s=(0.02, 0.06), has_tokens=False),
    Stage(
        name="mid-prefill",
        num_prompt_tokens=LONG_PROMPT_TOKENS,
        delay_s=(0.03, 0.06),
        has_tokens=False,
    ),
)


@dataclass(frozen=True, slots=True)
class HangUp:
    """One, as the client did it."""

    name: str
    """Its X-Request-Id; part of the request's id on the wire."""
    closed_s: float


async def hang_up(call: Call, stage: Stage, number: int) -> list[HangUp]:
    """Runs in the client process: so many, one after the other."""
    chance = random.Random(stage.name)
    done = []
    async with _endless_streams(call, stage.num_running):
        for index in range(number):
            name = f"hang-up-{stage.name}-{index:05}"
            connection = await Connection.open(call.port)
            connection.send(call.request(100 + index, stream=stage.stream, name=name))
            if stage.stream and stage.has_tokens:
                await connection.first_event
            await asyncio.sleep(chance.uniform(*stage.delay_s))
            done.append(HangUp(name, time.monotonic()))
            connection.close()
            await asyncio.sleep(REST_S)
    return done


@contextlib.asynccontextmanager
async def _endless_streams(call: Call, number: int) -> AsyncIterator[None]:
    """Keep so many streams going; one that ends begins anew."""
    endless = Call(call.port, call.model, BYSTANDER_TOKENS)

    async def stream_on(index: int) -> None:
        connection = await Connection.open(call.port)
        try:
            while True:
                await connection.send(endless.request(index, stream=True))
        finally:
            connection.close()

    tasks = [asyncio.create_task(stream_on(index)) for index in range(number)]
    await asyncio.sleep(0.5)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(REST_S)


def account(stage: Stage, hang_ups: Sequence[HangUp], frames: Sequence[Frame]) -> dict[str, float]:
    """What the frames say of these hang-ups."""
    begin_s, end_s = hang_ups[0].closed_s, hang_ups[-1].closed_s + REST_S
    # Only what was said meanwhile, so that each search stays short.
    frames = [frame for frame in frames if begin_s - 1 <= frame.timestamp_s <= end_s + 10]
    step_ends_s = [frame.timestamp_s for frame in frames if frame.num_tokens]
    latencies_s: list[float] = []
    steps_s: list[float] = []
    num_steps: list[int] = []
    wasted: list[int] = []
    num_elsewhere = 0
    for one in hang_ups:
        freed_s = next(
            (f.timestamp_s for f in frames if any(one.name in ended for ended in f.ended)), None
        )
        if freed_s is None:
            continue
        tokens = [
            (frame.timestamp_s, count)
            for frame in frames
            for request_id, count in frame.num_tokens.items()
            if one.name in request_id
        ]
        latencies_s.append(freed_s - one.closed_s)
        in_flight = bisect(step_ends_s, one.closed_s)
        steps_s.append(step_ends_s[in_flight] - step_ends_s[in_flight - 1])
        num_steps.append(bisect(step_ends_s, freed_s) - in_flight)
        wasted.append(sum(count for sampled_s, count in tokens if sampled_s > one.closed_s))
        num_elsewhere += any(at_s <= one.closed_s for at_s, _ in tokens) != stage.has_tokens
    beyond_s = [latency - step for latency, step in zip(latencies_s, steps_s, strict=True)]
    return {
        "blocks free after, p50 ms": percentile(latencies_s, 50) * 1e3,
        "blocks free after, p99 ms": percentile(latencies_s, 99) * 1e3,
        "blocks free after, max ms": percentile(latencies_s, 100) * 1e3,
        "step in flight, p50 ms": percentile(steps_s, 50) * 1e3,
        "step in flight, p99 ms": percentile(steps_s, 99) * 1e3,
        "beyond it, p50 ms": percentile(beyond_s, 50) * 1e3,
        "beyond it, p99 ms": percentile(beyond_s, 99) * 1e3,
        "steps p50": percentile(num_steps, 50),
        "steps max": percentile(num_steps, 100),
        "wasted tokens, mean": mean(wasted) if wasted else 0.0,
        "wasted tokens, max": max(wasted, default=0),
        "hang-ups": len(hang_ups),
        "missed": len(hang_ups) - len(latencies_s),
        "at another stage": num_elsewhere,
    }


def measure(server: Server, model: str, number: int) -> dict[str, dict[str, float]]:
    """All stages on one server, by their names."""
    rpc_port = free_port()
    figures = {}
    with Tap(f"tcp://{HOST}:{rpc_port}") as tap:
        engine = (
            f"{shlex.quote(sys.executable)} -P -m frontend.cli serve {shlex.quote(model)} "
            f"--headless --data-parallel-rpc-port {tap.port} --max-num-seqs {MAX_NUM_SEQS} "
            f"--max-num-batched-tokens {MAX_NUM_BATCHED_TOKENS} --num-threads 1"
        )
        with launched(engine, is_ours=True), serving(server, model, 1, rpc_port) as running:
            for stage in STAGES:
                call = Call(
                    running.port, running.model_name, VICTIM_TOKENS, stage.num_prompt_tokens
                )
                hang_ups: list[HangUp] = run_clients(hang_up, call, stage, number)
                figures[stage.name] = account(stage, hang_ups, list(tap.frames))
    return figures


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--hang-ups", type=int, default=100, help="of each stage (default 100)")
    arguments = parser.parse_args()
    columns: dict[str, dict[str, dict[str, float]]] = {}
    for server in default_servers(arguments.servers):
        columns[server.name] = measure(server, arguments.model, arguments.hang_ups)
        print_table(f"{server.name}: from hang-up to free blocks", columns[server.name])
    if arguments.json is not None:
        write_json(arguments.json, {"servers": columns})
    stages = [figures for by_stage in columns.values() for figures in by_stage.values()]
    return 1 if any(figures["missed"] or figures["at another stage"] for figures in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
