"""What the front end raises. Each message names the wrong value and the remedy."""

from __future__ import annotations

VALIDATION_ERROR = "validation_error"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
OVERLOADED = "overloaded"
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

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit
        """The configuration's name of the limit that was met."""


class EngineDeadError(RuntimeError):
    """No engine can serve the request, or the engine that should have answered died."""


class ShuttingDownError(EngineDeadError):
    """The front end serves what it has accepted, and nothing more."""


class EngineStartupError(RuntimeError):
    """An engine did not come up."""


class UtilityCallError(RuntimeError):
    """An engine answered a utility call with a failure."""
