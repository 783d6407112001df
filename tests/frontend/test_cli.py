"""The command line as a user meets it: what it prints, with which status it ends."""

from __future__ import annotations

import asyncio
import json
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
from typing import Any

import httpx
import pytest

from frontend import cli
from frontend.config import FrontendConfig, HttpConfig
from ipc.engine_config import EngineConfig
from ipc.logs import FORMAT_VARIABLE, LEVEL_VARIABLE
from tests.support.scripted_frontend import REPOSITORY, ScriptedFrontend

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
CAESURA = (sys.executable, "-P", "-m", "frontend.cli")
FAKE = ("--runner", "fake", "--port", "0", "--fake-step-time-ms", "5")
LONG = {"prompt": [1, 2, 3], "max_tokens": 4000}


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
        ("serve --max-num-seq 4", "--max-num-seq"),
        ("serve --tensor-parallel-size 2", "one engine is one GPU; --data-parallel-size N"),
        ("serve --gpu-memory-utilization=0.9", "--kv-cache-memory-bytes"),
        ("serve --model m", "caesura serve MODEL"),
        ("serve --prot 80", "did you mean --port? (see caesura serve --help)"),
        ("serve --seed -1", "seed=-1 must not be negative"),
        ("serve --port high", "'high'"),
        ("serve --port 70000", "port=70000"),
        ("serve --dtype float8", "dtype='float8'"),
        ("serve --device tpu", "device='tpu'"),
        ("serve --quantization int4", "quantization='int4' is not supported; choose one of int8"),
        ("serve --max-num-seqs 0", "max_num_seqs=0"),
        ("serve --data-parallel-size 0", "data_parallel_size=0"),
        (
            "serve --data-parallel-size 2 --data-parallel-size-local 3",
            "data_parallel_size_local=3",
        ),
        ("serve --data-parallel-rpc-port 0", "data_parallel_rpc_port=0"),
        ("serve --stream-interval 0", "stream_interval=0"),
        ("serve --max-num-queued-requests 0", "max_num_queued_requests=0"),
        ("serve --max-num-queued-tokens -1", "max_num_queued_tokens=-1"),
        ("serve --max-body-bytes 0", "max_body_bytes=0"),
        ("serve --max-body-bytes 64MiB", "'64MiB'"),
        ("serve --max-connections 0", "max_connections=0"),
        ("serve --max-unread-tokens 0", "max_unread_tokens=0"),
        ("serve --shutdown-timeout -1", "shutdown_timeout_s=-1.0"),
        ("serve --shutdown-timeout nan", "shutdown_timeout_s=nan"),
        ("serve --log-format xml", "choose from 'text', 'json'"),
        ("serve --api-key=", "api_key=''"),
        ("serve --admin-api-key=", "admin_api_key=''"),
        ("sing", "'sing'"),
        ("", "COMMAND"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line_with_status_two(arguments: str, complaint: str) -> None:
    result = run(*arguments.split())
    assert result.returncode == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key"])
@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\nline"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(flag: str, key: str) -> None:
    result = run("serve", flag, key)
    assert result.returncode == 2
    assert "cannot be sent in a header" in result.stderr
    assert key not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_configuration_that_is_printed_keeps_its_keys_to_itself() -> None:
    config = HttpConfig(api_key="open-sesame", admin_api_key="hush-hush")
    assert "open-sesame" not in repr(config)
    assert "hush-hush" not in repr(config)


def configurations(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, Any]:
    """What the server would be started with."""
    seen: list[tuple[Any, Any]] = []

    def run_server(config: FrontendConfig, http: HttpConfig) -> int:
        seen.append((config, http))
        return 0

    monkeypatch.setenv(FORMAT_VARIABLE, "text")
    monkeypatch.setattr(cli, "configure_logging", lambda _: None)
    monkeypatch.setattr(cli, "_run_server", run_server)
    assert cli.main(["serve", *arguments]) == 0
    [configs] = seen
    return configs


def test_what_no_flag_sets_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configurations(monkeypatch) == (FrontendConfig(), HttpConfig())


def test_every_flag_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    config, http = configurations(
        monkeypatch,
        *("--host", "::1", "--port", "81", "--api-key", "a", "--admin-api-key", "b"),
        *("--max-body-bytes", "1", "--max-connections", "2", "--max-unread-tokens", "3"),
        *("--shutdown-timeout", "1.5", "--strict-selectors", "--log-requests"),
        "--hold-while-paused",
        *("--max-num-queued-requests", "4", "--max-num-queued-tokens", "5"),
        *("--log-format", "json"),
    )
    assert http == HttpConfig(
        host="::1",
        port=81,
        api_key="a",
        admin_api_key="b",
        max_body_bytes=1,
        max_connections=2,
        max_unread_tokens=3,
        shutdown_timeout_s=1.5,
        strict_selectors=True,
        hold_while_paused=True,
        log_requests=True,
    )
    assert config == FrontendConfig(max_num_queued_requests=4, max_num_queued_tokens=5)
    assert os.environ[FORMAT_VARIABLE] == "json"


async def test_engines_log_in_the_form_that_the_server_was_told() -> None:
    async with running("serve", *FAKE, "--log-format", "json") as process:
        assert process.stderr is not None
        lines: list[dict[str, Any]] = []
        async with asyncio.timeout(30):
            while {line["process"] for line in lines} != {"frontend", "engine 0"}:
                lines.append(json.loads(await process.stderr.readline()))
        process.send_signal(signal.SIGTERM)
        for line in (await rest_of(process)).splitlines():
            json.loads(line)
        assert await asyncio.wait_for(process.wait(), 10) == 0


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
    async with running("serve", *FAKE, "--shutdown-timeout", "0") as process:
        url = await read_until(process, r"serving \S+ at (http\S+)")
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            post = asyncio.create_task(http.post("/v1/completions", json=LONG))
            await asyncio.sleep(0.2)
            process.send_signal(signal_number)
            assert (await post).status_code == 503
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_signal_lets_requests_end_by_themselves_within_the_grace() -> None:
    async with running("serve", *FAKE, "--shutdown-timeout", "20") as process:
        url = await read_until(process, r"serving \S+ at (http\S+)")
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            body = LONG | {"max_tokens": 200}
            post = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            answer = await post
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 200
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_second_signal_ends_the_grace_and_requests_still_get_their_answer() -> None:
    async with running("serve", *FAKE, "--shutdown-timeout", "20") as process:
        url = await read_until(process, r"serving \S+ at (http\S+)")
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            post = asyncio.create_task(http.post("/v1/completions", json=LONG))
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGINT)
            await read_until(process, "shutting down")
            process.send_signal(signal.SIGINT)
            assert (await post).status_code == 503
        assert "Traceback" not in await rest_of(process)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_third_signal_ends_a_shutdown_that_takes_too_long(
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
            post = asyncio.create_task(http.post("/v1/completions", json=LONG))
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGINT)
            await read_until(process, "shutting down")
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.2)  # Two signals of a kind that wait together are one.
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
