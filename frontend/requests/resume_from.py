"""`ResumeFrom` as plain data, as clients get it and send it back.

Invariant: what `read_resume_from` returns is consistent, whoever made it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from frontend.errors import InvalidRequestError
from frontend.guesses import known_names
from frontend.outputs import ResumeFrom, WeightSpan
from frontend.sampling_params import MAX_STOP_STRING_CHARS
from ipc import expect
from ipc.errors import WireError

_FIELDS = tuple(field.name for field in dataclasses.fields(ResumeFrom))
_REQUIRED = tuple(
    field.name for field in dataclasses.fields(ResumeFrom) if field.default is dataclasses.MISSING
)
_SPAN_FIELDS = tuple(field.name for field in dataclasses.fields(WeightSpan))
_REMEDY = "send resume_from back as the aborted result had it"


def plain_resume_from(resume_from: ResumeFrom) -> dict[str, Any]:
    """What JSON can carry."""
    return {
        "prompt_token_ids": list(resume_from.prompt_token_ids),
        "output_token_ids": list(resume_from.output_token_ids),
        "num_output_tokens_left": resume_from.num_output_tokens_left,
        "seed": resume_from.seed,
        "position": resume_from.position,
        "min_tokens_left": resume_from.min_tokens_left,
        "stop_tail_text": resume_from.stop_tail_text,
        "weight_spans": plain_weight_spans(resume_from.weight_spans),
    }


def plain_weight_spans(spans: Sequence[WeightSpan]) -> list[dict[str, Any]]:
    """As SGLang writes its `weight_versions`."""
    return [{"version": span.version, "start": span.start, "end": span.end} for span in spans]


def read_resume_from(value: object) -> ResumeFrom:
    """Check plain data, or an object that a caller may have made. Raises InvalidRequestError."""
    if isinstance(value, ResumeFrom):
        fields: dict[str, Any] = {name: getattr(value, name) for name in _FIELDS}
    elif isinstance(value, Mapping):
        fields = _known(value, _FIELDS, _REQUIRED, "resume_from")
    else:
        raise InvalidRequestError(f"resume_from={value!r:.80} must be an object; {_REMEDY}")
    try:
        return _checked(**fields)
    except WireError as error:
        raise InvalidRequestError(f"{error}; {_REMEDY}") from None


def _checked(
    *,
    prompt_token_ids: object,
    output_token_ids: object,
    num_output_tokens_left: object,
    position: object,
    seed: object = None,
    min_tokens_left: object = 0,
    stop_tail_text: object = "",
    weight_spans: object = (),
) -> ResumeFrom:
    prompt = _token_ids(prompt_token_ids, "resume_from.prompt_token_ids")
    outputs = _token_ids(output_token_ids, "resume_from.output_token_ids")
    if not prompt:
        raise WireError("resume_from.prompt_token_ids is empty, but a prompt has at least 1 token")
    end = len(prompt) + len(outputs)
    if expect.integer(position, "resume_from.position") != end:
        raise WireError(
            f"resume_from.position={position} must be {end}, the number of prompt and output tokens"
        )
    num_left = expect.integer(num_output_tokens_left, "resume_from.num_output_tokens_left", 1)
    tail = expect.text(stop_tail_text, "resume_from.stop_tail_text")
    if len(tail) >= MAX_STOP_STRING_CHARS:
        raise WireError(
            f"resume_from.stop_tail_text has {len(tail)} characters, but what begins a stop string "
            f"has less than {MAX_STOP_STRING_CHARS}"
        )
    return ResumeFrom(
        prompt_token_ids=prompt,
        output_token_ids=outputs,
        num_output_tokens_left=num_left,
        position=end,
        seed=expect.optional(expect.integer, seed, "resume_from.seed"),
        min_tokens_left=expect.integer(min_tokens_left, "resume_from.min_tokens_left", 0, num_left),
        stop_tail_text=tail,
        weight_spans=_weight_spans(weight_spans, len(outputs)),
    )


def _token_ids(value: object, path: str) -> tuple[int, ...]:
    return tuple(expect.token_ids(list(value) if isinstance(value, tuple) else value, path))


def _weight_spans(value: object, num_tokens: int) -> tuple[WeightSpan, ...]:
    entries = list(value) if isinstance(value, tuple) else value
    spans: list[WeightSpan] = []
    for index, entry in enumerate(expect.array(entries, "resume_from.weight_spans")):
        path = f"resume_from.weight_spans[{index}]"
        if isinstance(entry, WeightSpan):
            entry = {"version": entry.version, "start": entry.start, "end": entry.end}
        fields = _known(expect.mapping(entry, path), _SPAN_FIELDS, _SPAN_FIELDS, path)
        start = expect.integer(
            fields["start"], f"{path}.start", spans[-1].end if spans else 0, num_tokens
        )
        end = expect.integer(fields["end"], f"{path}.end", start + 1, num_tokens)
        spans.append(WeightSpan(expect.text(fields["version"], f"{path}.version"), start, end))
    return tuple(spans)


def _known(
    fields: Mapping[Any, object], known: Sequence[str], required: Sequence[str], path: str
) -> dict[str, Any]:
    for name in fields:
        if name not in known:
            raise InvalidRequestError(
                f"{path} has an unknown key {name!r:.80}; {known_names(str(name), known)}"
            )
    for name in required:
        if name not in fields:
            raise InvalidRequestError(f"{path}.{name} is missing; {_REMEDY}")
    return dict(fields)
