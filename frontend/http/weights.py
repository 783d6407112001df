"""Weight updates over HTTP: Caesura's own route, and what every dialect's have in common.

Tensors come from a path on the engines' machine, or as the body of the call: a safetensors file
with the content type `application/octet-stream`, whose other fields are then in the query.

Invariant: whatever is answered with an error below 500 or with 504 has changed nothing; the old
weights and their label serve on. A 500 `engine_error` names the engines that have the new ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from msgspec import Meta, Struct

from frontend.async_engine import AsyncEngine
from frontend.http.access import Access
from frontend.http.bodies import bad_field, read_body, read_query
from frontend.http.control import Name
from frontend.http.errors import ApiError
from frontend.http.exchange import BINARY, Exchange
from frontend.http.router import Route
from frontend.requests.fan_out import EngineOutcome
from frontend.weights.update import WeightUpdateReport
from ipc.pause import PauseMode

BodyT = TypeVar("BodyT", bound=Struct)

UPDATE_TIMEOUT_S = 600.0
MAX_UPDATE_TIMEOUT_S = 3600.0

Version = Annotated[Name, Meta(max_length=256)]
Names = Annotated[list[Name], Meta(min_length=1)]
Shapes = list[list[Annotated[int, Meta(ge=0, le=2**62)]]]
Port = Annotated[int, Meta(ge=1, le=65535)] | Annotated[str, Meta(pattern=r"^[1-9]\d{0,4}$")]
"""A number, or its digits, as AReaL sends them."""
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_UPDATE_TIMEOUT_S)]


class WeightsReply(Struct, kw_only=True):
    """What an update brought."""

    state: Literal["staged", "committed"]
    """A part of several is only staged; it takes effect with the end of the update."""
    version: str | None
    """The label from now on; null for a part."""
    num_tensors: int
    num_bytes: int
    checksum: str
    staging_s: float
    """How long it took to load and check the tensors, while requests ran."""
    paused_s: float
    """How long requests stood still."""
    engines: dict[int, EngineOutcome]

    @classmethod
    def of(cls, report: WeightUpdateReport, **fields: Any) -> Self:
        """`fields` are those that a dialect's reply adds."""
        told = {name: getattr(report, name) for name in WeightsReply.__struct_fields__}
        return cls(**told, **fields)


class WeightsQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    """What goes with tensors, wherever they come from."""

    version: Version | None = None
    """The label of the new weights; null leaves it as it is."""
    mode: PauseMode = "keep"
    """How to pause for the change, unless the server is paused already."""
    checksum: Name | None = None
    """What the tensors must sum up to."""
    timeout_s: Seconds = UPDATE_TIMEOUT_S
    """How long staging and pausing may take; then 504, and nothing was changed."""


class WeightsBody(WeightsQuery, kw_only=True):
    path: Name
    """On the engines' machine: a model's directory, or one `.safetensors` file with some tensors.
    """


class DiscardReply(Struct):
    discarded: bool
    """False if there was nothing to discard."""


def meeting_point(address: str, port: int | str) -> tuple[str, int]:
    """Where a group meets. An IPv6 address may be in brackets, as in a URL."""
    if not 1 <= int(port) <= 65535:
        raise bad_field("master_port", "a port, 1 to 65535", port)
    return address.removeprefix("[").removesuffix("]"), int(port)


def is_safetensors(exchange: Exchange) -> bool:
    """Whether the body is a file of tensors, and no JSON."""
    content_type = exchange.headers.get("content-type", "")
    return content_type.partition(";")[0].strip().lower() == BINARY


def read_fields(exchange: Exchange, kind: type[BodyT]) -> BodyT:
    """`read_body`, where the body may also be tensors that came without their content type."""
    head = exchange.body[:8]
    if b"\0" in head or not head[:1].isascii():
        raise ApiError(
            400, f"the body is no JSON; a safetensors file needs the header Content-Type: {BINARY}"
        )
    return read_body(exchange.body, kind)


async def update_from_path(
    engine: AsyncEngine,
    path: str,
    *,
    version: str | None,
    mode: PauseMode,
    checksum: str | None = None,
    timeout_s: float = UPDATE_TIMEOUT_S,
) -> WeightUpdateReport:
    """From a model's directory, or from one safetensors file."""
    if Path(path).suffix == ".safetensors":
        return await engine.update_weights_from_tensors(
            Path(path), version=version, mode=mode, checksum=checksum, timeout_s=timeout_s
        )
    return await engine.update_weights_from_disk(
        path, version=version, mode=mode, checksum=checksum, timeout_s=timeout_s
    )


def weight_routes(engine: AsyncEngine) -> list[Route]:
    """Caesura's own."""

    async def update(exchange: Exchange) -> None:
        if is_safetensors(exchange):
            options = read_query(exchange.query, WeightsQuery)
            report = await engine.update_weights_from_tensors(
                exchange.body,
                version=options.version,
                mode=options.mode,
                checksum=options.checksum,
                timeout_s=options.timeout_s,
            )
        else:
            body = read_fields(exchange, WeightsBody)
            report = await update_from_path(
                engine,
                body.path,
                version=body.version,
                mode=body.mode,
                checksum=body.checksum,
                timeout_s=body.timeout_s,
            )
        exchange.respond_json(WeightsReply.of(report))

    async def discard(exchange: Exchange) -> None:
        exchange.respond_json(DiscardReply(await engine.discard_weight_update()))

    return [
        Route(
            method="POST",
            path="/v1/weights",
            handler=update,
            summary="Load new weights, check them, and change to them between two steps",
            tag="Caesura",
            access=Access.ADMIN,
            body=WeightsBody,
            takes_safetensors=True,
            query=WeightsQuery,
            reply=WeightsReply,
        ),
        Route(
            method="DELETE",
            path="/v1/weights",
            handler=discard,
            summary="Discard the update that has begun, in whatever dialect, and not ended",
            tag="Caesura",
            access=Access.ADMIN,
            reply=DiscardReply,
        ),
    ]
