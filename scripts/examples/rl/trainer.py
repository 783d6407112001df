"""The policy, in transformers, and its training: GRPO with a reward that anyone can read.

The reward is the share of capital letters in a rollout's text: the policy learns to shout. Each
token's importance ratio is taken against the log-probability that the engine reported for it, so a
rollout that several versions of the policy sampled needs no special care.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scripts.examples.rl.rollout import Rollout

NUM_GRADIENT_STEPS = 4
"""A round."""
LEARNING_RATE = 1e-4
CLIP = 0.2


def load_policy(model: Path) -> Any:
    """The model in float32, the precision in which log-probabilities can be compared."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model))


def reward(text: str) -> float:
    """The share of capital letters."""
    return sum(letter.isupper() for letter in text) / max(1, len(text))


def token_logprobs(policy: Any, rollouts: Sequence[Rollout]) -> Tensor:
    """The policy's log-probability of each sampled token, given the prompt and all tokens before
    it: [rollouts, longest output], padded with 0.
    """
    sequences = [torch.tensor([*each.prompt_token_ids, *each.token_ids]) for each in rollouts]
    token_ids = pad_sequence(sequences, batch_first=True)
    logprobs = policy(token_ids[:, :-1]).logits.log_softmax(-1)
    of_tokens = logprobs.gather(2, token_ids[:, 1:, None])[..., 0]
    starts = [len(each.prompt_token_ids) - 1 for each in rollouts]
    rows = [
        of_tokens[row, start : start + len(each.token_ids)]
        for row, (start, each) in enumerate(zip(starts, rollouts, strict=True))
    ]
    return pad_sequence(rows, batch_first=True)


def advantages(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> Tensor:
    """How much better each rollout is than those of the same prompt, in standard deviations."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, rollout in enumerate(rollouts):
        groups[rollout.prompt_index].append(place)
    values = torch.tensor(rewards)
    result = torch.zeros(len(rollouts))
    for places in groups.values():
        group = values[places]
        result[places] = (group - group.mean()) / (group.std(correction=0) + 1e-6)
    return result


class Trainer:
    """The policy that learns. Slow calls: run them on a thread, the event loop has work to do."""

    def __init__(self, model: Path) -> None:
        self.policy = load_policy(model)
        self.tokenizer = load_tokenizer(model)
        self._optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0
        )

    def weights(self) -> dict[str, Tensor]:
        """All tensors by name; what is tied to another one is not among them."""
        return {name: tensor.detach() for name, tensor in self.policy.named_parameters()}

    def rewards(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [reward(self.tokenizer.decode(rollout.token_ids)) for rollout in rollouts]

    def step(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> None:
        """Some gradient steps on whole rollouts."""
        advantage = advantages(rollouts, rewards)[:, None]
        sampled = [torch.tensor(rollout.logprobs) for rollout in rollouts]
        behaviour = pad_sequence(sampled, batch_first=True)
        is_token = pad_sequence([torch.ones_like(row) for row in sampled], batch_first=True)
        for _ in range(NUM_GRADIENT_STEPS):
            ratio = (token_logprobs(self.policy, rollouts) - behaviour).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            loss = -(gain * is_token).sum() / is_token.sum()
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
