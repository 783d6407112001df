"""How a request's tokens are drawn and when it ends: vLLM's SamplingParams, as a map on the wire.

Invariants: a `SamplingParams` that exists is valid, wherever it came from (constructor and decoder
share one set of checks); encoding reproduces vLLM's bytes (its key order, defaults omitted, a map16
header whatever the length).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ipc import expect
from ipc.codec import pack
from ipc.errors import WireError, mismatch


class OutputKind(IntEnum):
    """What each output of a stream holds; a matter of the front end, engines ignore it."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; names and defaults are vLLM's. Raises ValueError naming a
    bad value.

    Lists may be given for tuples, and one string for `stop`. Fields stand in the order of the wire.
    """

    n: int = 1
    """Completions; the front end makes one request of each, so an engine sees 1."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    """0 is greedy."""
    watermarking: bool | None = None
    """Sent by vLLM's front ends; ignored."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the text; a matter of the front end, which has the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as fit the model; the front end resolves it."""
    min_tokens: int = 0
    logprobs: int | None = None
    """How many alternatives to each sampled token; -1 is the whole vocabulary."""
    prompt_logprobs: int | None = None
    """How many alternatives to each token of the prompt but its first; -1 as in `logprobs`."""
    prompt_logprob_token_ids: object = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: OutputKind = OutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_clone: bool = False
    output_text_buffer_length: int = 0
    eos_token_id: int | None = None
    """Ends the request with no stop reason; the front end fills it in unless `ignore_eos`."""
    all_stop_token_ids: frozenset[int] = frozenset()
    """Every token that may end the request: what `min_tokens` holds back."""
    watermarking_skipped: bool = False
    structured_outputs: Mapping[object, object] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    extra_args: Mapping[object, object] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: object = None
    skip_reading_prefix_cache: bool | None = None
    """None: only when prompt logprobs are wanted, which cached blocks cannot give."""
    thinking_token_budget: int | None = None
    repetition_detection: Mapping[object, object] | None = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        try:
            for name, check, default in _CHECKED_FIELDS:
                value = getattr(self, name)
                if value is not default:  # Defaults are valid, and nearly everything is one.
                    object.__setattr__(self, name, check(value, name))
        except WireError as error:
            raise ValueError(str(error)) from None
        if self.skip_reading_prefix_cache is None:
            object.__setattr__(self, "skip_reading_prefix_cache", self.prompt_logprobs is not None)
        _check_together(self.min_tokens, self.max_tokens, self.stop, self.detokenize)

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Fields that are set and that Caesura's own engine does not implement."""
        return tuple(name for name in _UNSUPPORTED if getattr(self, name) not in (None, ()))

    def to_wire(self) -> bytes:
        """The MessagePack map."""
        return encode_fields({name: getattr(self, name) for name in _CHECKS})

    @classmethod
    def from_wire(cls, value: object, path: str = "sampling_params") -> SamplingParams:
        """Parse a decoded map; unknown keys are ignored. Raises WireError."""
        fields = expect.mapping(value, path)
        known = {_NAMES[key]: entry for key, entry in fields.items() if key in _NAMES}
        try:
            return cls(**known)  # type: ignore[arg-type]  # __post_init__ checks every field
        except ValueError as error:
            raise WireError(f"{path}.{error}") from None


def check_fields(fields: Mapping[str, object]) -> dict[str, Any]:
    """Check some fields of a `SamplingParams`, all others being at their defaults; returns them in
    the types that it holds. Raises ValueError as it does.

    With `encode_fields`, a sender needs no object of forty fields for each request.
    """
    try:
        checked: dict[str, Any] = {
            name: _CHECKS[name](value, name) for name, value in fields.items()
        }
    except WireError as error:
        raise ValueError(str(error)) from None
    _check_together(
        checked.get("min_tokens", 0),
        checked.get("max_tokens"),
        checked.get("stop", ()),
        checked.get("detokenize", True),
    )
    return checked


def encode_fields(fields: Mapping[str, Any]) -> bytes:
    """The MessagePack map of a `SamplingParams` with these checked fields, and defaults."""
    entries = _ALWAYS_ENTRIES.copy()
    for name, value in fields.items():
        place, key, default, always = _WIRE_FIELDS[name]
        if always or value != default:
            entries[place] = key + pack(sorted(value) if isinstance(value, frozenset) else value)
    in_order = map(entries.__getitem__, sorted(entries))
    return b"\xde" + len(entries).to_bytes(2, "big") + b"".join(in_order)


def _check_together(
    min_tokens: int, max_tokens: int | None, stop: tuple[str, ...], detokenize: bool
) -> None:
    if max_tokens is not None and min_tokens > max_tokens:
        raise ValueError(
            f"min_tokens: {min_tokens} exceeds max_tokens {max_tokens}; "
            "lower it or raise max_tokens"
        )
    if stop and not detokenize:
        raise ValueError(
            "stop: stop strings need the text; set detokenize=True or use stop_token_ids"
        )


