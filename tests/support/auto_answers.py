"""Plays a whole engine through a `MockEngine`: at every step one token for every live request.

    async with MockEngine(address) as engine, AutoAnswers(engine, step_time_ms=10):
        ...

For load tests it also runs as a process, from the repository's root:

    python -m tests.support.auto_answers --handshake tcp://127.0.0.1:13345 --rank 0

Invariants
- Messages take effect in arrival order, at a step boundary, never within a step.
- A request ends once: with its `max_tokens`-th token (`length`), by an ABORT frame (no output
  follows: vLLM's meaning), or by `caesura_abort` (a terminal output, then the receipt). A Caesura
  engine confirms each end, in the frame of the terminal or, after an ABORT, in one of its own.
- While paused it makes no step. A pause of the mode `wait` is answered when no request lives; what
  comes until then is begun all the same.
- Token ids are `mock_tokens(prompt, n)`, so whoever receives them can check them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ipc import expect
from ipc.abort import Abort
from ipc.lifecycle import (
    CAESURA_ABORT,
    CAESURA_REQUESTS,
    CAESURA_STATUS,
    AbortReceipt,
    LiveRequest,
    LiveRequests,
    RequestReceipt,
)
from ipc.output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    OutputError,
    PrefillStats,
    SchedulerStats,
)
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME, PauseReceipt, read_mode
from ipc.request import EngineCoreRequest
from ipc.utility import UtilityCall
from tests.support.mock_engine import Message, MockEngine

DEFAULT_MAX_TOKENS = 16
VOCAB_SIZE = 256
CAESURA_METHODS = (
    CAESURA_ABORT,
    CAESURA_PAUSE,
    CAESURA_REQUESTS,
    CAESURA_RESUME,
    CAESURA_STATUS,
)


def mock_tokens(prompt_token_ids: Sequence[int], num_tokens: int, start: int = 0) -> list[int]:
    """The answer to a prompt, from its output number `start`: counts up from the prompt's sum."""
    first = sum(prompt_token_ids) + start
    return [(first + index) % VOCAB_SIZE for index in range(num_tokens)]


@dataclass(slots=True)
class _LiveRequest:
    request: EngineCoreRequest
    first_token: int
    max_tokens: int
    num_output_tokens: int = 0


