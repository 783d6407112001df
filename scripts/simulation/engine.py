"""An engine process in virtual time: the real core and step loop over a fake runner.

A turn of the step loop is one event. It takes effect when it begins; what it sends leaves when the
boundary or the step that made it would have ended.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine_core.batch import StepBatch, StepResult
from engine_core.config import SchedulerConfig
from engine_core.core import EngineCore, Input
from engine_core.fake_runner import FakeRunner
from engine_core.jobs import Job
from engine_core.outbox import Outgoing
from engine_core.process.intake import Failure, Intake, Item, Received, Shutdown
from engine_core.process.step_loop import StepLoop
from ipc.frames import InputError, decode_input
from ipc.handshake import CAESURA_PROTOCOL, Registration
from ipc.output import ENGINE_CORE_DEAD, EngineCoreOutputs, encode_outputs
from scripts.simulation.tokenizer import VOCAB_SIZE
from scripts.simulation.virtual_loop import VirtualLoop

STEP_TIME_FACTORS = (0.7, 1.0, 1.0, 1.3, 4.0)
BOUNDARY_TIME_S = 0.00002
JOB_TIMES_S = (0.0005, 0.002, 0.01, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """How large the engines are: small, so that everything is short at times."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    step_time_s: float
    enable_prefix_caching: bool = True


class PlannedFault(Exception):
    """An error that the scenario asked for."""


class EngineObserver(Protocol):
    """Who checks what an engine does."""

    def before_turn(
        self, rank: int, inputs: list[Input], now: float, *, is_last: bool, num_left: int
    ) -> None: ...

    def on_step(self, rank: int, batch: StepBatch) -> None: ...

    def on_engine_output(self, rank: int, outputs: EngineCoreOutputs) -> None: ...

    def after_turn(self, rank: int) -> None: ...

    def on_engine_fault(self, rank: int, error: Exception) -> None: ...


class TimedRunner(FakeRunner):
    """A fake runner that says when it has run."""

    on_executed: Callable[[StepBatch], None]

    def execute(self, batch: StepBatch) -> StepResult:
        result = super().execute(batch)
        self.on_executed(batch)
        return result

    def cells(self, slot: int, num_tokens: int) -> list[int]:
        """What the KV cache holds at a sequence's first positions."""
        return self._read(slot, range(num_tokens))


class _VirtualIntake(Intake):
    """Waits for nothing: the engine takes a turn when something has come."""

    def __init__(self, on_drained: Callable[[list[Item]], None]) -> None:
        super().__init__()
        self._on_drained = on_drained

    def drain(self, *, wait_s: float = 0.0) -> list[Item]:
        del wait_s
        items = super().drain()
        self._on_drained(items)
        return items


