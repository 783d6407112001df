"""What the model runner remembers of each running sequence: its tokens and its block table.

Everything lies in arrays indexed by slot and allocated once, so that a step's inputs are gathered
by a few array operations, however many tokens the sequences hold; Python loops only over changes.

Invariants
- `tokens[slot, :n]` are the sequence's known tokens, sampled ones included; what stands behind
  them is stale and never read.
- In a step's tensors, rows of one token come before longer ones (each kind has its own attention
  kernel); final states come in the order of the batch's rows all the same: those that sample
  first, then the spans of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine_core.batch import StepBatch
from engine_core.model.decoder import StepInputs
from engine_core.prompt_logprobs import PromptSpan

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step's tensors, and where its sampled tokens belong, in the order of the batch's rows."""

    inputs: StepInputs
    sampled_slots: Integers
    """[S]: slots of the rows that sample."""
    sampled_positions: Integers
    """[S]: index of the token to come in the sequence's prompt plus output."""


class PersistentBatch:
    """Tokens and block tables by slot."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        # Zeroed memory is mapped as it is first touched, so long contexts cost only what they use.
        self._tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        num_table_blocks = -(-max_model_len // block_size)
        self._block_tables = np.zeros((max_num_seqs, num_table_blocks), np.int32)
        self._num_blocks = [0] * max_num_seqs

    def update(self, batch: StepBatch) -> None:
        """Apply what changed. A slot that was left needs nothing: joining overwrites it."""
        for sequence in batch.joined:
            self._tokens[sequence.slot, : len(sequence.token_ids)] = sequence.token_ids
            self._num_blocks[sequence.slot] = 0
            self._append_blocks(sequence.slot, sequence.block_ids)
        for slot, block_ids in batch.new_blocks:
            self._append_blocks(slot, block_ids)

    def append_tokens(self, slots: Integers, positions: Integers, token_ids: Integers) -> None:
        """Append the tokens that a step sampled, one a slot."""
        self._tokens[slots, positions] = token_ids

    def prepare(self, batch: StepBatch, spans: Sequence[PromptSpan] = ()) -> PreparedStep:
        """Gather the tensors of a step that has at least one row."""
        slots = np.array(batch.slots)
        num_new = np.array(batch.num_new_tokens)
        ends = np.array(batch.num_computed_tokens) + num_new  # context length after this step
        samples = np.array(batch.samples)

        # From here on in computing order: rows of one token first.
        order = np.argsort(num_new > 1, kind="stable")
        row_slots, row_lens, row_ends = slots[order], num_new[order], ends[order]
        stops = np.cumsum(row_lens)
        num_tokens = int(stops[-1])
        num_decode_rows = int(np.count_nonzero(row_lens == 1))

        token_slots = np.repeat(row_slots, row_lens)
        positions = np.arange(num_tokens) + np.repeat(row_ends - stops, row_lens)
        blocks = self._block_tables[token_slots, positions // self._block_size].astype(np.int64)
        num_table_blocks = -(-int(ends.max()) // self._block_size)
        last_tokens = np.empty_like(stops)
        last_tokens[order] = stops - 1
        wants_all = num_tokens == len(slots) and bool(samples.all())
        wanted = last_tokens[samples]
        if spans:
            first_tokens = last_tokens - num_new + 1
            of_spans = (
                first_tokens[span.row] + np.arange(len(span.next_token_ids)) for span in spans
            )
            wanted = np.concatenate((wanted, *of_spans))

        prefill_start_loc = stops[num_decode_rows - 1 :] if num_decode_rows else np.append(0, stops)
        inputs = StepInputs(
            token_ids=self._tensor(self._tokens[token_slots, positions].astype(np.int64)),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(blocks * self._block_size + positions % self._block_size),
            block_tables=self._tensor(self._block_tables[row_slots, :num_table_blocks]),
            context_lens=self._tensor(row_ends.astype(np.int32)),
            num_decode_rows=num_decode_rows,
            prefill_start_loc=self._tensor((prefill_start_loc - num_decode_rows).astype(np.int32)),
            max_prefill_len=int(row_lens.max()) if num_decode_rows < len(slots) else 0,
            # Rows of one token that all sample are in the batch's order as they are.
            wanted_tokens=None if wants_all else self._tensor(wanted),
        )
        return PreparedStep(inputs, slots[samples], ends[samples])

    def _append_blocks(self, slot: int, block_ids: list[int]) -> None:
        start = self._num_blocks[slot]
        end = start + len(block_ids)
        self._block_tables[slot, start:end] = block_ids
        self._num_blocks[slot] = end

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
