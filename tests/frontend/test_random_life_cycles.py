"""Random lives of requests in one front end over three engines, one of which dies on the way.

Requests are generated, read, dropped in every way, aborted by name, prefix, tag or all at once,
paused and resumed in every mode, at random moments. Whatever happens, each stream that is read ends
once, its tokens are a prefix of the right answer, and in the end nobody remembers anything.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import get_args

from frontend.async_engine import AsyncEngine
from frontend.errors import EnginePausedError, PauseInterruptedError
from frontend.outputs import RequestOutput
from frontend.requests.pause_gate import NewcomerRule
from frontend.requests.pause_reports import PauseReport
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.pause import PauseMode
from tests.support.auto_answers import AutoAnswers, mock_tokens
from tests.support.mock_fleet import mock_fleet

NUM_OPERATIONS = 1500
FINISH_REASONS = {"length", "abort", "error"}


@dataclass(slots=True)
class Reader:
    """One client: what it asked for and what it got."""

    prompt: list[int]
    max_tokens: int
    outputs: list[RequestOutput] = field(default_factory=list)
    is_dropped: bool = False

    async def read(self, stream: RequestStream, rng: random.Random) -> None:
        async for output in stream:
            self.outputs.append(output)
            if rng.random() < 0.05 and output.finish_reason is None:
                self.is_dropped = True
                stream.close()

    def check(self) -> None:
        token_ids = [token_id for output in self.outputs for token_id in output.token_ids]
        assert token_ids == mock_tokens(self.prompt, len(token_ids))
        reasons = [output.finish_reason for output in self.outputs]
        assert all(reason is None for reason in reasons[:-1]), "a terminal was not the last"
        if not self.is_dropped:
            assert reasons[-1] in FINISH_REASONS
            if reasons[-1] == "length":
                assert len(token_ids) == self.max_tokens


class Storm:
    """Does one random thing after the other to a front end."""

    def __init__(self, frontend: AsyncEngine, rng: random.Random) -> None:
        self.readers: list[Reader] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.pauses: list[asyncio.Task[PauseReport]] = []
        self.num_refused = 0
        self._frontend = frontend
        self._rng = rng

    async def generate(self) -> None:
        rng, index = self._rng, len(self.readers)
        reader = Reader([rng.randrange(256) for _ in range(3)], rng.randint(1, 40))
        try:
            stream = self._frontend.generate(
                prompt_token_ids=reader.prompt,
                sampling_params=SamplingParams(max_tokens=reader.max_tokens, detokenize=False),
                request_id=f"{index % 7}/{index}",
                tags=[f"tag-{index % 5}"],
            )
        except EnginePausedError:
            self.num_refused += 1
            return
        self.readers.append(reader)
        self.tasks.append(asyncio.create_task(reader.read(stream, rng)))

    async def cancel(self) -> None:
        """Cancel a reading task, perhaps one that never ran or has ended."""
        if self.tasks:
            index = self._rng.randrange(len(self.tasks))
            if self.tasks[index].cancel():
                self.readers[index].is_dropped = True

    async def abort(self) -> None:
        rng = self._rng
        index = rng.randrange(len(self.readers) + 1)
        match rng.randrange(8):
            case 0:
                aborting = self._frontend.abort(prefix=f"{index % 7}/")
            case 1:
                aborting = self._frontend.abort(tag=f"tag-{index % 5}")
            case 2 if rng.random() < 0.2:
                aborting = self._frontend.abort(abort_all=True)
            case _:
                aborting = self._frontend.abort([f"{index % 7}/{index}", "nobody"], wait=False)
        receipt = await asyncio.wait_for(aborting, 10)
        assert {entry.status for entry in receipt.requests.values()} <= {
            "aborted",
            "finished",
            "unknown",
            "pending",
            "engine_error",
        }

    async def pause(self) -> None:
        """Perhaps while another pause drains, perhaps never awaited."""
        rng = self._rng
        pausing = asyncio.create_task(
            self._frontend.pause(
                rng.choice(get_args(PauseMode)),
                newcomers=rng.choice(get_args(NewcomerRule)),
                lease_s=rng.choice([None, 0.01]),
                timeout_s=10,
            )
        )
        self.pauses.append(pausing)
        await asyncio.sleep(0)
        if rng.random() < 0.2:
            pausing.cancel()
        elif rng.random() < 0.5:
            await asyncio.wait([pausing])

    async def resume(self) -> None:
        report = await self._frontend.resume(timeout_s=10)
        assert set(report.engines.values()) <= {"ok", "error"}

    async def breathe(self) -> None:
        await asyncio.sleep(self._rng.choice([0, 0, 0.001, 0.003]))


async def test_L1_L2_L11_L12_random_lives_all_end_once_and_leave_nothing_behind() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with AsyncExitStack() as stack:
        frontend, engines = await stack.enter_async_context(mock_fleet(3))
        answers = [
            await stack.enter_async_context(AutoAnswers(engine, step_time_ms=2))
            for engine in engines
        ]
        storm = Storm(frontend, rng)
        operations = [storm.generate, storm.cancel, storm.abort, storm.breathe]
        operations += [storm.pause, storm.resume]
        for operation_number in range(NUM_OPERATIONS):
            if operation_number == NUM_OPERATIONS // 2:
                await engines[1].die()
            [operation] = rng.choices(operations, weights=[50, 10, 10, 30, 2, 5])
            await operation()
        await storm.resume()
        async with asyncio.timeout(20):
            await asyncio.gather(*storm.tasks, return_exceptions=True)
            pauses = await asyncio.gather(*storm.pauses, return_exceptions=True)
        await asyncio.sleep(0.1)  # The last drops reach their engines.

        for reader in storm.readers:
            reader.check()
        assert frontend.num_live_requests == frontend.pause_state.num_held == 0
        failures = [type(pause) for pause in pauses if isinstance(pause, BaseException)]
        assert set(failures) <= {PauseInterruptedError, asyncio.CancelledError}
        assert len(failures) < len(pauses)
        print(f"{len(pauses)} pauses, {storm.num_refused} requests refused")
        registry = frontend._dispatcher.registry
        assert (registry.num_ending, registry.num_in_flight) == (0, [0, 0, 0])
        assert not answers[0].live
        assert not answers[2].live
        ends = [reader.outputs[-1].finish_reason for reader in storm.readers if reader.outputs]
        print({reason: ends.count(reason) for reason in set(ends)})
        assert set(ends) >= {"length", "abort", None}
