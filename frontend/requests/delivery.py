"""Hands an engine's news of a live request to its mailbox: tokens become text, and the terminal is
told if there is one.

Invariant: nothing here ends a request. Whoever asked for the delivery does, with what it returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frontend.metrics import Metrics
from frontend.outputs import AbortCause, Terminal, TokenLogprobs
from frontend.requests.logprobs import token_logprobs
from frontend.requests.registry import Entry
from frontend.requests.terminals import engine_terminal
from ipc.output import EngineCoreOutput, FinishReason


@dataclass(frozen=True, slots=True)
class End:
    """How a delivery found that its request ends."""

    terminal: Terminal
    abort_in_engine: AbortCause | None = None
    """Set if the engine does not know."""


class Delivery:
    """Delivers outputs of live requests, and counts them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def output(self, entry: Entry, output: EngineCoreOutput, now: float) -> End | None:
        """An output that is more than tokens of a running request."""
        mailbox = entry.mailbox
        if output.prefill_stats is not None:
            # Outputs that a resumed request brought along may be cached too.
            mailbox.num_cached_tokens = min(
                output.prefill_stats.num_cached_tokens, len(mailbox.prompt_token_ids)
            )
        if output.prompt_logprobs is not None:
            prompt_logprobs = output.prompt_logprobs
            mailbox.prompt_logprobs = tuple(
                token_logprobs(prompt_logprobs, len(prompt_logprobs.ranks))
            )
        if output.events is not None:
            self._metrics.on_events(output.events)
        reason, token_ids = output.finish_reason, [*entry.unprocessed, *output.new_token_ids]
        logprobs: Sequence[TokenLogprobs] = ()
        if output.new_logprobs is not None:
            logprobs = token_logprobs(output.new_logprobs, len(output.new_token_ids))
        end = self.tokens(entry, token_ids, now, logprobs, reason)
        if end is None and reason is not None:
            return End(engine_terminal(output, reason, entry.abort_cause))
        return end

    def tokens(
        self,
        entry: Entry,
        token_ids: list[int],
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
        reason: FinishReason | None = None,
    ) -> End | None:
        """New tokens as text; `reason` says that they are the last. Returns the end that a stop
        string in them is.
        """
        assert entry.processor is not None
        entry.unprocessed = []
        # An aborted text is broken off later, for it may be continued.
        is_whole = reason is not None and reason is not FinishReason.ABORT
        text, num_tokens, stop_string = entry.processor.process(token_ids, is_whole)
        if num_tokens:
            if entry.last_output_s is not None:
                self._metrics.on_tokens(num_tokens, now - entry.last_output_s)
            else:
                self._note_first_tokens(entry, num_tokens, now)
            entry.last_output_s = now
        if stop_string is None:
            if num_tokens or text:
                entry.mailbox.put(text, token_ids, logprobs, is_last=reason is not None)
            return None
        entry.mailbox.put(text, token_ids[:num_tokens], logprobs[:num_tokens], is_last=True)
        cause = AbortCause.STOP_STRING if reason is None else None
        return End(Terminal("stop", stop_reason=stop_string), cause)

    def _note_first_tokens(self, entry: Entry, num_tokens: int, now: float) -> None:
        entry.leave_queue()
        num_prompt_tokens = len(entry.mailbox.prompt_token_ids)
        self._metrics.on_first_tokens(num_tokens, now - entry.accepted_s, num_prompt_tokens)
