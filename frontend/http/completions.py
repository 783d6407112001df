"""OpenAI's completions API as data: a request's body parsed, and a request's outcome in its shape.

Nothing here knows sockets or engines. Fields beyond OpenAI's own follow vLLM's names
(`return_token_ids`, `priority`, `request_id`, the further sampling parameters); `tags` and
`abort_cause` are Caesura's. Unknown fields are ignored, as in vLLM.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from frontend.http.errors import ApiError
from frontend.outputs import RequestOutput, RequestResult, TokenLogprobs
from frontend.sampling_params import SamplingParams, read_token_id
from ipc.expect import INT64_MAX, INT64_MIN

MAX_REQUEST_ID_LENGTH = 256
_DEFAULT_MAX_TOKENS = 16
_SAMPLING_FIELDS = tuple(spec.name for spec in dataclasses.fields(SamplingParams))
_ONLY_DEFAULTS: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "prompt_logprobs": (None,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (None,),
    "truncate_prompt_tokens": (None,),
}
"""Fields that are known, with the values that ask for nothing."""

_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A parsed body. Either `prompt` or `prompt_token_ids` is set."""

    prompt: str | None
    prompt_token_ids: list[int] | None
    sampling_params: SamplingParams
    request_id: str | None
    model: str | None
    stream: bool
    include_usage: bool
    return_token_ids: bool
    return_tokens_as_token_ids: bool
    """Name tokens in logprobs `token_id:ID` instead of by their text."""
    priority: int
    tags: tuple[str, ...]


def parse_completion(body: object) -> CompletionRequest:
    """Read the JSON body of a completion. Raises ApiError naming the field and its value."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_short(body)}")
    for name, values in _ONLY_DEFAULTS.items():
        if (value := body.get(name)) is not None and value not in values:
            raise _bad(name, value, f"{_short(values[0])}: nothing else is supported")
    stream = _boolean(body, "stream")
    prompt, prompt_token_ids = _prompt(body.get("prompt"))
    return CompletionRequest(
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        sampling_params=_sampling_params(body),
        request_id=parse_request_id(body.get("request_id"), "request_id"),
        model=_text(body, "model"),
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
        return_token_ids=_boolean(body, "return_token_ids"),
        return_tokens_as_token_ids=_boolean(body, "return_tokens_as_token_ids"),
        priority=_integer(body, "priority"),
        tags=_tags(body.get("tags")),
    )


def parse_request_id(value: object, name: str) -> str | None:
    """A caller's id for its request. Raises ApiError if it cannot be one."""
    if value is None or (isinstance(value, str) and 0 < len(value) <= MAX_REQUEST_ID_LENGTH):
        return value
    raise _bad(name, value, f"a string of 1 to {MAX_REQUEST_ID_LENGTH} characters")


def _prompt(value: object) -> tuple[str | None, list[int] | None]:
    """One prompt, as text or token ids; a batch of one is fine."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and value and all(type(token_id) is int for token_id in value):
        return None, value
    raise _bad("prompt", value, "one prompt, as a string or a list of token ids")


def _sampling_params(body: Mapping[str, object]) -> SamplingParams:
    fields: dict[str, object] = {
        name: body[name] for name in _SAMPLING_FIELDS if body.get(name) is not None
    }
    # As in vLLM, an explicit null lifts OpenAI's default limit.
    fields["max_tokens"] = body.get("max_tokens", _DEFAULT_MAX_TOKENS)
    bias = fields.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no integer keys
        fields["logit_bias"] = {read_token_id(key): value for key, value in bias.items()}
    try:
        return SamplingParams(**fields)  # type: ignore[arg-type]  # it checks every field
    except ValueError as error:
        first_word = re.match(r"\w*", str(error))  # the field, or an entry of it
        name = first_word[0] if first_word is not None else ""
        raise ApiError(400, str(error), param=name if name in fields else None) from None


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _bad("stream_options", options, "an object")
    if not stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return _boolean(options, "include_usage", "stream_options.include_usage")


def _tags(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return tuple(value)
    raise _bad("tags", value, "a list of strings")


def _boolean(body: Mapping[str, object], name: str, path: str | None = None) -> bool:
    if (value := body.get(name)) is None:
        return False
    if isinstance(value, bool):
        return value
    raise _bad(path or name, value, "true or false")


def _integer(body: Mapping[str, object], name: str) -> int:
    if (value := body.get(name)) is None:
        return 0
    if type(value) is int and INT64_MIN <= value <= INT64_MAX:
        return value
    raise _bad(name, value, "an integer of 64 bits")


def _text(body: Mapping[str, object], name: str) -> str | None:
    value = body.get(name)
    if value is None or isinstance(value, str):
        return value
    raise _bad(name, value, "a string")


def _bad(name: str, value: object, expected: str) -> ApiError:
    return ApiError(400, f"{name}: expected {expected}, got {_short(value)}", param=name)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(slots=True)
class CompletionFormat:
    """Shapes the outcome of one request; keeps what a stream's chunks have in common."""

    response_id: str
    model: str
    request: CompletionRequest
    prompt_token_ids: Sequence[int]
    """Filled only if the request wants them back."""
    token_text: Callable[[int], str]
    created: int = field(default_factory=lambda: int(time.time()))
    _num_completion_tokens: int = 0
    _text_offset: int = 0

    def chunk(self, output: RequestOutput) -> bytes:
        """One event of a stream."""
        is_first = self._num_completion_tokens == 0
        self._num_completion_tokens += len(output.token_ids)
        choice = self._choice(output, with_prompt=is_first)
        return self._event({"choices": [choice]})

    def usage_chunk(self, output: RequestOutput) -> bytes:
        """The event after the last choice, for `stream_options.include_usage`."""
        return self._event({"choices": [], "usage": self._usage(output)})

    def result(self, result: RequestResult) -> bytes:
        """The body of an answer that is no stream."""
        self._num_completion_tokens = len(result.token_ids)
        body = self._head() | {"choices": [self._choice(result, with_prompt=True)]}
        return _to_json(body | {"usage": self._usage(result)}).encode()

    def _head(self) -> dict[str, object]:
        return {
            "id": self.response_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _event(self, body: dict[str, object]) -> bytes:
        return f"data: {_to_json(self._head() | body)}\n\n".encode()

    def _choice(
        self, output: RequestOutput | RequestResult, *, with_prompt: bool
    ) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": 0,
            "text": output.text,
            "logprobs": self._logprobs(output.logprobs) if output.logprobs else None,
            "finish_reason": output.finish_reason,
        }
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        if output.finish_reason == "abort":
            choice["abort_cause"] = output.abort_cause
        if self.request.return_token_ids:
            choice["token_ids"] = output.token_ids
            if with_prompt:
                choice["prompt_token_ids"] = self.prompt_token_ids
        return choice

    def _usage(self, output: RequestOutput | RequestResult) -> dict[str, object]:
        return {
            "prompt_tokens": output.num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": output.num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
        }

    def _logprobs(self, records: Sequence[TokenLogprobs]) -> dict[str, object]:
        """OpenAI's parallel lists; offsets count characters of the tokens' own texts."""
        tokens, offsets = [], []
        for record in records:
            tokens.append(self._token_name(record.token_id))
            offsets.append(self._text_offset)
            self._text_offset += len(self.token_text(record.token_id))
        return {
            "tokens": tokens,
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [
                {
                    self._token_name(token_id): logprob
                    for token_id, logprob in ((record.token_id, record.logprob), *record.top)
                }
                for record in records
            ],
            "text_offset": offsets,
        }

    def _token_name(self, token_id: int) -> str:
        if self.request.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self.token_text(token_id)
