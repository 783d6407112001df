"""SGLang's `POST /abort_request`.

SGLang answers with an empty body before the effect; here it comes after it, with a receipt. A call
that names nothing aborts nothing, and is answered with 200 all the same.
"""

from __future__ import annotations

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.errors import InvalidRequestError
from frontend.http import control
from frontend.http.access import Access
from frontend.http.bodies import json_spelling, read_body
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Route
from frontend.outputs import AbortReceipt
from frontend.sglang.aborts import read_abort


class SglangAbortBody(msgspec.Struct, forbid_unknown_fields=True):
    """`abort_all` overrides the others. SGLang's own server knows `rid` and `abort_all` only."""

    rid: str | control.Ids | None = None
    """Exact ids, of requests or of batches."""
    abort_all: bool = False
    prefix: bool = False
    """Take `rid` for the beginning of ids."""
    tag: str | None = None
    wait: bool = True
    """Whether to answer after the effect."""


def routes(engine: AsyncEngine) -> list[Route]:
    async def abort_request(exchange: Exchange) -> None:
        body = read_body(exchange.body, SglangAbortBody)
        receipt = AbortReceipt()
        try:
            selector = read_abort(body.rid, body.abort_all, prefix=body.prefix, tag=body.tag)
        except InvalidRequestError as error:
            raise ApiError(400, json_spelling(str(error)), param="rid") from None
        if selector is not None:
            receipt = await control.abort(engine, selector, wait=body.wait)
        exchange.respond_json(control.Receipt.of(receipt))

    return [
        Route(
            method="POST",
            path="/abort_request",
            handler=abort_request,
            summary="Abort requests by rid, or all; answers after the effect",
            tag="SGLang",
            access=Access.ADMIN,
            body=SglangAbortBody,
            reply=control.Receipt,
        )
    ]