def _between(low: float, high: float = float("inf"), *, above_low: bool = False) -> expect.Check:
    interval = f"a number {'above' if above_low else 'of at least'} {low}"
    if high != float("inf"):
        interval += f" and at most {high}"

    def check(value: object, path: str) -> float:
        number = expect.number(value, path)
        if number < low or number > high or (above_low and number == low):
            raise mismatch(path, value, interval)
        return number

    return check


def _integer(minimum: int, maximum: int = expect.INT64_MAX) -> expect.Check:
    return lambda value, path: expect.integer(value, path, minimum, maximum)


def _sequence(value: object, path: str) -> list[object]:
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return list(value)
    raise mismatch(path, value, "a list")


def _token_ids(value: object, path: str) -> tuple[int, ...]:
    return tuple(expect.token_ids(_sequence(value, path), path))


def _token_id_set(value: object, path: str) -> frozenset[int]:
    return frozenset(_token_ids(value, path))


def _strings(value: object, path: str) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else expect.texts(_sequence(value, path), path)
    if "" in strings:
        raise mismatch(path, value, "strings that are not empty")
    return tuple(strings)


def _stop_token_ids(value: object, path: str) -> tuple[int, ...]:
    return () if value is None else _token_ids(value, path)


def _output_kind(value: object, path: str) -> OutputKind:
    if type(value) is OutputKind:
        return value
    return OutputKind(expect.integer(value, path, 0, 2))


def _logit_bias(value: object, path: str) -> dict[int, float]:
    return {
        expect.integer(token_id, f"{path} (token id)", 0, expect.MAX_TOKEN_ID): expect.number(
            bias, f"{path}[{token_id}]"
        )
        for token_id, bias in expect.mapping(value, path).items()
    }


_CHECKS: dict[str, expect.Check] = {
    "n": _integer(1),
    "presence_penalty": _between(-2.0, 2.0),
    "frequency_penalty": _between(-2.0, 2.0),
    "repetition_penalty": _between(0.0, above_low=True),
    "temperature": _between(0.0),
    "watermarking": expect.nullable(expect.boolean),
    "top_p": _between(0.0, 1.0, above_low=True),
    "top_k": _integer(-1),
    "min_p": _between(0.0, 1.0),
    "seed": expect.nullable(expect.integer),
    "stop": _strings,
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": expect.boolean,
    "max_tokens": expect.nullable(_integer(1)),
    "min_tokens": expect.count,
    "logprobs": expect.nullable(_integer(-1)),
    "prompt_logprobs": expect.nullable(_integer(-1)),
    "prompt_logprob_token_ids": expect.opaque,
    "prompt_logprob_start": expect.nullable(expect.count),
    "logprob_token_ids": expect.nullable(_token_ids),
    "flat_logprobs": expect.boolean,
    "detokenize": expect.boolean,
    "skip_special_tokens": expect.boolean,
    "spaces_between_special_tokens": expect.boolean,
    "include_stop_str_in_output": expect.boolean,
    "output_kind": _output_kind,
    "stream_interval": expect.nullable(_integer(1)),
    "skip_clone": expect.boolean,
    "output_text_buffer_length": expect.count,
    "eos_token_id": expect.nullable(_integer(0, expect.MAX_TOKEN_ID)),
    "all_stop_token_ids": _token_id_set,
    "watermarking_skipped": expect.boolean,
    "structured_outputs": expect.nullable(expect.opaque_mapping),
    "logit_bias": expect.nullable(_logit_bias),
    "allowed_token_ids": expect.nullable(_token_ids),
    "extra_args": expect.nullable(expect.opaque_mapping),
    "bad_words": _strings,
    "bad_words_token_ids": expect.opaque,
    "skip_reading_prefix_cache": expect.nullable(expect.boolean),
    "thinking_token_budget": expect.nullable(expect.integer),
    "repetition_detection": expect.nullable(expect.opaque_mapping),
    "routed_experts_prompt_start": expect.integer,
    "trace_decode_token_ids": expect.nullable(_token_ids),
}

_CHECKED_FIELDS = tuple(
    (field.name, _CHECKS[field.name], field.default) for field in dataclasses.fields(SamplingParams)
)

_UNSUPPORTED = (
    "prompt_logprob_token_ids",
    "logprob_token_ids",
    "structured_outputs",
    "bad_words",
    "thinking_token_budget",
    "repetition_detection",
    "trace_decode_token_ids",
)

# vLLM keeps these four private, hence the underscore on the wire.
_PRIVATE = ("eos_token_id", "all_stop_token_ids", "watermarking_skipped", "bad_words_token_ids")
_NAMES: dict[object, str] = {("_" + name if name in _PRIVATE else name): name for name in _CHECKS}

# vLLM's constructor moves these four off their defaults, so they always appear.
_ALWAYS_WRITTEN = ("stop", "stop_token_ids", "bad_words", "skip_reading_prefix_cache")
_WIRE_FIELDS = {
    field.name: (place, pack(key), field.default, field.name in _ALWAYS_WRITTEN)
    for place, (key, field) in enumerate(
        zip(_NAMES, dataclasses.fields(SamplingParams), strict=True)
    )
}
_ALWAYS_ENTRIES = {
    place: key + pack(getattr(SamplingParams(), name))
    for name, (place, key, _, always) in _WIRE_FIELDS.items()
    if always
}
