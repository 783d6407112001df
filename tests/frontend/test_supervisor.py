"""Engine processes under their launcher: they start, are watched, and never outlive it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from frontend.engines.supervisor import EngineSupervisor, engine_environment
from ipc.engine_config import EngineConfig
from tests.support.scripted_frontend import REPOSITORY, ScriptedFrontend

FAKE = EngineConfig(model="none", runner="fake", fake_step_time_ms=20)
Exit = tuple[int, int]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and awaits its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until `condition` held; fails after `timeout_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"still not so after {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - started


class Supervised:
    """A supervisor whose reports of exits can be awaited."""

    def __init__(self, handshake_address: str, *, num_engines: int = 1) -> None:
        self.exits: queue.Queue[Exit] = queue.Queue()
        self.supervisor = EngineSupervisor(
            FAKE,
            handshake_address=handshake_address,
            ranks=range(num_engines),
            on_exit=lambda rank, returncode: self.exits.put((rank, returncode)),
        )
        self.supervisor.start()


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Starts supervised engines that dial an address where nobody is, unless told another."""
    started: list[Supervised] = []

    def start(address: str = f"ipc://{tmp_path}/nobody", *, num_engines: int = 1) -> Supervised:
        started.append(Supervised(address, num_engines=num_engines))
        return started[-1]

    yield start
    for supervised in started:
        supervised.supervisor.kill()


@pytest.fixture
def pretend_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Lets a shell script stand in for the engine."""

    def pretend(script: str) -> None:
        path = tmp_path / "engine.sh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return pretend


_LAUNCHER = """
import sys, time
from frontend.engines.supervisor import EngineSupervisor
from ipc.engine_config import EngineConfig

supervisor = EngineSupervisor(
    EngineConfig.from_json(sys.argv[2]),
    handshake_address=sys.argv[1],
    ranks=range(2),
    on_exit=lambda rank, returncode: None,
)
supervisor.start()
print(*(supervisor.pid(rank) for rank in range(2)), flush=True)
time.sleep(60)
"""


def start_launcher(address: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that supervises two engines, and their process ids."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, address, FAKE.to_json()],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    with launcher.stdout as stdout:
        return launcher, [int(pid) for pid in stdout.readline().split()]


async def test_L12_no_serving_engine_outlives_its_killed_launcher_by_two_seconds() -> None:
    async with ScriptedFrontend() as frontend:
        launcher, pids = start_launcher(frontend.handshake_address)
        await frontend.accept(2)
        for rank in range(2):
            await frontend.add(f"r{rank}", [1, 2, 3], rank=rank, max_tokens=4000)
            await frontend.next_output(f"r{rank}")
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not any(map(is_alive, pids)), timeout_s=2.0)


def test_L12_no_starting_engine_outlives_its_killed_launcher_by_two_seconds(tmp_path: Path) -> None:
    launcher, pids = start_launcher(f"ipc://{tmp_path}/nobody")
    assert all(map(is_alive, pids))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(is_alive, pids)), timeout_s=2.0)


def test_an_engine_that_is_killed_is_reported_once_and_can_be_started_again(
    supervise: Callable[..., Supervised],
) -> None:
    supervised = supervise(num_engines=2)
    first_pid = supervised.supervisor.pid(1)
    os.kill(first_pid, signal.SIGKILL)
    assert supervised.exits.get(timeout=5) == (1, -signal.SIGKILL)
    assert "signal 9" in supervised.supervisor.describe_exit(1, -signal.SIGKILL)
    assert is_alive(supervised.supervisor.pid(0)), "the other engine lives on"
    supervised.supervisor.start_engine(1)
    assert supervised.supervisor.pid(1) != first_pid
    with pytest.raises(queue.Empty):
        supervised.exits.get(timeout=0.3)


async def test_terminate_lets_engines_end_in_order() -> None:
    async with ScriptedFrontend() as frontend:
        supervised = Supervised(frontend.handshake_address)
        await frontend.accept(1)
        supervised.supervisor.terminate()
        assert supervised.exits.get(timeout=1) == (0, 0)


def test_terminate_kills_an_engine_that_does_not_listen(
    supervise: Callable[..., Supervised], pretend_engine: Callable[[str], None]
) -> None:
    pretend_engine("trap '' TERM\necho deaf >&2\nwhile :; do sleep 0.1; done")
    supervised = supervise()
    wait_until(lambda: "deaf" in supervised.supervisor.describe_exit(0, 0), timeout_s=5)
    started = time.monotonic()
    supervised.supervisor.terminate(grace_s=0.3)
    assert time.monotonic() - started < 3
    assert supervised.exits.get(timeout=5) == (0, -signal.SIGKILL)


def test_a_failed_start_is_described_with_the_last_lines_and_passes_them_on(
    supervise: Callable[..., Supervised],
    pretend_engine: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    pretend_engine("for i in $(seq 100); do echo line $i >&2; done\nexit 7")
    supervised = supervise()
    assert supervised.exits.get(timeout=5) == (0, 7)
    description = supervised.supervisor.describe_exit(0, 7)
    assert "engine 0 ended with exit status 7" in description
    assert "line 100" in description
    assert "line 50" not in description, "only the last lines"
    assert capfd.readouterr().err.splitlines() == [f"line {index}" for index in range(1, 101)]


def test_what_the_user_can_mend_is_described_in_one_line_and_not_printed_twice(
    supervise: Callable[..., Supervised],
    pretend_engine: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    pretend_engine("echo 'cannot start: no model there' >&2\nexit 2")
    supervised = supervise()
    assert supervised.exits.get(timeout=5) == (0, 2)
    assert supervised.supervisor.describe_exit(0, 2) == "engine 0 cannot start: no model there"
    assert capfd.readouterr().err == ""


def test_engines_share_the_cores_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shared = engine_environment(FAKE, num_local_engines=4)
    assert shared["NUMBA_NUM_THREADS"] == "2"
    assert shared["OMP_NUM_THREADS"] == "3"
    told = EngineConfig(model="none", num_threads=5)
    assert engine_environment(told, num_local_engines=4)["OMP_NUM_THREADS"] == "5"


def test_a_package_that_would_shadow_ours_is_named_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    check = "from frontend.engines.shadowing import check_packages_are_ours as check; check()"
    run = subprocess.run(
        [sys.executable, "-P", "-c", check],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 1
    assert f"Python finds {tmp_path}/kernels" in run.stderr
    assert f"{REPOSITORY}" in run.stderr
