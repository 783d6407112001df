"""Ten thousand random operations against a real engine process, and an account of every request.

The fake runner's tokens are arithmetic over the contents of its KV cache, so a block that two
requests share by mistake, or that was reused too early, shows in the tokens. The engine is kept
short of blocks and rows, so requests queue, are prefilled in chunks, share prefixes and are
preempted all the time.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from engine_core.fake_runner import expected_tokens
from ipc.engine_config import EngineConfig
from ipc.lifecycle import CAESURA_ABORT, AbortReceipt
from ipc.output import EngineCoreOutput, FinishReason
from tests.support.scripted_frontend import ScriptedFrontend

NUM_OPERATIONS = 10_000
MAX_LIVE = 48
CONFIG = EngineConfig(
    model="fake",
    runner="fake",
    max_model_len=256,
    max_num_seqs=16,
    max_num_batched_tokens=64,
    block_size=8,
    num_gpu_blocks_override=64,
    fake_step_time_ms=0.2,
)
PREFIXES = [[11 * k + i for i in range(40)] for k in range(4)]
"""Prompts begin with one of these, so that they share blocks."""


@dataclass(slots=True)
class Request:
    """What the test knows of one request, and what the engine answered."""

    prompt: list[int]
    max_tokens: int
    silently_aborted: bool = False
    """An ABORT frame named it: from then on it may end without a word."""
    receipt_tokens: int | None = None
    """The count in the receipt of a `caesura_abort` that ended it."""
    token_ids: list[int] = field(default_factory=list)
    terminals: list[FinishReason] = field(default_factory=list)

    def take(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            assert not self.terminals, f"{output} came after the terminal {self.terminals}"
            self.token_ids.extend(output.new_token_ids)
            if output.finish_reason is not None:
                self.terminals.append(output.finish_reason)

    def check(self) -> None:
        """Assert that the request ended as it should have, with the tokens that it should have."""
        expected = expected_tokens(self.prompt, self.max_tokens)
        assert self.token_ids == expected[: len(self.token_ids)]
        if self.receipt_tokens is not None:
            assert self.terminals == [FinishReason.ABORT]
            assert len(self.token_ids) == self.receipt_tokens
        elif self.silently_aborted and not self.terminals:
            assert len(self.token_ids) < self.max_tokens
        else:
            assert self.terminals == [FinishReason.LENGTH]
            assert len(self.token_ids) == self.max_tokens


class Account:
    """Drives the engine at random and keeps the books of every request."""

    def __init__(self, frontend: ScriptedFrontend, rng: random.Random) -> None:
        self.requests: dict[str, Request] = {}
        self.live: dict[str, Request] = {}
        """Not ended, as far as the test has seen."""
        self._frontend = frontend
        self._rng = rng

    def pick(self, most: int) -> list[str]:
        """Up to `most` live ids; sometimes one of a request that ended, or of none."""
        ids = self._rng.sample(list(self.live), min(len(self.live), self._rng.randint(1, most)))
        if self._rng.random() < 0.1:
            ids.append(self._rng.choice(["never-added", *self.requests]))
        return ids

    async def add(self) -> None:
        rng = self._rng
        request_id = f"r{len(self.requests)}"
        prefix = rng.choice(PREFIXES)[: rng.randint(1, 40)]
        prompt = prefix + [rng.randrange(32_000) for _ in range(rng.randint(0, 80))]
        request = Request(prompt, max_tokens=rng.randint(1, 120))
        self.requests[request_id] = self.live[request_id] = request
        await self._frontend.add(request_id, prompt, max_tokens=request.max_tokens)

    async def drop(self) -> None:
        """Dropped streams: an ABORT frame, to which nothing is answered."""
        ids = self.pick(most=4)
        await self._frontend.abort(ids)
        for request_id in ids:
            if (request := self.live.pop(request_id, None)) is not None:
                request.silently_aborted = True

    async def abort(self) -> None:
        """An explicit abort: a terminal each, then the receipt."""
        ids = self.pick(most=4)
        answer = await self._frontend.utility(CAESURA_ABORT, ids, "test")
        receipt = AbortReceipt.from_wire(answer)
        assert set(receipt.requests) == set(ids)
        for request_id, entry in receipt.requests.items():
            request = self.requests.get(request_id)
            if entry.status != "aborted":
                continue
            assert request is not None
            # Terminals stand before the receipt, so it is here already.
            request.receipt_tokens = entry.num_output_tokens
            self.read(request_id)
            assert request.terminals == [FinishReason.ABORT]

    async def finish(self) -> None:
        """Let one request run to its end."""
        if not self.live:
            return
        request_id = self._rng.choice(list(self.live))
        async with asyncio.timeout(20):
            while not self.live[request_id].terminals:
                self.requests[request_id].take([await self._frontend.next_output(request_id)])
        del self.live[request_id]

    async def breathe(self) -> None:
        await asyncio.sleep(self._rng.choice([0, 0, 0.0005, 0.002]))
        for request_id in list(self.live):
            self.read(request_id)

    def read(self, request_id: str) -> None:
        request = self.requests[request_id]
        request.take(self._frontend.unread(request_id))
        if request.terminals:
            self.live.pop(request_id, None)


async def test_L1_L2_L8_L11_ten_thousand_random_operations_leave_every_request_accounted_for() -> (
    None
):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    started_s = time.monotonic()
    async with ScriptedFrontend() as frontend:
        await frontend.start(CONFIG)
        account = Account(frontend, rng)
        operations = [account.add, account.drop, account.abort, account.finish, account.breathe]
        for _ in range(NUM_OPERATIONS):
            if len(account.live) >= MAX_LIVE:
                operation = account.finish
            else:
                [operation] = rng.choices(operations, weights=[50, 15, 10, 5, 20])
            await operation()
        while account.live:
            await account.finish()
        status = await frontend.status()
        await asyncio.sleep(0.05)
        for request_id, request in account.requests.items():
            account.read(request_id)
            request.check()

    took_s = time.monotonic() - started_s
    num_tokens = sum(len(request.token_ids) for request in account.requests.values())
    print(
        f"{NUM_OPERATIONS} operations on {len(account.requests)} requests, {num_tokens} tokens, "
        f"{status.num_steps} steps, {status.counters} in {took_s:.1f} s"
    )
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert status.num_free_blocks + status.num_cached_blocks == status.num_blocks
    assert status.integrity_errors == ()
    assert status.counters["integrity_violations"] == 0
    assert status.counters["preemptions"] > 0, "the test should drive the engine into preemption"
    assert all(frame.outputs is not None for frame in frontend.frames), "the engine died"
