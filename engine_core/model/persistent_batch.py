"""What the model runner remembers of each running sequence: its tokens and its block table.

Everything lies in arrays indexed by slot and allocated once, so that a step's inputs are gathered
by a few array operations, however many tokens the sequences hold; Python loops only over changes.
While the same rows decode step after step, their block tables stay gathered too.

Invariants
- `tokens[slot, :n]` are the sequence's known tokens, sampled ones included; what stands behind
  them is stale and never read.
- In a step's tensors, rows of one token come before longer ones (each kind has its own attention
  kernel); final states come in the order of the batch's rows all the same: those that sample
  first, then the spans of prompts.
- A step's tensors are valid until the next one is prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine_core.batch import Integers, StepBatch
from engine_core.model.step_inputs import StepInputs
from engine_core.model.transfers import to_device
from engine_core.prompt_logprobs import PromptSpan


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
        self._gathered = _GatheredTables(self._block_tables)

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
        ends = batch.num_computed_tokens + batch.num_new_tokens  # context length after this step
        num_table_blocks = -(-int(ends.max()) // self._block_size)
        if int(batch.num_new_tokens.max()) == 1 and batch.samples.all():
            tables = self._gathered.of(batch.slots, num_table_blocks)
            inputs = self._prepare_decode(batch.slots, batch.num_computed_tokens, ends, tables)
            return PreparedStep(inputs, batch.slots, ends)
        inputs = self._prepare_mixed(batch, ends, num_table_blocks, spans)
        return PreparedStep(inputs, batch.slots[batch.samples], ends[batch.samples])

    def _prepare_decode(
        self, slots: Integers, positions: Integers, ends: Integers, tables: NDArray[np.int32]
    ) -> StepInputs:
        """Every row computes one token and samples."""
        blocks = tables[np.arange(len(slots)), positions // self._block_size].astype(np.int64)
        return StepInputs(
            token_ids=self._tensor(self._tokens[slots, positions].astype(np.int64)),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(blocks * self._block_size + positions % self._block_size),
            block_tables=self._tensor(tables),
            context_lens=self._tensor(ends.astype(np.int32)),
            num_decode_rows=len(slots),
            prefill_start_loc=self._tensor(np.zeros(1, np.int32)),
            max_prefill_len=0,
            wanted_tokens=None,
        )

    def _prepare_mixed(
        self, batch: StepBatch, ends: Integers, num_table_blocks: int, spans: Sequence[PromptSpan]
    ) -> StepInputs:
        num_new, samples = batch.num_new_tokens, batch.samples
        # From here on in computing order: rows of one token first.
        order = np.argsort(num_new > 1, kind="stable")
        row_slots, row_lens, row_ends = batch.slots[order], num_new[order], ends[order]
        stops = np.cumsum(row_lens)
        num_tokens = int(stops[-1])
        num_decode_rows = int(np.count_nonzero(row_lens == 1))

        token_slots = np.repeat(row_slots, row_lens)
        positions = np.arange(num_tokens) + np.repeat(row_ends - stops, row_lens)
        blocks = self._block_tables[token_slots, positions // self._block_size].astype(np.int64)
        last_tokens = np.empty_like(stops)
        last_tokens[order] = stops - 1
        wanted = last_tokens[samples]
        if spans:
            first_tokens = last_tokens - num_new + 1
            of_spans = (
                first_tokens[span.row] + np.arange(len(span.next_token_ids)) for span in spans
            )
            wanted = np.concatenate((wanted, *of_spans))

        prefill_start_loc = stops[num_decode_rows - 1 :] if num_decode_rows else np.append(0, stops)
        return StepInputs(
            token_ids=self._tensor(self._tokens[token_slots, positions].astype(np.int64)),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(blocks * self._block_size + positions % self._block_size),
            block_tables=self._tensor(self._block_tables[row_slots, :num_table_blocks]),
            context_lens=self._tensor(row_ends.astype(np.int32)),
            num_decode_rows=num_decode_rows,
            prefill_start_loc=self._tensor((prefill_start_loc - num_decode_rows).astype(np.int32)),
            max_prefill_len=int(row_lens.max()) if num_decode_rows < len(ends) else 0,
            wanted_tokens=self._tensor(wanted),
        )

    def _append_blocks(self, slot: int, block_ids: list[int]) -> None:
        start = self._num_blocks[slot]
        end = start + len(block_ids)
        self._block_tables[slot, start:end] = block_ids
        self._num_blocks[slot] = end
        self._gathered.note_change(slot, start, end)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)


class _GatheredTables:
    """The block tables of the rows that decoded last, in their order, for the next step."""

    def __init__(self, block_tables: NDArray[np.int32]) -> None:
        self._block_tables = block_tables
        self._slots = np.empty(0, np.int64)
        self._rows = np.full(len(block_tables), -1)
        """By slot; -1 for those that have none."""
        self._tables = block_tables[:0]

    def of(self, slots: Integers, num_table_blocks: int) -> NDArray[np.int32]:
        """[rows, num_table_blocks]; gathered anew if the rows or this width have changed."""
        width = self._tables.shape[1]
        if width != num_table_blocks or not np.array_equal(slots, self._slots):
            self._rows[self._slots] = -1
            self._rows[slots] = np.arange(len(slots))
            self._slots = slots
            self._tables = self._block_tables[slots, :num_table_blocks]
        return self._tables

    def note_change(self, slot: int, start: int, end: int) -> None:
        """A slot's blocks at start .. end - 1 are others than before."""
        row = self._rows[slot]
        if row >= 0:
            end = min(end, self._tables.shape[1])
            self._tables[row, start:end] = self._block_tables[slot, start:end]
