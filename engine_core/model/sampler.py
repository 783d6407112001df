"""Draws each row's next token from its logits, with the parameters of the sequence in its slot.

Order of operations, per row: allowed tokens, stop tokens held back by min_tokens, logit bias,
penalties; then the likeliest token if greedy, else temperature, min-p, top-k, top-p and the draw.

Invariants
- A draw depends only on the row's logits, its seed and the position of the new token in prompt plus
  output: not on the batch, and not on whether the sequence was preempted in between. (A sequence
  that brings no seed is given a fresh one each time it joins.) On a CPU this holds bit for bit, of
  log-probabilities too.
- Nobody pays for a feature that no row of the step uses; a greedy batch costs one argmax. What the
  rows of a batch use is looked up again only when other rows come.
- Log-probabilities are those of the model: before temperature, penalties and every mask.
- A row whose largest logit is no finite number (NaN and infinities are) gets NO_TOKEN; a token made
  up for it would look like any other.
- A step waits for its device once: where it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine_core.batch import Integers, JoinedSequence
from engine_core.model.choosers import RowParameters, SlotParameters, make_chooser
from engine_core.model.sampling_ops import gather_logprobs
from engine_core.model.transfers import to_device, to_host
from ipc.output import LogprobsLists
from ipc.request import SamplingParams
from kernels import ops

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the likeliest token is taken."""

_LEAST, _MOST = 1e-15, 1e15
"""Parameters without bounds of their own are cut to these: far beyond any effect, near enough for
float32 to stay finite through all edits together.
"""

_NO_LOGPROBS = -1


@dataclass(frozen=True, slots=True)
class _LogitEdits:
    """Changes to single logits that one sequence asked for."""

    biased_ids: Tensor
    biases: Tensor
    forbidden: Tensor | None
    """[V] bool: everything but the allowed tokens."""
    held_back_ids: Tensor
    """Stop tokens that are impossible at positions below `min_position`."""
    min_position: int

    def apply(self, logits: Tensor, position: int) -> None:
        """Edit one row's logits [V] in place."""
        if self.forbidden is not None:
            logits.masked_fill_(self.forbidden, -torch.inf)
        if position < self.min_position:
            logits.index_fill_(0, self.held_back_ids, -torch.inf)
        logits.index_add_(0, self.biased_ids, self.biases)


