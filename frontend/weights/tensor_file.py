"""Tensors on their way to engines of this machine: a file in shared memory, read by path.

It holds a whole safetensors file as its caller gave it. It has no name of its own, so it is gone
when its block is left or this process ends, however that comes about.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from frontend.errors import WeightUpdateError

CHUNK_BYTES = 64 * 1024 * 1024


@contextlib.asynccontextmanager
async def tensor_file(data: bytes) -> AsyncIterator[Path]:
    """A file with this content, written on a worker thread. Raises WeightUpdateError if it does not
    fit.
    """
    descriptor = os.memfd_create("caesura-tensors")
    writing = asyncio.get_running_loop().run_in_executor(None, _write, descriptor, data)
    try:
        try:
            await asyncio.shield(writing)
        except OSError as error:
            raise WeightUpdateError(
                f"{len(data)} bytes of tensors do not fit into shared memory: {error}; nothing was "
                f"changed; make room there, send them in parts, or update from disk"
            ) from error
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        # Not before the writer is done: the number may be another file's by then.
        writing.add_done_callback(lambda _: os.close(descriptor))


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:CHUNK_BYTES]) :]
