"""The command line as a user meets it: what it prints, with which status it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from ipc.engine_config import EngineConfig
from ipc.logs import LEVEL_VARIABLE
from tests.support.scripted_frontend import REPOSITORY, ScriptedFrontend

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
CAESURA = (sys.executable, "-P", "-m", "frontend.cli")
FAKE = ("--runner", "fake", "--port", "0", "--fake-step-time-ms", "5")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; of its log only errors are printed."""
    return subprocess.run(
        [*CAESURA, *arguments],
        env=ENVIRONMENT | {LEVEL_VARIABLE: "ERROR"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command line that runs; killed with the block if it has not ended."""
    process = await asyncio.create_subprocess_exec(
        *CAESURA, *arguments, env=ENVIRONMENT, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def read_until(process: asyncio.subprocess.Process, pattern: str) -> str:
    """Read stderr up to a line that matches; returns the match's first group or all of it."""
    assert process.stderr is not None
    async with asyncio.timeout(30):
        async for line in process.stderr:
            if (match := re.search(pattern, line.decode())) is not None:
                return match.group(match.lastindex or 0)
    raise AssertionError(f"ended without a line that matches {pattern!r}")


async def rest_of(process: asyncio.subprocess.Process) -> str:
    """What it still writes until it ends."""
    assert process.stderr is not None
    return (await asyncio.wait_for(process.stderr.read(), 20)).decode()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("serve --colour", "--colour"),
        ("serve --port high", "'high'"),
        ("serve --port 70000", "port=70000"),
        ("serve --dtype float8", "dtype='float8'"),
        ("serve --device tpu", "device='tpu'"),
        ("serve --max-num-seqs 0", "max_num_seqs=0"),
        ("serve --data-parallel-size 0", "data_parallel_size=0"),
        (
            "serve --data-parallel-size 2 --data-parallel-size-local 3",
            "data_parallel_size_local=3",
        ),
        ("serve --data-parallel-rpc-port 0", "data_parallel_rpc_port=0"),
        ("serve --stream-interval 0", "stream_interval=0"),
        ("sing", "'sing'"),
        ("", "COMMAND"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line_with_status_two(arguments: str, complaint: str) -> None:
    result = run(*arguments.split())
    assert result.returncode == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_is_nowhere_is_told_in_one_line(tmp_path: Path) -> None:
    result = run("serve", f"{tmp_path}/nowhere", "--port", "0")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}/nowhere" in result.stderr


def test_limits_that_contradict_each_other_are_told_in_one_line() -> None:
    result = run("serve", *FAKE, "--max-num-batched-tokens", "4", "--max-num-seqs", "8")
    assert result.returncode == 1
    complaint = "engine 0 cannot start: max_num_batched_tokens=4 is below max_num_seqs=8"
    assert result.stderr.splitlines()[-1].startswith(f"caesura: error: {complaint}")
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_told_before_any_engine_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", *FAKE, "--port", str(port))
    assert result.returncode == 1
    complaint = f"port {port} of 127.0.0.1 is in use; choose another with --port"
    assert result.stderr == f"caesura: error: {complaint}\n"


def test_an_unknown_host_is_told_in_one_line() -> None:
    result = run("serve", *FAKE, "--host", "no.such.host.invalid")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "no.such.host.invalid" in result.stderr


def test_an_address_that_is_not_ours_is_told_with_the_flag_to_check() -> None:
    result = run("serve", *FAKE, "--host", "192.0.2.1")
    assert result.returncode == 1
    assert result.stderr.endswith(
        "of 192.0.2.1: Cannot assign requested address; check --host and --port\n"
    )


def test_too_long_a_path_of_a_unix_socket_is_told_with_the_reason(tmp_path: Path) -> None:
    result = run("serve", *FAKE, "--uds", f"{tmp_path}/{'a' * 200}")
    assert result.returncode == 1
    assert result.stderr.endswith("AF_UNIX path too long; check --uds\n")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
async def test_L2_a_signal_ends_requests_with_an_answer_and_the_server_with_status_zero(
    signal_number: signal.Signals,
) -> None:
    async with running("serve", *FAKE) as process:
        url = await read_until(process, r"serving \S+ at (http\S+)")
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            body = {"prompt": [1, 2, 3], "max_tokens": 4000}
            post = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.2)
            process.send_signal(signal_number)
            assert (await post).status_code == 503
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_second_signal_ends_a_shutdown_that_takes_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of ten seconds keeps the engine from ending in order."""
    # Not tmp_path: a socket's path must be short.
    temporary = tempfile.TemporaryDirectory()
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", temporary.name)
    slow = ("--runner", "fake", "--port", "0", "--fake-step-time-ms", "10000")
    async with running("serve", *slow) as process:
        url = await read_until(process, r"serving \S+ at (http\S+)")
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            body = {"prompt": [1, 2, 3], "max_tokens": 4000}
            post = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGINT)
            await read_until(process, "shutting down")
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 5) == 130
            with pytest.raises(httpx.HTTPError):
                await post
    assert not [name for name in os.listdir(temporary.name) if name.startswith("caesura-")]
    temporary.cleanup()


async def test_a_signal_while_engines_start_ends_the_start() -> None:
    """One engine is to be started by somebody else, who never comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    deployment = ("--data-parallel-size", "2", "--data-parallel-size-local", "1")
    address = ("--data-parallel-rpc-port", port)
    async with running("serve", *FAKE, *deployment, *address) as process:
        await read_until(process, "engine 0 .* ready")
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_unix_socket_serves_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "http"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with running("serve", *FAKE, "--uds", str(path)) as process:
        await read_until(process, "serving .* at ")
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.get("/health")).status_code == 200
        second = await asyncio.to_thread(run, "serve", *FAKE, "--uds", str(path))
        assert f"the socket {path} is in use" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    assert not path.exists()


