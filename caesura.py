"""Caesura's public names.

from caesura import AsyncEngine, Engine, SamplingParams
"""

from __future__ import annotations

from importlib.util import find_spec

try:
    from frontend.engines.shadowing import check_packages_are_ours

    check_packages_are_ours()
except ModuleNotFoundError:
    spec = find_spec("frontend")
    raise ImportError(
        f"Caesura's package 'frontend' is shadowed by {spec and spec.origin}; rename it, or run "
        "from another directory"
    ) from None
except RuntimeError as error:
    raise ImportError(str(error)) from None

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig
from frontend.errors import (
    DuplicateRequestIdError,
    EngineDeadError,
    EnginePausedError,
    EngineStartupError,
    InvalidRequestError,
    PauseConflictError,
    PauseInterruptedError,
    PauseTimeoutError,
    PromptTooLongError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
from frontend.outputs import AbortReceipt, RequestOutput, RequestResult, ResumeFrom, WeightSpan
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from frontend.sync.engine import Engine
from ipc.engine_config import EngineConfig

__all__ = [
    "AbortReceipt",
    "AsyncEngine",
    "DuplicateRequestIdError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EnginePausedError",
    "EngineStartupError",
    "FrontendConfig",
    "InvalidRequestError",
    "PauseConflictError",
    "PauseInterruptedError",
    "PauseTimeoutError",
    "PromptTooLongError",
    "RequestOutput",
    "RequestResult",
    "RequestStream",
    "ResumeFrom",
    "SamplingParams",
    "WeightSpan",
    "WeightUpdateConflictError",
    "WeightUpdateError",
    "WeightUpdateIncompleteError",
]
