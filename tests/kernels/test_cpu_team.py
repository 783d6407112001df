"""The thread team: claims, barriers, sleeping and waking. Each check runs in a process of its own,
so that a deadlock fails one test.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from kernels import cpu_team
from kernels.cpu_runtime import pointer
from kernels.cpu_team import (
    TASK_SIGNATURE,
    Team,
    add32,
    barrier,
    claim,
    load32,
    num_members,
    pause,
    store32,
)

NUM_ITEMS = 37
MOST_MEMBERS = 8


def _claim_items(address: int, team: int, member: int) -> None:
    """[0]: phases; [1 + item]: how often it was claimed."""
    for _ in range(load32(address)):
        while True:
            item = claim(team)
            if item >= NUM_ITEMS:
                break
            add32(address + 4 * (1 + item), 1)
        barrier(team)


def _read_what_others_wrote(address: int, team: int, member: int) -> None:
    """[0]: phases; [1]: stale numbers that were seen; [2 + member]: its number of this phase."""
    words = numba.carray(pointer(address, np.int32(0)), (2 + MOST_MEMBERS,))
    for phase in range(words[0]):
        words[2 + member] = phase
        barrier(team)
        for other in range(num_members(team)):
            if words[2 + other] != phase:
                add32(address + 4, 1)
        barrier(team)


def _count_members(address: int, team: int, member: int) -> None:
    """[member]: tasks that it ran."""
    add32(address + 4 * member, 1)


def _wait_for_python(address: int, team: int, member: int) -> None:
    """[0]: set once it runs; [1]: set by somebody who needs the interpreter's lock to do so."""
    store32(address, 1)
    while load32(address + 4) == 0:
        pause()


CLAIM_ITEMS, READ_WHAT_OTHERS_WROTE, COUNT_MEMBERS, WAIT_FOR_PYTHON = (
    numba.cfunc(TASK_SIGNATURE)(task)  # Not from a cache: it would not notice a change of the team.
    for task in (_claim_items, _read_what_others_wrote, _count_members, _wait_for_python)
)


def in_a_process(check: Callable[..., None], *arguments: Any, timeout_s: float = 40) -> None:
    """Run a check in a child, which is killed if it does not end."""
    process = multiprocessing.get_context("fork").Process(target=check, args=arguments)
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"not done after {timeout_s} s: a deadlock")
    assert process.exitcode == 0, "see the child's traceback"


def words(count: int) -> Any:
    return np.zeros(count, np.int32)


several_threads = pytest.mark.parametrize("num_threads", [1, 2, 3, 5])


def check_claims(num_threads: int, num_phases: int) -> None:
    team, memory = Team(num_threads), words(1 + NUM_ITEMS)
    memory[0] = num_phases
    team.run(CLAIM_ITEMS.address, memory.ctypes.data)
    assert memory[1:].tolist() == [num_phases] * NUM_ITEMS


@several_threads
def test_each_item_is_claimed_once_in_each_of_many_thousand_phases(num_threads: int) -> None:
    in_a_process(check_claims, num_threads, 10_000)


def check_barriers(num_threads: int, num_phases: int) -> None:
    team, memory = Team(num_threads), words(2 + MOST_MEMBERS)
    memory[0] = num_phases
    team.run(READ_WHAT_OTHERS_WROTE.address, memory.ctypes.data)
    assert memory[1] == 0
    assert (memory[2 : 2 + num_threads] == num_phases - 1).all()


@several_threads
def test_past_a_barrier_all_see_what_each_wrote_before_it(num_threads: int) -> None:
    in_a_process(check_barriers, num_threads, 5_000)


def check_tasks(num_threads: int) -> None:
    team, memory = Team(num_threads), words(MOST_MEMBERS)
    pauses_s = [0.0] * 3000 + [0.01] * 20 + [0.0, 0.0002, 0.00005] * 100
    for pause_s in pauses_s:
        if pause_s:
            time.sleep(pause_s)
        before = memory.copy()
        team.run(COUNT_MEMBERS.address, memory.ctypes.data)
        assert (memory[:num_threads] == before[:num_threads] + 1).all()
    assert not memory[num_threads:].any()


@several_threads
def test_each_member_runs_each_task_in_quick_succession_and_from_sleep(num_threads: int) -> None:
    in_a_process(check_tasks, num_threads)


def check_close(num_threads: int, idle_s: float) -> None:
    team, memory = Team(num_threads), words(MOST_MEMBERS)
    team.run(COUNT_MEMBERS.address, memory.ctypes.data)
    time.sleep(idle_s)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("compute-")]
    assert len(threads) == num_threads - 1
    team.close()
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("idle_s", [0, 0.05], ids=["spinning", "asleep"])
@several_threads
def test_close_ends_the_threads(num_threads: int, idle_s: float) -> None:
    in_a_process(check_close, num_threads, idle_s)


def check_idle() -> None:
    team, memory = Team(3), words(MOST_MEMBERS)
    team.run(COUNT_MEMBERS.address, memory.ctypes.data)
    time.sleep(0.05)
    before_s = time.process_time()
    time.sleep(1)
    assert time.process_time() - before_s < 0.05


def test_a_team_without_work_burns_no_time() -> None:
    in_a_process(check_idle)


def check_interpreter_lock() -> None:
    team, memory = Team(2), words(2)

    def answer() -> None:
        while memory[0] == 0:
            time.sleep(0.001)
        memory[1] = 1

    thread = threading.Thread(target=answer)
    thread.start()
    team.run(WAIT_FOR_PYTHON.address, memory.ctypes.data)
    thread.join()


def test_other_threads_run_python_while_a_task_runs() -> None:
    in_a_process(check_interpreter_lock)


def check_cores(cores: list[int]) -> None:
    team = Team(2, cores)
    team.bind()
    memory = words(MOST_MEMBERS)
    team.run(COUNT_MEMBERS.address, memory.ctypes.data)
    (follower,) = team._threads
    assert follower.native_id is not None
    assert os.sched_getaffinity(0) == {cores[0]}
    assert os.sched_getaffinity(follower.native_id) == {cores[1]}


def test_members_keep_to_the_cores_that_they_were_given() -> None:
    cores = sorted(os.sched_getaffinity(0))
    in_a_process(check_cores, [cores[-1], cores[0]])


def check_missing_cores() -> None:
    team, memory = Team(3, [4093, 4094, 4095]), words(MOST_MEMBERS)
    team.bind()
    team.run(COUNT_MEMBERS.address, memory.ctypes.data)
    assert memory[:3].tolist() == [1, 1, 1]


def test_a_member_whose_core_is_gone_runs_elsewhere() -> None:
    in_a_process(check_missing_cores)


def test_a_kind_of_cpu_without_support_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_team, "_FUTEX", 0)
    with pytest.raises(RuntimeError, match="no support for CPUs of the kind"):
        Team(2)
