"""Drives a model runner with no scheduler: a test says who joins, who leaves, and in what chunks.

Blocks are dealt out in random order, so that a table used wrongly shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine_core.batch import JoinedSequence, ModelRunner, StepBatch
from ipc.output import LogprobsLists
from ipc.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class ScriptedSequence:
    """One sequence; `token_ids` and `logprobs` grow with each sampled token."""

    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    slot: int = -1
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    logprobs: list[LogprobsLists] = field(default_factory=list)

    @property
    def outputs(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class ScriptedBatching:
    """Slots, blocks and steps; every call to `step` executes one batch of all running sequences."""

    def __init__(self, runner: ModelRunner, block_size: int, max_num_seqs: int) -> None:
        self.runner = runner
        self.block_size = block_size
        self.running: list[ScriptedSequence] = []
        self._free_slots = list(range(max_num_seqs))
        self._free_blocks = list(range(runner.num_blocks))
        self._random = random.Random(0)
        self._random.shuffle(self._free_blocks)
        self._left: list[int] = []
        self._joined: list[ScriptedSequence] = []

    def join(self, prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> ScriptedSequence:
        sequence = ScriptedSequence(list(prompt), len(prompt), sampling)
        self.rejoin(sequence)
        return sequence

    def rejoin(self, sequence: ScriptedSequence) -> None:
        """Let a sequence in (again): all its known tokens are computed anew."""
        sequence.slot = self._free_slots.pop(0)
        sequence.num_computed_tokens = 0
        self.running.append(sequence)
        self._joined.append(sequence)

    def leave(self, sequence: ScriptedSequence) -> None:
        """Take a sequence out; its slot and blocks are the next to be handed out."""
        self.running.remove(sequence)
        self._left.append(sequence.slot)
        self._free_slots.insert(0, sequence.slot)
        self._free_blocks += sequence.block_ids
        sequence.block_ids = []

    def step(self, max_chunk: int | None = None) -> None:
        """Compute every running sequence's missing tokens, at most `max_chunk` of each."""
        batch, rows = StepBatch(left=self._left), []
        for sequence in self.running:
            num_new = len(sequence.token_ids) - sequence.num_computed_tokens
            num_new = min(num_new, max_chunk or num_new)
            end = sequence.num_computed_tokens + num_new
            self._grow(sequence, end, batch)
            is_whole = end == len(sequence.token_ids)
            rows.append((sequence.slot, num_new, sequence.num_computed_tokens, is_whole))
            sequence.num_computed_tokens = end
        batch = batch.with_rows(rows)
        result = self.runner.execute(batch)
        self._left, self._joined = [], []
        sampled = iter(result.token_ids.tolist())
        for sequence, samples in zip(self.running, batch.samples, strict=True):
            if samples:
                sequence.token_ids.append(next(sampled))
                if sequence.slot in result.logprobs:
                    sequence.logprobs.append(result.logprobs[sequence.slot])
        assert next(sampled, None) is None, "more tokens came back than rows that sample"

    def run(self, num_outputs: int, max_chunk: int | None = None) -> None:
        """Step until every running sequence has `num_outputs` outputs, taking out those that do."""
        while self.running:
            self.step(max_chunk)
            for sequence in list(self.running):
                if len(sequence.outputs) >= num_outputs:
                    self.leave(sequence)

    def _grow(self, sequence: ScriptedSequence, num_tokens: int, batch: StepBatch) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        new_blocks = [self._free_blocks.pop() for _ in range(num_blocks - len(sequence.block_ids))]
        sequence.block_ids += new_blocks
        if sequence in self._joined:
            batch.joined.append(
                JoinedSequence(
                    slot=sequence.slot,
                    token_ids=list(sequence.token_ids),
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    block_ids=list(sequence.block_ids),
                    sampling=sequence.sampling,
                )
            )
        elif new_blocks:
            batch.new_blocks.append((sequence.slot, new_blocks))
