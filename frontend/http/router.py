"""From a request's method and path to the handler that answers it.

Invariants
- Who may not call a route is refused before the request's body is read.
- Whatever a handler raises becomes an answer, in the route's own error shape; a fault of ours is a
  500 that tells the client nothing of the inside, and is logged.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec

from frontend.http.access import Access, AccessRules
from frontend.http.errors import REFUSALS, ApiError, from_exception
from frontend.http.exchange import Exchange
from ipc.logs import RateLimitedLog

logger = logging.getLogger(__name__)
_refusals = RateLimitedLog(logger)

_MAX_GUESSED = 80
"""No route's path is longer; comparing a longer one would only cost time."""

Handler = Callable[[Exchange], Coroutine[Any, Any, None] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One operation of the API. What its schema says goes to the OpenAPI page."""

    method: str
    path: str
    """May hold parameters: `/v1/models/{model}`."""
    handler: Handler
    """Answers at once or later, or is a coroutine function and runs as a task."""
    summary: str
    tag: str
    """Whose dialect it is."""
    access: Access = Access.CLIENT
    body: type[msgspec.Struct] | None = None
    body_is_optional: bool = False
    """Whether an empty body may be sent."""
    takes_safetensors: bool = False
    """Whether the body may be a safetensors file instead; the other fields are the query's then."""
    query: type[msgspec.Struct] | None = None
    reply: Any = None
    """The type of the JSON in a 200."""
    event: Any = None
    """The type of one server-sent event's data, where the route can stream."""
    error_body: Callable[[ApiError], bytes] | None = None
    """A dialect's own error shape; None is OpenAI's."""


class Router:
    """Finds routes and runs them; the `Service` of all connections."""

    def __init__(self, routes: Iterable[Route], rules: AccessRules) -> None:
        self.routes = tuple(routes)
        self._rules = rules
        self.running: set[asyncio.Task[None]] = set()
        """Handlers that are coroutines."""
        by_path: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        for route in self.routes:
            methods = by_path.setdefault(route.path, {})
            assert route.method not in methods, f"two routes for {route.method} {route.path}"
            methods[route.method] = route
        for path, methods in by_path.items():
            if "{" in path:
                pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(path))
                self._patterns.append((re.compile(pattern), methods))
        self._by_path = {path: methods for path, methods in by_path.items() if "{" not in path}

    def screen(self, exchange: Exchange) -> None:
        """Raises ApiError if there is no such route, or if this client may not call it."""
        route = self._find(exchange)
        try:
            self._rules.check(route.access, exchange)
        except ApiError as error:
            _refusals.info(
                "refused %s %s with %d: %s", route.method, route.path, error.status, error
            )
            raise

    def handle(self, exchange: Exchange) -> None:
        route = self._find(exchange)
        try:
            running = route.handler(exchange)
        except Exception as error:
            _answer_error(exchange, route, error)
            return
        if running is not None:
            task = asyncio.get_running_loop().create_task(_run(exchange, route, running))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    def _find(self, exchange: Exchange) -> Route:
        methods = self._by_path.get(exchange.path) or self._match(exchange)
        method = "GET" if exchange.method == "HEAD" else exchange.method
        route = methods.get(method)
        if route is None:
            allowed = ", ".join(sorted(methods))
            raise ApiError(
                405,
                f"{exchange.path:.80} takes {allowed}, not {exchange.method}",
                headers=[("allow", allowed)],
            )
        return route

    def _match(self, exchange: Exchange) -> dict[str, Route]:
        for pattern, methods in self._patterns:
            if (match := pattern.fullmatch(exchange.path)) is not None:
                exchange.path_params = {
                    name: unquote(value) for name, value in match.groupdict().items()
                }
                return methods
        path = unquote(exchange.path)
        if path in self._by_path:
            return self._by_path[path]
        nearest = difflib.get_close_matches(path[:_MAX_GUESSED], self._by_path, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else "GET /openapi.json lists the routes"
        raise ApiError(404, f"there is no route {exchange.path!r:.80}; {remedy}")


async def _run(exchange: Exchange, route: Route, running: Coroutine[Any, Any, None]) -> None:
    try:
        await running
    except Exception as error:
        _answer_error(exchange, route, error)


def _answer_error(exchange: Exchange, route: Route, error: Exception) -> None:
    if isinstance(error, REFUSALS):
        error = from_exception(error)
    if not isinstance(error, ApiError):
        logger.error("%s %s failed", exchange.method, exchange.path, exc_info=error)
        exchange.fail()
    elif not exchange.is_finished:
        error.answer(exchange, route.error_body(error) if route.error_body is not None else None)
