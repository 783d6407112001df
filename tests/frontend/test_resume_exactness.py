"""A rollout that is cut anywhere and continued is the rollout that nobody cut, on the bundled model
with `deterministic`: its tokens, text and log-probabilities to the bit.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.outputs import RequestResult
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from ipc.engine_config import EngineConfig

MODEL = FrontendConfig().engine.model
NUM_TOKENS = 96
TIMEOUT_S = 60
PROMPTS = ("import os\n", "def read(self", "class Node:\n    ", "for name in ")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 1.0, "top_p": 0.95},
    "penalised": {"temperature": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.3},
    "greedy": {"temperature": 0.0, "presence_penalty": 0.5, "min_tokens": 60},
}


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    """Small steps, so that prompts are computed in chunks and between other rows."""
    config = EngineConfig(
        model=MODEL,
        dtype="float32",
        deterministic=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        num_gpu_blocks_override=64,
    )
    async with await AsyncEngine.start(FrontendConfig(engine=config)) as engine:
        yield engine


def params(kind: str, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=NUM_TOKENS, seed=seed, logprobs=1, ignore_eos=True, **SAMPLINGS[kind]
    )


async def cut_after(engine: AsyncEngine, stream: RequestStream, num_tokens: int) -> RequestResult:
    """Abort a request once it has so many tokens, and return all of it."""
    num_seen = 0
    while num_seen < num_tokens:
        num_seen += len((await anext(stream)).token_ids)
    await engine.abort(stream.request_id)
    return await stream.result()


async def in_pieces(
    engine: AsyncEngine, prompt: str, sampling: SamplingParams, cuts: list[int]
) -> list[RequestResult]:
    """The pieces of one rollout that is aborted and continued as often as `cuts` has lengths."""
    stream = engine.generate(prompt, sampling_params=sampling)
    pieces = []
    for num_tokens in cuts:
        piece = await cut_after(engine, stream, num_tokens)
        pieces.append(piece)
        if piece.finish_reason != "abort":
            return pieces
        assert piece.resume_from is not None
        stream = engine.generate(resume_from=piece.resume_from, sampling_params=sampling)
    pieces.append(await stream.result())
    return pieces


@pytest.mark.parametrize("kind", SAMPLINGS)
async def test_L2_rollouts_that_are_cut_and_continued_among_others_are_exactly_the_uncut_ones(
    engine: AsyncEngine, kind: str
) -> None:
    draw = random.Random(kind)
    async with asyncio.timeout(TIMEOUT_S):
        whole = [
            await engine.generate(prompt, sampling_params=params(kind, seed)).result()
            for seed, prompt in enumerate(PROMPTS)
        ]
        rollouts = await asyncio.gather(
            *(
                in_pieces(
                    engine,
                    prompt,
                    params(kind, seed),
                    [draw.randint(1, 40) for _ in range(draw.randint(1, 3))],
                )
                for seed, prompt in enumerate(PROMPTS)
            )
        )
    assert any(len(pieces) > 2 for pieces in rollouts)
    for one, pieces in zip(whole, rollouts, strict=True):
        assert pieces[-1].finish_reason == one.finish_reason == "length"
        assert tuple(token for piece in pieces for token in piece.token_ids) == one.token_ids
        assert tuple(entry for piece in pieces for entry in piece.logprobs) == one.logprobs
        assert "".join(piece.text for piece in pieces) == one.text
