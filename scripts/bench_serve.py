"""Latency and throughput of servers under load, over HTTP: TTFT, ITL and end-to-end percentiles.

    python -m scripts.bench_serve --model qwen3-0.6b --server caesura --concurrency 1 16 \\
        --server 'vllm=/opt/vllm/bin/vllm serve {model}' --rate 2

Each client asks /v1/completions for a stream of exactly --output-length tokens from a prompt of
random token ids. With --concurrency N, N clients send one request after the other (closed loop);
with --rate R, requests come at the random times of a Poisson process, R a second, whether or not
the server keeps up (open loop), and latencies count from these times. Rounds alternate between the
servers, of which those started here stand still while another one is measured; the prompts are the
same for all, and never used twice.

A server is `caesura`, with flags and a name if need be ('int8=caesura --quantization int8'), or
NAME=COMMAND, where {model} and {port} are filled in, or NAME=http://HOST:PORT for one that runs
already. Figures are medians over the rounds. A request that does not end as asked is a failure
(exit status 1).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from scripts.http_bench.client import Reply, gaps_s
from scripts.http_bench.figures import medians, percentile, print_table, write_json
from scripts.http_bench.servers import CAESURA, HOST, Server, serving
from scripts.perf_bench.command_line import find_model, make_parser
from scripts.perf_bench.http_load import Target, closed_loop, open_loop
from scripts.perf_bench.machine import describe_machine
from scripts.perf_bench.models import vocabulary_size
from scripts.perf_bench.stopping import stopped

_ROOT = Path(__file__).parents[1]
_CAESURA_COMMAND = shlex.join(
    ["env", f"PYTHONPATH={_ROOT}", sys.executable, "-P", "-m", "frontend.cli", "serve"]
)
PERCENTS = (50, 90, 99)
URL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """Either so many clients at a time, or so many requests a second."""

    concurrency: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.concurrency} clients" if self.concurrency else f"{self.rate:g} requests/s"


def parse_server(text: str) -> Server:
    """Raises ArgumentTypeError."""
    name, _, command = ("", "", text) if text.split()[:1] == [CAESURA] else text.partition("=")
    words = command.split(maxsplit=1)
    if not words or not (name or words[0] == CAESURA):
        raise argparse.ArgumentTypeError(
            f"unknown server {text!r}; write {CAESURA}, NAME=COMMAND or NAME=http://HOST:PORT"
        )
    if words[0] == CAESURA:
        words[0] = f"{_CAESURA_COMMAND} {{model}}"
        command = " ".join(words)
    is_whole = command.startswith("http://") or "{port}" in command
    return Server(name or CAESURA, command if is_whole else f"{command} --port {{port}}")


def check_names(servers: Sequence[Server], parser: argparse.ArgumentParser) -> None:
    names = [server.name for server in servers]
    if len(set(names)) < len(names):
        parser.error(f"names of servers repeat: {', '.join(names)}; write NAME=COMMAND")


@dataclass(frozen=True, slots=True)
class Reached:
    """A server that answers, and its process if it was started here."""

    target: Target
    pids: list[int]


@contextlib.contextmanager
def reached(server: Server, model: str, vocab_size: int) -> Iterator[Reached]:
    """Start a server, or look for the one that runs. Raises RuntimeError if it does not answer."""
    if not server.command.startswith("http://"):
        with serving(server, model, num_engines=1, rpc_port=0) as running:
            target = Target(f"http://{HOST}:{running.port}", running.model_name, vocab_size)
            yield Reached(target, [running.pid])
        return
    url = server.command.rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=URL_TIMEOUT_S) as answer:
            name = json.load(answer)["data"][0]["id"]
    except (OSError, urllib.error.URLError, ValueError, LookupError) as error:
        raise RuntimeError(f"{url} does not serve: {error}") from None
    yield Reached(Target(url, name, vocab_size), [])


def figures_of(replies: Sequence[Reply], max_tokens: int) -> dict[str, float]:
    """Of one load; percentiles over all its requests, ITL's over all gaps between events.

    Events that one read brings are no time apart.
    """
    good = [reply for reply in replies if reply.is_good]
    span_s = max((reply.end_s for reply in good), default=math.nan) - min(
        reply.sent_s for reply in replies
    )
    samples = {
        "TTFT": [reply.arrivals_s[0] - reply.sent_s for reply in good],
        "ITL": gaps_s(good),
        "E2E": [reply.end_s - reply.sent_s for reply in good],
    }
    latencies = {
        f"{name} p{percent} ms": percentile(values, percent) * 1e3
        for name, values in samples.items()
        for percent in PERCENTS
    }
    throughput = {
        "requests/s": len(good) / span_s,
        "tokens/s": len(good) * max_tokens / span_s,
    }
    return throughput | latencies | {"failed requests": len(replies) - len(good)}


def measure(
    target: Target, load: Load, *, num_requests: int, lengths: tuple[int, int], seed: str
) -> dict[str, float]:
    """One load on one server; `lengths` are those of prompts and outputs."""
    num_prompt_tokens, max_tokens = lengths
    requests = target.requests(
        num_requests, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, seed=seed
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if load.concurrency:
            replies = runner.run(closed_loop(target, requests, load.concurrency))
        else:
            replies = runner.run(open_loop(target, requests, load.rate, seed))
    return figures_of(replies, max_tokens)


def measure_all(
    servers: Mapping[str, Reached], loads: Sequence[Load], *, rounds: int, **options: Any
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Figures of all rounds, by load and server; `options` are those of `measure`."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {str(load): {} for load in loads}
    for load in loads:
        for number in range(-1, rounds):
            for name, server in servers.items():
                others = [other for other in servers.values() if other is not server]
                with stopped(pid for other in others for pid in other.pids):
                    figures = measure(server.target, load, seed=f"{load} {number}", **options)
                if number >= 0:  # the round before is for warming up
                    runs[str(load)].setdefault(name, []).append(figures)
    return runs


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--server", action="append", type=parse_server, dest="servers")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--rate", type=float, nargs="+", default=[], metavar="R")
    parser.add_argument("--requests", type=int, default=64, help="of a round (default 64)")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens (default 64)")
    parser.add_argument("--output-length", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    arguments = parser.parse_args()
    loads = [Load(concurrency=number) for number in arguments.concurrency]
    loads += [Load(rate=rate) for rate in arguments.rate]
    if any(load.concurrency <= 0 and load.rate <= 0 for load in loads):
        parser.error("--concurrency and --rate must be above 0")
    loads = loads or [Load(concurrency=1), Load(concurrency=16)]
    directory = find_model(parser, arguments)
    servers = arguments.servers or [parse_server(CAESURA)]
    check_names(servers, parser)
    lengths = (arguments.prompt_length, arguments.output_length)
    try:
        with contextlib.ExitStack() as stack:
            vocab_size = vocabulary_size(directory)
            running = {
                server.name: stack.enter_context(reached(server, str(directory), vocab_size))
                for server in servers
            }
            runs = measure_all(
                running,
                loads,
                rounds=arguments.rounds,
                num_requests=arguments.requests,
                lengths=lengths,
            )
    except RuntimeError as error:
        print(f"bench_serve: error: {error}", file=sys.stderr)
        return 1
    for title, by_server in runs.items():
        print_table(title, {name: medians(of_server) for name, of_server in by_server.items()})
    if arguments.json is not None:
        settings = {"model": str(directory), "prompt and output tokens": lengths}
        write_json(arguments.json, describe_machine() | {"settings": settings, "runs": runs})
    every = [figures for by in runs.values() for of in by.values() for figures in of]
    return 1 if any(figures["failed requests"] for figures in every) else 0


if __name__ == "__main__":
    sys.exit(main())
