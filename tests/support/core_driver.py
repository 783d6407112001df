"""Drives an `EngineCore` by hand: no process, no sockets, time that only moves when told to.

driver = CoreDriver(max_num_seqs=4)
driver.add("a", [1, 2, 3], max_tokens=5)
driver.run()
assert driver.tokens["a"] == expected_tokens([1, 2, 3], 5)
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from engine_core.batch import ModelRunner
from engine_core.config import SchedulerConfig
from engine_core.core import EngineCore, Input
from engine_core.fake_runner import FakeRunner
from engine_core.jobs import Job
from engine_core.outbox import Outgoing
from ipc.frames import Abort
from ipc.lifecycle import (
    CAESURA_ABORT,
    CAESURA_REQUESTS,
    CAESURA_STATUS,
    AbortReceipt,
    EngineStatus,
    LiveRequest,
    LiveRequests,
)
from ipc.output import EngineCoreOutput, EngineCoreOutputs, FinishReason, encode_outputs
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME, PauseReceipt
from ipc.request import EngineCoreRequest, SamplingParams
from ipc.utility import UtilityCall, UtilityReply

MAX_STEPS = 10_000


class CoreDriver:
    """One core, and everything it has said so far."""

    def __init__(
        self, *, num_blocks: int = 64, runner: ModelRunner | None = None, **limits: Any
    ) -> None:
        """With the fake runner unless another one is given."""
        config = {
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "block_size": 4,
        } | limits
        self.config = SchedulerConfig(**config)
        fake = FakeRunner(
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
        )
        self.core = EngineCore(self.config, runner or fake)
        self.now = 0.0
        self._last_call_id = 6
        self.frames: list[Outgoing] = []
        self.outputs: defaultdict[str, list[EngineCoreOutput]] = defaultdict(list)
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.replies: list[UtilityReply] = []
        self.jobs: list[Job] = []
        self.confirmed: list[tuple[int, str]] = []
        """(client index, request id) of each end that was confirmed, in order."""

    # ── in ────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, message: Input, client_index: int = 0) -> list[EngineCoreOutputs]:
        """Let it take effect; work that it asks for stays in `jobs` until `run_jobs`."""
        frames = self._take(self.core.apply([(client_index, message)], self.now))
        self.jobs += self.core.take_jobs()
        return frames

    def run_jobs(self) -> None:
        """Do the work that calls asked for, and let them be answered."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            self.apply(job.done(), job.client_index)

    def add(
        self,
        request_id: str,
        prompt: list[int] | None,
        *,
        client_index: int = 0,
        priority: int = 0,
        request: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[EngineCoreOutputs]:
        message = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(**sampling),
            client_index=client_index,
            priority=priority,
            **(request or {}),
        )
        return self.apply(message, client_index)

    def abort(self, *request_ids: str, client_index: int = 0) -> list[EngineCoreOutputs]:
        """A plain ABORT frame."""
        return self.apply(Abort(request_ids), client_index)

    def call(self, method: str, *args: object, client_index: int = 0) -> UtilityReply:
        """Of a call that is answered at once, or when its work is done."""
        self.start_call(method, *args, client_index=client_index)
        self.run_jobs()
        assert self.replies[-1].call_id == self._last_call_id, "the call was not answered"
        return self.replies[-1]

    def start_call(self, method: str, *args: object, client_index: int = 0) -> int:
        """The id of a call that may be answered later."""
        self._last_call_id += 1
        self.apply(UtilityCall(client_index, self._last_call_id, method, args), client_index)
        return self._last_call_id

    def reply(self, call_id: int) -> UtilityReply | None:
        """The answer to a call; None if there is none yet."""
        found = [reply for reply in self.replies if reply.call_id == call_id]
        assert len(found) <= 1, "a call was answered twice"
        return found[0] if found else None

    def pause(self, mode: str, *, clear_cache: bool = False, **others: object) -> PauseReceipt:
        reply = self.call(
            CAESURA_PAUSE, mode, clear_cache, others.get("lease_s"), others.get("pause_id")
        )
        assert reply.failure_message is None, reply.failure_message
        return PauseReceipt.from_wire(reply.result)

    def resume(self) -> object:
        return self.call(CAESURA_RESUME, None).result

    def abort_with_receipt(self, *request_ids: str, client_index: int = 0) -> AbortReceipt:
        reply = self.call(CAESURA_ABORT, list(request_ids), "test", client_index=client_index)
        assert reply.failure_message is None
        return AbortReceipt.from_wire(reply.result)

    def live_requests(self, client_index: int = 0) -> dict[str, LiveRequest]:
        reply = self.call(CAESURA_REQUESTS, client_index=client_index)
        return LiveRequests.from_wire(reply.result).requests

    def status(self) -> EngineStatus:
        return EngineStatus.from_wire(self.call(CAESURA_STATUS).result)

    # ── out ───────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[EngineCoreOutputs]:
        self.now += 0.01
        return self._take(self.core.step(self.now))

    def run(self) -> None:
        """Step until nothing is left to do, checking the books on the way."""
        for _ in range(MAX_STEPS):
            if not self.core.has_work:
                self.assert_idle_and_whole()
                return
            self.step()
            assert self.core.scheduler.check_integrity() == []
        raise AssertionError(f"still at work after {MAX_STEPS} steps")

    def finish_reasons(self, request_id: str) -> list[FinishReason]:
        return [o.finish_reason for o in self.outputs[request_id] if o.finish_reason is not None]

    def assert_idle_and_whole(self) -> None:
        pool = self.core.scheduler.pool
        assert self.core.num_live_requests == 0
        assert pool.num_free + pool.num_cached == pool.num_blocks
        assert self.core.scheduler.check_integrity() == []
        assert self.core.counters["integrity_violations"] == 0

    def _take(self, outgoing: list[Outgoing]) -> list[EngineCoreOutputs]:
        for client_index, frame in outgoing:
            encode_outputs(frame)  # Every frame must be one that may leave.
            self.frames.append((client_index, frame))
            for output in frame.outputs:
                assert not self.finish_reasons(output.request_id), "output after a terminal"
                self.outputs[output.request_id].append(output)
                self.tokens[output.request_id].extend(output.new_token_ids)
            confirmed = frame.finished_requests or []
            assert frame.finished_requests != [], "an empty list of ended requests"
            told = [o.request_id for o in frame.outputs if o.finish_reason is not None]
            assert set(told) <= set(confirmed), "a terminal whose request may still hold blocks"
            assert len(confirmed) == len(set(confirmed)), "an end that one frame tells twice"
            live = {request.request_id for request in self.core.live_requests(client_index)}
            assert live.isdisjoint(confirmed), "a live request was said to have ended"
            self.confirmed.extend((client_index, request_id) for request_id in confirmed)
            if frame.utility_output is not None:
                self.replies.append(frame.utility_output)
        return [frame for _, frame in outgoing]
