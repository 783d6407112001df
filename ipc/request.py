"""The ADD frame: a request on its way to an engine, an array of 22 positions.

Fields that Caesura's engine has no use for are carried as they came (`object`), so that a request
decodes whatever it asks for and the engine can refuse it by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ipc import expect
from ipc.codec import Frames, pack, unpack
from ipc.errors import WireError, mismatch
from ipc.request_type import RequestType
from ipc.sampling_params import OutputKind as OutputKind
from ipc.sampling_params import SamplingParams as SamplingParams

_NUM_REQUIRED = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCoreRequest:
    """One request. Fields stand in the order of the wire; up to `data_parallel_rank` a sender must
    write them."""

    request_id: str
    """Unique for the engine's life."""
    prompt_token_ids: list[int] | None
    mm_features: object = None
    sampling_params: SamplingParams | None = None
    pooling_params: object = None
    arrival_time: float = 0.0
    """Wall clock, in seconds."""
    lora_request: object = None
    cache_salt: str | None = None
    data_parallel_rank: int | None = None
    prompt_embeds: object = None
    prompt_is_token_ids: object = None
    client_index: int = 0
    """Which output socket the answers go to."""
    current_wave: int = 0
    priority: int = 0
    """Lower runs first; may be negative."""
    trace_headers: Mapping[object, object] | None = None
    resumable: bool = False
    external_req_id: str | None = None
    """The id the user knows."""
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: Mapping[object, object] | None = None
    abort_immediately: bool = False
    session_id: str | None = None
    kv_hints: object = None

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Features that the request asks for and that Caesura's own engine does not implement."""
        names = [name for name in _UNSUPPORTED if getattr(self, name) not in (None, [], False)]
        if self.sampling_params is not None:
            names += self.sampling_params.unsupported
            names += ["n"] if self.sampling_params.n != 1 else []
        return tuple(names)


_UNSUPPORTED = ("mm_features", "pooling_params", "lora_request", "prompt_embeds", "resumable")


def encode_add(request: EngineCoreRequest) -> list[bytes]:
    """Frames of one ADD, type byte first; all 22 positions, as vLLM's front ends write them."""
    sampling_params = request.sampling_params
    body = b"".join(
        (
            b"\xdc\x00\x16",
            pack(request.request_id),
            pack(request.prompt_token_ids),
            pack(request.mm_features),
            pack(None) if sampling_params is None else sampling_params.to_wire(),
            *(pack(getattr(request, name)) for name in _AFTER_SAMPLING_PARAMS),
        )
    )
    return [RequestType.ADD.frame, body]


_AFTER_SAMPLING_PARAMS = tuple(EngineCoreRequest.__slots__[4:])
_PACKED_DEFAULTS = {
    field.name: pack(field.default)
    for field in dataclasses.fields(EngineCoreRequest)
    if field.name in ("mm_features", *_AFTER_SAMPLING_PARAMS)
}


def encode_new(
    *, request_id: str, prompt_token_ids: list[int], sampling_params: bytes, **others: object
) -> list[bytes]:
    """What `encode_add` returns for a request of these fields, at a fraction of its cost.

    `sampling_params` is their map, encoded; `others` are fields behind it, by name.
    """
    assert others.keys() <= _PACKED_DEFAULTS.keys(), f"no such fields: {sorted(others)}"
    packed = _PACKED_DEFAULTS | {name: pack(value) for name, value in others.items()}
    body = b"".join(
        (
            b"\xdc\x00\x16",
            pack(request_id),
            pack(prompt_token_ids),
            packed.pop("mm_features"),
            sampling_params,
            *packed.values(),
        )
    )
    return [RequestType.ADD.frame, body]


def decode_add(frames: Frames) -> EngineCoreRequest:
    """Parse what `encode_add` returns (type byte, payload, auxiliary frames). Raises WireError."""
    if len(frames) < 2:
        raise WireError("request: the payload frame is missing")
    return request_from_wire(unpack(frames[1]))


def request_from_wire(value: object) -> EngineCoreRequest:
    """The request in a decoded payload; trailing positions may be missing and unknown ones are
    ignored."""
    entries = expect.array(value, "request", _NUM_REQUIRED)
    fields: dict[str, object] = {}
    for name, entry in zip(EngineCoreRequest.__slots__, entries, strict=False):
        fields[name] = _CHECKS[name](entry, f"request.{name}")
    return EngineCoreRequest(**fields)  # type: ignore[arg-type]  # the checks return each field's type


def _request_id(value: object, path: str) -> str:
    request_id = expect.text(value, path)
    if not request_id:
        raise mismatch(path, value, "an id that is not empty")
    return request_id


_CHECKS: dict[str, expect.Check] = {
    "request_id": _request_id,
    "prompt_token_ids": expect.nullable(expect.token_ids),
    "mm_features": expect.opaque,
    "sampling_params": expect.nullable(SamplingParams.from_wire),
    "pooling_params": expect.opaque,
    "arrival_time": expect.number,
    "lora_request": expect.opaque,
    "cache_salt": expect.nullable(expect.text),
    "data_parallel_rank": expect.nullable(expect.count),
    "prompt_embeds": expect.opaque,
    "prompt_is_token_ids": expect.opaque,
    "client_index": expect.count,
    "current_wave": expect.count,
    "priority": expect.integer,
    "trace_headers": expect.nullable(expect.opaque_mapping),
    "resumable": expect.boolean,
    "external_req_id": expect.nullable(expect.text),
    "reasoning_ended": expect.nullable(expect.boolean),
    "reasoning_parser_kwargs": expect.nullable(expect.opaque_mapping),
    "abort_immediately": expect.boolean,
    "session_id": expect.nullable(expect.text),
    "kv_hints": expect.opaque,
}
