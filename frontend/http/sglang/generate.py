"""SGLang's `POST /generate`: text or token ids in, cumulative results out.

A field that is not known here, or asks for what Caesura does not do, is refused, unless it is null
or false.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.errors import (
    CONTEXT_LENGTH_EXCEEDED,
    DuplicateRequestIdError,
    InvalidRequestError,
    PromptTooLongError,
)
from frontend.guesses import known_names
from frontend.http.access import Access
from frontend.http.bodies import json_spelling, read_body
from frontend.http.errors import ApiError
from frontend.http.exchange import MAX_REQUEST_ID_LENGTH, REQUEST_ID_HEADER, Exchange
from frontend.http.generation import generate
from frontend.http.router import Route
from frontend.http.sglang.events import GenerateForm
from frontend.outputs import AbortCause, ResumeFrom, WeightSpan
from frontend.sampling_params import SGLANG_NAMES, in_sglang_names
from frontend.sglang.calls import NOT_SUPPORTED, GenerateCall, read_call
from frontend.sglang.results import LogprobEntry

MAX_TOP_LOGPROBS = 128
"""Most alternatives told of one token. SGLang has no limit; a whole vocabulary for each token would
hold up every other stream."""

NumTop = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)]
RequestId = Annotated[str, msgspec.Meta(max_length=MAX_REQUEST_ID_LENGTH)]


class SglangGenerateBody(msgspec.Struct, kw_only=True):
    """`text`, `input_ids` or `resume_from`; what is no list holds for all prompts."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    resume_from: ResumeFrom | list[ResumeFrom] | None = None
    """In place of a prompt: that of an aborted result, to go on where it ended. Its seed, and what
    its `max_new_tokens` and `min_new_tokens` left, hold on; other parameters should be sent again.
    """
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    """SGLang's, `n` among them; `max_new_tokens` is 128 if left out."""
    rid: RequestId | list[RequestId] | None = None
    """The request's id, or that of its batch, whose requests are then `rid_0`, `rid_1`, ..."""
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    top_logprobs_num: NumTop | list[NumTop] | None = None
    logprob_start_len: int | list[int] | None = None
    """From which position of the prompt on its log-probabilities are told; -1 tells none."""
    return_text_in_logprobs: bool = False
    priority: int | None = None
    """A higher one runs first."""
    tags: list[str] = []
    """By which requests can be aborted; SGLang's own server has none."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """The age at which a request is aborted, with its partial result; likewise Caesura's own."""


class Stopped(msgspec.Struct, tag_field="type", tag="stop"):
    matched: int | str | None
    """The token or the stop string that ended it."""


class LengthReached(msgspec.Struct, tag_field="type", tag="length"):
    length: int


class Aborted(msgspec.Struct, tag_field="type", tag="abort"):
    """Ended by someone, or by an error, which then has a status code."""

    message: str
    status_code: int | None
    err_type: str | None
    abort_cause: AbortCause | msgspec.UnsetType | None = msgspec.UNSET


class MetaInfo(msgspec.Struct, omit_defaults=True):
    id: str
    finish_reason: Stopped | LengthReached | Aborted | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    """By which the last token was sampled; of an unfinished result, that of now."""
    e2e_latency: float
    """Seconds."""
    weight_versions: list[WeightSpan] | msgspec.UnsetType = msgspec.UNSET
    """At the end: by which weights the tokens were sampled."""
    resume_from: ResumeFrom | msgspec.UnsetType = msgspec.UNSET
    """Of an aborted request: to be sent instead of a prompt, to go on where it ended."""
    input_token_logprobs: list[LogprobEntry] = []
    """(logprob, token id, text if asked for) of the prompt's tokens; the first has none."""
    output_token_logprobs: list[LogprobEntry] = []
    input_top_logprobs: list[list[LogprobEntry] | None] = []
    output_top_logprobs: list[list[LogprobEntry]] = []


class ErrorInStream(msgspec.Struct, rename={"kind": "type"}):
    message: str
    kind: str
    code: int
    """An HTTP status."""
    retryable: bool


class SglangErrorEvent(msgspec.Struct, omit_defaults=True):
    """A request failed after its stream had begun."""

    error: ErrorInStream
    index: int | None = None


