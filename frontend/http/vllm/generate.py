"""vLLM's `POST /inference/v1/generate`: token ids in, token ids out, never any text.

Names and shapes are those of vLLM's `token_in_token_out` protocol. The answer's id is
`generate-tokens-` and the request's. Here the last event always comes, also of a request that was
aborted without new tokens, and says why it ended.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from msgspec import Meta, Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import not_supported, read_body
from frontend.http.errors import ApiError
from frontend.http.exchange import MAX_REQUEST_ID_LENGTH, REQUEST_ID_HEADER, Exchange
from frontend.http.generation import generate
from frontend.http.openai.calls import CallNames, check_model, check_resumed
from frontend.http.openai.requests import (
    MAX_CHOICES,
    CacheSalt,
    Count,
    Int64,
    NumAlternatives,
    Penalty,
    Positive,
    Resumed,
    StopString,
    StopStrings,
    StreamOptions,
    TokenId,
)
from frontend.http.router import Route
from frontend.http.vllm.tokens import TokensEvent, TokensForm, TokensReply, UsageWanted
from frontend.ids import new_id
from frontend.requests.new_request import NewRequest
from frontend.sampling_params import SamplingParams
from ipc.expect import INT64_MAX

RequestId = Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID_LENGTH)]


class SamplingBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's sampling parameters; null stands for a default."""

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    seed: Annotated[Int64, Meta(description="Choice i draws with seed + i.")] | None = None
    max_tokens: Annotated[Positive, Meta(description="Null: as many as fit.")] | None = None
    min_tokens: Count | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[TokenId, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    logprobs: NumAlternatives | None = None
    prompt_logprobs: NumAlternatives | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    detokenize: bool | None = None
    output_kind: int | None = None
    skip_clone: bool | None = None
    spaces_between_special_tokens: bool | None = None

    bad_words: list[None] | None = None
    extra_args: None = None
    repetition_detection: None = None
    structured_outputs: None = None
    thinking_token_budget: None = None
    truncate_prompt_tokens: None = None


_HAVE_NO_TEXT = {"detokenize", "output_kind", "skip_clone", "spaces_between_special_tokens"}
"""They shape the text or how it is delivered inside vLLM; neither exists here."""
_SAMPLING_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name in SamplingBody.__struct_fields__ and field.name not in _HAVE_NO_TEXT
)


class TokensBody(Struct, kw_only=True):
    token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    """One of this and `resume_from`."""
    resume_from: Resumed | None = None
    sampling_params: SamplingBody
    request_id: RequestId | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[Int64, Meta(description="Lower runs first.")] = 0
    tags: Annotated[list[str], Meta(description="Names to abort many calls by.")] = []
    timeout_s: (
        Annotated[
            float,
            Meta(gt=0.0, description="The age at which it is aborted, with its partial result."),
        ]
        | None
    ) = None
    cache_salt: CacheSalt | None = None
    features: None = None
    kv_transfer_params: None = None


def routes(engine: AsyncEngine) -> list[Route]:
    def handle(exchange: Exchange) -> None:
        body = read_body(exchange.body, TokensBody)
        check_model(body.model, engine.served_model_name)
        given = body.sampling_params
        if given.prompt_logprobs is not None and body.stream:
            path = "sampling_params.prompt_logprobs"
            raise not_supported(path, given.prompt_logprobs, "it needs stream=false")
        header_id = exchange.headers.get(REQUEST_ID_HEADER) or None
        request_id = body.request_id or header_id or new_id()
        names = CallNames(request_id, header_id, f"generate-tokens-{request_id}")
        requests = read_requests(body, names)
        options = body.stream_options or StreamOptions()
        form = TokensForm(
            names.response_id,
            engine.served_model_name,
            num_choices=len(requests),
            has_logprobs=given.logprobs is not None,
            has_prompt_logprobs=given.prompt_logprobs is not None,
            usage=UsageWanted(bool(options.include_usage), bool(options.continuous_usage_stats)),
        )
        generate(exchange, engine, requests, form, stream=bool(body.stream))

    return [
        Route(
            method="POST",
            path="/inference/v1/generate",
            handler=handle,
            summary="Generate from token ids to token ids",
            tag="vLLM",
            access=Access.CLIENT,
            body=TokensBody,
            reply=TokensReply,
            event=TokensEvent,
        )
    ]


def read_requests(body: TokensBody, names: CallNames) -> list[NewRequest]:
    """The requests of a call; with `n` above 1 they are called by the call's id and `-0`, ..., and
    share all the call's names.
    """
    given = body.sampling_params
    num_choices = given.n or 1
    is_resumed = body.resume_from is not None
    if (body.token_ids is not None) == is_resumed:
        raise ApiError(400, "give either token_ids or resume_from, one of them", param="token_ids")
    check_resumed(num_choices, is_resumed)
    is_batch = num_choices > 1
    return [
        NewRequest(
            prompt_token_ids=body.token_ids,
            resume_from=body.resume_from,
            sampling_params=params,
            request_id=f"{names.request_id}-{index}" if is_batch else names.request_id,
            batch_id=names.request_id if is_batch else None,
            aliases=names.aliases,
            priority=body.priority,
            tags=body.tags,
            timeout_s=body.timeout_s,
            cache_salt=body.cache_salt,
        )
        for index, params in enumerate(_sampling_params(given, num_choices))
    ]


def _sampling_params(given: SamplingBody, num_choices: int) -> list[SamplingParams]:
    """Those of each choice; seeded ones differ by their seed."""
    fields = {
        name: value for name in _SAMPLING_FIELDS if (value := getattr(given, name)) is not None
    }
    try:
        # Text is needed to find a stop string, and for nothing else.
        params = SamplingParams(**fields, detokenize=bool(given.stop))
        if (seed := params.seed) is None:
            return [params] * num_choices
        return [dataclasses.replace(params, seed=seed + index) for index in range(num_choices)]
    except ValueError as error:
        raise ApiError(400, f"sampling_params: {error}", param="sampling_params") from None
