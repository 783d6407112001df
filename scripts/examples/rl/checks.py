"""What must be true of every rollout, whatever was done to it on its way.

The judge of the tokens is transformers: each one's log-probability, as the engine reported it, must
be what the weights of its version give it behind the whole of prompt and earlier tokens. A token
lost, made up, shifted or sampled by other weights than it says would show in all that follow it.

A request that is frozen through an update (`keep`) goes on with the KV that the old weights wrote.
Its later tokens are by a mixture that no model computes anew, so transformers can judge its first
version's tokens only; the others have their versions checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ipc.pause import PauseMode
from scripts.examples.rl.rollout import Rollout
from scripts.examples.rl.trainer import load_policy, token_logprobs

TOLERANCE = 1e-4
"""In nats; float32 on both sides, in another order of operations."""


class Reference:
    """Every version of the policy that ever served."""

    def __init__(self, model: Path) -> None:
        self._policy = load_policy(model)
        self._weights: dict[str, dict[str, Tensor]] = {}

    def remember(self, version: str, weights: Mapping[str, Tensor]) -> None:
        self._weights[version] = {name: tensor.clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def logprobs(self, version: str, rollouts: Sequence[Rollout]) -> Tensor:
        """Of all tokens, whoever sampled them: [rollouts, longest output]."""
        # Not strict: a tied tensor has one name here and two in the model.
        self._policy.load_state_dict(self._weights[version], strict=False)
        return token_logprobs(self._policy, rollouts)


@dataclass(slots=True, eq=False)
class Check:
    """One promise, and how it fared."""

    promise: str
    num_checked: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """What was never looked at did not pass."""
        return self.num_checked > 0 and not self.failures

    def expect(self, is_true: bool, otherwise: str, *, count: int = 1) -> None:
        self.num_checked += count
        if not is_true:
            self.failures.append(otherwise)


class Checks:
    """Judges finished rollouts, batch by batch."""

    def __init__(self, reference: Reference, mode: PauseMode, max_tokens: int) -> None:
        self.ended = Check("every rollout came to its end, once")
        self.tokens = Check("no token was lost or invented")
        self.versions = Check("every token names the weights that sampled it")
        self.logprobs = Check("log-probabilities are those weights' own")
        self.max_difference = 0.0
        self.num_mixed = 0
        """Tokens that attended to KV of several versions."""
        self._reference = reference
        self._mode = mode
        self._max_tokens = max_tokens

    @property
    def all(self) -> list[Check]:
        return [self.ended, self.tokens, self.versions, self.logprobs]

    def add(self, rollouts: Sequence[Rollout]) -> float:
        """Judge a batch; returns its largest difference of a log-probability, in nats."""
        for rollout in rollouts:
            self._check_tokens(rollout)
            self.versions.expect(
                rollout.versions == rollout.served_by,
                f"seed {rollout.seed}: the engine says {rollout.versions}, "
                f"but what came was sampled by {rollout.served_by}",
                count=len(rollout.token_ids),
            )
        difference = self._check_logprobs(rollouts)
        self.max_difference = max(self.max_difference, difference)
        return difference

    def finish(self, started: Sequence[Rollout], trained_on: Sequence[Rollout]) -> None:
        """After the last round: what was started is what came to its end."""
        counts = dict.fromkeys(started, 0)
        for rollout in trained_on:
            counts[rollout] += 1
        for rollout, count in counts.items():
            self.ended.expect(
                count == 1 and rollout.is_finished, f"seed {rollout.seed}: ended {count} times"
            )

    def _check_tokens(self, rollout: Rollout) -> None:
        """Its pieces follow each other, and a limit counts from the first start."""
        num_tokens, name = len(rollout.token_ids), f"seed {rollout.seed}"
        self.tokens.expect(
            0 < num_tokens == len(rollout.logprobs) <= self._max_tokens
            and (rollout.finish_reason != "length" or num_tokens == self._max_tokens),
            f"{name}: {num_tokens} tokens and {len(rollout.logprobs)} log-probabilities, "
            f"ended by {rollout.finish_reason}",
            count=num_tokens,
        )
        for num_then, resume_from in rollout.aborted:
            self.tokens.expect(
                list(resume_from.output_token_ids) == rollout.token_ids[:num_then]
                and list(resume_from.prompt_token_ids) == list(rollout.prompt_token_ids)
                and resume_from.num_output_tokens_left == self._max_tokens - num_then
                and resume_from.seed == rollout.seed,
                f"{name}: aborted after {num_then} tokens, but to be resumed from {resume_from}",
                count=0,
            )

    def _check_logprobs(self, rollouts: Sequence[Rollout]) -> float:
        largest = 0.0
        versions = dict.fromkeys(version for each in rollouts for version in each.versions)
        for version in versions:
            touched = [each for each in rollouts if version in each.versions]
            rows = self._reference.logprobs(version, touched).tolist()
            for rollout, expected in zip(touched, rows, strict=True):
                for place, by in enumerate(rollout.versions):
                    if by != version:
                        continue
                    if self._mode == "keep" and by != rollout.versions[0]:
                        self.num_mixed += 1
                        continue
                    difference = abs(rollout.logprobs[place] - expected[place])
                    largest = max(largest, difference)
                    self.logprobs.expect(
                        difference <= TOLERANCE,
                        f"seed {rollout.seed}, token {place}: reported "
                        f"{rollout.logprobs[place]:.6f}, {version} gives {expected[place]:.6f}",
                    )
        return largest
