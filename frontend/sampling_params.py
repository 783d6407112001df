"""How a request's tokens are drawn and when it ends, as a caller says it.

Names and defaults are vLLM's, but for `max_tokens`, which is unlimited here. The completions of one
prompt (`n`) are requests of their own and hence no sampling parameter.

Invariants
- A `SamplingParams` that exists is valid: it passes the very checks that the wire makes.
- Stop strings stay in the front end, which has the text; an engine sees only token ids.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frontend.guesses import known_names
from ipc import sampling_params as wire

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
"""Every token is compared with each of them."""
NUM_RESUMED_TOKENS = "caesura_num_resumed_tokens"
"""Caesura's own key in the wire's `extra_args`, which other engines ignore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. Raises ValueError naming a bad value and what is
    allowed."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]."""
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    """In [0, 1], relative to the likeliest token."""
    presence_penalty: float = 0.0
    """In [-2, 2]."""
    frequency_penalty: float = 0.0
    """In [-2, 2]."""
    repetition_penalty: float = 1.0
    """Above 0."""
    seed: int | None = None
    """Makes the draws reproducible; None leaves them to the engine's own seed."""
    max_tokens: int | None = None
    """Most tokens of the output; None is as many as fit the model's context."""
    min_tokens: int = 0
    """Tokens before which neither EOS, stop tokens nor stop strings end the output."""
    stop: Sequence[str] = ()
    """Strings that end the output, at most 64 of at most 1024 characters; one may be given plainly.
    """
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output, besides EOS."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Alternatives to report for each sampled token; 0 is the sampled one alone, -1 all."""
    prompt_logprobs: int | None = None
    """Alternatives to report for each prompt token but the first; counted as in `logprobs`."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits, by token id."""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be sampled."""
    include_stop_str_in_output: bool = False
    """Whether the text keeps what ended it: a stop string, a stop token or EOS."""
    skip_special_tokens: bool = True
    detokenize: bool = True
    """False gives token ids only."""

    def __post_init__(self) -> None:
        given = self._given(_DEFAULTS)
        for name, value in wire.check_fields(given).items():
            if value is not given[name]:
                object.__setattr__(self, name, value)
        if self.stop:
            _check_stop(self.stop)

    def ending_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Every token that ends this request as soon as it is sampled."""
        eos_ids = () if self.ignore_eos else eos_token_ids
        return frozenset((*eos_ids, *self.stop_token_ids))

    def num_tokens_within(self, num_tokens_left: int) -> int:
        """`max_tokens`, where the context has room for so many."""
        return num_tokens_left if self.max_tokens is None else min(self.max_tokens, num_tokens_left)

    def to_wire(
        self,
        eos_token_ids: Sequence[int] = (),
        *,
        num_tokens_left: int,
        num_resumed_tokens: int = 0,
    ) -> bytes:
        """What an engine is sent, encoded.

        `eos_token_ids` are the model's, its tokenizer's first: on that one an engine stops without
        naming a reason, the others are sent as stop tokens. `num_tokens_left` is the room between
        the prompt and the end of the context; it bounds `max_tokens`. Of the prompt's tokens, the
        last `num_resumed_tokens` are outputs of an earlier run; an engine counts them as such, and
        hence `min_tokens` and `max_tokens` from that run's beginning. Raises ValueError if less
        than `min_tokens` fit.
        """
        eos_id, other_eos_ids = None, eos_token_ids[1:]
        if self.ignore_eos:
            other_eos_ids = ()
        elif eos_token_ids:
            eos_id = eos_token_ids[0]
        max_tokens = self.num_tokens_within(num_tokens_left)
        wire.check_fields({"min_tokens": self.min_tokens, "max_tokens": max_tokens})
        sent = self._given(_SENT_AS_THEY_ARE)
        sent["stop_token_ids"] = tuple(dict.fromkeys((*self.stop_token_ids, *other_eos_ids)))
        sent["max_tokens"] = max_tokens
        sent["eos_token_id"] = eos_id
        sent["all_stop_token_ids"] = frozenset((*eos_token_ids, *self.stop_token_ids))
        sent["skip_reading_prefix_cache"] = self.prompt_logprobs is not None
        if num_resumed_tokens:
            sent["extra_args"] = {NUM_RESUMED_TOKENS: num_resumed_tokens}
            sent["max_tokens"] += num_resumed_tokens
            if self.min_tokens:
                sent["min_tokens"] = self.min_tokens + num_resumed_tokens
        return wire.encode_fields(sent)

    def _given(self, defaults: Mapping[str, object]) -> dict[str, Any]:
        """Those of the fields that are not left at their defaults, which are the wire's too."""
        return {
            name: value
            for name, default in defaults.items()
            if (value := getattr(self, name)) is not default
        }

    @classmethod
    def from_sglang(cls, values: Mapping[str, object]) -> SamplingParams:
        """Read SGLang's `sampling_params` dictionary; its `max_new_tokens` defaults to 128.

        Raises ValueError, in SGLang's names, for bad values, for unknown keys (naming the nearest
        known one) and for what SGLang knows but Caesura does not do. None stands for a key's
        default.
        """
        fields: dict[str, object] = {"max_tokens": 128}
        for key, value in values.items():
            if key not in (*_FROM_SGLANG, *_ONLY_SGLANG_DEFAULT, *_WITHOUT_EFFECT):
                remedy = known_names(key, sorted(_FROM_SGLANG))
                if key in _TO_SGLANG:
                    remedy = f"did you mean {_TO_SGLANG[key]!r}?"
                raise ValueError(f"unknown sampling parameter {key!r:.80}; {remedy}")
            if key == "max_new_tokens":
                fields["max_tokens"] = value  # None is SGLang's word for no limit
            elif value is None:
                continue
            elif key in _FROM_SGLANG:
                fields[_FROM_SGLANG[key]] = value
            elif key in _ONLY_SGLANG_DEFAULT and value != _ONLY_SGLANG_DEFAULT[key]:
                raise ValueError(
                    f"sampling parameter {key}={value!r:.80} is not supported; "
                    + _REMEDIES.get(key, "leave it out")
                )
        bias = fields.get("logit_bias")
        if isinstance(bias, Mapping):  # its keys are strings, as in JSON
            fields["logit_bias"] = {read_token_id(key): value for key, value in bias.items()}
        try:
            return cls(**fields)  # type: ignore[arg-type]  # __post_init__ checks every field
        except ValueError as error:
            raise ValueError(in_sglang_names(str(error))) from None


