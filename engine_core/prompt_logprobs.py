"""Log-probabilities of a prompt's own tokens, gathered while the prompt is computed.

A sequence that asks for them owes one position less than its prompt has tokens (nothing stands
before the first). Each step of its prefill yields the positions it computed; the request collects
them and they leave with its first output.

Invariant: a sequence owes only until its first output. One that joins again after a preemption
begins anew if it had none, and owes nothing if it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine_core.batch import JoinedSequence, StepBatch
from ipc.output import LogprobsLists


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Positions of one row, behind each of which the prompt's next token is to be judged."""

    row: int
    """Place of the row in the batch; its first new token is the span's first position."""
    slot: int
    start: int
    next_token_ids: list[int]
    """The prompt's tokens at positions start + 1, start + 2, …"""
    num_alternatives: int


class OwedPromptLogprobs:
    """What a runner remembers of the running sequences that owe; costs nothing while none does."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._owed: dict[int, JoinedSequence] = {}

    def take_spans(self, batch: StepBatch) -> list[PromptSpan]:
        """Apply the batch's changes; returns what its rows owe, in row order."""
        if self._owed:
            for slot in batch.left:
                self._owed.pop(slot, None)
        for sequence in batch.joined:
            has_outputs = len(sequence.token_ids) > sequence.num_prompt_tokens
            if sequence.sampling.prompt_logprobs is not None and not has_outputs:
                self._owed[sequence.slot] = sequence
        if not self._owed:
            return []
        return [
            self._take(row, slot, batch)
            for row, slot in enumerate(batch.slots.tolist())
            if slot in self._owed
        ]

    def _take(self, row: int, slot: int, batch: StepBatch) -> PromptSpan:
        sequence = self._owed[slot]
        start = int(batch.num_computed_tokens[row])
        stop = start + int(batch.num_new_tokens[row])
        if stop == sequence.num_prompt_tokens:
            del self._owed[slot]
        num_wanted = sequence.sampling.prompt_logprobs
        assert num_wanted is not None, "only sequences that ask for them owe prompt logprobs"
        return PromptSpan(
            row,
            slot,
            start,
            sequence.token_ids[start + 1 : stop + 1],
            self._vocab_size if num_wanted < 0 else min(num_wanted, self._vocab_size),
        )


def join_logprobs(parts: Sequence[LogprobsLists]) -> LogprobsLists:
    """The positions of all parts, of which there is at least one, in order."""
    token_ids, logprobs, ranks = zip(*(part.arrays for part in parts), strict=True)
    return LogprobsLists(np.concatenate(token_ids), np.concatenate(logprobs), np.concatenate(ranks))
