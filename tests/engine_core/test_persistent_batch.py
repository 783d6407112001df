"""A step's tensors against ones gathered anew from what the sequences are known to hold."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from engine_core.batch import JoinedSequence, StepBatch
from engine_core.model.persistent_batch import PersistentBatch
from ipc.request import SamplingParams

BLOCK_SIZE, MAX_LEN, NUM_SLOTS = 4, 64, 8


@dataclass
class Held:
    """One sequence; the KV of all its tokens but `num_left` is computed."""

    slot: int
    token_ids: list[int]
    block_ids: list[int]
    num_computed: int = 0


class Batching:
    """Random life of a batch; `check` compares every step."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.batch = PersistentBatch(NUM_SLOTS, MAX_LEN, BLOCK_SIZE, torch.device("cpu"))
        self.held: list[Held] = []
        self.next_block = 0
        self.num_decode_steps = 0

    def blocks(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def step(self, *, join: bool, leave: bool) -> None:
        changes = StepBatch()
        if leave and self.held:
            changes.left.append(self.held.pop(self.chance.randrange(len(self.held))).slot)
        rows = []
        for one in self.held:
            missing = -(-len(one.token_ids) // BLOCK_SIZE) - len(one.block_ids)
            if missing:
                new_blocks = self.blocks(missing)
                one.block_ids += new_blocks
                changes.new_blocks.append((one.slot, new_blocks))
        free = sorted(set(range(NUM_SLOTS)) - {one.slot for one in self.held})
        if join and free:
            self.held.append(self.join(self.chance.choice(free), changes))
        if not self.held:
            return
        for one in self.held:
            num_new = len(one.token_ids) - one.num_computed
            rows.append((one.slot, num_new, one.num_computed, True))
        self.check(changes.with_rows(rows))

    def join(self, slot: int, changes: StepBatch) -> Held:
        tokens = [self.chance.randrange(1000) for _ in range(self.chance.randrange(1, 20))]
        new = Held(slot, tokens, self.blocks(-(-len(tokens) // BLOCK_SIZE)))
        changes.joined.append(
            JoinedSequence(slot, list(tokens), len(tokens), list(new.block_ids), SamplingParams())
        )
        return new

    def check(self, step: StepBatch) -> None:
        self.batch.update(step)
        prepared = self.batch.prepare(step)
        inputs = prepared.inputs
        by_rows = sorted(self.held, key=lambda one: len(one.token_ids) - one.num_computed > 1)
        tokens, positions, places = [], [], []
        for one in by_rows:
            for at in range(one.num_computed, len(one.token_ids)):
                tokens.append(one.token_ids[at])
                positions.append(at)
                places.append(one.block_ids[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE)
        assert inputs.token_ids.tolist() == tokens
        assert inputs.positions.tolist() == positions
        assert inputs.slot_mapping.tolist() == places
        assert inputs.context_lens.tolist() == [len(one.token_ids) for one in by_rows]
        for table, one in zip(inputs.block_tables.tolist(), by_rows, strict=True):
            assert table[: len(one.block_ids)] == one.block_ids
        assert prepared.sampled_slots.tolist() == [one.slot for one in self.held]
        self.num_decode_steps += inputs.wanted_tokens is None
        sampled = np.array([self.chance.randrange(1000) for _ in self.held])
        self.batch.append_tokens(prepared.sampled_slots, prepared.sampled_positions, sampled)
        for one, token_id in zip(self.held, sampled.tolist(), strict=True):
            one.num_computed = len(one.token_ids)
            one.token_ids.append(token_id)
        self.held = [one for one in self.held if len(one.token_ids) < MAX_LEN]


def test_tensors_are_those_of_the_sequences_through_joins_leaves_and_new_blocks() -> None:
    num_decode_steps = 0
    for seed in range(20):
        batching = Batching(seed)
        for _ in range(120):
            chance = batching.chance
            batching.step(join=chance.random() < 0.15, leave=chance.random() < 0.05)
        num_decode_steps += batching.num_decode_steps
    assert num_decode_steps > 1000
