"""Engines under test, each loaded in a process of its own that is driven over JSON lines.

An engine is written `[NAME=] [VARIABLE=VALUE ...] KIND[@WHERE] [--ARGUMENT VALUE ...]`:

    caesura                                         this checkout
    int8=caesura --quantization int8                arguments of EngineConfig
    before=caesura@/tmp/caesura-before              another checkout
    vllm=OMP_NUM_THREADS=2 vllm@/opt/vllm/bin/python --block-size 64      arguments of vllm.LLM
    transformers                                    its arguments: dtype

Invariant: every wait for an engine ends, with an answer or with an EngineError that tells what the
engine wrote last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scripts.http_bench.processes import cpu_time_s, process_tree, resident_bytes
from scripts.perf_bench.driver import ENGINES

_ROOT = Path(__file__).parents[2]
_DRIVER = Path(__file__).parent / "driver.py"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=")
_NAME = re.compile(r"[a-z][\w.+-]*")
_NUM_LOG_CHARACTERS = 3000
START_TIMEOUT_S = 900.0
LOAD_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 20.0


class EngineError(Exception):
    """An engine ended, failed, or kept silent for too long."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine as the command line names it."""

    name: str
    kind: str
    interpreter: str
    checkout: Path | None
    """Of Caesura."""
    environment: dict[str, str]
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> EngineSpec:
        """Raises ValueError that says what is wrong with `text`."""
        name, separator, rest = text.partition("=")
        if not separator or not _NAME.fullmatch(name):
            name, rest = "", text
        words = shlex.split(rest)
        environment = {}
        while words and _VARIABLE.match(words[0]):
            variable, _, value = words.pop(0).partition("=")
            environment[variable] = value
        kind, _, where = words.pop(0).partition("@") if words else ("", "", "")
        if kind not in ENGINES:
            raise ValueError(f"unknown engine {kind!r} in {text!r}; known: {', '.join(ENGINES)}")
        interpreter, checkout = where or sys.executable, None
        if kind == "caesura":
            interpreter, checkout = sys.executable, Path(where or _ROOT).resolve()
            if not (checkout / "caesura.py").is_file():
                raise ValueError(f"{checkout} is no checkout of Caesura: it has no caesura.py")
        elif kind == "vllm" and not where:
            raise ValueError("which interpreter has vLLM? Write vllm@/path/to/python")
        if shutil.which(interpreter) is None:
            raise ValueError(f"there is no interpreter {interpreter!r}")
        return cls(name or kind, kind, interpreter, checkout, environment, _read_arguments(words))


def _read_arguments(words: list[str]) -> dict[str, Any]:
    """`--some-flag 3 --other` as {"some_flag": 3, "other": True}."""
    arguments: dict[str, Any] = {}
    while words:
        flag = words.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is no argument; write --NAME VALUE, or --NAME for true")
        value: Any = True
        if words and not words[0].startswith("--"):
            value = words.pop(0)
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(value)
        arguments[flag[2:].replace("-", "_")] = value
    return arguments


class RunningEngine:
    """An engine with its model loaded."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        """Wait until the driver in `process`, which logs to `log`, is ready. Raises EngineError."""
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log
        self._unread = b""
        self.version: str = self._read(START_TIMEOUT_S)["ready"]["version"]

    def run(self, prompts: list[list[int]], max_tokens: int) -> tuple[Any, Any]:
        """Run one load; returns for each prompt the arrivals of its tokens, in seconds, and its
        tokens. Raises EngineError, also if there are not exactly `max_tokens` of them."""
        load = json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(load + b"\n")
            self._process.stdin.flush()
        answer = self._read(LOAD_TIMEOUT_S)
        lengths = {len(tokens) for tokens in (*answer["tokens"], *answer["arrivals_s"])}
        if lengths != {max_tokens} or len(answer["tokens"]) != len(prompts):
            raise EngineError(f"{self.name}: asked for {max_tokens} tokens each, got {lengths}")
        return answer["arrivals_s"], answer["tokens"]

    def cpu_time_s(self) -> float:
        """Of all its processes so far."""
        return cpu_time_s(process_tree(self.pid))

    def resident_mib(self) -> float:
        """Of all its processes; pages that they share count in each."""
        return resident_bytes(process_tree(self.pid)) / 2**20

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], timeout_s)[0]:
                raise EngineError(f"{self.name}: no answer for {timeout_s:.0f} s{self._log_end()}")
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise EngineError(f"{self.name}: ended{self._log_end()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _log_end(self) -> str:
        self._log.seek(0)
        end = self._log.read().decode(errors="replace")[-_NUM_LOG_CHARACTERS:]
        return f"; it last wrote:\n{end}" if end else " and wrote nothing"


@contextlib.contextmanager
def running(spec: EngineSpec, settings: dict[str, Any]) -> Iterator[RunningEngine]:
    """Start an engine with the `settings` that driver.py takes; it and all its processes end with
    the block. Raises EngineError."""
    environment = os.environ | spec.environment
    if spec.checkout is not None:
        # `-P` and this path: the packages are that checkout's, whatever else is installed.
        paths = (str(spec.checkout), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    given = (json.dumps(settings), json.dumps(spec.arguments))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [spec.interpreter, "-P", str(_DRIVER), spec.kind, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            yield RunningEngine(spec.name, process, log)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The end of its stdin asks it to end."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
