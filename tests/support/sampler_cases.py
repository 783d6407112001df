"""Sequences with made-up sampling parameters, and rows of made-up logits for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine_core.batch import JoinedSequence
from engine_core.model.sampler import Sampler
from ipc.output import LogprobsLists
from ipc.request import SamplingParams


def make_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def join(
    sampler: Sampler,
    slot: int,
    params: SamplingParams,
    prompt: Sequence[int] = (0,),
    outputs: Sequence[int] = (),
) -> None:
    sampler.join(
        JoinedSequence(
            slot=slot,
            token_ids=[*prompt, *outputs],
            num_prompt_tokens=len(prompt),
            block_ids=[],
            sampling=params,
        )
    )


def sample(
    sampler: Sampler, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]
) -> tuple[list[int], dict[int, LogprobsLists]]:
    """Sample from a copy of the logits."""
    tokens, logprobs = sampler.sample(logits.clone(), np.array(slots), np.array(positions))
    return tokens.tolist(), logprobs


def random_params(choose: random.Random, vocab_size: int) -> SamplingParams:
    def maybe(value: Any, default: Any) -> Any:
        return value if choose.random() < 0.4 else default

    tokens = range(vocab_size)
    return SamplingParams(
        temperature=maybe(0.0, choose.uniform(0.3, 2.0)),
        top_k=maybe(choose.randrange(1, 60), 0),
        top_p=maybe(choose.uniform(0.1, 1.0), 1.0),
        min_p=maybe(choose.uniform(0.0, 0.3), 0.0),
        presence_penalty=maybe(choose.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(choose.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(choose.uniform(0.5, 2.0), 1.0),
        seed=choose.randrange(-5, 2**63),
        logit_bias=maybe({choose.choice(tokens): choose.uniform(-5, 5) for _ in range(4)}, None),
        allowed_token_ids=maybe(tuple(choose.sample(tokens, 20)), None),
        min_tokens=maybe(choose.randrange(1, 8), 0),
        max_tokens=None,
        all_stop_token_ids=frozenset(choose.sample(tokens, 5)),
        logprobs=maybe(choose.randrange(0, 5), None),
    )
