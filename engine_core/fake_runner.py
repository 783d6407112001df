"""A model runner whose tokens are arithmetic, so that every output checks itself.

It keeps a KV cache of token ids and reads them back through the block tables: the next token is a
function of the last token, of the token in the middle of the context and of the length. A block
handed to two sequences, lost, or reused with stale contents makes the output wrong, and
`expected_tokens` says what it should have been.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine_core.batch import StepBatch, StepResult
from engine_core.prompt_logprobs import OwedPromptLogprobs, PromptSpan
from ipc.output import LogprobsLists

FAKE_LOGPROB = -1.0


def next_token(last: int, middle: int, num_tokens: int, vocab_size: int) -> int:
    """The token behind a context of `num_tokens`, whose token at index `num_tokens // 2` is
    `middle`.
    """
    return (3 * last + 5 * middle + num_tokens) % vocab_size


def expected_tokens(prompt: Sequence[int], num_tokens: int, vocab_size: int = 32_000) -> list[int]:
    """The outputs that a fake engine answers to `prompt` while nothing stops it."""
    context = list(prompt)
    for _ in range(num_tokens):
        length = len(context)
        context.append(next_token(context[-1], context[length // 2], length, vocab_size))
    return context[len(prompt) :]


def expected_prompt_logprobs(
    prompt: Sequence[int], num_alternatives: int, vocab_size: int = 32_000
) -> LogprobsLists:
    """The log-probabilities that a fake engine answers for the prompt itself."""
    tokens = np.array(prompt, np.int64)
    return _prompt_logprobs(tokens[:-1], tokens[1:], num_alternatives, vocab_size)


def _prompt_logprobs(
    last: NDArray[np.int64], following: NDArray[np.int64], num_alternatives: int, vocab_size: int
) -> LogprobsLists:
    columns = np.arange(-1, num_alternatives)
    token_ids = (last[:, None] + columns) % vocab_size
    token_ids[:, 0] = following
    logprobs = -(last[:, None] % 64 + 1 + columns) / 8
    return LogprobsLists(token_ids.astype(np.int32), logprobs.astype(np.float32), last % 16 + 1)


class FakeRunner:
    """Implements `ModelRunner` without a model.

    `step_time_ms` is slept in each step, as a stand-in for the time of a model.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int = 32_000,
        step_time_ms: float = 0.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self._block_size = block_size
        self._step_time_s = step_time_ms / 1000
        self._tokens: NDArray[np.int64] = np.zeros((max_num_seqs, max_model_len + 1), np.int64)
        self._num_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        num_table_blocks = -(-max_model_len // block_size)
        self._tables: NDArray[np.int64] = np.zeros((max_num_seqs, num_table_blocks), np.int64)
        self._table_lengths = [0] * max_num_seqs
        self._wants_logprobs: dict[int, int] = {}
        self._owed_prompt_logprobs = OwedPromptLogprobs(vocab_size)
        self._cache: NDArray[np.int64] = np.full(num_blocks * block_size, -1, np.int64)

    def execute(self, batch: StepBatch) -> StepResult:
        if self._step_time_s:
            time.sleep(self._step_time_s)
        self._update(batch)
        slots = np.array(batch.slots)
        computed = np.array(batch.num_computed_tokens)
        num_new = np.array(batch.num_new_tokens)
        self._write(slots, computed, num_new)
        of_prompts = {
            span.slot: self._judge_span(span)
            for span in self._owed_prompt_logprobs.take_spans(batch)
        }
        return self._sample(slots[np.array(batch.samples, dtype=bool)], of_prompts)

    def _update(self, batch: StepBatch) -> None:
        for slot in batch.left:
            self._wants_logprobs.pop(slot, None)
        for sequence in batch.joined:
            slot = sequence.slot
            self._tokens[slot, : len(sequence.token_ids)] = sequence.token_ids
            self._num_tokens[slot] = len(sequence.token_ids)
            self._table_lengths[slot] = 0
            self._append_blocks(slot, sequence.block_ids)
            if sequence.sampling.logprobs is not None:
                self._wants_logprobs[slot] = sequence.sampling.logprobs
        for slot, block_ids in batch.new_blocks:
            self._append_blocks(slot, block_ids)

    def _append_blocks(self, slot: int, block_ids: list[int]) -> None:
        start = self._table_lengths[slot]
        self._tables[slot, start : start + len(block_ids)] = block_ids
        self._table_lengths[slot] = start + len(block_ids)

    def _cells(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cache cells of (slot, position) pairs, through the block tables."""
        blocks = self._tables[slots, positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size

    def _write(
        self,
        slots: NDArray[np.int64],
        computed: NDArray[np.int64],
        num_new: NDArray[np.int64],
    ) -> None:
        rows = np.repeat(slots, num_new)
        starts = np.repeat(np.cumsum(num_new) - num_new, num_new)
        positions = np.repeat(computed, num_new) + np.arange(len(rows)) - starts
        self._cache[self._cells(rows, positions)] = self._tokens[rows, positions]

    def _judge_span(self, span: PromptSpan) -> LogprobsLists:
        num_positions = len(span.next_token_ids)
        positions = np.arange(span.start, span.start + num_positions)
        last = self._cache[self._cells(np.full(num_positions, span.slot), positions)]
        return _prompt_logprobs(
            last, np.array(span.next_token_ids, np.int64), span.num_alternatives, self.vocab_size
        )

    def _sample(self, slots: NDArray[np.int64], of_prompts: dict[int, LogprobsLists]) -> StepResult:
        lengths = self._num_tokens[slots]
        last = self._cache[self._cells(slots, lengths - 1)]
        middle = self._cache[self._cells(slots, lengths // 2)]
        sampled = (3 * last + 5 * middle + lengths) % self.vocab_size
        self._tokens[slots, lengths] = sampled
        self._num_tokens[slots] += 1
        token_ids: list[int] = sampled.tolist()
        logprobs = {
            slot: self._fake_logprobs(token_id, self._wants_logprobs[slot])
            for slot, token_id in zip(slots.tolist(), token_ids, strict=True)
            if slot in self._wants_logprobs
        }
        return StepResult(token_ids, logprobs, of_prompts)

    def _fake_logprobs(self, token_id: int, num_logprobs: int) -> LogprobsLists:
        num_logprobs = min(num_logprobs, self.vocab_size)
        ids = [token_id] + [(token_id + k) % self.vocab_size for k in range(num_logprobs)]
        return LogprobsLists(
            np.array([ids], np.int32),
            np.full((1, len(ids)), FAKE_LOGPROB, np.float32),
            np.ones(1, np.int64),
        )
