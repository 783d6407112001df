"""Servers under test: how each is started, and a running one with its made-up engines.

A server is a name and a command in which {model}, {port}, {rpc_port} and {num_engines} are filled
in. It must serve HTTP on {port} and wait for {num_engines} engines of vLLM's wire at {rpc_port} of
127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from frontend.config import BUNDLED_MODEL_DIRECTORY
from scripts.http_bench.bench_engine import Engines
from scripts.http_bench.processes import cpu_time_s, process_tree, resident_bytes

CAESURA = "caesura"
_ROOT = Path(__file__).parents[2]
_DISTRIBUTED = (
    "--data-parallel-size {num_engines} --data-parallel-size-local 0 "
    "--data-parallel-address 127.0.0.1 --data-parallel-rpc-port {rpc_port} --port {port}"
)
_CAESURA_COMMAND = (
    f"{shlex.quote(sys.executable)} -P -m frontend.cli serve {{model}} {_DISTRIBUTED}"
)
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Server:
    """A name, and the command that starts it."""

    name: str
    command: str

    @classmethod
    def parse(cls, text: str) -> Server:
        """`caesura`, or `NAME=COMMAND`; a command without {port} gets vLLM's flags added."""
        if text == CAESURA:
            return cls(CAESURA, _CAESURA_COMMAND)
        name, separator, command = text.partition("=")
        if not separator or not name or not command:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither {CAESURA!r} nor NAME=COMMAND, "
                "as in 'vllm-rs=/opt/vllm-rs serve {model}'"
            )
        return cls(name, command if "{port}" in command else f"{command} {_DISTRIBUTED}")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark of servers has; `description` is a docstring.

    From here on SIGTERM ends the program in order, and so what it has started.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--server",
        action="append",
        type=Server.parse,
        dest="servers",
        metavar="NAME[=COMMAND]",
        help="a server to measure, once for each: caesura (the default), or a name and a command "
        "like 'vllm-rs=/opt/vllm-rs serve {model}'",
    )
    parser.add_argument(
        "--model", default=str(BUNDLED_MODEL_DIRECTORY), help="its tokenizer is what is used"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


@dataclass(slots=True)
class RunningServer:
    """A server that answers."""

    name: str
    port: int
    model_name: str
    """As its API calls the model."""
    pid: int

    def tree(self) -> list[int]:
        return process_tree(self.pid)

    def cpu_time_s(self) -> float:
        return cpu_time_s(self.tree())

    def resident_bytes(self) -> int:
        return resident_bytes(self.tree())


@contextlib.contextmanager
def serving(server: Server, model: str, num_engines: int, rpc_port: int) -> Iterator[RunningServer]:
    """Start a server whose engines dial `rpc_port`; it answers when the block begins.

    Raises RuntimeError, with the end of its log, if it does not come to answer.
    """
    port = free_port()
    command = server.command.format(
        model=shlex.quote(model), port=port, rpc_port=rpc_port, num_engines=num_engines
    )
    with launched(command, is_ours=server.name == CAESURA) as (process, log):
        model_name = _wait_for_model(process, port)
        if model_name is None:
            log.seek(0)
            raise RuntimeError(f"{server.name} does not serve:\n{log.read()[-4000:]}")
        yield RunningServer(server.name, port, model_name, process.pid)


@contextlib.contextmanager
def launched(command: str, *, is_ours: bool) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """A process and its log; it is asked to end with the block, and killed if it does not.

    `is_ours`: it runs Caesura's code, from this checkout.
    """
    search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | ({"PYTHONPATH": search_path} if is_ours else {})
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            shlex.split(command), stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            yield process, log
        finally:
            _stop(process)


@contextlib.contextmanager
def with_engines(
    server: Server, model: str, num_engines: int
) -> Iterator[tuple[RunningServer, Engines]]:
    """A server and its made-up engines, joined."""
    rpc_port = free_port()
    with Engines(f"tcp://{HOST}:{rpc_port}", num_engines) as engines:
        with serving(server, model, num_engines, rpc_port) as running:
            engines.wait_until_joined()
            yield running, engines


def free_port() -> int:
    """A port that nobody listens on, a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_model(process: subprocess.Popen[bytes], port: int) -> str | None:
    """The first model's name, when the server is healthy; None if it ended or took too long."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(port, "/health")[0] == 200:
                status, body = get(port, "/v1/models")
                if status == 200:
                    name: str = json.loads(body)["data"][0]["id"]
                    return name
        time.sleep(0.1)
    return None


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of one GET. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def default_servers(servers: Sequence[Server] | None) -> Sequence[Server]:
    return servers or [Server.parse(CAESURA)]
