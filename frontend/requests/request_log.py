"""One log line for each request that ends, with its facts as fields for structured logs."""

from __future__ import annotations

import logging

from frontend.outputs import AbortCause, Stage
from frontend.requests.registry import Entry

logger = logging.getLogger(__name__)


class RequestLog:
    """Silent, but at debug level, until `level` is raised."""

    def __init__(self) -> None:
        self.level = logging.DEBUG

    def note_end(self, entry: Entry, cause: AbortCause | None, stage: Stage, age_s: float) -> None:
        """A request ended at this stage; `cause` is set if it was aborted, here or there."""
        if not logger.isEnabledFor(self.level):
            return
        assert entry.terminal is not None
        finish_reason, error = entry.terminal.finish_reason, entry.terminal.error
        why = f"cause {cause}, " if cause is not None else ""
        if error is not None:
            why += f"error {error.code}: {error.message}, "
        logger.log(
            self.level,
            "request %s ended: %s (%sstage %s, %d output tokens, %.3f s)",
            entry.request_id,
            finish_reason,
            why,
            stage,
            entry.num_output_tokens,
            age_s,
            extra={
                "request_id": entry.request_id,
                "finish_reason": finish_reason,
                "abort_cause": cause,
                "error_code": error and error.code,
                "error_message": error and error.message,
                "stage": stage,
                "num_prompt_tokens": len(entry.mailbox.prompt_token_ids),
                "num_output_tokens": entry.num_output_tokens,
                "age_s": round(age_s, 6),
                "engine": entry.engine_index,
            },
        )
