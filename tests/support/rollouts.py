"""Rollouts as RL frameworks make them over HTTP, and what must be true of all of them.

Every token that a trainer gets has the log-probability which the model itself gives it at that
place (`assert_scored_by_the_model`): so nothing was lost, made up or shifted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig
from ipc.engine_config import EngineConfig
from tests.support.served_engine import ServedEngine, served_engine

MODEL = "caesura-bundled"
PROMPT_IDS = [603, 558, 285, 285, 600]
LONG = 6000
"""Tokens of an answer that does not end before it is aborted."""
NUM_PLACES = 6
"""Requests that run at once; further ones wait."""


@asynccontextmanager
async def rollout_server() -> AsyncIterator[ServedEngine]:
    """The bundled model, in the precision in which log-probabilities can be compared."""
    engine = EngineConfig(
        model=str(BUNDLED_MODEL_DIRECTORY), dtype="float32", max_num_seqs=NUM_PLACES
    )
    async with served_engine(FrontendConfig(engine=engine)) as served:
        yield served


async def assert_alive_and_idle(server: ServedEngine) -> None:
    """Fail unless the server holds nothing (L11) and still answers."""
    await server.wait_until_idle(10)
    assert (await server.http.get("/health_generate")).status_code == 200


async def post(http: httpx.AsyncClient, path: str, body: object, **options: Any) -> Any:
    response = await http.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    return response.json()


async def wait_for_tokens(http: httpx.AsyncClient, num_requests: int, at_least: int) -> None:
    """Return when so many requests have so many tokens each."""
    async with asyncio.timeout(20):
        while True:
            requests = (await http.get("/requests")).json()["requests"]
            ready = [one for one in requests if one["num_output_tokens"] >= at_least]
            if len(ready) >= num_requests:
                return
            await asyncio.sleep(0.01)


async def assert_scored_by_the_model(
    http: httpx.AsyncClient,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[float],
) -> None:
    """Fail unless each token has the log-probability that a fresh prefill gives it."""
    assert len(ids) == len(logprobs) > 0
    body = {
        "input_ids": [*prompt_ids, *ids],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": len(prompt_ids) - 1,
    }
    entries = (await post(http, "/generate", body))["meta_info"]["input_token_logprobs"][1:]
    assert [token_id for _, token_id, _ in entries] == list(ids)
    for (expected, _, _), given in zip(entries, logprobs, strict=True):
        assert given == pytest.approx(expected, abs=2e-3)


@dataclass
class Sample:
    """A rollout, as a trainer's buffer holds it."""

    prompt_ids: list[int]
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ending: str = ""

    def add_sglang(self, result: Any) -> None:
        """Ids and log-probabilities are taken from `output_token_logprobs` alone."""
        info = result["meta_info"]
        entries = info["output_token_logprobs"]
        assert [token_id for _, token_id, _ in entries] == result["output_ids"]
        assert info["completion_tokens"] == len(entries)
        self.ids += [entry[1] for entry in entries]
        self.logprobs += [entry[0] for entry in entries]
        self.ending = info["finish_reason"]["type"]

    @property
    def num_tokens_left(self) -> int:
        return self.max_tokens - len(self.ids)


async def check_interrupted_rollout(
    http: httpx.AsyncClient,
    send: Callable[[Sample], Awaitable[None]],
    abort: Callable[[], Awaitable[Any]],
) -> None:
    """AReaL's and verl's loop: an aborted call is sent again with what came, until it ends. Here
    two are aborted, and the third one's budget is kept to the token.
    """
    sample = Sample(PROMPT_IDS, LONG)

    async def roll_out() -> int:
        num_calls = 0
        while sample.ending in ("", "abort") and sample.num_tokens_left > 0:
            await send(sample)
            num_calls += 1
            if num_calls == 2:
                sample.max_tokens = len(sample.ids) + 30
        return num_calls

    rollout = asyncio.create_task(roll_out())
    for _ in range(2):
        await wait_for_tokens(http, 1, at_least=20)
        await abort()
    assert await asyncio.wait_for(rollout, 30) == 3
    assert (sample.ending, sample.num_tokens_left) == ("length", 0)
    assert len(sample.ids) >= 70
    await assert_scored_by_the_model(http, PROMPT_IDS, sample.ids, sample.logprobs)
