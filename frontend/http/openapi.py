"""The OpenAPI page of a server: made from its routes, so that it says what they do.

Structs become named schemas. OpenAPI 3.2 is the first that can describe a stream of server-sent
events, by the schema of one event (`itemSchema`); its `data` is JSON of a schema of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from frontend.http.access import Access
from frontend.http.exchange import BINARY, JSON, Exchange
from frontend.http.router import Route

Schema = dict[str, Any]

_PATH_PARAMETER = re.compile(r"\{(\w+)\}")
_REF_TEMPLATE = "#/components/schemas/{name}"


class ErrorDetails(msgspec.Struct, kw_only=True):
    """What went wrong, and where."""

    message: str
    type: str
    param: str | None
    """The field that is to blame."""
    code: str | None


class ErrorReply(msgspec.Struct, kw_only=True):
    """OpenAI's shape of an error."""

    error: ErrorDetails


def routes(described: Sequence[Route]) -> list[Route]:
    """The route of the page that describes the others."""

    @cache
    def page() -> bytes:
        return msgspec.json.encode(document(described))

    def on_openapi(exchange: Exchange) -> None:
        exchange.respond(200, page())

    return [
        Route(
            method="GET",
            path="/openapi.json",
            handler=on_openapi,
            summary="This page",
            tag="Caesura",
            access=Access.OPEN,
        )
    ]


def document(described: Sequence[Route]) -> Schema:
    """The page, as JSON data."""
    schemas = _Schemas(described)
    paths: dict[str, Schema] = {}
    for route in described:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "Caesura",
            "version": _version(),
            "summary": "LLM serving with exact control over the life of a request",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "tags": [{"name": name} for name in dict.fromkeys(route.tag for route in described)],
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "apiKey": _bearer("The server's --api-key, if it has one."),
                "adminKey": _bearer(
                    "The server's --admin-api-key; without one its --api-key; without either, "
                    "control routes answer clients on the same machine only."
                ),
            },
        },
    }


class _Schemas:
    """The schemas of all types that routes speak of, each made once."""

    def __init__(self, described: Iterable[Route]) -> None:
        types: list[Any] = [ErrorReply]
        for route in described:
            given = (route.body, route.query, route.reply, *_event_kinds(route))
            types += [kind for kind in given if kind is not None and kind not in types]
        schemas, self.components = msgspec.json.schema_components(types, ref_template=_REF_TEMPLATE)
        self._types, self._schemas = types, tuple(schemas)

    def of(self, kind: Any) -> Schema:
        return self._schemas[self._types.index(kind)]

    def query_parameters(self, kind: type[msgspec.Struct]) -> list[Schema]:
        component = self.components[self.of(kind)["$ref"].rpartition("/")[2]]
        return [
            {
                "name": name,
                "in": "query",
                "required": name in component.get("required", ()),
                "schema": schema,
            }
            for name, schema in component["properties"].items()
        ]


_SECURITY: dict[Access, list[Schema]] = {
    Access.OPEN: [],
    Access.CLIENT: [{"apiKey": []}, {}],  # The empty one: a server without keys asks for none.
    Access.ADMIN: [{"adminKey": []}, {}],
}


def _operation(route: Route, schemas: _Schemas) -> Schema:
    path_parameters: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PATH_PARAMETER.findall(route.path)
    ]
    query = [] if route.query is None else schemas.query_parameters(route.query)
    operation: Schema = {
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', route.path)}",
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": path_parameters + query,
        "security": _SECURITY[route.access],
        "responses": _responses(route, schemas),
    }
    if route.body is not None:
        content: Schema = {JSON: {"schema": schemas.of(route.body)}}
        if route.takes_safetensors:
            content[BINARY] = {}
        operation["requestBody"] = {"required": not route.body_is_optional, "content": content}
    return operation


def _responses(route: Route, schemas: _Schemas) -> Schema:
    content: Schema = {}
    if route.reply is not None:
        content[JSON] = {"schema": schemas.of(route.reply)}
    if route.event is not None:
        events = [schemas.of(kind) for kind in _event_kinds(route)]
        content["text/event-stream"] = {"itemSchema": _event(events)}
    faults = {
        "400": "A field is wrong, or the fields do not go together; the message says which.",
        "503": "Nothing can serve it now; Retry-After says when to try again.",
        "default": "Any other fault.",
    }
    if route.body is not None:
        faults["413"] = "The body is too large."
    if route.access is not Access.OPEN:
        faults["401"] = "The API key is missing or wrong."
    if route.access is Access.ADMIN:
        faults["403"] = "Without a key, control is for clients on the same machine."
    if "{" in route.path or "model" in getattr(route.body, "__struct_fields__", ()):
        faults["404"] = "There is no such thing here."
    # A dialect's own error shape is JSON too, and its own affair.
    error = schemas.of(ErrorReply) if route.error_body is None else {}
    responses: Schema = {"200": {"description": "Done.", "content": content}}
    for status, words in sorted(faults.items()):
        responses[status] = {"description": words, "content": {JSON: {"schema": error}}}
    return responses


def _event_kinds(route: Route) -> Sequence[Any]:
    """The types of an event's data; where the route names only one, an error is the other."""
    if route.event is None:
        return ()
    return route.event if isinstance(route.event, tuple) else (route.event, ErrorReply)


def _event(kinds: list[Schema]) -> Schema:
    data = {"contentMediaType": JSON, "contentSchema": {"anyOf": kinds}}
    last = {"const": "[DONE]"}
    return {
        "type": "object",
        "properties": {"data": {"type": "string", "anyOf": [data, last]}},
        "required": ["data"],
    }


def _bearer(words: str) -> Schema:
    return {"type": "http", "scheme": "bearer", "description": words}


def _version() -> str:
    try:
        return version("caesura")
    except PackageNotFoundError:  # It runs from a checkout.
        return "0"
