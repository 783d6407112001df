"""Steps for decoders without a scheduler: all tokens are known, a test says who gets how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_core.batch import JoinedSequence, StepBatch
from engine_core.model.config import ModelConfig
from engine_core.model.persistent_batch import PersistentBatch
from engine_core.model.step_inputs import StepInputs
from ipc.request import SamplingParams

Caches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's next tokens, and whether the last one's final state is wanted."""

    slot: int
    num_tokens: int
    is_wanted: bool = True


MIXED_STEPS: list[list[Chunk]] = [
    [Chunk(0, 20, False), Chunk(1, 5), Chunk(2, 1, False)],
    [Chunk(0, 17), Chunk(1, 1), Chunk(2, 1), Chunk(3, 70, False)],
    [Chunk(0, 1), Chunk(1, 1), Chunk(2, 1), Chunk(3, 1)],
    [Chunk(2, 1)],
    [Chunk(4, 130), Chunk(1, 1, False), Chunk(3, 1), Chunk(0, 2, False)],
    [Chunk(4, 1), Chunk(1, 1), Chunk(3, 40)],
    [Chunk(0, 1, False), Chunk(2, 1)],
]
"""Decoding rows and chunks of prompts, alone and mixed, in steps that grow and shrink."""


class StepMaker:
    """Sequences of known tokens, in blocks dealt out in random order."""

    def __init__(self, token_ids: Sequence[Sequence[int]], block_size: int) -> None:
        """`token_ids`: of each sequence, all of one length."""
        num_sequences, length = len(token_ids), len(token_ids[0])
        generator = torch.Generator().manual_seed(0)
        blocks_each = -(-length // block_size)
        self.num_blocks = num_sequences * blocks_each + 3
        blocks = torch.randperm(self.num_blocks, generator=generator).tolist()
        self._batch = PersistentBatch(num_sequences, length, block_size, torch.device("cpu"))
        self._num_computed = [0] * num_sequences
        joined = [
            JoinedSequence(
                slot=slot,
                token_ids=list(tokens),
                num_prompt_tokens=length,
                block_ids=blocks[slot * blocks_each : (slot + 1) * blocks_each],
                sampling=SamplingParams(),
            )
            for slot, tokens in enumerate(token_ids)
        ]
        self._batch.update(StepBatch(joined=joined))

    def step(self, chunks: Sequence[Chunk]) -> StepInputs:
        """The next tokens of some sequences; wanted states come in the order of the chunks."""
        batch = StepBatch().with_rows(
            [
                (chunk.slot, chunk.num_tokens, self._num_computed[chunk.slot], chunk.is_wanted)
                for chunk in chunks
            ]
        )
        for chunk in chunks:
            self._num_computed[chunk.slot] += chunk.num_tokens
        return self._batch.prepare(batch).inputs


def random_tokens(vocab_size: int, num_sequences: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_sequences, length)
    tokens: list[list[int]] = torch.randint(vocab_size, shape, generator=generator).tolist()
    return tokens


def poisoned_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype
) -> Caches:
    """Keys and values of every layer, NaN until they are written; 64 bytes of slack behind each."""
    shape = (num_blocks, config.num_kv_heads, block_size, config.head_size)
    count = num_blocks * config.num_kv_heads * block_size * config.head_size

    def poisoned() -> Tensor:
        return torch.full((count + 64,), torch.nan, dtype=dtype)[:count].view(shape)

    return [(poisoned(), poisoned()) for _ in range(config.num_layers)]
