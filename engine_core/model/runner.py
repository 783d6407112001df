"""Executes steps with a real model: gathers a step's tensors, runs the decoder, samples.

Invariants
- A step runs from start to end inside `execute`: when it returns, the step's keys and values are in
  the cache and its tokens are appended, so blocks may change hands before the next step.
- Only rows that sample pay for logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_core.batch import JoinedSequence, StepBatch, StepResult
from engine_core.model.decoder import Decoder
from engine_core.model.persistent_batch import PersistentBatch
from engine_core.model.sampler import Sampler
from ipc.request import SamplingParams


class TorchModelRunner:
    """Implements `ModelRunner` with PyTorch; `engine_core.model.loader.load_runner` makes one."""

    def __init__(
        self,
        model: Decoder,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        *,
        max_num_seqs: int,
        max_model_len: int,
        seed: int,
    ) -> None:
        """`kv_cache` has a key and a value tensor a layer, [num_blocks, Hkv, block_size, D]."""
        keys, _ = kv_cache[0]
        self.num_blocks: int = keys.shape[0]
        self.vocab_size = model.config.vocab_size
        self._model = model
        self._kv_cache = kv_cache
        self._device = keys.device
        self._batch = PersistentBatch(max_num_seqs, max_model_len, keys.shape[2], keys.device)
        self._sampler = Sampler(max_num_seqs, self.vocab_size, keys.device, seed)

    @torch.inference_mode()
    def execute(self, batch: StepBatch) -> StepResult:
        """Run one step; all K/V writes are complete when it returns."""
        self._batch.update(batch)
        for sequence in batch.joined:
            self._sampler.join(sequence)
        if not batch.slots:
            return StepResult([])
        step = self._batch.prepare(batch)
        logits = self._model.forward(step.inputs, self._kv_cache)
        slots, positions = step.sampled_slots, step.sampled_positions
        if not len(slots):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return StepResult([])
        token_ids, logprobs = self._sampler.sample(logits, slots, positions)
        self._batch.append_tokens(slots, positions, token_ids)
        return StepResult(token_ids.tolist(), logprobs)

    def warm_up(self, num_tokens: int) -> None:
        """Run a prompt of `num_tokens` and a decode behind it in slot 0, which must be free.

        Kernels are compiled for the shapes they meet; better now than in someone's first request.
        """
        block_size = self._kv_cache[0][0].shape[2]
        sequence = JoinedSequence(
            slot=0,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            block_ids=list(range(num_tokens // block_size + 1)),
            sampling=SamplingParams(temperature=0.0, seed=0),
        )
        prefill = StepBatch(
            joined=[sequence],
            slots=[0],
            num_new_tokens=[num_tokens],
            num_computed_tokens=[0],
            samples=[True],
        )
        decode = StepBatch(
            slots=[0], num_new_tokens=[1], num_computed_tokens=[num_tokens], samples=[False]
        )
        for batch in (prefill, decode, StepBatch(left=[0])):
            self.execute(batch)
