"""Executes steps with a real model: gathers a step's tensors, runs the decoder, samples.

Invariants
- A step runs from start to end inside `execute`: when it returns, the step's keys and values are in
  the cache and its tokens are appended, so blocks may change hands before the next step.
- Only rows that sample, and prompts that asked for log-probabilities, pay for logits; of prompts
  no more than `_MAX_PROMPT_LOGITS` are in memory at once.
- New weights are prepared on another thread (`stage`) and take effect between two steps (`commit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from engine_core.batch import JoinedSequence, StepBatch, StepResult
from engine_core.model.config import ModelConfig
from engine_core.model.parts import Parts, PartsForm
from engine_core.model.persistent_batch import PersistentBatch
from engine_core.model.sampler import Sampler
from engine_core.model.sampling_ops import gather_logprobs
from engine_core.model.step_inputs import StepInputs
from engine_core.model.transfers import to_host
from engine_core.model.updates import StagedParts, UpdateStager
from engine_core.prompt_logprobs import OwedPromptLogprobs, PromptSpan, join_logprobs
from engine_core.staging import StagedWeights
from ipc.output import LogprobsLists
from ipc.request import SamplingParams
from ipc.weights import WeightsGroup, WeightSource

_MAX_PROMPT_LOGITS = 2**24
"""Logits of one chunk of a prompt's positions: 64 MiB, and as much again for their logarithms."""


class Model(Protocol):
    """A decoder; see `engine_core.model.decoder.Decoder`, or the CPU's own."""

    config: ModelConfig
    parts: Parts

    def with_parts(self, parts: Parts) -> Self: ...

    def bind_thread(self) -> None: ...

    def forward(self, step: StepInputs, kv_cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor: ...

    def logits(self, states: Tensor) -> Tensor: ...


class TorchModelRunner:
    """Implements `ModelRunner` with PyTorch; `engine_core.model.loader.load_runner` makes one."""

    def __init__(
        self,
        model: Model,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        *,
        max_num_seqs: int,
        max_model_len: int,
        seed: int,
        form: PartsForm,
    ) -> None:
        """`kv_cache` has a key and a value tensor a layer, [num_blocks, Hkv, block_size, D];
        `form` is that of the model's parts, and of those of its updates.
        """
        keys, _ = kv_cache[0]
        self.num_blocks: int = keys.shape[0]
        self.vocab_size = model.config.vocab_size
        self.model: Model = model
        self.kv_cache = kv_cache
        self._device = keys.device
        self._batch = PersistentBatch(max_num_seqs, max_model_len, keys.shape[2], keys.device)
        self._sampler = Sampler(max_num_seqs, self.vocab_size, keys.device, seed)
        self._owed_prompt_logprobs = OwedPromptLogprobs(self.vocab_size)
        self._stager = UpdateStager(model.config, form)

    def bind_thread(self) -> None:
        self.model.bind_thread()

    # -- steps -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, batch: StepBatch) -> StepResult:
        """Run one step; all K/V writes are complete when it returns."""
        self._batch.update(batch)
        for sequence in batch.joined:
            self._sampler.join(sequence)
        spans = self._owed_prompt_logprobs.take_spans(batch)
        if not len(batch.slots):
            return StepResult()
        step = self._batch.prepare(batch, spans)
        states = self.model.forward(step.inputs, self.kv_cache)
        slots, positions = step.sampled_slots, step.sampled_positions
        of_prompts = self._judge_prompts(states[len(slots) :], spans) if spans else {}
        if not len(slots):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return StepResult(prompt_logprobs=of_prompts)
        logits = self.model.logits(states[: len(slots)])
        token_ids, logprobs = self._sampler.sample(logits, slots, positions)
        self._batch.append_tokens(slots, positions, token_ids)
        return StepResult(token_ids, logprobs, of_prompts)

    def _judge_prompts(
        self, states: Tensor, spans: Sequence[PromptSpan]
    ) -> dict[int, LogprobsLists]:
        """By slot, the log-probabilities of the prompts' next tokens; `states` [P, H] are those of
        the spans, one after the other.
        """
        of_spans = torch.split(states, [len(span.next_token_ids) for span in spans])
        return {
            span.slot: self._judge_span(states, span)
            for states, span in zip(of_spans, spans, strict=True)
        }

    def _judge_span(self, states: Tensor, span: PromptSpan) -> LogprobsLists:
        """[positions, H] -> arrays of as many positions."""
        num_rows = max(1, _MAX_PROMPT_LOGITS // self.vocab_size)
        next_tokens = torch.tensor(span.next_token_ids, dtype=torch.int64, device=self._device)
        chunks = zip(torch.split(states, num_rows), torch.split(next_tokens, num_rows), strict=True)
        parts = []
        for some, tokens in chunks:
            gathered = gather_logprobs(self.model.logits(some), tokens, span.num_alternatives)
            ids, logprobs, ranks = to_host(gathered)
            parts.append(LogprobsLists(ids.astype(np.int32), logprobs, ranks))
        return join_logprobs(parts)

    def warm_up(self, num_tokens: int) -> None:
        """Run a prompt of `num_tokens` and a decode behind it in slot 0, which must be free.

        Kernels are compiled for the shapes they meet; better now than in someone's first request.
        """
        block_size = self.kv_cache[0][0].shape[2]
        sequence = JoinedSequence(
            slot=0,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            block_ids=list(range(num_tokens // block_size + 1)),
            sampling=SamplingParams(temperature=0.0, seed=0),
        )
        prefill = StepBatch(joined=[sequence]).with_rows([(0, num_tokens, 0, True)])
        decode = StepBatch().with_rows([(0, 1, num_tokens, False)])
        for batch in (prefill, decode, StepBatch(left=[0])):
            self.execute(batch)

    # -- weights ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def stage(self, source: WeightSource, earlier: StagedWeights | None) -> StagedParts:
        """Load and check a part of an update; see `ModelRunner` and `engine_core.model.updates`."""
        before = earlier or StagedParts()
        assert isinstance(before, StagedParts), "weights that another runner staged"
        if self._device.type == "cpu":
            return self._stager.stage(source, before, self.model.parts)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            staged = self._stager.stage(source, before, self.model.parts)
        stream.synchronize()
        return staged

    def commit(self, staged: StagedWeights) -> None:
        """Compute with staged weights from the next step on."""
        assert isinstance(staged, StagedParts), "weights that another runner staged"
        self.model = self.model.with_parts(staged.parts)

    def join_group(self, group: WeightsGroup) -> None:
        """Become a member of a trainer's process group. Raises ValueError."""
        self._stager.groups.join(group)

    def leave_group(self, group_name: str) -> None:
        """Raises ValueError if there is no such group."""
        self._stager.groups.leave(group_name)
