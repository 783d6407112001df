"""vLLM's routes for weight updates: tensors that a trainer broadcasts, and the weights' label.

The process group is one of `torch.distributed`, the trainer rank 0 of it; each tensor is broadcast
by itself. An update between start and finish takes effect as a whole at the finish; one without a
start, at once. `POST /update_weight_version` is SGLang's too, and served with its routes.
"""

from __future__ import annotations

from functools import partial

from msgspec import Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import not_supported, read_body, read_optional_body, read_query
from frontend.http.control import Name
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Route
from frontend.http.weights import (
    Count,
    Names,
    Port,
    Shapes,
    Version,
    WeightsReply,
    meeting_point,
    update_from_path,
)
from frontend.sglang.results import UNLABELLED
from ipc.pause import PauseMode

GROUP = "weight_transfer"
"""vLLM has one group, without a name."""
_MODE: PauseMode = "keep"
"""Unless the server is paused: requests stand still for the change, and go on with new weights."""


class InitInfo(Struct, forbid_unknown_fields=True, kw_only=True):
    master_address: Name
    master_port: Port
    rank_offset: Count
    """The rank of the first engine."""
    world_size: Count
    """The trainer and all engines."""
    backend: Name = "nccl"
    """`gloo` where engines run on a CPU; vLLM's own server has no such field."""
    packed: bool = False


class InitBody(Struct, forbid_unknown_fields=True):
    init_info: InitInfo


class StartBody(Struct, forbid_unknown_fields=True):
    is_checkpoint_format: bool = True


class UpdateInfo(Struct, forbid_unknown_fields=True, kw_only=True):
    """Tensors in the order in which they are broadcast."""

    names: Names
    dtype_names: list[Name]
    """Such as bfloat16."""
    shapes: Shapes
    packed: bool = False
    packed_buffer_size_bytes: Count | None = None
    packed_num_buffers: Count | None = None


class UpdateBody(Struct, forbid_unknown_fields=True):
    """One of the two."""

    update_info: UpdateInfo | None = None
    weight_dir: Name | None = None
    """A model's directory on the engines' machine: prime-rl's extension of vLLM's server."""


class FinishBody(Struct, forbid_unknown_fields=True):
    weight_version: Version | None = None


class WorldSizeQuery(Struct, forbid_unknown_fields=True):
    include_dp: bool = True


class Done(Struct):
    message: str


class VllmWeightsReply(WeightsReply, kw_only=True):
    message: str


class WeightInfo(Struct):
    weight_version: str


class WorldSize(Struct):
    world_size: int


def routes(engine: AsyncEngine) -> list[Route]:
    async def init(exchange: Exchange) -> None:
        info = read_body(exchange.body, InitBody).init_info
        _check_unpacked("init_info.packed", info.packed)
        address, port = meeting_point(info.master_address, info.master_port)
        await engine.init_weights_update_group(
            master_address=address,
            master_port=port,
            rank_offset=info.rank_offset,
            world_size=info.world_size,
            group_name=GROUP,
            backend=info.backend,
        )
        exchange.respond_json(Done("Weight transfer initialized"))

    async def start(exchange: Exchange) -> None:
        body = read_optional_body(exchange.body, StartBody)
        if not body.is_checkpoint_format:
            remedy = "send tensors by the names that the checkpoint has"
            raise not_supported("is_checkpoint_format", False, remedy)
        await engine.begin_weight_update()
        exchange.respond_json(Done("Weight update started"))

    async def update(exchange: Exchange) -> None:
        body = read_body(exchange.body, UpdateBody)
        if (body.update_info is None) == (body.weight_dir is None):
            raise ApiError(400, "give either update_info or weight_dir", param="update_info")
        if (info := body.update_info) is not None:
            _check_unpacked("update_info.packed", info.packed)
            report = await engine.update_weights_from_distributed(
                info.names, info.dtype_names, info.shapes, group_name=GROUP, mode=_MODE
            )
        else:
            path = body.weight_dir or ""
            report = await update_from_path(engine, path, version=None, mode=_MODE)
        exchange.respond_json(VllmWeightsReply.of(report, message="Weights updated"))

    async def finish(exchange: Exchange) -> None:
        body = read_optional_body(exchange.body, FinishBody)
        report = await engine.end_weight_update(version=body.weight_version, mode=_MODE)
        exchange.respond_json(VllmWeightsReply.of(report, message="Weight update finished"))

    def weight_info(exchange: Exchange) -> None:
        exchange.respond_json(WeightInfo(engine.weight_version or UNLABELLED))

    def world_size(exchange: Exchange) -> None:
        query = read_query(exchange.query, WorldSizeQuery)
        exchange.respond_json(
            WorldSize(engine.config.data_parallel_size if query.include_dp else 1)
        )

    post = partial(Route, method="POST", tag="vLLM", access=Access.ADMIN)
    get = partial(Route, method="GET", tag="vLLM", access=Access.ADMIN)
    return [
        post(
            path="/init_weight_transfer_engine",
            handler=init,
            summary="Join the trainer's process group",
            body=InitBody,
            reply=Done,
        ),
        post(
            path="/start_weight_update",
            handler=start,
            summary="Begin an update of several parts",
            body=StartBody,
            body_is_optional=True,
            reply=Done,
        ),
        post(
            path="/update_weights",
            handler=update,
            summary="Receive tensors that the trainer broadcasts, or load a directory",
            body=UpdateBody,
            reply=VllmWeightsReply,
        ),
        post(
            path="/finish_weight_update",
            handler=finish,
            summary="Change to the new weights between two steps",
            body=FinishBody,
            body_is_optional=True,
            reply=VllmWeightsReply,
        ),
        get(
            path="/weight_info",
            handler=weight_info,
            summary="The weights' label",
            reply=WeightInfo,
        ),
        get(
            path="/get_world_size",
            handler=world_size,
            summary="How many ranks the engines take in a process group",
            query=WorldSizeQuery,
            reply=WorldSize,
        ),
    ]


def _check_unpacked(path: str, is_packed: bool) -> None:
    if is_packed:
        raise not_supported(path, True, "broadcast each tensor by itself")
