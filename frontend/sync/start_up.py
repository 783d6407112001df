"""Starts the engine that an `Engine` drives: as quiet as SGLang's, and with the label asked for."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from frontend.async_engine import AsyncEngine
from frontend.sync.sglang_arguments import EngineArguments
from ipc.logs import LEVEL_VARIABLE


async def start_engine(arguments: EngineArguments) -> AsyncEngine:
    """Raises what `AsyncEngine.start` does."""
    with _log_level(arguments.log_level):
        engine = await AsyncEngine.start(arguments.config)
    if arguments.weight_version is not None:
        try:
            await engine.set_weight_version(arguments.weight_version)
        except BaseException:
            await engine.shutdown()
            raise
    return engine


@contextlib.contextmanager
def _log_level(level: str | None) -> Iterator[None]:
    """Give engines that start meanwhile a log level (SGLang's engine is quiet unless told), and
    our own loggers, if one was asked for.
    """
    if level is not None:
        for name in ("frontend", "ipc"):
            logging.getLogger(name).setLevel(level)
    before = os.environ.get(LEVEL_VARIABLE)
    os.environ[LEVEL_VARIABLE] = level or before or "ERROR"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LEVEL_VARIABLE]
        else:
            os.environ[LEVEL_VARIABLE] = before
