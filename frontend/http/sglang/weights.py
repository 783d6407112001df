"""SGLang's routes for new weights.

Unless the server is paused, an update waits for the requests that have begun, as in SGLang, or ends
them (`abort_all_requests`); newcomers are held meanwhile. Pickled tensors are not read: they are
sent as a safetensors file, by its path or as the body of the call. An update never needs a flush:
what was cached under other weights is never used.

Between `/begin_weight_update` and `/end_weight_update` each update is a part of one that takes
effect as a whole at the end, with the label that a part named last. Without, each does at once.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Literal, Self

from msgspec import Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import bad_field, not_supported, read_body, read_optional_body, read_query
from frontend.http.control import Name
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Route
from frontend.http.weights import (
    Names,
    Shapes,
    Version,
    WeightsReply,
    is_safetensors,
    read_fields,
    update_from_path,
)
from frontend.weights.update import WeightUpdateReport
from ipc.pause import PauseMode

GROUP = "weight_update_group"
"""SGLang's name of a group that is not named."""
_TENSORS_REMEDY = (
    "pickles are not read; send a safetensors file as the body, with Content-Type: "
    "application/octet-stream and the other fields in the query, or give its path"
)


_MESSAGES = {
    "staged": "The tensors were staged; they take effect with /end_weight_update.",
    "committed": "The weights were updated.",
}


class UpdateOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """What goes with tensors, wherever they come from."""

    weight_version: Version | None = None
    """The label of the new weights; null leaves it as it is."""
    abort_all_requests: bool = False
    """End all requests, with what they have, before the change."""
    load_format: Literal["auto", "safetensors"] | None = None
    flush_cache: bool = True
    """Has no effect, like `torch_empty_cache`: no update needs it."""
    torch_empty_cache: bool = False
    selector: Literal["all", "target"] | None = None


class DiskBody(UpdateOptions, kw_only=True):
    model_path: Name
    """A model's directory, or one `.safetensors` file, on the engines' machine."""
    recapture_cuda_graph: bool = False
    """Has no effect, like the three below, which have none in SGLang either."""
    is_async: bool = False
    keep_pause: bool = False
    token_step: int = 0
    manifest: None = None


class TensorBody(UpdateOptions, kw_only=True):
    path: Name | None = None
    """A safetensors file on the engines' machine."""
    serialized_named_tensors: Any = None
    """Not supported: give `path`."""


class BroadcastBody(UpdateOptions, kw_only=True):
    """Tensors in the order in which they are broadcast."""

    names: Names
    dtypes: list[Name]
    """Such as bfloat16."""
    shapes: Shapes
    group_name: Name = GROUP


class IpcBody(Struct):
    zmq_handles: Any = None


class SessionBody(Struct, forbid_unknown_fields=True):
    selector: Literal["all", "target"] | None = None


class Done(Struct, kw_only=True):
    success: bool = True
    message: str


class UpdateReply(WeightsReply, kw_only=True):
    success: bool = True
    message: str
    num_paused_requests: int = 0
    """Always 0, as in SGLang."""

    @classmethod
    def of(cls, report: WeightUpdateReport, **fields: Any) -> Self:
        return super().of(report, message=_MESSAGES[report.state], **fields)


def error_body(error: ApiError) -> bytes:
    """SGLang's shape of a failed update, and OpenAI's beside it."""
    reply = {"success": False, "message": str(error), "num_paused_requests": 0}
    return json.dumps(reply | json.loads(error.body())).encode()


def routes(engine: AsyncEngine) -> list[Route]:
    end_mode: PauseMode = "wait"

    def answer(exchange: Exchange, report: WeightUpdateReport, mode: PauseMode) -> None:
        """How a part was to pause the engines counts at the end of all."""
        nonlocal end_mode
        if report.state == "staged" and mode == "abort":
            end_mode = mode
        exchange.respond_json(UpdateReply.of(report))

    async def from_disk(exchange: Exchange) -> None:
        body = read_body(exchange.body, DiskBody)
        mode = _mode(body)
        report = await update_from_path(
            engine, body.model_path, version=body.weight_version, mode=mode
        )
        answer(exchange, report, mode)

    async def from_tensor(exchange: Exchange) -> None:
        if is_safetensors(exchange):
            options = read_query(exchange.query, UpdateOptions)
            mode = _mode(options)
            report = await engine.update_weights_from_tensors(
                exchange.body, version=options.weight_version, mode=mode
            )
            answer(exchange, report, mode)
            return
        body = read_fields(exchange, TensorBody)
        if body.serialized_named_tensors is not None:
            path = "serialized_named_tensors"
            raise not_supported(path, body.serialized_named_tensors, _TENSORS_REMEDY)
        if body.path is None or not body.path.endswith(".safetensors"):
            raise bad_field("path", "the path of a .safetensors file", body.path)
        mode = _mode(body)
        report = await update_from_path(engine, body.path, version=body.weight_version, mode=mode)
        answer(exchange, report, mode)

    async def from_distributed(exchange: Exchange) -> None:
        body = read_body(exchange.body, BroadcastBody)
        mode = _mode(body)
        report = await engine.update_weights_from_distributed(
            body.names,
            [dtype.removeprefix("torch.") for dtype in body.dtypes],
            body.shapes,
            group_name=body.group_name,
            version=body.weight_version,
            mode=mode,
        )
        answer(exchange, report, mode)

    def from_ipc(exchange: Exchange) -> None:
        handles = read_body(exchange.body, IpcBody).zmq_handles
        remedy = "call /update_weights_from_tensor or /update_weights_from_distributed"
        raise not_supported("zmq_handles", handles, remedy)

    async def begin(exchange: Exchange) -> None:
        nonlocal end_mode
        read_optional_body(exchange.body, SessionBody)
        await engine.begin_weight_update()
        end_mode = "wait"
        exchange.respond_json(Done(message="The weight update began."))

    async def end(exchange: Exchange) -> None:
        nonlocal end_mode
        read_optional_body(exchange.body, SessionBody)
        report = await engine.end_weight_update(mode=end_mode)
        end_mode = "wait"
        exchange.respond_json(UpdateReply.of(report))

    post = partial(Route, method="POST", tag="SGLang", access=Access.ADMIN, error_body=error_body)
    return [
        post(
            path="/update_weights_from_disk",
            handler=from_disk,
            summary="Load new weights from a directory",
            body=DiskBody,
            reply=UpdateReply,
        ),
        post(
            path="/update_weights_from_tensor",
            handler=from_tensor,
            summary="Load tensors from a safetensors file",
            body=TensorBody,
            takes_safetensors=True,
            query=UpdateOptions,
            reply=UpdateReply,
        ),
        post(
            path="/update_weights_from_distributed",
            handler=from_distributed,
            summary="Receive tensors that a trainer broadcasts",
            body=BroadcastBody,
            reply=UpdateReply,
        ),
        post(
            path="/update_weights_from_ipc",
            handler=from_ipc,
            summary="Not supported; the answer names what is",
            body=IpcBody,
        ),
        post(
            path="/begin_weight_update",
            handler=begin,
            summary="Begin an update of several parts",
            body=SessionBody,
            body_is_optional=True,
            reply=Done,
        ),
        post(
            path="/end_weight_update",
            handler=end,
            summary="Change to the new weights between two steps",
            body=SessionBody,
            body_is_optional=True,
            reply=UpdateReply,
        ),
    ]


def _mode(options: UpdateOptions) -> PauseMode:
    """How to pause for an update."""
    return "abort" if options.abort_all_requests else "wait"