@dataclass(frozen=True, slots=True)
class _Reporting:
    """Rows that want as many log-probabilities. They are looked at together, for where logits are
    equal, those that are told may depend on how many are asked for."""

    rows: Tensor
    slots: Integers
    num_alternatives: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the rows of a batch use. All its tensors are on the device."""

    slots: Integers
    device_slots: Tensor
    parameters: RowParameters
    is_greedy: bool
    """All rows are."""
    edits: list[tuple[int, _LogitEdits]]
    """(row, its edits)"""
    reporting: list[_Reporting]
    penalized: Tensor | None
    """Rows [P], if there are any."""


class Sampler:
    """Sampling state of every slot, and the batched draw."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, seed: int) -> None:
        """`seed` is the root of the seeds given to sequences that bring none."""
        self._vocab_size = vocab_size
        self._device = device
        self._seed_generator = np.random.default_rng(seed)
        self._chooser = make_chooser(vocab_size, device)
        self._parameters = SlotParameters(max_num_seqs)
        self._num_logprobs = np.full(max_num_seqs, _NO_LOGPROBS, np.int64)
        self._edits: dict[int, _LogitEdits] = {}
        self._is_penalized = np.zeros(max_num_seqs, bool)
        # [slots, V] each, allocated when the first penalized sequence joins.
        self._output_counts: Tensor | None = None
        self._prompt_mask: Tensor | None = None
        self._plan: _Plan | None = None
        """Of the last batch, until a sequence joins."""

    # -- slots -----------------------------------------------------------------------------------

    def join(self, sequence: JoinedSequence) -> None:
        """Take over a sequence's parameters; replaces whatever its slot held."""
        slot, params, by_slot = sequence.slot, sequence.sampling, self._parameters
        vocab_size = self._vocab_size
        self._plan = None
        is_greedy = params.temperature < GREEDY_TEMPERATURE
        by_slot.temperature[slot] = 0 if is_greedy else min(params.temperature, _MOST)
        by_slot.min_p[slot] = params.min_p
        by_slot.top_k[slot] = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
        by_slot.top_p[slot] = params.top_p
        seed = self._seed_generator.integers(2**63) if params.seed is None else params.seed
        by_slot.seeds[slot] = int(seed) % 2**64
        if params.logprobs is None:
            self._num_logprobs[slot] = _NO_LOGPROBS
        else:
            wants_all = params.logprobs < 0
            self._num_logprobs[slot] = vocab_size if wants_all else min(params.logprobs, vocab_size)
        self._edits.pop(slot, None)
        if params.logit_bias or params.allowed_token_ids is not None or params.min_tokens > 0:
            self._edits[slot] = self._make_edits(params, sequence.num_prompt_tokens)
        repetition = min(max(params.repetition_penalty, _LEAST), _MOST)
        by_slot.presence[slot] = params.presence_penalty
        by_slot.frequency[slot] = params.frequency_penalty
        by_slot.repetition[slot] = repetition
        penalties = (params.presence_penalty, params.frequency_penalty, repetition)
        self._is_penalized[slot] = penalties != (0.0, 0.0, 1.0)
        if self._is_penalized[slot]:
            self._count_tokens(sequence)

    def _make_edits(self, params: SamplingParams, num_prompt_tokens: int) -> _LogitEdits:
        bias = {
            token_id: min(max(bias, -_MOST), _MOST)
            for token_id, bias in (params.logit_bias or {}).items()
            if token_id < self._vocab_size
        }
        forbidden = None
        if params.allowed_token_ids is not None:
            forbidden = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
            forbidden[self._ids(params.allowed_token_ids)] = False
        return _LogitEdits(
            biased_ids=self._ids(bias),
            biases=self._tensor(np.array(list(bias.values()), np.float32)),
            forbidden=forbidden,
            held_back_ids=self._ids(params.all_stop_token_ids),
            min_position=num_prompt_tokens + params.min_tokens,
        )

    def _count_tokens(self, sequence: JoinedSequence) -> None:
        if self._output_counts is None or self._prompt_mask is None:
            shape = (len(self._is_penalized), self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self._device)
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        outputs = sequence.token_ids[sequence.num_prompt_tokens :]
        counts = np.bincount(outputs, minlength=self._vocab_size).astype(np.int32)
        self._output_counts[sequence.slot] = self._tensor(counts)
        self._prompt_mask[sequence.slot] = False
        self._prompt_mask[sequence.slot, self._ids(prompt)] = True

    # -- a step ----------------------------------------------------------------------------------

    def sample(
        self, logits: Tensor, slots: Integers, positions: Integers
    ) -> tuple[Integers, dict[int, LogprobsLists]]:
        """Draw a token for each row.

        `logits` [S, V] float32 may be overwritten; row i is of the sequence in `slots[i]`, and its
        new token will stand at index `positions[i]` of prompt plus output. Returns the tokens [S]
        (NO_TOKEN where there is none), and by slot the log-probabilities of the rows that want
        them.
        """
        plan = self._plan
        if plan is None or not np.array_equal(plan.slots, slots):
            plan = self._plan = self._make_plan(slots)
        raw = [logits[reporting.rows] for reporting in plan.reporting]
        for row, edits in plan.edits:
            edits.apply(logits[row], int(positions[row]))
        self._penalize(logits, plan)
        if plan.is_greedy:
            tokens = self._chooser.likeliest(logits)
        else:
            tokens = self._chooser.choose(logits, plan.parameters, self._tensor(positions))
        self._count(tokens, plan)
        return self._report(raw, tokens, plan)

    def _make_plan(self, slots: Integers) -> _Plan:
        rows = enumerate(slots.tolist()) if self._edits else ()
        penalized = np.flatnonzero(self._is_penalized[slots])
        return _Plan(
            slots=slots,
            device_slots=self._tensor(slots),
            parameters=self._parameters.of(slots, self._device),
            is_greedy=not self._parameters.temperature[slots].any(),
            edits=[(row, self._edits[slot]) for row, slot in rows if slot in self._edits],
            reporting=list(self._plan_reports(slots)),
            penalized=self._tensor(penalized) if len(penalized) else None,
        )

    def _plan_reports(self, slots: Integers) -> Iterator[_Reporting]:
        counts = self._num_logprobs[slots]
        for count in np.unique(counts[counts != _NO_LOGPROBS]).tolist():
            rows = np.flatnonzero(counts == count)
            yield _Reporting(self._tensor(rows), slots[rows], count)

    def _penalize(self, logits: Tensor, plan: _Plan) -> None:
        if plan.penalized is None:
            return
        assert self._output_counts is not None
        assert self._prompt_mask is not None
        ops.penalize(
            logits,
            plan.penalized,
            plan.device_slots,
            self._output_counts,
            self._prompt_mask,
            plan.parameters.presence,
            plan.parameters.frequency,
            plan.parameters.repetition,
        )

    def _count(self, tokens: Tensor, plan: _Plan) -> None:
        """Penalties are to know of the tokens. (A row without one is told of to nobody.)"""
        if plan.penalized is None:
            return
        assert self._output_counts is not None
        rows = plan.penalized
        self._output_counts[plan.device_slots[rows], tokens[rows].clamp(min=0)] += 1

    def _report(
        self, raw: list[Tensor], tokens: Tensor, plan: _Plan
    ) -> tuple[Integers, dict[int, LogprobsLists]]:
        """The tokens, and by slot the log-probabilities, on the host."""
        tensors = [tokens]
        for logits, reporting in zip(raw, plan.reporting, strict=True):
            of_rows = tokens[reporting.rows].clamp(min=0)
            tensors += gather_logprobs(logits, of_rows, reporting.num_alternatives)
        arrays = iter(to_host(tensors))
        token_ids, reports = next(arrays), {}
        for reporting in plan.reporting:
            ids, logprobs, ranks = next(arrays).astype(np.int32), next(arrays), next(arrays)
            for index, slot in enumerate(reporting.slots.tolist()):
                at = slice(index, index + 1)
                reports[slot] = LogprobsLists(ids[at], logprobs[at], ranks[at])
        return token_ids, reports

    # -- tensors ---------------------------------------------------------------------------------

    def _ids(self, token_ids: Iterable[int]) -> Tensor:
        """Token ids as an index; ids outside the vocabulary, which have no logit, are left out."""
        inside = [token_id for token_id in token_ids if token_id < self._vocab_size]
        return self._tensor(np.array(inside, np.int64))

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)
