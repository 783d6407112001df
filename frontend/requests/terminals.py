"""A request's end: an engine's last word on it as the front end tells it, and its last event."""

from __future__ import annotations

from frontend.outputs import AbortCause, FinishReasonName, Terminal
from frontend.requests.registry import Entry
from frontend.requests.weight_spans import spans_of
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


def finish_mailbox(entry: Entry, terminal: Terminal) -> None:
    """Leave the last event for whoever reads: text held back for a stop string belongs to a partial
    result, and one that was aborted, or lost with its engine, says how to continue it.
    """
    mailbox, processor, stop_tail_text = entry.mailbox, entry.processor, ""
    can_go_on = terminal.finish_reason == "abort" or (
        terminal.error is not None and terminal.error.retryable
    )
    if processor is not None and can_go_on:
        stop_tail_text = processor.stop_tail_text
        mailbox.put(processor.break_off(), (), is_last=True)
    elif processor is not None and terminal.finish_reason == "error":
        mailbox.put(processor.process((), True).text, (), is_last=True)
    weight_spans = spans_of(entry.weight_marks, entry.num_output_tokens)
    resume_from = None
    if entry.origin is not None and can_go_on:
        resume_from = entry.origin.resume_from(mailbox.token_ids, weight_spans, stop_tail_text)
    mailbox.finish(terminal, weight_spans, resume_from)
