"""How long servers take to start: seconds from the command to a healthy server, and to a token.

    python -m scripts.bench_startup --server caesura --server 'vllm=/opt/bin/vllm serve {model}'

A cold start finds no caches of compiled code; a warm one follows it and finds what it left (with
`--starts warm` alone, what earlier runs left). Beside them stands the time to read the weights'
files once, which no start can go below. Servers are written as for bench_serve. Figures are medians
over the repeats, in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.bench_serve import check_names, parse_server
from scripts.http_bench.figures import medians, print_table, write_json
from scripts.http_bench.servers import CAESURA, HOST, Server, free_port, get, launched
from scripts.perf_bench.command_line import find_model, make_parser
from scripts.perf_bench.http_load import Target
from scripts.perf_bench.machine import describe_machine
from scripts.perf_bench.models import vocabulary_size

CACHE_VARIABLES = (
    *("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"),
)
START_TIMEOUT_S = 600.0
POLL_S = 0.01


class StartError(Exception):
    """A server did not come up, or did not answer."""


def start_up(server: Server, model: Path) -> dict[str, float]:
    """Start a server, ask it for one token, and stop it."""
    port = free_port()
    fields = {"model": shlex.quote(str(model)), "port": port}
    begin_s = time.monotonic()
    command = server.command.format(**fields)
    with launched(command, is_ours=False) as (process, log):
        if not _is_healthy(process, port):
            log.seek(0)
            raise StartError(f"{server.name} does not serve:\n{log.read()[-4000:]}")
        ready_s = time.monotonic() - begin_s
        target = Target(f"http://{HOST}:{port}", _model_name(port), vocabulary_size(model))
        [request] = target.requests(1, num_prompt_tokens=16, max_tokens=1, seed="start-up")
        reply = asyncio.run(target.answer(request))
        if not reply.is_good:
            raise StartError(f"{server.name} failed to answer, with status {reply.status}")
        return {"ready": ready_s, "first token": reply.arrivals_s[0] - begin_s}


def _is_healthy(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait for it; False if the server ended or took too long."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(port, "/health")[0] == 200:
                return True
        time.sleep(POLL_S)
    return False


def _model_name(port: int) -> str:
    _, body = get(port, "/v1/models")
    name: str = json.loads(body)["data"][0]["id"]
    return name


def measure(server: Server, model: Path, starts: Sequence[str]) -> dict[str, float]:
    """One start of each kind; those after a cold one find the caches it left."""
    with contextlib.ExitStack() as stack:
        if "cold" in starts:
            caches = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_startup."))
            os.environ.update({name: str(Path(caches, name.lower())) for name in CACHE_VARIABLES})
        return {
            f"{kind} start, {until}": seconds
            for kind in starts
            for until, seconds in start_up(server, model).items()
        }


def read_weights_s(model: Path) -> float:
    """How long it takes to read all bytes of the weights, from where they are now."""
    begin_s = time.monotonic()
    buffer = bytearray(16 << 20)
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - begin_s


def main() -> int:
    """Measure; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--server", action="append", type=parse_server, dest="servers")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--starts", nargs="+", choices=("cold", "warm"), default=("cold", "warm"))
    arguments = parser.parse_args()
    servers = arguments.servers or [parse_server(CAESURA)]
    check_names(servers, parser)
    model = find_model(parser, arguments)
    runs: dict[str, list[dict[str, float]]] = {}
    try:
        for _ in range(arguments.repeats):
            for server in servers:
                figures = measure(server, model, arguments.starts)
                figures["read the weights"] = read_weights_s(model)
                runs.setdefault(server.name, []).append(figures)
    except StartError as error:
        print(f"bench_startup: error: {error}", file=sys.stderr)
        return 1
    print_table("seconds", {name: medians(of_server) for name, of_server in runs.items()})
    if arguments.json is not None:
        write_json(arguments.json, describe_machine() | {"model": str(model), "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
