"""What the replies of both kinds of completion have in common: their bytes, and their usage.

Invariants
- A plain event, which has a token's text and nothing else, is three byte strings joined. It is the
  one thing here that happens once a token. A choice's first and last event are never plain.
- A prompt counts once in the usage, however many choices it has.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from frontend.http.errors import ApiError
from frontend.http.openai.calls import CallNames
from frontend.http.openai.logprobs import TokenNames, prompt_logprobs
from frontend.http.openai.replies import Choice, PromptLogprobs, PromptTokensDetails, Usage
from frontend.http.openai.requests import GenerationBody, StreamOptions
from frontend.outputs import RequestOutput
from frontend.requests.new_request import NewRequest
from frontend.requests.stream import RequestStream
from frontend.text.tokenizer import Tokenizer

EventChoice = TypeVar("EventChoice", bound=Choice)

_encode = msgspec.json.Encoder().encode
_NO_OPTIONS = StreamOptions()


@dataclass(frozen=True, slots=True)
class Call:
    """What goes to the engine, and the shape of what comes back."""

    requests: list[NewRequest]
    form: GenerationForm[Any]


class GenerationForm(ABC, Generic[EventChoice]):
    """Shapes the outcome of one call. `EventChoice` is a choice of an event."""

    PLAIN_START: str
    """What stands between `"index":N,` and the text in a plain event."""
    PLAIN_END = b',"logprobs":null,"finish_reason":null}]}\n\n'
    EVENT_KIND: str
    """The `object` of an event."""

    streams: Sequence[RequestStream] = ()

    def __init__(
        self,
        body: GenerationBody,
        names: CallNames,
        *,
        model: str,
        num_prompts: int,
        tokenizer: Tokenizer | None,
        has_logprobs: bool,
    ) -> None:
        self._response_id = names.response_id
        self._model = model
        self._created = int(time.time())
        self._n = body.n or 1
        self._has_prompt_logprobs = body.prompt_logprobs is not None
        self._has_token_ids = bool(body.return_token_ids)
        self.token_names = TokenNames(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        options = body.stream_options or _NO_OPTIONS
        self._has_usage_event = bool(options.include_usage)
        self._has_usage_in_events = bool(options.continuous_usage_stats)
        self._is_plain = not (has_logprobs or self._has_token_ids or self._has_usage_in_events)
        num_choices = num_prompts * self._n
        self._num_output_tokens = [0] * num_choices
        self._prompt_sizes = [(0, 0)] * num_choices
        """Tokens of each choice's prompt, and how many of them were cached; known at its end."""
        self._plain_starts = self._make_plain_starts(num_choices) if body.stream else []

    # -- ReplyForm -----------------------------------------------------------------------------

    def plain_event(self, index: int, text: str, token_ids: Sequence[int]) -> bytes | None:
        num_tokens = self._num_output_tokens[index]
        if not (num_tokens and self._is_plain):
            return None
        self._num_output_tokens[index] = num_tokens + len(token_ids)
        return self._plain_starts[index] + _encode(text) + self.PLAIN_END

    def event(self, index: int, output: RequestOutput) -> bytes:
        if output.finish_reason is None:
            plain = self.plain_event(index, output.text, output.token_ids)
            if plain is not None:
                return plain
        num_tokens = self._num_output_tokens[index]
        self._num_output_tokens[index] = num_tokens + len(output.token_ids)
        if output.finish_reason is not None:
            self._prompt_sizes[index] = (output.num_prompt_tokens, output.num_cached_tokens)
        return self.full_event(index, output, is_first=num_tokens == 0)

    def end(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._has_usage_event:
            return done
        return sse(self.chunk([], usage=self.usage())) + done

    def error_event(self, index: int, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        for index, output in enumerate(outputs):
            self._num_output_tokens[index] = len(output.token_ids)
            self._prompt_sizes[index] = (output.num_prompt_tokens, output.num_cached_tokens)
        return _encode(self.whole(outputs))

    # -- what the kinds differ in --------------------------------------------------------------

    @abstractmethod
    def full_event(self, index: int, output: RequestOutput, *, is_first: bool) -> bytes:
        """An event that may have everything."""

    @abstractmethod
    def chunk(self, choices: list[EventChoice], *, usage: Usage | UnsetType) -> Struct:
        """An event's data."""

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput]) -> Struct:
        """The answer that is no stream."""

    # -- for the kinds -------------------------------------------------------------------------

    def ending(self, output: RequestOutput) -> dict[str, Any]:
        """The fields of `Choice` that tell of the end and of tokens."""
        return {
            "finish_reason": output.finish_reason,
            "stop_reason": UNSET if output.finish_reason is None else output.stop_reason,
            "abort_cause": UNSET if output.abort_cause is None else output.abort_cause,
            "weight_versions": UNSET if output.finish_reason is None else output.weight_spans,
            "token_ids": list(output.token_ids) if self._has_token_ids else UNSET,
        }

    def prompt_token_ids(self, index: int) -> list[int] | UnsetType:
        """Those of a choice's prompt, if they are to be returned."""
        return list(self.streams[index].prompt_token_ids) if self._has_token_ids else UNSET

    def prompt_logprobs(self, index: int, output: RequestOutput) -> PromptLogprobs | UnsetType:
        """Those of a choice's prompt, if they were asked for by that name."""
        if not self._has_prompt_logprobs:
            return UNSET
        num_prompt_tokens = len(self.streams[index].prompt_token_ids)
        return prompt_logprobs(output.prompt_logprobs, self.token_names, num_prompt_tokens)

    def usage(self) -> Usage:
        """Of the whole call, as far as its choices have ended."""
        sizes = self._prompt_sizes[:: self._n]
        return _usage(
            sum(num_prompt_tokens for num_prompt_tokens, _ in sizes),
            sum(self._num_output_tokens),
            sum(num_cached_tokens for _, num_cached_tokens in sizes),
        )

    def usage_so_far(self, index: int, output: RequestOutput) -> Usage | UnsetType:
        """Of one choice, for its event, if every event is to have it."""
        if not self._has_usage_in_events:
            return UNSET
        return _usage(
            output.num_prompt_tokens, self._num_output_tokens[index], output.num_cached_tokens
        )

    def _make_plain_starts(self, num_choices: int) -> list[bytes]:
        head = (
            f'data: {{"id":{_json(self._response_id)},"object":"{self.EVENT_KIND}",'
            f'"created":{self._created},"model":{_json(self._model)},"choices":[{{"index":'
        )
        return [f"{head}{index},{self.PLAIN_START}".encode() for index in range(num_choices)]


def sse(data: Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


def _json(text: str) -> str:
    return _encode(text).decode()


def _usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
    )
