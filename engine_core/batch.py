"""What passes between the scheduler and a model runner: one step's work, and what it sampled.

A running sequence owns a *slot*, a row of the runner's persistent batch, from the step in which it
joins until it leaves (finished, aborted or preempted). A `StepBatch` therefore carries only what
changed (`left`, then `joined`, then `new_blocks`) plus the rows to compute; its size does not
depend on how many tokens the sequences hold.

Invariants
- `left` is applied before `joined`: a slot may be left and joined in the same step.
- A row's `num_new_tokens` tokens start at position `num_computed_tokens`; their blocks are
  already in the row's table.
- A row samples exactly when its new tokens reach the end of the tokens known for it; the runner
  then appends the sampled token to the row itself, and the scheduler does the same on its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine_core.staging import StagedWeights
from ipc.output import LogprobsLists
from ipc.request import SamplingParams
from ipc.weights import WeightsGroup, WeightSource

Integers = NDArray[np.int64]


def _no_integers() -> Integers:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class JoinedSequence:
    """A sequence that enters the running set: everything a runner must know about it."""

    slot: int
    token_ids: list[int]
    """The prompt, followed by the outputs so far (some after a preemption)."""
    num_prompt_tokens: int
    block_ids: list[int]
    """Blocks in order, prefix-cache hits first; covers this step's tokens."""
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step: changes to the persistent batch, and its rows (arrays with an entry a row)."""

    left: list[int] = field(default_factory=list)
    joined: list[JoinedSequence] = field(default_factory=list)
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)
    """(slot, block ids appended to its table), for sequences that had joined before."""
    slots: Integers = field(default_factory=_no_integers)
    num_new_tokens: Integers = field(default_factory=_no_integers)
    num_computed_tokens: Integers = field(default_factory=_no_integers)
    samples: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    def with_rows(self, rows: Sequence[tuple[int, int, int, bool]]) -> StepBatch:
        """The same changes, with these rows: (slot, new tokens, computed tokens, samples)."""
        slots, num_new_tokens, num_computed_tokens, samples = zip(*rows, strict=True)
        return replace(
            self,
            slots=np.array(slots),
            num_new_tokens=np.array(num_new_tokens),
            num_computed_tokens=np.array(num_computed_tokens),
            samples=np.array(samples),
        )


NO_TOKEN = -1
"""In a token id's place: no logit of the row is the largest, so nothing can be sampled."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled: one token id, or NO_TOKEN, for each row with `samples`, in row order."""

    token_ids: Integers = field(default_factory=_no_integers)
    logprobs: dict[int, LogprobsLists] = field(default_factory=dict)
    """By slot, for sampling rows that asked for logprobs: arrays with one position."""
    prompt_logprobs: dict[int, LogprobsLists] = field(default_factory=dict)
    """By slot, for prompts that asked for them: the positions that this step computed."""


class ModelRunner(Protocol):
    """Executes steps. The real one runs a model; the fake one computes arithmetic."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache it holds."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def bind_thread(self) -> None:
        """Settle the calling thread, which will execute all steps, on its core. Called once the
        process's other threads have started, which may go anywhere.
        """
        ...

    def execute(self, batch: StepBatch) -> StepResult:
        """Run one step; all K/V writes are complete when it returns."""
        ...

    def stage(self, source: WeightSource, earlier: StagedWeights | None) -> StagedWeights:
        """Load and check a part of a weight update beside the weights that serve.

        Runs on a thread of its own while steps go on, and changes nothing that they read. `earlier`
        is what the update staged before, to be added to. Raises ValueError naming what does not
        fit.
        """
        ...

    def commit(self, staged: StagedWeights) -> None:
        """Compute with staged weights from the next step on. Called between steps; cannot fail."""
        ...

    def join_group(self, group: WeightsGroup) -> None:
        """Become a member of a trainer's process group, on the thread of `stage`; returns when all
        members came. Raises ValueError.
        """
        ...

    def leave_group(self, group_name: str) -> None:
        """Raises ValueError if there is no such group."""
        ...
