"""SGLang's routes about the server: its model, its load, and whether its engines answer."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from frontend.async_engine import AsyncEngine
from frontend.errors import EngineDeadError, InvalidRequestError, OverloadedError
from frontend.http.access import Access
from frontend.http.bodies import read_query
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.router import Handler, Route
from frontend.sampling_params import SamplingParams
from frontend.sglang.results import UNLABELLED
from frontend.version import version
from ipc.lifecycle import EngineStatus
from ipc.pause import EngineState

HEALTH_TIMEOUT_S = 20.0
LOADS_TIMEOUT_S = 5.0


class ModelInfo(msgspec.Struct, kw_only=True):
    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool = True
    weight_version: str


class Load(msgspec.Struct, kw_only=True):
    """Of one engine."""

    dp_rank: int
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    """The first engine's include those that no engine has yet."""
    num_total_reqs: int = 0
    num_used_tokens: int = 0
    """KV slots that requests hold."""
    max_total_num_tokens: int = 0
    token_usage: float = 0.0
    """The part of the KV slots that requests hold."""


class TotalLoad(msgspec.Struct):
    total_running_reqs: int
    total_waiting_reqs: int
    total_reqs: int


class Loads(msgspec.Struct, kw_only=True):
    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[Load]
    aggregate: TotalLoad


class LoadsQuery(msgspec.Struct):
    include: str | None = None
    """Names of sections; there is only `core`, and it is always there."""
    dp_rank: int | None = None


class ServerInfoQuery(msgspec.Struct):
    config_format: Literal["json"] | None = None
    """vLLM's: the reply then has a `vllm_config` too."""


class VllmModelConfig(msgspec.Struct):
    model: str
    dtype: str
    """As torch calls it, such as torch.bfloat16."""
    max_model_len: int


class VllmParallelConfig(msgspec.Struct):
    data_parallel_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


class VllmConfig(msgspec.Struct):
    model_config: VllmModelConfig
    parallel_config: VllmParallelConfig


class ServerInfo(ModelInfo, kw_only=True):
    version: str
    state: EngineState
    """Whether it runs, drains or is paused."""
    dp_size: int
    tp_size: int = 1
    context_length: int
    max_running_requests: int
    page_size: int
    dtype: str
    device: str
    internal_states: list[Load]
    vllm_config: VllmConfig | msgspec.UnsetType = msgspec.UNSET


def routes(engine: AsyncEngine) -> list[Route]:
    async def health_generate(exchange: Exchange) -> None:
        if not await is_answering(engine, HEALTH_TIMEOUT_S):
            raise ApiError(503, f"no engine answered within {HEALTH_TIMEOUT_S:g} s")
        exchange.respond(200)

    def model_info(exchange: Exchange) -> None:
        model = engine.config.engine.model
        exchange.respond_json(
            ModelInfo(
                model_path=model,
                tokenizer_path=model,
                served_model_name=engine.served_model_name,
                weight_version=engine.weight_version or UNLABELLED,
            )
        )

    async def server_info(exchange: Exchange) -> None:
        config = engine.config
        query = read_query(exchange.query, ServerInfoQuery)
        info = ServerInfo(
            model_path=config.engine.model,
            tokenizer_path=config.engine.model,
            served_model_name=engine.served_model_name,
            weight_version=engine.weight_version or UNLABELLED,
            version=version(),
            state=engine.pause_state.state,
            dp_size=config.data_parallel_size,
            context_length=engine.max_model_len,
            max_running_requests=config.engine.max_num_seqs,
            page_size=config.engine.block_size,
            dtype=config.engine.dtype,
            device=config.engine.device,
            internal_states=await read_loads(engine),
            vllm_config=msgspec.UNSET if query.config_format is None else _vllm_config(engine),
        )
        exchange.respond_json(info)

    async def loads(exchange: Exchange) -> None:
        query = read_query(exchange.query, LoadsQuery)
        found = await read_loads(engine)
        if query.dp_rank is not None:
            found = [load for load in found if load.dp_rank == query.dp_rank]
        running = sum(load.num_running_reqs for load in found)
        waiting = sum(load.num_waiting_reqs for load in found)
        exchange.respond_json(
            Loads(
                timestamp=datetime.now(UTC).isoformat(),
                version=version(),
                dp_rank_count=engine.config.data_parallel_size,
                loads=found,
                aggregate=TotalLoad(running, waiting, running + waiting),
            )
        )

    def get(path: str, handler: Handler, summary: str, **more: Any) -> Route:
        return Route(
            method="GET", path=path, handler=handler, summary=summary, tag="SGLang", **more
        )

    health = "200 if the engines' step loops answer, also while they are busy"
    model = "The model and the version of its weights"
    server = "The configuration, and the load of each engine"
    load = "How many requests and KV slots each engine holds"
    return [
        get("/health_generate", health_generate, health, access=Access.OPEN),
        get("/model_info", model_info, model, reply=ModelInfo),
        get("/get_model_info", model_info, model, reply=ModelInfo),
        get("/server_info", server_info, server, query=ServerInfoQuery, reply=ServerInfo),
        get("/get_server_info", server_info, server, query=ServerInfoQuery, reply=ServerInfo),
        get("/v1/loads", loads, load, query=LoadsQuery, reply=Loads),
    ]


