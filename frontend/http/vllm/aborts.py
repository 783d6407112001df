"""vLLM's two abort routes.

That of its development server aborts everything if it is given no ids, with a warning here; that of
its token-in-token-out server wants ids. Both answer before the effect in vLLM, and after it here.
"""

from __future__ import annotations

import logging
from typing import Literal

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.http import control
from frontend.http.access import Access
from frontend.http.bodies import read_body
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Handler, Route
from frontend.requests.explicit_abort import Selector

logger = logging.getLogger(__name__)


class VllmAbortBody(msgspec.Struct, forbid_unknown_fields=True):
    """Which requests to abort."""

    request_ids: control.Ids | None = None
    """Exact: the id that a response carries, the X-Request-Id, or the body's `request_id`."""
    wait: bool = True
    """Whether to answer after the effect; vLLM's own server has no such field."""


class VllmAbortReply(control.Receipt, kw_only=True):
    status: Literal["aborted"] = "aborted"
    aborted: int
    """How many requests."""


def routes(engine: AsyncEngine, *, strict_selectors: bool) -> list[Route]:
    async def abort_requests(exchange: Exchange) -> None:
        body = read_body(exchange.body, VllmAbortBody)
        if body.request_ids:
            await abort(exchange, body, Selector(request_ids=body.request_ids))
            return
        if strict_selectors:
            raise ApiError(
                400,
                "request_ids is empty, which vLLM takes for all requests, and this server runs "
                'with --strict-selectors; name ids, or POST {"abort_all": true} to /v1/abort',
                param="request_ids",
            )
        logger.warning("POST /abort_requests names no request_ids: every request is aborted")
        await abort(exchange, body, Selector(everything=True))

    async def abort_named(exchange: Exchange) -> None:
        body = read_body(exchange.body, VllmAbortBody)
        if body.request_ids is None:
            raise ApiError(400, "request_ids is missing; name ids", param="request_ids")
        await abort(exchange, body, Selector(request_ids=body.request_ids))

    async def abort(exchange: Exchange, body: VllmAbortBody, selector: Selector) -> None:
        receipt = await control.abort(engine, selector, wait=body.wait)
        exchange.respond_json(VllmAbortReply.of(receipt, aborted=receipt.num_aborted))

    def route(path: str, handler: Handler, summary: str) -> Route:
        return Route(
            method="POST",
            path=path,
            handler=handler,
            summary=summary,
            tag="vLLM",
            access=Access.ADMIN,
            body=VllmAbortBody,
            reply=VllmAbortReply,
        )

    return [
        route(
            "/abort_requests",
            abort_requests,
            "Abort requests by id, or all if none is named; answers after the effect",
        ),
        route(
            "/inference/v1/abort_requests",
            abort_named,
            "Abort requests by id; answers after the effect",
        ),
    ]