class SimulatedEngine:
    """One engine, from its start to its end."""

    def __init__(
        self,
        rank: int,
        shape: EngineShape,
        loop: VirtualLoop,
        chance: random.Random,
        observer: EngineObserver,
    ) -> None:
        self.rank = rank
        self.is_alive = True
        self.send: Callable[[list[bytes], float], object]
        """Given a message and the moment when it leaves."""
        self.corrupt_next = False
        """The next message with outputs leaves damaged."""
        self._loop = loop
        self._chance = chance
        self._observer = observer
        self._shape = shape
        self.runner = runner = TimedRunner(
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_num_seqs=shape.max_num_seqs,
            max_model_len=shape.max_model_len,
            vocab_size=VOCAB_SIZE,
        )
        runner.on_executed = self._on_executed
        limits = SchedulerConfig(
            max_model_len=shape.max_model_len,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            block_size=shape.block_size,
            enable_prefix_caching=shape.enable_prefix_caching,
        )
        self.core = EngineCore(limits, runner, engine_index=rank)
        self._intake = _VirtualIntake(self._on_drained)
        self._step_loop = StepLoop(
            self.core, self._intake, self._on_outgoing, self._start_job, clock=self._clock
        )
        self._jobs_done_s = 0.0
        """When the job thread will have done what it was given."""
        self._num_pending = 0
        self._now = 0.0
        """The engine's own time within its turn."""
        self._is_scheduled = False
        self._busy_until = 0.0
        self.stalled_until = 0.0
        self._num_healed = 0
        """Turns that were put off before the last of so many heals never come."""

    @property
    def registration(self) -> Registration:
        shape = self._shape
        return Registration(
            max_model_len=shape.max_model_len,
            num_gpu_blocks=shape.num_blocks,
            block_size=shape.block_size,
            dp_stats_address=None,
            dtype="float32",
            vllm_version="0.33.0",
            world_size=1,
            data_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            data_parallel_rank=self.rank,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            instance_id=f"simulated-{self.rank}",
            supports_lora=False,
            max_loras=0,
            caesura_protocol=CAESURA_PROTOCOL,
        )

    # -- what reaches it -----------------------------------------------------------------------

    def receive(self, frames: list[bytes] | None) -> None:
        """A message arrived."""
        if not self.is_alive or frames is None:
            return
        try:
            message: Input = decode_input(frames)
        except InputError as error:
            message = error
        self._put(Received(0, message))

    def terminate(self) -> None:
        """SIGTERM: every request ends, and then the engine."""
        if self.is_alive:
            self._put(Shutdown("received SIGTERM"))

    def stall(self, duration_s: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self.stalled_until = max(self.stalled_until, self._loop.time() + duration_s)

    def heal(self) -> None:
        """SIGCONT: a turn that was put off comes soon."""
        if self.stalled_until > self._loop.time():
            self.stalled_until = 0.0
            if self._is_scheduled:
                self._num_healed += 1
                self._is_scheduled = False
                self._schedule()

    def fail(self) -> None:
        """Its next turn ends with an error."""
        if self.is_alive:
            self._put(Failure(PlannedFault("as the scenario says")))

    def die(self) -> None:
        """SIGKILL."""
        self.is_alive = False

    def _put(self, item: Item) -> None:
        self._num_pending += 1
        self._intake.put(item)
        self._schedule()

    # -- its turns -----------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            when = max(self._loop.time(), self._busy_until, self.stalled_until)
            self._loop.at(when, self._turn, self._num_healed)

    def _turn(self, num_healed: int) -> None:
        if not self.is_alive or num_healed != self._num_healed:
            return
        now = self._loop.time()
        if now < self.stalled_until:
            self._loop.at(self.stalled_until, self._turn, num_healed)
            return
        self._is_scheduled = False
        lease_ends_s = self.core.lease_ends_s
        if not (self._num_pending or self.core.has_work or lease_ends_s is not None):
            return
        self._now = now + BOUNDARY_TIME_S
        try:
            is_last = self._step_loop.turn()
        except Exception as error:
            self._observer.on_engine_fault(self.rank, error)
            self.send([ENGINE_CORE_DEAD], self._now)
            self.die()
            return
        self._busy_until = self._now
        if is_last:
            self.is_alive = False
            self._loop.at(self._now, self.on_exit)
        self._observer.after_turn(self.rank)
        if self._num_pending or self.core.has_work:
            self._schedule()
        elif (lease_ends_s := self.core.lease_ends_s) is not None:
            self._loop.at(lease_ends_s, self._schedule)

    on_exit: Callable[[], None]
    """Called when the process has ended in order."""

    def _clock(self) -> float:
        return self._now

    def _on_drained(self, items: list[Item]) -> None:
        self._num_pending -= len(items)
        self._observer.before_turn(
            self.rank,
            [item.message for item in items if isinstance(item, Received)],
            self._now,
            is_last=any(isinstance(item, Shutdown) for item in items),
            num_left=self._num_pending,
        )

    def _start_job(self, job: Job) -> None:
        """As the job thread does: one after the other, while steps go on."""
        done_s = max(self._now, self._jobs_done_s) + self._chance.choice(JOB_TIMES_S)
        self._jobs_done_s = done_s
        self._loop.at(done_s, self._finish_job, job)

    def _finish_job(self, job: Job) -> None:
        if self.is_alive:
            self._put(Received(job.client_index, job.done()))

    def _on_executed(self, batch: StepBatch) -> None:
        self._observer.on_step(self.rank, batch)
        self._now += self._shape.step_time_s * self._chance.choice(STEP_TIME_FACTORS)

    def _on_outgoing(self, outgoing: Outgoing) -> None:
        _, outputs = outgoing
        self._observer.on_engine_output(self.rank, outputs)
        frames = encode_outputs(outputs)
        if self.corrupt_next and (outputs.outputs or outputs.finished_requests):
            self.corrupt_next = False
            frames = [b"\xc1" + frames[0]]
        self.send(frames, self._now)
