"""Errors as API clients see them: OpenAI's shape, and the HTTP status."""

from __future__ import annotations

import json

from starlette.responses import Response

from frontend.errors import (
    CALLERS_FAULTS,
    CONTEXT_LENGTH_EXCEEDED,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
)
from frontend.outputs import AbortCause, RequestOutput, RequestResult

RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field that is to blame."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

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

    def response(self) -> Response:
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status == 503 else None
        return Response(self.body(), self.status, headers, media_type="application/json")


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    503: "service_unavailable",
}


def from_exception(error: InvalidRequestError | EngineDeadError) -> ApiError:
    """What `AsyncEngine.generate` raised."""
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param="prompt", code=CONTEXT_LENGTH_EXCEEDED)
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error))
    return ApiError(503, str(error), code="engine_dead")


def from_terminal(output: RequestOutput | RequestResult) -> ApiError | None:
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
