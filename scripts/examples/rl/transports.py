"""Three ways for the trainer's weights to reach the engines.

Each is an async context manager that gives out a function: send these tensors under this label.
Whichever it is, engines load and check the tensors beside the weights that serve, and then exchange
all of them between two steps.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Literal

from safetensors.torch import save, save_file
from torch import Tensor

from caesura import AsyncEngine
from frontend.weights.update import WeightUpdateReport
from scripts.trainer_group import broadcast_tensors, described, init_trainer_group

Transport = Literal["disk", "tensors", "broadcast"]
Tensors = Mapping[str, Tensor]
Send = Callable[[Tensors, str], Awaitable[WeightUpdateReport]]
"""Takes the tensors and their label."""

LOCALHOST = "127.0.0.1"


@asynccontextmanager
async def disk(engine: AsyncEngine) -> AsyncIterator[Send]:
    """Through a directory in Hugging Face's layout. Its safetensors files are all it needs."""
    with tempfile.TemporaryDirectory(prefix="policy-") as directory:

        async def send(tensors: Tensors, version: str) -> WeightUpdateReport:
            path = await asyncio.to_thread(save_model, tensors, Path(directory, version))
            return await engine.update_weights_from_disk(path, version=version)

        yield send


def save_model(tensors: Tensors, path: Path) -> Path:
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors")
    return path


@asynccontextmanager
async def tensors(engine: AsyncEngine) -> AsyncIterator[Send]:
    """As bytes; engines on this machine read them from shared memory."""

    async def send(tensors: Tensors, version: str) -> WeightUpdateReport:
        content = await asyncio.to_thread(save, dict(tensors))
        return await engine.update_weights_from_tensors(content, version=version)

    yield send


@asynccontextmanager
async def broadcast(engine: AsyncEngine) -> AsyncIterator[Send]:
    """Over a process group in which the trainer is rank 0; with `nccl`, from GPU to GPU."""
    with socket.create_server((LOCALHOST, 0)) as free:
        port = free.getsockname()[1]
    world_size = 1 + len(engine.alive_engines)
    group, _ = await asyncio.gather(
        asyncio.to_thread(init_trainer_group, LOCALHOST, port, world_size),
        engine.init_weights_update_group(
            master_address=LOCALHOST, master_port=port, rank_offset=1, world_size=world_size
        ),
    )

    async def send(tensors: Tensors, version: str) -> WeightUpdateReport:
        report, _ = await asyncio.gather(
            engine.update_weights_from_distributed(*described(tensors), version=version),
            asyncio.to_thread(broadcast_tensors, group, tensors),
        )
        return report

    yield send
    await engine.destroy_weights_update_group()


TRANSPORTS: Mapping[str, Callable[[AsyncEngine], AbstractAsyncContextManager[Send]]] = {
    "disk": disk,
    "tensors": tensors,
    "broadcast": broadcast,
}
