"""Starts the local engine processes, watches them, and ends them.

Invariants
- An engine never outlives its launcher: it holds the read end of a pipe whose other end only this
  process has, and the kernel kills it when the thread that started it dies. Start engines from a
  thread that lives as long as they should.
- Engines sit in process groups of their own, so that Ctrl-C reaches the launcher alone, which ends
  them in order.
- Each exit is reported exactly once, through `on_exit`, called on one of the supervisor's own
  threads.
- What an engine writes to stderr passes through to ours; the last lines are kept, to explain a
  failed start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from frontend.engines.shadowing import PACKAGE_ROOT, check_packages_are_ours
from ipc.engine_config import SETUP_ERROR_PREFIX, EngineConfig

_NUM_KEPT_LINES = 20
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

ExitCallback = Callable[[int, int], None]
"""Called with (rank, return code); the code of a process ended by signal n is -n."""


@dataclass(slots=True)
class _EngineProcess:
    rank: int
    process: subprocess.Popen[bytes]
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT_LINES))


class EngineSupervisor:
    """The engine processes of one launcher, by rank. Of its calls only `terminate` waits."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        handshake_address: str,
        ranks: Sequence[int],
        local: bool = True,
        data_parallel_size: int | None = None,
        on_exit: ExitCallback,
    ) -> None:
        """`local`: the front end at `handshake_address` is this very process."""
        self._config = config
        self._handshake_address = handshake_address
        self._ranks = tuple(ranks)
        self._local = local
        self._data_parallel_size = data_parallel_size or len(self._ranks)
        self._on_exit = on_exit
        self._engines: dict[int, _EngineProcess] = {}

    def start(self) -> None:
        """Start all engines. Raises EngineStartupError if foreign code shadows ours."""
        check_packages_are_ours()
        for rank in self._ranks:
            self.start_engine(rank)

    def start_engine(self, rank: int) -> None:
        """Start one engine, also anew after its death."""
        command = [sys.executable, "-P", "-m", "engine_core"]
        command += ["--handshake", self._handshake_address, "--rank", str(rank)]
        command += ["--local" if self._local else "--headless", "--die-with-stdin"]
        command += ["--num-local-engines", str(len(self._ranks))]
        command += ["--data-parallel-size", str(self._data_parallel_size)]
        command += ["--config", self._config.to_json()]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=engine_environment(self._config, num_local_engines=len(self._ranks)),
            process_group=0,
        )
        engine = _EngineProcess(rank, process)
        self._engines[rank] = engine
        relay = threading.Thread(
            target=_relay_stderr, args=(engine,), name=f"engine-{rank}-stderr", daemon=True
        )
        relay.start()
        threading.Thread(
            target=self._report_exit, args=(engine, relay), name=f"engine-{rank}-exit", daemon=True
        ).start()

    def pid(self, rank: int) -> int:
        """Process id of the engine that was last started for this rank."""
        return self._engines[rank].process.pid

    def describe_exit(self, rank: int, returncode: int) -> str:
        """Say how an engine ended and why, as far as it told: text for an error or a log line."""
        lines = self._engines[rank].last_lines
        if lines and lines[-1].startswith(SETUP_ERROR_PREFIX):
            return f"engine {rank} {lines[-1]}"
        if returncode < 0:
            how = f"was ended by signal {-returncode} ({signal.strsignal(-returncode)})"
        else:
            how = f"ended with exit status {returncode}"
        wrote = "; its last lines:\n  " + "\n  ".join(lines) if lines else " and wrote nothing"
        return f"engine {rank} {how}{wrote}"

    def terminate(self, *, grace_s: float = 5.0) -> None:
        """Ask all engines to end and wait for them, at most `grace_s`; then kill the rest."""
        self._send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for engine in self._engines.values():
            try:
                engine.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                engine.process.kill()
        for engine in self._engines.values():
            engine.process.wait()

    def kill(self) -> None:
        """End all engines at once, without a chance to answer their requests."""
        self._send_signal(signal.SIGKILL)

    def _send_signal(self, signal_number: signal.Signals) -> None:
        for engine in self._engines.values():
            engine.process.send_signal(signal_number)  # Nothing happens to one that has ended.

    def _report_exit(self, engine: _EngineProcess, relay: threading.Thread) -> None:
        returncode = engine.process.wait()
        relay.join(
            0.5
        )  # So that the last lines are there; a child of the engine may hold stderr longer.
        if engine.process.stdin is not None:
            engine.process.stdin.close()
        self._on_exit(engine.rank, returncode)


def _relay_stderr(engine: _EngineProcess) -> None:
    assert engine.process.stderr is not None
    with engine.process.stderr as stderr:
        for raw_line in stderr:
            line = raw_line.decode(errors="replace").rstrip()
            engine.last_lines.append(line)
            if line.startswith(SETUP_ERROR_PREFIX):
                continue  # `describe_exit` tells it, and once is enough.
            # Whatever became of our own stderr: an engine whose pipe nobody empties would stop at
            # its next line.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{line}\n")  # At once, or our own log's lines get in between.
                sys.stderr.flush()


def engine_environment(config: EngineConfig, *, num_local_engines: int) -> dict[str, str]:
    """The environment of an engine: ours, with compute threads shared out among the engines of this
    launcher.

    A thread count that the user set in the environment stays, unless the configuration names one.
    """
    environment = dict(os.environ)
    share = max(1, len(os.sched_getaffinity(0)) // max(1, num_local_engines))
    for name in _THREAD_VARIABLES:
        if config.num_threads is not None:
            environment[name] = str(config.num_threads)
        else:
            environment.setdefault(name, str(share))
    # Threads that spin while they wait hold up whatever shares their cores, by a scheduler's time
    # slice a matrix product; a short spin is nearly as quick on idle cores.
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    # PyTorch's tensors in huge pages, as ours are: a gigabyte of weights is read twice as fast.
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if str(PACKAGE_ROOT) != sysconfig.get_path("purelib"):
        # `-P` keeps the user's folder off the module path, but a checkout that is not installed has
        # to be on it.
        paths = (str(PACKAGE_ROOT), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment
