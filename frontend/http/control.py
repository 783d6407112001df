"""Control over HTTP: aborts, in one place for every dialect, and the list of what runs.

A dialect's abort route says which requests it means (`Selector`) and puts the `Receipt` into its
reply; the abort itself is the engine's.

Invariant: an abort is answered after its effect, unless its caller says `wait: false`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.errors import InvalidRequestError
from frontend.http.access import Access
from frontend.http.bodies import json_spelling, read_body, read_query
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Route
from frontend.outputs import AbortCause, AbortedRequest, AbortReceipt, LiveRequest, Stage
from frontend.requests.explicit_abort import Selector

DEFAULT_TIMEOUT_S = 5.0
MAX_IDS = 65_536
"""The most ids of one abort; `abort_all`, a prefix or a tag name any number."""
Ids = Annotated[list[str], msgspec.Meta(max_length=MAX_IDS)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Names = Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_IDS)]


class Receipt(msgspec.Struct, kw_only=True):
    """What an abort did. Every abort route has these fields in its reply."""

    requests: dict[str, AbortedRequest]
    """By request id. `pending`: not confirmed in time, or not waited for; the effect follows."""
    num_aborted: int
    num_blocks_freed: int
    num_blocks_cached: int
    """KV blocks that left the requests and still hold a prefix for others."""
    engines: dict[int, Literal["ok", "timeout", "error"]]

    @classmethod
    def of(cls, receipt: AbortReceipt, **fields: Any) -> Self:
        """`fields` are those that a dialect's reply adds."""
        return cls(
            requests=receipt.requests,
            num_aborted=receipt.num_aborted,
            num_blocks_freed=receipt.num_blocks_freed,
            num_blocks_cached=receipt.num_blocks_cached,
            engines=receipt.engines,
            **fields,
        )


async def abort(
    engine: AsyncEngine,
    selector: Selector,
    *,
    wait: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> AbortReceipt:
    """Abort what the selector means. Every HTTP route that aborts comes through here."""
    return await engine.abort(
        selector.request_ids,
        prefix=selector.prefix,
        tag=selector.tag,
        abort_all=selector.everything,
        wait=wait,
        timeout_s=timeout_s,
    )


class AbortBody(msgspec.Struct, forbid_unknown_fields=True):
    """Exactly one of `request_id`, `prefix`, `tag` and `abort_all` says what to abort."""

    request_id: Name | Names | None = None
    """Exact: a request's own id, the X-Request-Id it came with, the id its response carries, or the
    id of its batch."""
    prefix: Name | None = None
    """The beginning of any of these."""
    tag: Name | None = None
    abort_all: bool = False
    wait: bool = True
    """Whether to answer after the effect."""
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = DEFAULT_TIMEOUT_S
    """How long to wait at most."""


class RequestsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which requests to list; both may be given."""

    tag: str | None = None
    prefix: str | None = None


class Aborting(msgspec.Struct):
    """An abort under way."""

    cause: AbortCause
    for_s: float


class RequestCard(msgspec.Struct, kw_only=True):
    """A request that holds something, here or in an engine."""

    request_id: str
    aliases: tuple[str, ...]
    """Its further names, that of its batch among them."""
    stage: Stage
    """`ending`: its client has its end, and its engine has not yet confirmed it."""
    age_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    tags: tuple[str, ...]
    engine: int | None
    """None until it was sent to one."""
    priority: int
    aborting: Aborting | None


class RequestsReply(msgspec.Struct):
    requests: list[RequestCard]
    """In order of acceptance."""


def control_routes(engine: AsyncEngine) -> list[Route]:
    """Caesura's own control routes."""

    async def abort_requests(exchange: Exchange) -> None:
        body = read_body(exchange.body, AbortBody)
        names = [body.request_id] if isinstance(body.request_id, str) else body.request_id
        try:
            selector = Selector(
                request_ids=names, prefix=body.prefix, tag=body.tag, everything=body.abort_all
            )
        except InvalidRequestError as error:
            raise ApiError(400, json_spelling(str(error))) from None
        receipt = await abort(engine, selector, wait=body.wait, timeout_s=body.timeout_s)
        exchange.respond_json(Receipt.of(receipt))

    async def list_requests(exchange: Exchange) -> None:
        query = read_query(exchange.query, RequestsQuery)
        live = await engine.list_requests()
        cards = [_card(request) for request in live if _is_wanted(request, query)]
        exchange.respond_json(RequestsReply(cards))

    return [
        Route(
            method="POST",
            path="/v1/abort",
            handler=abort_requests,
            summary="Abort requests by id, prefix or tag, or all; answers after the effect",
            tag="Caesura",
            access=Access.ADMIN,
            body=AbortBody,
            reply=Receipt,
        ),
        Route(
            method="GET",
            path="/requests",
            handler=list_requests,
            summary="The requests that run, wait or end, with their stages",
            tag="Caesura",
            access=Access.ADMIN,
            query=RequestsQuery,
            reply=RequestsReply,
        ),
    ]


def _is_wanted(request: LiveRequest, query: RequestsQuery) -> bool:
    names = (request.request_id, *request.aliases)
    return (query.tag is None or query.tag in request.tags) and (
        query.prefix is None or any(name.startswith(query.prefix) for name in names)
    )


def _card(request: LiveRequest) -> RequestCard:
    aborting = None
    if request.aborting_cause is not None:
        aborting = Aborting(request.aborting_cause, request.aborting_for_s or 0.0)
    return RequestCard(
        request_id=request.request_id,
        aliases=request.aliases,
        stage=request.stage,
        age_s=request.age_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        tags=request.tags,
        engine=request.engine_index,
        priority=request.priority,
        aborting=aborting,
    )
