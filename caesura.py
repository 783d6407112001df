"""Caesura's public names.

from caesura import AsyncEngine, Engine, SamplingParams
"""

from __future__ import annotations

from importlib.util import find_spec

try:
    from frontend.shadowing import check_packages_are_ours
except ImportError:
    spec = find_spec("frontend")
    raise ImportError(
        f"Caesura's package 'frontend' is shadowed by {spec and spec.origin}; rename it, or run from "
        "another directory"
    ) from None
check_packages_are_ours()

from frontend.async_engine import AsyncEngine  # noqa: E402 (after the check)
from frontend.config import FrontendConfig  # noqa: E402
from frontend.engine import Engine  # noqa: E402
from frontend.errors import (  # noqa: E402
    DuplicateRequestIdError,
    EngineDeadError,
    EngineStartupError,
    InvalidRequestError,
    PromptTooLongError,
)
from frontend.outputs import AbortReceipt, RequestOutput, RequestResult  # noqa: E402
from frontend.sampling_params import SamplingParams  # noqa: E402
from frontend.stream import RequestStream  # noqa: E402
from ipc.engine_config import EngineConfig  # noqa: E402

__all__ = [
    "AbortReceipt",
    "AsyncEngine",
    "DuplicateRequestIdError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EngineStartupError",
    "FrontendConfig",
    "InvalidRequestError",
    "PromptTooLongError",
    "RequestOutput",
    "RequestResult",
    "RequestStream",
    "SamplingParams",
]
