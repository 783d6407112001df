"""The threads that compute on a CPU: one team an engine, which runs one task at a time, together.

A task is a compiled function `task(arguments, team, member)`, the first two being addresses. All
members run it; within it they *claim* items of work by number, each item once, and meet at
*barriers*. The members are the thread that calls `Team.run`, and threads that never leave compiled
code: Python's interpreter lock is free while a task runs, and no task waits for it.

Invariants
- All members pass the same barriers in the same order; past one, everything that any member wrote
  before it is there for all, and claims count from zero again.
- A member that waits spins for some microseconds and then sleeps in the kernel, so a team without
  work costs nothing, and one whose member lost its core gives the others' cores back.
- Which member claims what is up to chance: results must not depend on it.
- Members that may keep to cores of their own. Left to the system, two of them often end up taking
  turns on one core, and a barrier then costs 50 us instead of 0.3.

The waiting is Drepper's ("Futexes Are Tricky", 2011): a waker changes the word and then looks for
sleepers; a sleeper counts itself and then has the kernel compare the word.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.cpu_runtime import jit

TASK_SIGNATURE = types.void(types.int64, types.int64, types.int64)
"""Of a task: address of its arguments, address of the team, index of the member."""

# The team's state is 32-bit words, each with a cache line of its own, and three 64-bit ones.
_LINE = 64
_GENERATION = 0 * _LINE  # Counts tasks.
_PHASE = 1 * _LINE  # Counts barriers.
_ARRIVED = 2 * _LINE
_SLEEPERS = 3 * _LINE
_NEXT_ITEM = 4 * _LINE
_IS_CLOSED = 5 * _LINE
_TASK = 6 * _LINE
_ARGUMENTS = _TASK + 8
_NUM_MEMBERS = _TASK + 16
_STATE_BYTES = 7 * _LINE

_SPINS = 2000
"""Looks at a word before sleeping: some 50 us, as long as waking up takes."""
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
"""Number of the system call."""
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # Of this process only.

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Team:
    """Threads that run tasks together. One thread at a time may call `run`.

    The threads end when the team is closed, or collected.
    """

    def __init__(self, num_threads: int, cores: Sequence[int] = ()) -> None:
        """`cores`: one for each thread, or none to leave them to the system."""
        if not _FUTEX:
            raise RuntimeError(f"no support for CPUs of the kind {platform.machine()!r}")
        self.num_threads = num_threads
        self._cores: Sequence[int | None] = cores or [None] * num_threads
        self._state = _State(num_threads)
        # Threads know the state, but not the team: it could never be collected.
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(self._state, member, self._cores[member]),
                name=f"compute-{member}",
                daemon=True,
            )
            for member in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._dismiss = weakref.finalize(self, self._state.dismiss)

    def bind(self) -> None:
        """Keep the calling thread, which will call `run`, to its core. Threads that it starts from
        then on begin there as well.
        """
        _keep_to(self._cores[0])

    def run(self, task: int, arguments: int) -> None:
        """Run the task at an address with the arguments at an address, to its end."""
        _lead(self._state.address, task, arguments)

    def close(self) -> None:
        """End the threads."""
        self._dismiss()
        for thread in self._threads:
            thread.join()


class _State:
    """A team's memory."""

    def __init__(self, num_threads: int) -> None:
        self._words = np.zeros(_STATE_BYTES + _LINE, np.uint8)  # `address` is one in there.
        self.address = self._words.ctypes.data + -self._words.ctypes.data % _LINE
        _set_up(self.address, num_threads)

    def dismiss(self) -> None:
        _dismiss(self.address)


def _serve(state: _State, member: int, core: int | None) -> None:
    """A member's thread."""
    _keep_to(core)
    _follow(state.address, member)


def _keep_to(core: int | None) -> None:
    # A core may be gone since; a member that ended for that would be waited for, forever.
    if core is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {core})


# -- for tasks ---------------------------------------------------------------------------------


@jit
def num_members(team: int) -> int:
    """How many run the task."""
    return int(load64(team + _NUM_MEMBERS))


@jit
def claim(team: int) -> int:
    """The number of the next item since the last barrier."""
    return int(add32(team + _NEXT_ITEM, 1))


@jit
def barrier(team: int) -> None:
    """Wait until all members are here."""
    phase = load32(team + _PHASE)
    if add32(team + _ARRIVED, 1) + 1 == load64(team + _NUM_MEMBERS):
        store32(team + _ARRIVED, 0)
        store32(team + _NEXT_ITEM, 0)
        _change(team, team + _PHASE)
    else:
        _wait_for_change(team, team + _PHASE, phase)


# -- threads -----------------------------------------------------------------------------------


@jit
def _set_up(team: int, num_threads: int) -> None:
    store64(team + _NUM_MEMBERS, num_threads)


@jit
def _lead(team: int, task: int, arguments: int) -> None:
    store64(team + _TASK, task)
    store64(team + _ARGUMENTS, arguments)
    _change(team, team + _GENERATION)
    call_task(task, arguments, team, 0)
    barrier(team)


@jit
def _follow(team: int, member: int) -> None:
    generation = 0
    while True:
        _wait_for_change(team, team + _GENERATION, generation)
        generation = load32(team + _GENERATION)
        if load32(team + _IS_CLOSED) != 0:
            return
        call_task(load64(team + _TASK), load64(team + _ARGUMENTS), team, member)
        barrier(team)


@jit
def _dismiss(team: int) -> None:
    store32(team + _IS_CLOSED, 1)
    _change(team, team + _GENERATION)


@jit
def _change(team: int, word: int) -> None:
    add32(word, 1)
    if load32(team + _SLEEPERS) > 0:
        system_call(_FUTEX, word, _FUTEX_WAKE, 2**31 - 1, 0)


@jit
def _wait_for_change(team: int, word: int, value: int) -> None:
    for _ in range(_SPINS):
        if load32(word) != value:
            return
        pause()
    add32(team + _SLEEPERS, 1)
    while load32(word) == value:
        system_call(_FUTEX, word, _FUTEX_WAIT, value, 0)
    add32(team + _SLEEPERS, -1)


# -- instructions ------------------------------------------------------------------------------


def _load(bits: int) -> Any:
    number = types.Integer.from_bitwidth(bits)

    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.load_atomic(place, "seq_cst", bits // 8)

        return number(types.int64), generate

    return intrinsic(load)


def _store(bits: int) -> Any:
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store_atomic(arguments[1], place, "seq_cst", bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.Integer.from_bitwidth(bits)), generate

    return intrinsic(store)


def _add32(typing_context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _I32.as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int32(types.int64, types.int32), generate


def _pause(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() == "x86_64":
            function_type = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(builder.module.declare_intrinsic(name, (), function_type), [])
        return context.get_dummy_value()

    return types.void(), generate


def _system_call(
    typing_context: Any, number: Any, address: Any, operation: Any, value: Any, timeout: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(_I64, [_I64] * 5)
        module = builder.module
        function = module.globals.get("syscall") or ir.Function(module, function_type, "syscall")
        builder.call(function, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _call_task(typing_context: Any, task: Any, arguments: Any, team: Any, member: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        builder.call(builder.inttoptr(values[0], function_type.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


load32, load64 = _load(32), _load(64)
store32, store64 = _store(32), _store(64)
add32: Any = intrinsic(_add32)
"""Add to a word; the value before."""
pause: Any = intrinsic(_pause)
system_call: Any = intrinsic(_system_call)
call_task: Any = intrinsic(_call_task)
