"""FastDeploy's `GET /v1/is_paused` and `POST /v1/update_weights`.

FastDeploy demands a pause before an update and answers 500 without; here an update pauses by itself
if nobody has. It never resumes what others have paused.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import not_supported, read_optional_body
from frontend.http.control import Name
from frontend.http.exchange import Exchange
from frontend.http.fastdeploy.replies import control_id, error_body
from frontend.http.router import Route
from frontend.http.weights import Version, WeightsReply, update_from_path
from ipc.pause import EngineState


class PausedResult(Struct):
    is_paused: bool
    """False while a pause drains."""
    state: EngineState


class IsPausedReply(Struct, kw_only=True):
    request_id: str = msgspec.field(default_factory=control_id)
    status: Literal["success"] = "success"
    error_message: None = None
    result: PausedResult


class UpdateBody(Struct, forbid_unknown_fields=True):
    version: Version | None = None
    """The label of the new weights."""
    path: Name | None = None
    """A model's directory or a `.safetensors` file, on the engines' machine. Null: the directory
    that is served, to be read again. FastDeploy's own server has no such field."""
    rsync_config: Any = None
    """Not supported: give `path`."""


class UpdateReply(Struct, kw_only=True):
    request_id: str = msgspec.field(default_factory=control_id)
    status: Literal["success"] = "success"
    error_message: None = None
    result: WeightsReply


def routes(engine: AsyncEngine) -> list[Route]:
    def is_paused(exchange: Exchange) -> None:
        state = engine.pause_state.state
        exchange.respond_json(IsPausedReply(result=PausedResult(state == "paused", state)))

    async def update_weights(exchange: Exchange) -> None:
        body = read_optional_body(exchange.body, UpdateBody)
        if body.rsync_config is not None:
            remedy = "copy the weights to the engines' machine, and name the directory as path"
            raise not_supported("rsync_config", body.rsync_config, remedy)
        path = body.path or engine.config.engine.model
        report = await update_from_path(engine, path, version=body.version, mode="keep")
        exchange.respond_json(UpdateReply(result=WeightsReply.of(report)))

    return [
        Route(
            method="GET",
            path="/v1/is_paused",
            handler=is_paused,
            summary="Whether a pause holds; answers at once",
            tag="FastDeploy",
            access=Access.ADMIN,
            reply=IsPausedReply,
            error_body=error_body,
        ),
        Route(
            method="POST",
            path="/v1/update_weights",
            handler=update_weights,
            summary="Load new weights from a directory or a file",
            tag="FastDeploy",
            access=Access.ADMIN,
            body=UpdateBody,
            body_is_optional=True,
            reply=UpdateReply,
            error_body=error_body,
        ),
    ]
