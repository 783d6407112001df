"""The driver of the core: order at a boundary, and the ways in which the loop ends."""

from __future__ import annotations

import time

import pytest

from engine_core.config import SchedulerConfig
from engine_core.core import EngineCore
from engine_core.fake_runner import FakeRunner, expected_tokens
from engine_core.outbox import Outgoing
from engine_core.process.intake import Failure, Intake, Received, Shutdown
from engine_core.process.job_thread import JobThread
from engine_core.process.step_loop import StepLoop
from ipc.frames import InputError
from ipc.output import EngineCoreOutput, FinishReason
from ipc.request import EngineCoreRequest, SamplingParams
from ipc.utility import UtilityCall


class Driven:
    """A step loop whose frames are kept."""

    def __init__(self) -> None:
        runner = FakeRunner(num_blocks=64, block_size=4, max_num_seqs=4, max_model_len=64)
        limits = SchedulerConfig(
            max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32, block_size=4
        )
        self.core = EngineCore(limits, runner)
        self.intake = Intake()
        self.frames: list[Outgoing] = []
        jobs = JobThread(self.intake)
        self.loop = StepLoop(self.core, self.intake, self.frames.append, jobs.start)

    def add(self, request_id: str, *, max_tokens: int = 8) -> None:
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=[1, 2, 3],
            sampling_params=SamplingParams(max_tokens=max_tokens),
        )
        self.intake.put(Received(0, request))

    @staticmethod
    def rows(frame: Outgoing) -> list[str]:
        return [row.request_id for row in frame[1].outputs]

    def outputs(self, request_id: str) -> list[EngineCoreOutput]:
        frames = (frame for _, frame in self.frames)
        return [row for frame in frames for row in frame.outputs if row.request_id == request_id]


def test_a_shutdown_lets_what_came_before_it_take_effect_and_ends_every_request() -> None:
    driven = Driven()
    driven.add("early")
    assert not driven.loop.turn()
    driven.add("late")
    driven.intake.put(Shutdown("test"))
    driven.loop.run()
    assert [row.finish_reason for row in driven.outputs("early")] == [None, FinishReason.ABORT]
    assert [row.finish_reason for row in driven.outputs("late")] == [FinishReason.ABORT]
    assert not driven.core.has_work


def test_requests_run_to_their_end_turn_by_turn() -> None:
    driven = Driven()
    driven.add("a", max_tokens=8)
    for _ in range(8):
        assert not driven.loop.turn()
    token_ids = [token for row in driven.outputs("a") for token in row.new_token_ids]
    assert token_ids == expected_tokens([1, 2, 3], 8)


def test_an_idle_turn_waits_and_does_nothing() -> None:
    driven = Driven()
    started = time.monotonic()
    assert not driven.loop.turn()
    assert time.monotonic() - started > 0.5, "no busy polling"
    assert driven.frames == []


def test_a_failed_thread_ends_the_loop_with_its_error() -> None:
    driven = Driven()
    driven.intake.put(Failure(OSError("the socket is gone")))
    with pytest.raises(OSError, match="the socket is gone"):
        driven.loop.run()


def test_L12_a_malformed_message_is_answered_counted_and_changes_nothing_else() -> None:
    driven = Driven()
    driven.add("good")
    driven.intake.put(Received(1, InputError("bad field", request_id="bad", client_index=0)))
    driven.intake.put(Received(0, InputError("bad call", call_id=9)))
    driven.intake.put(Received(0, InputError("noise")))
    driven.loop.turn()
    [(client_index, refused)] = [frame for frame in driven.frames if driven.rows(frame) == ["bad"]]
    assert client_index == 1, "the client on whose socket it came, whatever it claims"
    assert refused.outputs[0].finish_reason is FinishReason.ERROR
    [reply] = [frame.utility_output for _, frame in driven.frames if frame.utility_output]
    assert (reply.call_id, reply.failure_message) == (9, "bad call")
    assert [row.finish_reason for row in driven.outputs("good")] == [None]
    assert driven.core.counters["malformed_messages"] == 3


def test_L13_everything_that_arrived_takes_effect_at_one_boundary_in_order() -> None:
    driven = Driven()
    for index in range(100):
        driven.add(f"r{index}")
    driven.intake.put(Received(0, UtilityCall(0, 1, "get_supported_tasks")))
    driven.loop.turn()
    replies = [frame.utility_output for _, frame in driven.frames if frame.utility_output]
    assert len(replies) == 1
    assert driven.core.num_live_requests == 100
