"""The HTTP routes, as an ASGI application over an `AsyncEngine`.

Routes are thin. They parse, call the engine, and shape what comes back; whatever matters to a
request's life happens in the engine's front end, where the Python API has it too.

Invariants
- A client that hangs up ends its request at once, at any stage.
- Nothing is sent before the first output is there, so an early failure still has its HTTP status.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import closing

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.async_engine import AsyncEngine
from frontend.errors import EngineDeadError, InvalidRequestError
from frontend.http.completions import (
    CompletionFormat,
    CompletionRequest,
    parse_completion,
    parse_request_id,
)
from frontend.http.errors import ApiError, from_exception, from_terminal
from frontend.http.hang_up import EndOnHangUp
from frontend.requests.stream import RequestStream

MAX_BODY_BYTES = 64 * 1024 * 1024
_DONE = b"data: [DONE]\n\n"


def create_app(engine: AsyncEngine, api_key: str | None = None) -> ASGIApp:
    """The ASGI application over a started engine."""
    started_at_s = int(time.time())

    async def health(_: Request) -> Response:
        return Response(status_code=200 if engine.is_healthy else 503)

    async def models(_: Request) -> Response:
        card = {
            "id": engine.served_model_name,
            "object": "model",
            "created": started_at_s,
            "owned_by": "caesura",
            "max_model_len": engine.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [card]})

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", Completions(engine), methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _answer_api_error,
            InvalidRequestError: _answer_engine_error,
            EngineDeadError: _answer_engine_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
        },
    )
    return app if api_key is None else RequireKey(app, api_key)


class Completions:
    """`POST /v1/completions`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as an ASGI application, because a stream outlives a function's return."""
        request = Request(scope, receive)
        call = parse_completion(await read_json(request))
        if call.model not in (None, self._engine.served_model_name):
            raise ApiError(
                404,
                f"the model {call.model!r} is not served here; "
                f"this server has {self._engine.served_model_name!r}",
                param="model",
                code="model_not_found",
            )
        header_id = parse_request_id(request.headers.get("x-request-id"), "X-Request-Id")
        request_id = call.request_id or header_id or secrets.token_hex(16)
        response_id = f"cmpl-{request_id}"
        async with EndOnHangUp(receive):
            with closing(
                self._engine.generate(
                    call.prompt,
                    prompt_token_ids=call.prompt_token_ids,
                    sampling_params=call.sampling_params,
                    request_id=request_id,
                    aliases=_aliases(request_id, response_id, header_id),
                    priority=call.priority,
                    tags=call.tags,
                )
            ) as stream:
                answer = Answer(send, header_id)
                shape = CompletionFormat(
                    response_id=response_id,
                    model=self._engine.served_model_name,
                    request=call,
                    prompt_token_ids=await self._prompt_token_ids(call),
                    token_text=self._token_text,
                )
                if call.stream:
                    await _send_events(stream, shape, answer)
                else:
                    result = await stream.result()
                    if (error := from_terminal(result)) is not None:
                        raise error
                    await answer.send_json(shape.result(result))

    async def _prompt_token_ids(self, call: CompletionRequest) -> list[int]:
        """The prompt's ids, if they are to be returned."""
        if not call.return_token_ids:
            return []
        if call.prompt is None:
            return call.prompt_token_ids or []
        assert self._engine.tokenizer is not None, "a text prompt was accepted"
        return await asyncio.to_thread(self._engine.tokenizer.encode, call.prompt)

    def _token_text(self, token_id: int) -> str:
        tokenizer = self._engine.tokenizer
        return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _aliases(request_id: str, *names: str | None) -> tuple[str, ...]:
    """The other names under which a caller may know its request, each once."""
    return tuple({name for name in names if name is not None and name != request_id})


class Answer:
    """One HTTP answer, with the caller's X-Request-Id in its headers."""

    def __init__(self, send: Send, header_id: str | None) -> None:
        self._send = send
        self._headers = (
            [] if header_id is None else [(b"x-request-id", header_id.encode("latin-1"))]
        )

    async def send_json(self, body: bytes) -> None:
        """The whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(b"application/json", length)
        await self._send({"type": "http.response.body", "body": body})

    async def start_events(self) -> None:
        """The head of a stream of server-sent events."""
        await self._start(b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"))

    async def send_event(self, event: bytes, *, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": event, "more_body": not is_last})

    async def _start(self, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        head = [(b"content-type", content_type), *headers, *self._headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})


async def _send_events(stream: RequestStream, shape: CompletionFormat, answer: Answer) -> None:
    has_started = False
    async for output in stream:
        error = from_terminal(output)
        if error is not None and not has_started:
            raise error
        if not has_started:
            await answer.start_events()
            has_started = True
        if error is not None:
            tail = b"data: " + error.body() + b"\n\n" + _DONE
        elif output.finish_reason is None:
            await answer.send_event(shape.chunk(output))
            continue
        else:
            tail = shape.chunk(output)
            if shape.request.include_usage:
                tail += shape.usage_chunk(output)
            tail += _DONE
        await answer.send_event(tail, is_last=True)


async def read_json(request: Request) -> object:
    """The body as JSON. Raises ApiError if it is none or too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body exceeds {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


class RequireKey:
    """Middleware: requests under /v1 need the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                error = ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY"
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_engine_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidRequestError | EngineDeadError)
    return from_exception(error).response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The client hung up while it sent its body."""
    return Response(status_code=499)
