"""FastDeploy's abort route, as of its PR 6992, which answers with what was aborted."""

from __future__ import annotations

from typing import Literal

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.http import control
from frontend.http.access import Access
from frontend.http.bodies import read_body
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.fastdeploy.replies import control_id
from frontend.http.router import Route
from frontend.outputs import AbortReceipt
from frontend.requests.explicit_abort import Selector

_NO_SELECTOR = "must provide abort_all=true or req_ids"


class FastDeployAbortBody(msgspec.Struct, forbid_unknown_fields=True):
    """Either `req_ids` or `abort_all`, which overrides them."""

    req_ids: control.Ids = []
    """Exact ids; the id that a response carried is one."""
    abort_all: bool = False
    wait: bool = True
    """Whether to answer after the effect; FastDeploy's own server has no such field."""


class Aborted(msgspec.Struct):
    request_id: str
    output_token_count: int


class AbortResult(msgspec.Struct):
    aborted: list[Aborted]
    not_found: list[str]
    """Ids that name no live request."""


class FastDeployAbortReply(control.Receipt, kw_only=True):
    request_id: str
    """Of this call: `control-` and a UUID."""
    status: Literal["success", "error"] = "success"
    error_message: str | None = None
    result: AbortResult


def routes(engine: AsyncEngine) -> list[Route]:
    async def abort_requests(exchange: Exchange) -> None:
        body = read_body(exchange.body, FastDeployAbortBody)
        if not body.abort_all and not body.req_ids:
            raise ApiError(400, _NO_SELECTOR)
        if body.abort_all:
            selector = Selector(everything=True)
        else:
            selector = Selector(request_ids=body.req_ids)
        exchange.respond_json(_reply(await control.abort(engine, selector, wait=body.wait)))

    return [
        Route(
            method="POST",
            path="/v1/abort_requests",
            handler=abort_requests,
            summary="Abort requests by id, or all; answers after the effect",
            tag="FastDeploy",
            access=Access.ADMIN,
            body=FastDeployAbortBody,
            reply=FastDeployAbortReply,
            error_body=_error_body,
        )
    ]


def _error_body(error: ApiError) -> bytes:
    """FastDeploy's shape for the error that FastDeploy has; the others keep OpenAI's."""
    if str(error) == _NO_SELECTOR:
        return msgspec.json.encode({"error": _NO_SELECTOR})
    return error.body()


def _reply(receipt: AbortReceipt) -> FastDeployAbortReply:
    aborted = [
        Aborted(request_id, request.num_output_tokens)
        for request_id, request in receipt.requests.items()
        if request.status == "aborted"
    ]
    not_found = [name for name, request in receipt.requests.items() if request.status == "unknown"]
    return FastDeployAbortReply.of(
        receipt,
        request_id=control_id(),
        result=AbortResult(aborted, not_found),
    )
