"""`caesura abort|pause|resume|status` against real servers, against things that are none, and
against nobody: what is printed, and the exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from frontend.config import FrontendConfig
from tests.support.scripted_frontend import REPOSITORY
from tests.support.served_engine import PROMPT, ServedEngine, fake, served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "CAESURA_API_KEY"}
ENVIRONMENT |= {"PYTHONPATH": str(REPOSITORY)}
CAESURA = (sys.executable, "-P", "-m", "frontend.cli")

Result = tuple[int, str, str]
"""(exit status, stdout, stderr)."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[ServedEngine]:
    async with served_engine(fake(fake_step_time_ms=2)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(running: ServedEngine) -> AsyncIterator[ServedEngine]:
    yield running
    await running.engine.resume()
    await running.engine.abort(abort_all=True)


def url_of(served: ServedEngine) -> str:
    return f"http://127.0.0.1:{served.port}"


async def run(*arguments: str, **environment: str) -> Result:
    process = await asyncio.create_subprocess_exec(
        *CAESURA,
        *arguments,
        env=ENVIRONMENT | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode()


async def start(served: ServedEngine, name: str, **fields: object) -> None:
    """A request without an end; its answer goes nowhere."""
    body = {"prompt": PROMPT, "max_tokens": 4000, "request_id": name} | fields
    number = served.engine.num_live_requests
    _asked.append(asyncio.create_task(served.http.post("/v1/completions", json=body)))
    await served.wait_for_live_requests(number + 1)


_asked: list[asyncio.Task[object]] = []


@asynccontextmanager
async def other_server(answer: bytes) -> AsyncIterator[str]:
    """The URL of something that answers every connection with these bytes; b"" is nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if answer:
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# -- what is done ----------------------------------------------------------------------------------


async def test_L5_abort_takes_ids_a_prefix_a_tag_or_all(served: ServedEngine) -> None:
    for name, tag in (("job-1", "a"), ("job-10", "a"), ("other-1", "b"), ("other-2", "c")):
        await start(served, name, tags=[tag])
    url = url_of(served)
    status, out, err = await run("abort", "job-1", "stranger", "--url", url)
    assert (status, err) == (0, "")
    assert out.startswith(f"{url}: 1 aborted, 1 unknown; ")
    assert served.engine.num_live_requests == 3
    assert "1 aborted" in (await run("abort", "--prefix", "job", "--url", url))[1]
    assert "1 aborted" in (await run("abort", "--tag", "b", "--url", url))[1]
    assert served.engine.num_live_requests == 1
    assert "1 aborted" in (await run("abort", "--all", "--url", url))[1]
    assert served.engine.num_live_requests == 0
    status, out, _ = await run("abort", "--all", "--url", url)
    assert (status, out.startswith(f"{url}: nothing to abort")) == (0, True)


async def test_L9_pause_status_and_resume_tell_what_they_found(served: ServedEngine) -> None:
    url = url_of(served)
    await start(served, "kept")
    pause = ("pause", "--pause-id", "mine", "--lease", "60", "--newcomers", "reject")
    status, out, err = await run(*pause, "--url", url)
    assert (status, err) == (0, "")
    assert out.startswith(f"{url}: paused after ")
    assert "(pause_id mine)" in out
    assert "0 aborted, 1 kept, 0 retracted, 0 held" in out
    state = served.engine.pause_state
    assert (state.mode, state.newcomers, state.pause_id) == ("keep", "reject", "mine")
    status, out, err = await run("status", "--url", url)
    assert (status, err) == (0, "")
    [summary, head, engine] = out.splitlines()
    assert summary.startswith(f"{url}: paused for ")
    assert "keep, pause_id mine; newcomers: reject, 0 held; resumes in " in summary
    assert "1 requests; weights default" in summary
    assert head.split()[:3] == ["engine", "state", "running"]
    assert engine.split()[:3] == ["0", "paused", "1"]
    status, out, err = await run("resume", "--pause-id", "yours", "--url", url)
    assert (status, out) == (1, "")
    assert "'mine'" in err
    assert served.engine.pause_state.state == "paused"
    status, out, _ = await run("resume", "--url", url)
    assert (status, out.startswith(f"{url}: resumed after ")) == (0, True)
    assert (await run("resume", "--url", url))[1] == f"{url}: was running\n"
    assert "running for" in (await run("status", "--url", url))[1]


async def test_L9_flags_of_pause_reach_the_engine(served: ServedEngine) -> None:
    await start(served, "gone")
    url = url_of(served)
    status, out, _ = await run("pause", "--mode", "abort", "--clear-cache", "--url", url)
    assert status == 0
    assert "1 aborted" in out
    engine_status = (await served.engine.status())[0]
    assert engine_status.num_free_blocks == engine_status.num_blocks
    assert served.engine.pause_state.newcomers == "hold"


async def test_each_line_of_json_is_an_object(served: ServedEngine) -> None:
    dead = unused_url()
    status, out, err = await run("status", "--json", "--url", url_of(served), "--url", dead)
    assert (status, err) == (1, "")
    lines = {line["url"]: line for line in map(json.loads, out.splitlines())}
    assert lines[url_of(served)]["ok"] is True
    assert lines[url_of(served)]["reply"]["state"] == "running"
    assert lines[dead]["ok"] is False
    assert "cannot reach it" in lines[dead]["error"]
    assert set(lines) == {url_of(served), dead}


async def test_L9_a_pause_that_does_not_hold_in_time_is_told_and_goes_on(
    served: ServedEngine,
) -> None:
    await start(served, "slow")
    arguments = ("pause", "--mode", "wait", "--timeout", "0.5", "--url", url_of(served))
    status, out, err = await run(*arguments)
    assert (status, out) == (1, "")
    assert "did not pause within" in err
    assert served.engine.pause_state.state == "draining"


# -- what goes wrong -------------------------------------------------------------------------------


async def test_every_server_is_asked_though_others_are_silent_dead_or_something_else(
    served: ServedEngine,
) -> None:
    not_found = b"HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n" + b'{"detail":"Not Found"}'
    web_page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
    async with (
        other_server(b"") as silent,
        other_server(not_found) as vllm,
        other_server(web_page) as web,
        other_server(b"SSH-2.0-OpenSSH_9.6\r\n") as ssh,
    ):
        dead = unused_url()
        urls = [silent, vllm, web, ssh, dead, url_of(served)]
        began_s = time.monotonic()
        flags = [word for url in urls for word in ("--url", url)]
        status, out, err = await run("pause", *flags, "--timeout", "2")
        assert time.monotonic() - began_s < 8, "two seconds, and the start of a process"
    assert status == 1
    assert out.startswith(f"{url_of(served)}: paused")
    assert len(out.splitlines()) == 1
    assert served.engine.pause_state.state == "paused"
    lines = dict(line.split(": error: ") for line in err.splitlines())
    assert set(lines) == {silent, vllm, web, ssh, dead}
    assert lines[silent] == "no answer within 2 s"
    assert lines[vllm].startswith("it is no Caesura server")
    assert "404" in lines[vllm]
    assert lines[web].startswith("it is no Caesura server")
    assert lines[ssh].startswith("it does not speak HTTP")
    assert lines[dead] == "cannot reach it: Connection refused"


async def test_a_server_that_drips_is_given_up_in_time() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            writer.write(b" ")
            await asyncio.sleep(0.1)
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    began_s = time.monotonic()
    status, _, err = await run("status", "--url", url, "--timeout", "1")
    assert time.monotonic() - began_s < 6
    assert (status, err) == (1, f"{url}: error: no answer within 1 s\n")
    server.close()


async def test_keys_are_sent_and_their_lack_is_told_with_the_flag() -> None:
    async with served_engine(fake(), api_key="client", admin_api_key="admin") as served:
        url = url_of(served)
        status, _, err = await run("status", "--url", url)
        assert (status, "(--api-key KEY)" in err) == (1, True)
        status, _, err = await run("status", "--url", url, "--api-key", "client")
        assert (status, "admin key" in err) == (1, True)
        assert (await run("status", "--url", url, "--api-key", "admin"))[0] == 0
        assert (await run("status", "--url", url, CAESURA_API_KEY="admin"))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("status --url localhost:8000", "did you mean http://localhost:8000?"),
        ("status --url ftp://localhost", "'ftp://localhost' is no server's URL"),
        ("status --url http://", "'http://' is no server's URL"),
        ("status --url http://localhost:port", "'http://localhost:port' is no URL"),
        ("status --url http://localhost/?a=1", "is no server's URL"),
        ("status --timeout 0", "--timeout: 0 must be above 0"),
        ("status --timeout nan", "must be above 0"),
        ("abort", "name the requests by ids, or by one of --prefix, --tag and --all"),
        ("abort a --all", "name the requests by ids"),
        ("abort --prefix p --tag t", "name the requests by ids"),
        ("pause --mode stop", "invalid choice: 'stop'"),
        *(
            (f"pause --lease {value}", f"argument --lease: '{value}' is no number of seconds")
            for value in ("soon", "nan", "inf", "0", "-1")
        ),
        ("resume --mode keep", "unrecognized arguments: --mode keep (see caesura resume --help)"),
        ("status --colour", "unrecognized arguments: --colour"),
        ("status --tiemout 1", "did you mean --timeout? (see caesura status --help)"),
    ],
)
async def test_a_wrong_usage_is_told_in_one_line_with_status_two(
    arguments: str, complaint: str
) -> None:
    status, out, err = await run(*arguments.split())
    assert (status, out) == (2, "")
    assert complaint in err
    assert len(err.splitlines()) == 1


async def test_what_the_server_refuses_is_told_in_its_words(served: ServedEngine) -> None:
    status, out, err = await run("pause", "--lease", "1e9", "--url", url_of(served))
    assert (status, out) == (1, "")
    assert "lease_s" in err
    assert served.engine.pause_state.state == "running"


async def test_L9_an_engine_that_does_not_confirm_a_resume_is_named_in_time() -> None:
    """The server is asked to answer within a part of the command's own time."""
    config = FrontendConfig(engine=fake().engine, data_parallel_size=2)
    async with served_engine(config) as served:
        url = url_of(served)
        assert (await run("pause", "--url", url))[0] == 0
        pid = served.engine._supervisor.pid(1)
        os.kill(pid, signal.SIGSTOP)
        try:
            status, out, _ = await run("resume", "--timeout", "1", "--url", url)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (status, out.startswith(f"{url}: resumed after ")) == (1, True)
        assert out.endswith("; engine 1: timeout\n")


async def test_a_shutdown_under_way_is_told_and_nothing_can_be_paused_then() -> None:
    async with served_engine(fake(fake_step_time_ms=2)) as served:
        url = url_of(served)
        await start(served, "last")
        ending = asyncio.create_task(served.engine.shutdown(30))
        await asyncio.sleep(0)
        _, out, _ = await run("status", "--url", url)
        assert out.startswith(f"{url}: shutting down, 2")
        assert " s left; running for " in out
        status, _, err = await run("pause", "--url", url)
        assert (status, "is shutting down; it cannot be paused any more" in err) == (1, True)
        assert (await run("abort", "--all", "--url", url))[0] == 0
        await asyncio.wait_for(ending, 20)


async def test_nobody_who_reads_what_is_printed_changes_nothing(served: ServedEngine) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    urls = ("--url", url_of(served), "--url", url_of(served) + "/")
    process = await asyncio.create_subprocess_exec(
        *(*CAESURA, "pause", *urls), env=ENVIRONMENT, stdout=writer, stderr=asyncio.subprocess.PIPE
    )
    os.close(writer)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, err) == (0, b"")
    assert served.engine.pause_state.state == "paused"


async def test_a_url_with_the_wrong_scheme_or_a_path_is_told_so(served: ServedEngine) -> None:
    url = url_of(served)
    status, _, err = await run("status", "--url", url.replace("http:", "https:"))
    assert (status, f"is its URL {url}?" in err) == (1, True)
    status, _, err = await run("status", "--url", f"{url}/v1")
    assert (status, "GET /v1/v1/status is answered with 404" in err) == (1, True)
    assert "the URL may be right without its path" in err


async def test_an_interrupt_ends_it_without_a_traceback() -> None:
    async with other_server(b"") as silent:
        process = await asyncio.create_subprocess_exec(
            *CAESURA,
            *("status", "--url", silent, "--timeout", "60"),
            env=ENVIRONMENT,
            stderr=asyncio.subprocess.PIPE,
        )
        await asyncio.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, err) == (130, b"")


async def test_the_commands_load_neither_a_server_nor_its_libraries() -> None:
    code = (
        "import sys; from frontend import cli; cli.main(['status', '--url', 'http://127.0.0.1:1']);"
        "print({'asyncio', 'uvloop', 'zmq', 'torch', 'tokenizers'} & set(sys.modules))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), env=ENVIRONMENT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert out == b"set()\n"
