"""What the front end raises. Each message names the wrong value and the remedy."""

from __future__ import annotations

VALIDATION_ERROR = "validation_error"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
OVERLOADED = "overloaded"
ENGINE_PAUSED = "engine_paused"
CALLERS_FAULTS = (VALIDATION_ERROR, CONTEXT_LENGTH_EXCEEDED)
"""Codes of an `OutputError` that blame the request, not the engine."""


class InvalidRequestError(ValueError):
    """The request cannot run as it stands; nothing was sent."""


class PromptTooLongError(InvalidRequestError):
    """Prompt and wanted output do not fit the model's context."""


class DuplicateRequestIdError(InvalidRequestError):
    """The id names a live request already; nothing was sent."""


class OverloadedError(RuntimeError):
    """Too much waits already; nothing was sent. The same request may be welcome later."""

    code = OVERLOADED
    """What clients are told, as in `OutputError.code`."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit
        """The configuration's name of the limit that was met."""


class EnginePausedError(OverloadedError):
    """The engines are paused, and newcomers are refused or too many; nothing was sent."""

    code = ENGINE_PAUSED

    def __init__(self, message: str) -> None:
        super().__init__(message, ENGINE_PAUSED)


class EngineDeadError(RuntimeError):
    """No engine can serve the request, or the engine that should have answered died."""


class ShuttingDownError(EngineDeadError):
    """The front end serves what it has accepted, and nothing more."""


class EngineStartupError(RuntimeError):
    """An engine did not come up."""


class UtilityCallError(RuntimeError):
    """An engine answered a utility call with a failure."""


class EngineTimeoutError(RuntimeError):
    """An engine did not answer in time; what it was asked for may still take effect."""


class PauseTimeoutError(EngineTimeoutError):
    """Engines did not stand still in time. They go on draining, and `resume` ends it."""


class PauseConflictError(RuntimeError):
    """The engines are paused under another pause_id; nothing was changed."""


class PauseInterruptedError(RuntimeError):
    """A resume ended the pause while it was still waited for."""


class WeightUpdateError(ValueError):
    """The weights cannot be updated so; nothing was changed."""


class WeightUpdateConflictError(RuntimeError):
    """Another weight update is on its way, or none that could be ended; nothing was changed."""


class WeightUpdateIncompleteError(RuntimeError):
    """Some engines have the new weights, others have not or may not."""

    def __init__(self, message: str, engines: dict[int, str]) -> None:
        super().__init__(message)
        self.engines = engines
        """By rank: `ok` has the new weights; `error` has not; `timeout` did not say."""