def in_sglang_names(message: str) -> str:
    """A message about sampling parameters, in SGLang's names for them."""
    return _RENAMED.sub(lambda found: _TO_SGLANG[found[0]], message)


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(
            f"stop: {len(stop)} strings, but at most {MAX_STOP_STRINGS} can be watched for; "
            "give fewer"
        )
    for place, text in enumerate(stop):
        if len(text) > MAX_STOP_STRING_CHARS:
            raise ValueError(
                f"stop[{place}]: a string of {len(text)} characters, but at most "
                f"{MAX_STOP_STRING_CHARS} can be watched for; shorten it"
            )


_MAX_TOKEN_ID_DIGITS = 10


def read_token_id(key: object) -> object:
    """The token id that a key of a JSON object spells; what is none is left to the checks."""
    is_token_id = isinstance(key, str) and key.isdecimal() and len(key) <= _MAX_TOKEN_ID_DIGITS
    return int(key) if is_token_id else key  # type: ignore[call-overload]


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}

_KEPT = ("stop", "include_stop_str_in_output", "skip_special_tokens", "detokenize")
"""What an engine has no use for."""
_SENT_AS_THEY_ARE = {
    name: default
    for name, default in _DEFAULTS.items()
    if name not in (*_KEPT, "stop_token_ids", "max_tokens")
}

_SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "skip_special_tokens"),
)
_FROM_SGLANG = {name: name for name in _SAME_NAME} | {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}
SGLANG_NAMES = frozenset((*_FROM_SGLANG, "n"))
"""Those of SGLang's sampling parameters that have an effect."""
_TO_SGLANG = {ours: theirs for theirs, ours in _FROM_SGLANG.items() if ours != theirs}
_RENAMED = re.compile(rf"(?<!')\b(?:{'|'.join(_TO_SGLANG)})\b")
"""What stands in quotes is the caller's own word."""
_ONLY_SGLANG_DEFAULT: dict[str, object] = {
    "n": 1,
    **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag")),
    **dict.fromkeys(("stop_regex", "custom_params", "stream_interval")),
}
"""What SGLang knows besides, with the value that asks for nothing."""
_WITHOUT_EFFECT = ("spaces_between_special_tokens",)
"""Fast tokenizers, the only ones here, have no such thing."""
_REMEDIES = {"n": "pass the prompt that many times"}
