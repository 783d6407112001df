"""The bytes of vLLM's token-in-token-out answers.

An event is put together from byte strings, most of which are made once for each choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from frontend.http.errors import ApiError
from frontend.http.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from frontend.http.openai.replies import (
    ChatLogprobs,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from frontend.outputs import (
    AbortCause,
    FinishReasonName,
    RequestOutput,
    ResumeFrom,
    WeightSpan,
)
from frontend.requests.stream import RequestStream

_encode = msgspec.json.Encoder().encode
_NAMES = TokenNames(None)
"""Tokens are called `token_id:` and their id."""


class TokensChoice(msgspec.Struct, kw_only=True):
    index: int
    token_ids: Sequence[int]
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    abort_cause: AbortCause | msgspec.UnsetType | None = msgspec.UNSET
    """Of an aborted request."""
    weight_versions: Sequence[WeightSpan] | msgspec.UnsetType = msgspec.UNSET
    """At the end: by which weights the tokens were sampled."""
    resume_from: ResumeFrom | msgspec.UnsetType = msgspec.UNSET
    """Of an aborted request: to be sent instead of token ids, to go on where it ended."""


class TokensReply(msgspec.Struct, kw_only=True):
    request_id: str
    model: str
    created: int
    choices: list[TokensChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    kv_transfer_params: None = None


class TokensEvent(msgspec.Struct, omit_defaults=True):
    request_id: str
    choices: list[TokensChoice]
    """One with what is new; none in the event that only tells the usage."""
    usage: Usage | None = None


class UsageWanted(NamedTuple):
    at_end: bool
    in_each_event: bool


class TokensForm:
    """One call's outcome, as a ReplyForm."""

    streams: Sequence[RequestStream] = ()

    def __init__(
        self,
        response_id: str,
        model: str,
        *,
        num_choices: int,
        has_logprobs: bool,
        has_prompt_logprobs: bool = False,
        usage: UsageWanted,
    ) -> None:
        self._response_id = response_id
        self._model = model
        self._created = int(time.time())
        self._has_logprobs = has_logprobs
        self._has_prompt_logprobs = has_prompt_logprobs
        self._usage = usage
        head = b'data: {"request_id":' + _encode(response_id) + b',"choices":[{"index":'
        self._heads = [head + b'%d,"token_ids":' % index for index in range(num_choices)]
        self._num_tokens = [0] * num_choices
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    def plain_event(self, index: int, text: str, token_ids: Sequence[int]) -> bytes | None:
        if self._has_logprobs or self._usage.in_each_event:
            return None
        self._num_tokens[index] += len(token_ids)
        tail = b',"logprobs":null,"finish_reason":null}]}\n\n'
        return self._heads[index] + _encode(token_ids) + tail

    def event(self, index: int, output: RequestOutput) -> bytes:
        if output.finish_reason is None:
            plain = self.plain_event(index, output.text, output.token_ids)
            if plain is not None:
                return plain
        self._num_tokens[index] += len(output.token_ids)
        self._count_prompt(output)
        event = TokensEvent(self._response_id, [self._choice(index, output)])
        if self._usage.in_each_event:
            event.usage = self._usage_of(self._num_tokens[index])
        return b"data: " + _encode(event) + b"\n\n"

    def end(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._usage.at_end:
            return done
        event = TokensEvent(self._response_id, [], self._usage_of(sum(self._num_tokens)))
        return b"data: " + _encode(event) + b"\n\n" + done

    def error_event(self, index: int, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        self._count_prompt(outputs[0])
        reply = TokensReply(
            request_id=self._response_id,
            model=self._model,
            created=self._created,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            usage=self._usage_of(sum(len(output.token_ids) for output in outputs)),
        )
        if self._has_prompt_logprobs:
            first = outputs[0]
            reply.prompt_logprobs = prompt_logprobs(
                first.prompt_logprobs, _NAMES, first.num_prompt_tokens
            )
        return _encode(reply)

    def _choice(self, index: int, output: RequestOutput) -> TokensChoice:
        choice = TokensChoice(
            index=index,
            token_ids=output.token_ids,
            logprobs=chat_logprobs(output.logprobs, _NAMES) if self._has_logprobs else None,
            finish_reason=output.finish_reason,
        )
        if output.finish_reason == "abort":
            choice.abort_cause = output.abort_cause
        if output.finish_reason is not None:
            choice.weight_versions = output.weight_spans
        if output.resume_from is not None:
            choice.resume_from = output.resume_from
        return choice

    def _usage_of(self, num_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=self._num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached_tokens),
        )

    def _count_prompt(self, output: RequestOutput) -> None:
        self._num_prompt_tokens = output.num_prompt_tokens
        self._num_cached_tokens = output.num_cached_tokens