class AutoAnswers:
    """Drives one engine until the context is left."""

    def __init__(self, engine: MockEngine, *, step_time_ms: float = 1.0) -> None:
        self.live: dict[str, _LiveRequest] = {}
        self.num_steps = 0
        self.state = "running"
        self._draining: list[UtilityCall] = []
        self._engine = engine
        self._step_time_s = step_time_ms / 1000
        self._inbox: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._engine.on_message = self._receive
        self._task = asyncio.create_task(self.run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._engine.on_message = None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _receive(self, message: Message) -> None:
        self._inbox.append(message)
        self._arrived.set()

    async def run(self) -> None:
        """Step while requests live, wait while none does. Ends only by cancellation."""
        self._engine.on_message = self._receive
        clock = asyncio.get_running_loop().time
        next_step_s = clock()
        while True:
            if not self.live or self.state == "paused":
                await self._arrived.wait()
                next_step_s = clock()
            self._arrived.clear()
            while self._inbox:
                await self._apply(self._inbox.popleft())
            next_step_s = max(clock(), next_step_s + self._step_time_s)
            await asyncio.sleep(next_step_s - clock())
            if self.state != "paused":
                await self._step()
            if not self.live:
                await self._settle()

    async def _step(self) -> None:
        """One token for each live request, in one frame for each front-end process."""
        outputs: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        for live in list(self.live.values()):
            request = live.request
            token = (live.first_token + live.num_output_tokens) % VOCAB_SIZE
            live.num_output_tokens += 1
            done = live.num_output_tokens >= live.max_tokens
            if done:
                del self.live[request.request_id]
            outputs[request.client_index].append(
                EngineCoreOutput(
                    request.request_id,
                    [token],
                    finish_reason=FinishReason.LENGTH if done else None,
                    prefill_stats=_prefill_stats(request) if live.num_output_tokens == 1 else None,
                )
            )
        if not outputs:
            return
        self.num_steps += 1
        stats = SchedulerStats(num_running_reqs=len(self.live), step_counter=self.num_steps)
        for client_index, batch in outputs.items():
            frame = EngineCoreOutputs(outputs=batch, scheduler_stats=stats)
            await self._engine.send(frame, client_index)

    async def _apply(self, message: Message) -> None:
        if isinstance(message, EngineCoreRequest):
            await self._add(message)
        elif isinstance(message, Abort):
            await self._abort_silently(message)
        elif isinstance(message, UtilityCall):
            await self._call(message)
        else:
            raise AssertionError(f"the front end sent a frame that does not decode: {message}")

    async def _add(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            error = OutputError("validation_error", "the mock engine serves token ids only")
            output = EngineCoreOutput(
                request.request_id, finish_reason=FinishReason.ERROR, error=error
            )
            await self._engine.send(EngineCoreOutputs(outputs=[output]), request.client_index)
            return
        assert request.request_id not in self.live, f"duplicate ADD of {request.request_id}"
        self.live[request.request_id] = _LiveRequest(
            request,
            first_token=sum(request.prompt_token_ids),
            max_tokens=DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens,
        )

    async def _call(self, call: UtilityCall) -> None:
        if not self._engine.caesura or call.method not in CAESURA_METHODS:
            await self._engine.reply(
                call, failure=f"Call to {call.method} method failed: no attribute '{call.method}'"
            )
        elif call.method == CAESURA_STATUS:
            status = self._engine.make_status(
                state=self.state, num_running=len(self.live), num_steps=self.num_steps
            )
            await self._engine.reply(call, status.to_wire())
        elif call.method == CAESURA_REQUESTS:
            requests = {
                request_id: LiveRequest("decode", live.num_output_tokens)
                for request_id, live in self.live.items()
                if live.request.client_index == call.client_index
            }
            await self._engine.reply(call, LiveRequests(requests).to_wire())
        elif call.method == CAESURA_PAUSE:
            await self._pause(call)
        elif call.method == CAESURA_RESUME:
            await self._resume(call)
        else:
            request_ids = expect.texts(call.args[0], "request_ids")
            receipt = await self._abort(request_ids, call.client_index)
            await self._engine.reply(call, receipt.to_wire())

    async def _pause(self, call: UtilityCall) -> None:
        mode, num_aborted = read_mode(call.args[0]), 0
        if mode == "abort":
            num_aborted = len(self.live)
            await self._abort(list(self.live), call.client_index)
        if mode == "wait" and self.live:
            self.state = "draining"
            self._draining.append(call)
            return
        self.state = "paused"
        await self._settle()
        receipt = PauseReceipt(num_aborted=num_aborted, num_kept=len(self.live))
        await self._engine.reply(call, receipt.to_wire())

    async def _settle(self) -> None:
        """Nothing is in flight."""
        for call in self._draining:
            self.state = "paused"
            await self._engine.reply(call, PauseReceipt().to_wire())
        self._draining.clear()

    async def _resume(self, call: UtilityCall) -> None:
        for pause in self._draining:
            await self._engine.reply(pause, failure="a resume overtook the pause")
        self._draining.clear()
        ended, self.state = self.state, "running"
        await self._engine.reply(call, ended)

    async def _abort_silently(self, message: Abort) -> None:
        client_index = 0
        for request_id in message.request_ids:
            if (live := self.live.pop(request_id, None)) is not None:
                client_index = live.request.client_index
        if self._engine.caesura:
            await self._engine.confirm(message.request_ids, client_index)

    async def _abort(self, request_ids: Sequence[str], client_index: int) -> AbortReceipt:
        """End the requests with an output each; returns the receipt."""
        receipts: dict[str, RequestReceipt] = {}
        outputs: list[EngineCoreOutput] = []
        for request_id in request_ids:
            live = self.live.pop(request_id, None)
            if live is None:
                receipts[request_id] = RequestReceipt("unknown")
            else:
                receipts[request_id] = RequestReceipt("aborted", live.num_output_tokens, "decode")
                outputs.append(EngineCoreOutput(request_id, finish_reason=FinishReason.ABORT))
        if outputs:
            await self._engine.send(EngineCoreOutputs(outputs=outputs), client_index)
        return AbortReceipt(receipts)


def _prefill_stats(request: EngineCoreRequest) -> PrefillStats:
    num_prompt_tokens = len(request.prompt_token_ids or ())
    return PrefillStats(num_prompt_tokens=num_prompt_tokens, num_computed_tokens=num_prompt_tokens)


async def _serve(handshake_address: str, rank: int, step_time_ms: float) -> None:
    async with MockEngine(handshake_address, rank=rank) as engine:
        await AutoAnswers(engine, step_time_ms=step_time_ms).run()


def main() -> None:
    parser = argparse.ArgumentParser(description="An engine that answers with made-up tokens.")
    parser.add_argument("--handshake", required=True, help="the front end's handshake address")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--step-time-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(arguments.handshake, arguments.rank, arguments.step_time_ms))


if __name__ == "__main__":
    main()