def _vllm_config(engine: AsyncEngine) -> VllmConfig:
    """What trainers read of vLLM's."""
    config = engine.config
    model = VllmModelConfig(config.engine.model, f"torch.{engine.dtype}", engine.max_model_len)
    return VllmConfig(model, VllmParallelConfig(config.data_parallel_size))


async def is_answering(engine: AsyncEngine, timeout_s: float) -> bool:
    """Whether an engine's step loop answers within `timeout_s`.

    Engines tell their status between two steps, so it proves that steps are made, under any
    load. Foreign engines know no such call; for them a request of one token stands in.
    """
    if not engine.is_healthy:
        return False
    started_at_s = asyncio.get_running_loop().time()
    if await engine.status(timeout_s / 2, check_integrity=False):
        return True
    time_left_s = timeout_s - (asyncio.get_running_loop().time() - started_at_s)
    try:
        async with asyncio.timeout(time_left_s):
            probe = engine.generate(
                prompt_token_ids=[1], sampling_params=SamplingParams(max_tokens=1)
            )
            return (await probe.result()).finish_reason != "error"
    except (TimeoutError, EngineDeadError, OverloadedError, InvalidRequestError):
        return False


async def read_loads(engine: AsyncEngine) -> list[Load]:
    """The load of each engine, dead ones too. One that does not answer has the requests that it was
    sent from here, as waiting; a request that no engine has yet waits at the first.
    """
    statuses = await engine.status(LOADS_TIMEOUT_S, check_integrity=False)
    block_size = engine.config.engine.block_size
    loads = [
        _load(rank, statuses[rank], block_size)
        if rank in statuses
        else Load(dp_rank=rank, num_waiting_reqs=num_sent, num_total_reqs=num_sent)
        for rank, num_sent in enumerate(engine.num_in_flight)
    ]
    num_in_engines = sum(load.num_total_reqs for load in loads)
    num_elsewhere = max(0, engine.num_live_requests - num_in_engines)
    loads[0].num_waiting_reqs += num_elsewhere
    loads[0].num_total_reqs += num_elsewhere
    return loads


def _load(rank: int, status: EngineStatus, block_size: int) -> Load:
    num_used_blocks = status.num_blocks - status.num_free_blocks - status.num_cached_blocks
    return Load(
        dp_rank=rank,
        num_running_reqs=status.num_running,
        num_waiting_reqs=status.num_waiting,
        num_total_reqs=status.num_running + status.num_waiting,
        num_used_tokens=num_used_blocks * block_size,
        max_total_num_tokens=status.num_blocks * block_size,
        token_usage=num_used_blocks / max(1, status.num_blocks),
    )
