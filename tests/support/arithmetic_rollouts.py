"""Rollouts over HTTP, of an engine whose tokens are arithmetic.

    async with served_engine(fake(fake_step_time_ms=1)) as served:
        rollout = Rollout(served, "a", 50)
        assert (await rollout.result()).ending == "length"
        await assert_nothing_left(served)

A result checks itself: its tokens are those of its prompt, and its counts agree. Every wait is
bounded.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpx

from engine_core.fake_runner import expected_tokens
from tests.support.served_engine import ServedEngine

LONG = 4000
"""Tokens of an answer that does not end before it is aborted."""
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Result:
    ending: str
    """The type of its finish reason."""
    token_ids: list[int]
    info: dict[str, Any]
    """What else was told: SGLang's `meta_info`, or vLLM's choice."""


class Rollout:
    """A request of SGLang's dialect under way, with a prompt of its own."""

    path = "/generate"

    def __init__(self, served: ServedEngine, rid: str, num_tokens: int, **fields: Any) -> None:
        """`fields` are of the body."""
        self.rid = rid
        self.prompt = prompt_of(rid)
        body = self.body(num_tokens) | fields
        call = served.http.post(self.path, json=body, timeout=TIMEOUT_S)
        self._answer = asyncio.create_task(call)

    def body(self, num_tokens: int) -> dict[str, Any]:
        return {
            "rid": self.rid,
            "input_ids": self.prompt,
            "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True},
            "return_logprob": True,
        }

    @property
    def is_answered(self) -> bool:
        return self._answer.done()

    async def answer(self) -> httpx.Response:
        return await asyncio.wait_for(self._answer, TIMEOUT_S)

    async def result(self, *, salt: int = 0) -> Result:
        """The result, whose tokens must be those of the weights `salt`."""
        result = await self.result_of_mixed_weights()
        assert result.token_ids == expected_tokens(self.prompt, len(result.token_ids), salt=salt)
        return result

    async def result_of_mixed_weights(self) -> Result:
        answer = await self.answer()
        assert answer.status_code == 200, answer.text
        return self.read(answer.json())

    def read(self, body: dict[str, Any]) -> Result:
        info, token_ids = body["meta_info"], body["output_ids"]
        assert info["id"] == self.rid
        assert info["completion_tokens"] == len(token_ids)
        assert [entry[1] for entry in info.get("output_token_logprobs", [])] == token_ids
        return Result(info["finish_reason"]["type"], token_ids, info)


class Completion(Rollout):
    """A request of vLLM's dialect under way."""

    path = "/v1/completions"

    def body(self, num_tokens: int) -> dict[str, Any]:
        return {
            "request_id": self.rid,
            "prompt": self.prompt,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def read(self, body: dict[str, Any]) -> Result:
        [choice] = body["choices"]
        assert body["id"].endswith(self.rid)
        assert body["usage"]["completion_tokens"] == len(choice["token_ids"])
        return Result(choice["finish_reason"], choice["token_ids"], choice)


def prompt_of(rid: str) -> list[int]:
    return [5, 6, zlib.crc32(rid.encode()) % 30_000]


def start(
    served: ServedEngine,
    rids: Iterable[str],
    num_tokens: int = LONG,
    kind: type[Rollout] = Rollout,
    **fields: Any,
) -> list[Rollout]:
    return [kind(served, rid, num_tokens, **fields) for rid in rids]


async def results(rollouts: Iterable[Rollout]) -> list[Result]:
    return [await rollout.result() for rollout in rollouts]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once it holds."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await condition():  # noqa: ASYNC110  # no event to await
            await asyncio.sleep(0.005)


async def until_state(served: ServedEngine, state: str) -> None:
    async def is_reached() -> bool:
        return served.engine.pause_state.state == state

    await until(is_reached)


async def num_steps(served: ServedEngine) -> list[int]:
    """How many steps each engine has made."""
    return [status.num_steps for status in (await served.engine.status()).values()]


async def assert_standing_still(served: ServedEngine, duration_s: float = 0.03) -> None:
    """Fail if an engine steps within that time."""
    before = await num_steps(served)
    await asyncio.sleep(duration_s)
    assert await num_steps(served) == before


async def assert_nothing_left(served: ServedEngine) -> None:
    """Fail unless the server runs, holds nothing (L11) and serves the next request exactly."""
    await served.wait_until_idle()
    assert served.engine.pause_state.state == "running"
    for status in (await served.engine.status()).values():
        assert status.state == "running"
        assert status.num_free_blocks + status.num_cached_blocks == status.num_blocks
    assert (await served.http.get("/health_generate")).status_code == 200
