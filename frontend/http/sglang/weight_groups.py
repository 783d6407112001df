"""SGLang's routes beside its weight updates: the trainer's process group, and the weights' label.

vLLM's `POST /update_weight_version` is the same path: it takes less, and reads less of the reply.
"""

from __future__ import annotations

from functools import partial

from msgspec import Struct

from frontend.async_engine import AsyncEngine
from frontend.http import control
from frontend.http.access import Access
from frontend.http.bodies import read_body, read_optional_body
from frontend.http.control import Name
from frontend.http.exchange import Exchange
from frontend.http.router import Route
from frontend.http.sglang.weights import GROUP, Done, error_body
from frontend.http.weights import Count, Port, Version, meeting_point
from frontend.requests.explicit_abort import Selector
from frontend.sglang.results import UNLABELLED


class GroupBody(Struct, forbid_unknown_fields=True, kw_only=True):
    master_address: Name
    master_port: Port
    rank_offset: Count
    """The rank of the first engine."""
    world_size: Count
    """The trainer, rank 0, and all engines."""
    group_name: Name = GROUP
    backend: Name = "nccl"
    """Of `torch.distributed`; `gloo` where engines run on a CPU."""


class LeaveBody(Struct, forbid_unknown_fields=True):
    group_name: Name = GROUP


class VersionBody(Struct, forbid_unknown_fields=True):
    new_version: Version
    abort_all_requests: bool = False
    """SGLang's own default is true."""


class NewVersionReply(Done, kw_only=True):
    new_version: str


class VersionReply(Struct):
    weight_version: str


def routes(engine: AsyncEngine) -> list[Route]:
    async def join(exchange: Exchange) -> None:
        body = read_body(exchange.body, GroupBody)
        address, port = meeting_point(body.master_address, body.master_port)
        await engine.init_weights_update_group(
            master_address=address,
            master_port=port,
            rank_offset=body.rank_offset,
            world_size=body.world_size,
            group_name=body.group_name,
            backend=body.backend,
        )
        exchange.respond_json(Done(message=f"All engines joined {body.group_name!r}."))

    async def leave(exchange: Exchange) -> None:
        body = read_optional_body(exchange.body, LeaveBody)
        await engine.destroy_weights_update_group(body.group_name)
        exchange.respond_json(Done(message=f"All engines left {body.group_name!r}."))

    async def update_version(exchange: Exchange) -> None:
        body = read_body(exchange.body, VersionBody)
        if body.abort_all_requests:
            await control.abort(engine, Selector(everything=True))
        await engine.set_weight_version(body.new_version)
        message = f"The weights are labelled {body.new_version!r}."
        exchange.respond_json(NewVersionReply(message=message, new_version=body.new_version))

    def get_version(exchange: Exchange) -> None:
        exchange.respond_json(VersionReply(engine.weight_version or UNLABELLED))

    post = partial(Route, method="POST", tag="SGLang", access=Access.ADMIN, error_body=error_body)
    return [
        post(
            path="/init_weights_update_group",
            handler=join,
            summary="Join the trainer's process group",
            body=GroupBody,
            reply=Done,
        ),
        post(
            path="/destroy_weights_update_group",
            handler=leave,
            summary="Leave the trainer's process group",
            body=LeaveBody,
            body_is_optional=True,
            reply=Done,
        ),
        post(
            path="/update_weight_version",
            handler=update_version,
            summary="Label the weights; aborts nothing unless it is told to",
            body=VersionBody,
            reply=NewVersionReply,
        ),
        Route(
            method="GET",
            path="/get_weight_version",
            handler=get_version,
            summary="The weights' label",
            tag="SGLang",
            access=Access.ADMIN,
            reply=VersionReply,
        ),
    ]
