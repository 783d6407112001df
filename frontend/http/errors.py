"""Errors as API clients see them: OpenAI's shape, and the HTTP status."""

from __future__ import annotations

import json
from collections.abc import Sequence

from frontend.errors import (
    CALLERS_FAULTS,
    CONTEXT_LENGTH_EXCEEDED,
    DuplicateRequestIdError,
    EngineDeadError,
    EngineTimeoutError,
    InvalidRequestError,
    OverloadedError,
    PauseConflictError,
    PauseInterruptedError,
    PromptTooLongError,
    ShuttingDownError,
    UtilityCallError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
from frontend.http.exchange import Exchange
from frontend.outputs import AbortCause, RequestOutput

RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The JSON object of OpenAI's API."""
        return json.dumps(
            {
                "error": {
                    "message": str(self),
                    "type": _TYPES.get(self.status, "server_error"),
                    "param": self.param,
                    "code": self.code,
                }
            }
        ).encode()

    def answer(self, exchange: Exchange, body: bytes | None = None) -> None:
        """Send it, in a dialect's own shape if `body` is given."""
        headers = list(self.headers)
        if self.status == 503:
            headers.append(("retry-after", str(RETRY_AFTER_S)))
        if self.status == 401:
            headers.append(("www-authenticate", "Bearer"))
        exchange.respond(self.status, self.body() if body is None else body, headers=headers)


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "invalid_request_error",
    431: "invalid_request_error",
    503: "service_unavailable",
    504: "timeout_error",
}


REFUSALS = (
    InvalidRequestError,
    OverloadedError,
    EngineDeadError,
    EngineTimeoutError,
    PauseConflictError,
    PauseInterruptedError,
    UtilityCallError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
"""What the calls of `AsyncEngine` raise if they cannot be served as they stand."""


def from_exception(error: Exception) -> ApiError:
    """The answer to one of `REFUSALS`."""
    message = str(error)
    match error:
        case PromptTooLongError():
            return ApiError(400, message, param="prompt", code=CONTEXT_LENGTH_EXCEEDED)
        case DuplicateRequestIdError():
            return ApiError(400, message, param="request_id")
        case PauseConflictError() | PauseInterruptedError() | WeightUpdateConflictError():
            return ApiError(409, message)
        case InvalidRequestError() | WeightUpdateError():
            return ApiError(400, message)
        case EngineTimeoutError():
            return ApiError(504, message, code="timeout")
        case UtilityCallError() | WeightUpdateIncompleteError():
            return ApiError(500, message, code="engine_error")
        case OverloadedError():
            return ApiError(503, message, code=error.code)
        case ShuttingDownError():
            return ApiError(503, message, code="shutdown")
    return ApiError(503, message, code="engine_dead")


def from_terminal(output: RequestOutput) -> ApiError | None:
    """The error that a request ended with; None for an end that is a success, also by an abort."""
    if output.abort_cause is AbortCause.SHUTDOWN:
        return ApiError(503, "the server is shutting down; send the request again", code="shutdown")
    if output.finish_reason != "error":
        return None
    if output.error is None:
        return ApiError(500, "the engine met an error")
    status = 503 if output.error.retryable else 500
    if output.error.code in CALLERS_FAULTS:
        status = 400
    param = "prompt" if output.error.code == CONTEXT_LENGTH_EXCEEDED else None
    return ApiError(status, output.error.message, param=param, code=output.error.code)


def slow_reader(num_unread_tokens: int, limit: int) -> ApiError:
    return ApiError(
        503,
        f"{num_unread_tokens} tokens waited for the client to read them, and the limit is "
        f"max_unread_tokens={limit}; read faster, or ask for fewer tokens",
        code="slow_reader",
    )