async def test_headless_engines_dial_the_given_address_and_end_with_a_signal() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", "--runner", "fake", "--headless", "--data-parallel-size", "3"]
    arguments += ["--data-parallel-start-rank", "1", "--data-parallel-size-local", "2"]
    arguments += ["--data-parallel-rpc-port", str(port)]
    async with running(*arguments) as process, ScriptedFrontend() as frontend:
        frontend._handshake.bind(f"tcp://127.0.0.1:{port}")
        await frontend.accept(2)
        assert sorted(frontend.registrations) == [1, 2]
        assert {peer.data_parallel_size for peer in frontend.registrations.values()} == {3}
        await frontend.add("a", [1, 2], rank=2, max_tokens=3)
        await frontend.collect("a")
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_the_launch_script_starts_engines_and_ends_them_with_a_signal() -> None:
    async with ScriptedFrontend() as frontend:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "scripts/launch.py", "none", "--config", '{"runner": "fake"}'),
            *("--handshake", frontend.handshake_address, "--num-engines", "2"),
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stderr=asyncio.subprocess.PIPE,
        )
        await frontend.accept(2)
        for _ in range(2):
            await read_until(process, "engine . .* ready: ")
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


def test_headless_engines_that_cannot_start_end_the_launcher_with_their_status(
    tmp_path: Path,
) -> None:
    result = run("serve", "--runner", "fake", "--headless", "--data-parallel-address", "a b")
    assert result.returncode == 2
    assert "engine 0 cannot start: cannot dial" in result.stderr
    assert "Traceback" not in result.stderr


def test_headless_without_engines_is_refused() -> None:
    result = run("serve", *FAKE, "--headless", "--data-parallel-size-local", "0")
    assert result.returncode == 1
    assert result.stderr == "caesura: error: 0 engines are to be started; ask for at least 1\n"


@pytest.mark.parametrize("config", ["{", "[]"])
def test_the_launch_script_refuses_a_configuration_that_is_no_object(config: str) -> None:
    command = (sys.executable, "scripts/launch.py", "--config", config)
    result = subprocess.run(
        command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"launch.py: error: argument --config: '{config}' is no"
    )


def test_the_version_is_told() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("caesura ")


def test_a_configuration_reaches_the_engine_field_by_field() -> None:
    config = EngineConfig(model="m", dtype="bfloat16", block_size=16, seed=3)
    assert EngineConfig.from_json(config.to_json()) == config
