"""Pauses of one engine, as its inputs say: a state of its own, compared with what the engine does.

Checks
- `stillness`: no step while paused; while draining only requests that had begun before.
- `pause answer`: a pause is answered when it holds, in the turn in which it does, and fails only if
  a resume or the end of its lease overtook it.
- `pause mode`: `abort` leaves nothing, `wait` nothing that has begun, `retract` nothing with KV;
  what `keep` holds keeps its KV, token by token, until the resume.
- `cleared cache`: whoever asked for an empty prefix cache has one at the moment of the answer.
- `pause receipt`: its numbers are true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ipc.pause import PauseReceipt
from ipc.utility import UtilityReply

if TYPE_CHECKING:
    from engine_core.core import EngineCore
    from scripts.simulation.ledger_request import LedgerRequest

Violate = Callable[[str, str], object]
"""(name of the check, what was seen)"""


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A pause that is owed an answer."""

    clears_cache: bool
    num_blocks: int
    """That its requests gave up."""
    expected: PauseReceipt


@dataclass(slots=True)
class EnginePauses:
    """What one engine must know of pauses."""

    rank: int
    core: EngineCore
    live: dict[str, LedgerRequest]
    violate: Violate
    state: str = "running"
    mode: str | None = None
    pause_id: object = None
    lease_ends_s: float | None = None
    num_kept: int = 0
    """By the last pause, as was told."""
    is_ending: bool = False
    """This turn is its last."""
    given_up: set[str] = field(default_factory=set)
    """Requests whose KV was freed in this turn."""
    _waiters: dict[int, _Waiter] = field(default_factory=dict)
    _overtaken: set[int] = field(default_factory=set)
    _kept: dict[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    """What a `keep` froze: (tokens computed, blocks)."""
    _resumes: dict[int, str] = field(default_factory=dict)
    """By call: the state that it ends."""
    _flushes: dict[int, bool] = field(default_factory=dict)
    """By call: its answer."""

    # -- inputs --------------------------------------------------------------------------------

    def begin_turn(self, now: float) -> None:
        self.given_up.clear()
        if self.state == "paused":
            self._check_kept()
        if self.lease_ends_s is not None and now >= self.lease_ends_s:
            self._resume()

    def running(self) -> list[LedgerRequest]:
        """Requests with KV, as this turn's inputs leave them."""
        inside = self.core._requests
        return [
            one
            for one in self.live.values()
            if not one.is_aborted
            and one.internal_id not in self.given_up
            and (there := inside.get(one.internal_id)) is not None
            and there.slot >= 0
        ]

    def pause(self, call_id: int, args: Sequence[object], now: float) -> None:
        mode, clears_cache, lease_s, self.pause_id = args
        assert isinstance(mode, str)
        assert lease_s is None or isinstance(lease_s, float)
        self.state, self.mode = "draining", mode
        self.lease_ends_s = None if lease_s is None else now + lease_s
        self._kept.clear()
        running, num_blocks, expected = self.running(), 0, PauseReceipt()
        blocks = {one.internal_id: self._blocks(one) for one in running}
        if mode == "abort":
            ended = [one for one in self.live.values() if not one.is_aborted]
            for one in ended:
                one.is_aborted = True
            expected, num_blocks = (
                PauseReceipt(num_aborted=len(ended)),
                sum(map(len, blocks.values())),
            )
        elif mode == "retract" or (mode == "keep" and clears_cache):
            expected, num_blocks = (
                PauseReceipt(num_retracted=len(running)),
                sum(map(len, blocks.values())),
            )
            self.retract(running)
        elif mode == "keep":
            inside = self.core._requests
            self._kept = {
                name: (inside[name].num_computed_tokens, tuple(table))
                for name, table in blocks.items()
            }
        self._waiters[call_id] = _Waiter(bool(clears_cache), num_blocks, expected)

    def retract(self, requests: Iterable[LedgerRequest]) -> None:
        """Their KV is given up; they wait to be recomputed."""
        for one in requests:
            one.is_retracted = True
            self.given_up.add(one.internal_id)
            self._kept.pop(one.internal_id, None)

    def resume(self, call_id: int) -> None:
        self._resumes[call_id] = self.state
        self._resume()

    def _resume(self) -> None:
        self.state, self.mode, self.pause_id, self.lease_ends_s = "running", None, None, None
        self._overtaken.update(self._waiters)
        self._waiters.clear()

    def flush(self, call_id: int, args: Sequence[object]) -> None:
        running = self.running()
        if args[0]:
            self.retract(running)
        self._flushes[call_id] = bool(args[0]) or not running

    def _blocks(self, request: LedgerRequest) -> Sequence[int]:
        return self.core._requests[request.internal_id].block_ids

    # -- steps ---------------------------------------------------------------------------------

    def on_step(self, rows: Iterable[tuple[LedgerRequest, int]]) -> None:
        """The engine computes these requests, which had so many tokens computed before."""
        if self.state == "paused" or (self.state == "draining" and self.mode != "wait"):
            self.violate("stillness", f"engine {self.rank} steps while {self.state} ({self.mode})")
        for one, num_computed in rows:
            kept, _ = self._kept.get(one.internal_id, (num_computed, ()))
            if num_computed != kept:
                self.violate("pause mode", f"{one.internal_id} was kept, and is recomputed")
            if self.state == "draining" and not one.has_begun:
                self.violate("stillness", f"{one.internal_id} begins while engine drains")
            one.has_begun, one.is_retracted = True, False
        self._kept.clear()

    # -- answers -------------------------------------------------------------------------------

    def check_reply(self, reply: UtilityReply) -> None:
        """If it answers a call of this book."""
        call_id = reply.call_id
        if (was := self._resumes.pop(call_id, None)) is not None:
            self._check_kept()
            if reply.result != was:
                self.violate("pause answer", f"a resume from {was} was told {reply.result!r}")
        elif (flushed := self._flushes.pop(call_id, None)) is not None:
            if reply.result is not flushed:
                self.violate("flush", f"engine {self.rank} told {reply.result}, not {flushed}")
            if flushed:
                self._check_cleared("flush")
        elif call_id in self._overtaken:
            self._overtaken.discard(call_id)
            if reply.failure_message is None:
                self.violate("pause answer", f"engine {self.rank}: a resume overtook the pause")
        elif (waiter := self._waiters.pop(call_id, None)) is not None:
            self._check_paused(waiter, reply)

    def _check_paused(self, waiter: _Waiter, reply: UtilityReply) -> None:
        if reply.failure_message is not None:
            self.violate("pause answer", f"engine {self.rank}: {reply.failure_message}")
            return
        if not self._holds:
            self.violate("pause answer", f"engine {self.rank} answered while requests go on")
        self.state = "paused"
        if self.is_ending:
            return
        self._check_kept()
        pool, running = self.core.scheduler.pool, self.running()
        if self.mode != "keep" and (running or pool.num_available != pool.num_blocks):
            self.violate("pause mode", f"{self.mode} leaves {len(running)} requests with KV")
        if waiter.clears_cache:
            self._check_cleared("cleared cache")
        told = PauseReceipt.from_wire(reply.result)
        self.num_kept = told.num_kept
        expected = replace(
            waiter.expected,
            num_kept=len(running),
            num_waiting=len(self.live) - len(running),
            num_blocks_freed=waiter.num_blocks - told.num_blocks_cached,
            num_blocks_cached=told.num_blocks_cached,
        )
        if told != expected:
            self.violate("pause receipt", f"engine {self.rank} told {told}, true is {expected}")

    def _check_cleared(self, check: str) -> None:
        pool = self.core.scheduler.pool
        if pool.num_cached or pool._block_by_hash:
            self.violate(check, f"engine {self.rank} has {pool.num_cached} cached blocks")

    @property
    def _holds(self) -> bool:
        """Whether what the newest pause waits for has come."""
        return self.mode != "wait" or not any(one.has_begun for one in self.live.values())

    def _check_kept(self) -> None:
        for name, (num_computed, table) in self._kept.items():
            inside = self.core._requests.get(name)
            if name in self.live and inside is not None:
                now = inside.num_computed_tokens, tuple(inside.block_ids)
                if now != (num_computed, table):
                    self.violate("pause mode", f"{name} was kept with {num_computed}, has {now}")

    def after_turn(self) -> None:
        if self.state == "draining" and self._holds and not self.is_ending:
            self.violate("pause answer", f"engine {self.rank} should be paused by now")
        if self.core.pauses.state != self.state:
            self.violate(
                "pause state", f"engine {self.rank} is {self.core.pauses.state}, not {self.state}"
            )
