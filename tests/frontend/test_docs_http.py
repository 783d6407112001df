"""Every example of docs/http.md runs, in order, against a server with the bundled model, and prints
what the page says.

In the page's JSON, `...` within a string stands for anything, numbers stand for their type, and a
field "..." for further fields. In its other outputs, `...` stands for anything within a line, and
alone for any lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from frontend.config import FrontendConfig
from tests.support.scripted_frontend import REPOSITORY
from tests.support.served_engine import served_engine

PAGE = (REPOSITORY / "docs" / "http.md").read_text()
BASE_URL = "http://127.0.0.1:8000"
STAND_IN = f'"{sys.executable}" "{REPOSITORY / "tests/support/curl.py"}"'
HAS_CURL = shutil.which("curl") is not None


class Example(NamedTuple):
    command: str
    kind: str
    """Of the output: json, a value or several, or text."""
    output: str


def examples() -> list[Example]:
    fence = r"```bash\n(.*?)```\n+(?:[^`\n][^\n]*\n+)*```(json|text)\n(.*?)```"
    return [Example(*match) for match in re.findall(fence, PAGE, re.DOTALL)]


async def run(command: str, program: str, directory: Path, url: str) -> tuple[str, list[int]]:
    """What a command prints, and the HTTP status of each of its calls. Its `sleep` takes as long as
    it must until tokens come.
    """
    statuses = Path(tempfile.mkdtemp(dir=directory))
    # A file for each call: two that end at once would write between each other's digits.
    script = f"""
        curl() {{
            {program} --max-time 20 -w '%{{stderr}}%{{http_code}}\n' "$@" 2>$(mktemp -p {statuses})
            echo
        }}
        caesura() {{ PYTHONPATH="{REPOSITORY}" "{sys.executable}" -P -m frontend.cli "$@"; }}
        # Bash's own connection: starting a program takes too long on a busy machine, where the call
        # that is waited for could be through by then.
        has_sampled() {{
            exec 3<>/dev/tcp/{url.removeprefix("http://").replace(":", "/")}
            printf 'GET /requests HTTP/1.0\r\n\r\n' >&3
            grep -q '"num_output_tokens":[1-9]' <&3
        }}
        sleep() {{
            until has_sampled; do
                command sleep 0.05
            done
        }}
        {command.replace(BASE_URL, url)}
    """
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", script),
        cwd=directory,
        env={"PATH": os.environ["PATH"], "NO_PROXY": "*"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # A loop that waits would do so for ever.
    told = await asyncio.to_thread(lambda: [path.read_text() for path in statuses.iterdir()])
    assert process.returncode == 0, f"{command}\n{output.decode()}\n{errors.decode()}\n{told}"
    printed = output.decode().replace("\r\n", "\n").replace(url, BASE_URL)
    return printed, [int(status) for status in told]


def values(text: str) -> Iterator[object]:
    """JSON values that stand one after the other."""
    decoder = json.JSONDecoder()
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:]


def assert_like(shown: object, printed: object, where: str = "") -> None:
    """Fail unless what was printed is what the page shows."""
    if isinstance(shown, dict) and isinstance(printed, dict):
        shown = dict(shown)
        if shown.pop("...", None) is None:
            assert shown.keys() == printed.keys(), where
        for name, value in shown.items():
            assert_like(value, printed[name], f"{where}.{name}")
    elif isinstance(shown, list) and isinstance(printed, list):
        assert len(shown) == len(printed), where
        for index, (one, other) in enumerate(zip(shown, printed, strict=True)):
            assert_like(one, other, f"{where}[{index}]")
    elif isinstance(shown, str) and isinstance(printed, str):
        pattern = ".*".join(map(re.escape, shown.split("...")))
        assert re.fullmatch(pattern, printed, re.DOTALL), (where, shown, printed)
    elif isinstance(shown, bool | None):
        assert shown is printed, where
    else:
        assert isinstance(printed, type(shown) if shown != 0 else int | float), (where, printed)


def pattern_of(text: str) -> str:
    """The regular expression that a text with `...` stands for."""
    lines = (
        r"(?:.*\n)*" if line == "...\n" else ".*".join(map(re.escape, line.split("...")))
        for line in text.splitlines(keepends=True)
    )
    return "".join(lines)


@pytest.mark.parametrize("program", ["curl", "stand-in"])
async def test_every_example_prints_what_the_page_says(program: str, tmp_path: Path) -> None:
    if program == "curl" and not HAS_CURL:
        pytest.skip("curl is not installed; the stand-in runs the same commands")
    program = "command curl" if program == "curl" else STAND_IN
    async with served_engine(FrontendConfig()) as served:
        url = str(served.http.base_url).rstrip("/")
        for example in examples():
            printed, statuses = await run(example.command, program, tmp_path, url)
            shown_status = re.findall(r"^HTTP/1.1 (\d+)", example.output, re.MULTILINE)
            expected = [int(status) for status in shown_status] or [200] * len(statuses)
            assert set(statuses) == set(expected), f"{example.command}: {statuses}\n{printed}"
            if example.kind == "json":
                shown = list(values(example.output))
                assert_like(shown, list(values(printed)), example.command)
            else:
                pattern = pattern_of(example.output)
                assert re.fullmatch(pattern + r"\s*", printed), (example.output, printed)
        await served.wait_until_idle()


async def test_the_page_has_every_route_and_no_other() -> None:
    tables = "".join(re.findall(r"^\|.*\n", PAGE.split("## Which ids")[0], re.MULTILINE))
    told = set(re.findall(r"`(GET|POST|PUT|DELETE) (/[^`]+)`", tables))
    async with served_engine(FrontendConfig()) as served:
        paths = (await served.http.get("/openapi.json")).json()["paths"]
    served_routes = {
        (method.upper(), path) for path, methods in paths.items() for method in methods
    }
    assert told == served_routes | {("GET", "/openapi.json")}


def test_every_row_of_a_route_table_has_an_example() -> None:
    commands = " ".join(example.command for example in examples())
    called = set(re.findall(BASE_URL + r"(/[^\s'\"?]*)", commands))
    rows = re.findall(r"^\|(.*?)\|.*\n", PAGE.split("## Which ids")[0], re.MULTILINE)
    for row in rows:
        paths = re.findall(r"`(?:GET|POST|PUT|DELETE) (/[^`]+)`", row)
        patterns = [re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)) for path in paths]
        found = any(re.fullmatch(pattern, path) for pattern in patterns for path in called)
        assert found or not paths, f"no example for{row}"


def test_the_page_has_no_command_without_an_output() -> None:
    assert len(examples()) == PAGE.count("```bash")
