"""An engine's last word on a request, as the front end tells it."""

from __future__ import annotations

from frontend.outputs import AbortCause, FinishReasonName, Terminal
from ipc.output import EngineCoreOutput, FinishReason, OutputError

_FINISH_REASONS: dict[FinishReason, FinishReasonName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.REPETITION: "repetition",
}


def engine_terminal(
    output: EngineCoreOutput, reason: FinishReason, abort_cause: AbortCause | None
) -> Terminal:
    """An engine's last word on a request."""
    name = _FINISH_REASONS[reason]
    if name == "abort":
        return Terminal(name, abort_cause=abort_cause or AbortCause.ENGINE)
    if name == "error":
        unexplained = OutputError("internal_error", "the engine failed on this request", False)
        return Terminal(name, error=output.error or unexplained)
    return Terminal(name, stop_reason=output.stop_reason)