class SglangResult(msgspec.Struct, omit_defaults=True):
    """A list of these for a list of prompts, or with `n` above 1."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | None = None
    """In a stream of several requests: whose event this is."""


def routes(engine: AsyncEngine) -> list[Route]:
    tokenizer = engine.tokenizer
    token_text = None if tokenizer is None else tokenizer.token_text

    def handle(exchange: Exchange) -> None:
        body = read_body(exchange.body, SglangGenerateBody)
        header_id = exchange.headers.get(REQUEST_ID_HEADER) or None
        call = _read_call(body, _other_fields(exchange.body), header_id)
        form = GenerateForm(call, token_text, lambda: engine.weight_version)
        try:
            generate(exchange, engine, call.requests, form, stream=bool(body.stream))
        except DuplicateRequestIdError as error:
            message = f"Duplicate request ID detected: {error}"
            raise ApiError(400, message, param="rid") from None
        except InvalidRequestError as error:
            raise _refusal(error, "text" if body.input_ids is None else "input_ids") from None

    return [
        Route(
            method=method,
            path="/generate",
            handler=handle,
            summary="Generate from one prompt or several",
            tag="SGLang",
            access=Access.CLIENT,
            body=SglangGenerateBody,
            reply=SglangResult | list[SglangResult],
            event=(SglangResult, SglangErrorEvent),
        )
        for method in ("POST", "PUT")
    ]


def _read_call(
    body: SglangGenerateBody, others: Mapping[str, object], header_id: str | None
) -> GenerateCall:
    prompt = "text" if body.input_ids is None else "input_ids"
    try:
        call = read_call(
            body.text,
            body.input_ids,  # type: ignore[arg-type]  # mixed lists are refused with their tokens
            body.sampling_params,
            return_logprob=body.return_logprob,
            top_logprobs_num=body.top_logprobs_num,
            logprob_start_len=body.logprob_start_len,
            return_text_in_logprobs=body.return_text_in_logprobs,
            rid=body.rid,
            call_name=header_id,
            priority=body.priority,
            tags=body.tags,
            timeout_s=body.timeout_s,
            resume_from=body.resume_from,
            others=others,
        )
    except ValueError as error:
        raise _refusal(error, prompt) from None
    if not call.requests:
        raise ApiError(400, "the list of prompts is empty; give at least one", param=prompt)
    return call


def _refusal(error: ValueError, prompt: str) -> ApiError:
    """What is wrong in SGLang's and JSON's words; `prompt` is the field that has the prompts."""
    if str(error).startswith("resume_from"):  # It has the same names in every dialect.
        return ApiError(400, str(error), param="resume_from")
    message = in_sglang_names(str(error)).replace("prompt_token_ids", "input_ids")
    param = None
    if message.startswith("the prompt "):
        param = prompt
    elif (sampling := _SAMPLING_PARAMETER.match(message)) is not None:
        param = f"sampling_params.{sampling[1]}"
    elif (word := _WORD.match(message)) is not None:
        if word[0] in SGLANG_NAMES:
            param = f"sampling_params.{word[0]}"
        elif word[0] in SglangGenerateBody.__struct_fields__ or word[0] in NOT_SUPPORTED:
            param = word[0]
    code = CONTEXT_LENGTH_EXCEEDED if isinstance(error, PromptTooLongError) else None
    return ApiError(400, json_spelling(message), param=param, code=code)


_SAMPLING_PARAMETER = re.compile(r"(?:unknown )?sampling parameter '?(\w*)")
_WORD = re.compile(r"\w+")


def _other_fields(body: bytes) -> dict[str, object]:
    """Those of SGLang's fields that have no place in `SglangGenerateBody`."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    others: dict[str, object] = {}
    for name in fields.keys() - set(SglangGenerateBody.__struct_fields__):
        try:
            value: object = msgspec.json.decode(fields[name])
        except msgspec.ValidationError:  # A number that is out of every range.
            value = bytes(fields[name]).decode()
        if name in NOT_SUPPORTED:
            others[name] = value
        elif value not in (None, False):
            remedy = known_names(name, SglangGenerateBody.__struct_fields__)
            raise ApiError(400, f"unknown field {name!r:.80}; {remedy}", param=name[:80])
    return others
