"""Makes up requests: prompts, parameters, names and readers of every kind, and engines for them."""

from __future__ import annotations

import random
import string
from typing import Any

from scripts.simulation.engine import EngineShape
from scripts.simulation.oracle import Wants, text_of, uninterrupted
from scripts.simulation.tokenizer import VOCAB_SIZE

NUM_PREFIXES = 3
_NAME_LETTERS = "ab"
_NUM_NAMES = 14
TAGS = ("red", "green", "blue")


class RequestAuthor:
    """The part of a scenario's author that asks for something."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._is_greedy = chance.random() < 0.3
        """Short prompts and long outputs: running requests outgrow the cache."""
        self._shape = _shape(chance, is_greedy=self._is_greedy)
        self._prefixes = [[chance.randrange(60) for _ in range(16)] for _ in range(NUM_PREFIXES)]

    def _target(self) -> dict[str, Any]:
        raise NotImplementedError

    def _add(self) -> tuple[str, dict[str, Any]]:
        chance, shape = self._chance, self._shape
        prefix = chance.choice(self._prefixes)
        prompt = prefix[: chance.randint(1, 16)]
        if not self._is_greedy:
            prompt += [chance.randrange(60) for _ in range(chance.choice((0, 1, 3, 8, 14)))]
        if chance.random() < 0.02:
            prompt = (prompt * shape.max_model_len)[: shape.max_model_len + chance.randint(0, 4)]
        num_children = chance.choice((1, 1, 1, 1, 2, 3))
        text = chance.choice((None, None, None, "short", "long", "long"))
        max_tokens = chance.choice((20, 30) if self._is_greedy else (1, 2, 5, 9, 14, 20, 30))
        args: dict[str, Any] = {
            "name": self._name() if chance.random() < 0.85 else None,
            "prompt": prompt,
            "text": text,
            "max_tokens": max_tokens,
            "readers": [self._reader() for _ in range(num_children)],
        }
        if chance.random() < 0.25:
            args["aliases"] = [self._name() for _ in range(chance.randint(1, 2))]
        if chance.random() < 0.5:
            args["tags"] = chance.sample(TAGS, chance.randint(1, 2))
        if chance.random() < 0.2:
            args["tenant"] = chance.choice(("me", "you"))
        if chance.random() < 0.2:
            args["priority"] = chance.choice((-1, 1, 2))
        if chance.random() < 0.2:
            args["timeout_s"] = chance.choice((0.0003, 0.002, 0.008, 0.02, 0.05))
        if chance.random() < 0.3:
            args["stop"] = [self._stop_string() for _ in range(chance.randint(1, 8))]
        elif chance.random() < 0.25:
            args["stop"] = [self._coming(prompt, max_tokens)]
        rest = (
            ("min_tokens", 0.15, min(max_tokens, chance.randint(1, 6))),
            ("stop_token_ids", 0.15, [chance.randrange(VOCAB_SIZE) for _ in range(3)]),
            ("ignore_eos", 0.5, True),
            ("logprobs", 0.15, chance.choice((0, 2))),
            ("prompt_logprobs", 0.05, 1),
            ("detokenize", 0.15, False),
            ("include_stop", 0.1, True),
            ("final_only", 0.15, True),
        )
        args |= {name: value for name, share, value in rest if chance.random() < share}
        if "stop" in args:
            args.pop("detokenize", None)
        return "add", args

    def _resume_from(self) -> tuple[str, dict[str, Any]]:
        chance = self._chance
        args: dict[str, Any] = {
            "pick": chance.randrange(1000),
            "name": self._name(),
            "reader": self._reader(),
        }
        if chance.random() < 0.3:
            args["max_tokens"] = chance.choice((1, 3, 8))
        if chance.random() < 0.2:
            args["timeout_s"] = chance.choice((0.002, 0.008, 0.02))
        if chance.random() < 0.3:
            args["as_json"] = True
        return "resume_from", args

    def _name(self) -> str:
        chance = self._chance
        return f"{chance.choice(_NAME_LETTERS)}{chance.randrange(_NUM_NAMES)}"

    def _stop_string(self) -> str:
        chance = self._chance
        return "".join(
            chance.choice(string.ascii_letters) for _ in range(chance.choice((1, 1, 1, 2)))
        )

    def _coming(self, prompt: list[int], max_tokens: int) -> str:
        """A piece of the text that the prompt is answered with, under the first weights."""
        chance = self._chance
        text = text_of(uninterrupted(prompt, max_tokens), Wants(max_tokens=max_tokens))
        start = chance.randrange(len(text))
        piece = text[start : start + chance.randint(2, 8)]
        return self._stop_string() if "\ufffd" in piece else piece

    def _reader(self) -> dict[str, Any]:
        chance = self._chance
        habits: dict[str, Any] = {
            "kind": chance.choice(("iterate", "iterate", "iterate", "result", "listen", "never"))
        }
        if chance.random() < 0.2:
            habits["first_pause_s"] = chance.choice((0.001, 0.01, 0.1))
        if chance.random() < 0.2:
            habits["pause_s"] = chance.choice((0.0, 0.003, 0.02))
        if chance.random() < 0.1:
            habits["close_after"] = chance.randint(1, 6)
        if habits["kind"] == "listen" and chance.random() < 0.5:
            habits["takes_deltas"] = True
        return habits

    def _duplicate(self) -> tuple[str, dict[str, Any]]:
        kind, args = self._add()
        args["name_of"] = self._target()
        return kind, args


def _shape(chance: random.Random, *, is_greedy: bool) -> EngineShape:
    block_size = chance.choice((2, 4, 4, 8))
    max_model_len = chance.choice((40, 48, 64))
    fewest = -(-max_model_len // block_size)
    max_num_seqs = chance.choice((4, 6) if is_greedy else (1, 2, 3, 4, 6))
    return EngineShape(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, chance.choice((4, 8, 16, 32))),
        block_size=block_size,
        num_blocks=fewest + chance.choice((0, 1) if is_greedy else (0, 0, 2, 6, 16)),
        step_time_s=chance.choice((0.0005, 0.001, 0.003)),
        enable_prefix_caching=chance.random() < 0.9,
    )
