"""Bugs of what a client gets: tokens, texts, log-probabilities and counts."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

DELIVERY = "frontend/requests/delivery.py"
MAILBOX = "frontend/requests/mailbox.py"

MUTATIONS = (
    # -- aborted ones ----------------------------------------------------------------------------
    Mutation(
        "invented_eos",
        "An aborted result ends with an end-of-sequence token that was never sampled.",
        Edit(
            "engine_core/aborts.py",
            "EngineCoreOutput(request.request_id, finish_reason=FinishReason.ABORT)",
            """
            EngineCoreOutput(
                request.request_id,
                (request.sampling.eos_token_id or 0,),
                finish_reason=FinishReason.ABORT,
            )
            """,
        ),
        origin="FastDeploy",
    ),
    Mutation(
        "unread_tokens_lost",
        "Tokens that nobody had read yet are lost with an abort.",
        Edit(
            MAILBOX,
            "self._terminal = terminal\n",
            """
            self._terminal = terminal
            if terminal.finish_reason == "abort":
                del self.token_ids[self._num_taken :]
                self._text.clear()
                self._logprobs.clear()
            """,
        ),
        origin="SGLang #11673; vLLM #22197",
    ),
    Mutation(
        "held_back_text_lost",
        "Text that might have begun a stop string is missing in an aborted result.",
        Edit(
            "frontend/requests/terminals.py",
            "mailbox.put(processor.break_off(), (), is_last=True)",
            "",
        ),
    ),
    Mutation(
        "half_a_character_at_an_abort",
        "An aborted text ends with a replacement character where half of one had come.",
        Edit(
            DELIVERY,
            "is_whole = reason is not None and reason is not FinishReason.ABORT",
            "is_whole = reason is not None",
        ),
    ),
    Mutation(
        "receipt_one_short",
        "A receipt counts one token less than its request has.",
        Edit(
            "frontend/requests/explicit_abort.py",
            'AbortedRequest("aborted", entry.num_output_tokens, stage)',
            'AbortedRequest("aborted", max(0, entry.num_output_tokens - 1), stage)',
        ),
    ),
    Mutation(
        "receipt_counts_the_prompt",
        "An engine's receipt counts the prompt among the outputs.",
        Edit(
            "engine_core/aborts.py",
            "request.stage, request.num_new_tokens",
            "request.stage, len(request.token_ids)",
        ),
    ),
    # -- stop strings ----------------------------------------------------------------------------
    Mutation(
        "tokens_behind_a_stop_string",
        "Tokens that were sampled behind a stop string reach the client.",
        Edit(
            DELIVERY,
            "entry.mailbox.put(text, token_ids[:num_tokens], logprobs[:num_tokens], is_last=True)",
            "entry.mailbox.put(text, token_ids, logprobs, is_last=True)",
        ),
    ),
    Mutation(
        "logprob_lost_at_a_stop_string",
        "The token that completes a stop string has no log-probability.",
        Edit(DELIVERY, "logprobs[:num_tokens], is_last", "logprobs[: num_tokens - 1], is_last"),
    ),
    Mutation(
        "stop_string_over_two_tokens",
        "A stop string that begins in one token and ends in another is missed.",
        Edit(
            "frontend/text/stop_strings.py",
            "text.find(stop, max(0, num_seen - len(stop) + 1))",
            "text.find(stop, num_seen)",
        ),
    ),
    Mutation(
        "min_tokens_of_each_delta",
        "`min_tokens` counts anew with each delta, and a stop string never matches.",
        Edit("frontend/text/output_processor.py", "self._num_tokens += num_tokens", ""),
    ),
    # -- delivery --------------------------------------------------------------------------------
    Mutation(
        "quiet_end_wakes_nobody",
        "An end that brings no tokens does not wake its reader.",
        Edit(
            MAILBOX,
            """
            self._weight_spans, self._resume_from = weight_spans, resume_from
            self._wake()
            """,
            """
            self._weight_spans, self._resume_from = weight_spans, resume_from
            if self.num_unread_tokens:
                self._wake()
            """,
        ),
    ),
    Mutation(
        "logprobs_told_twice",
        "Log-probabilities that were read come again.",
        Edit(MAILBOX, "self._logprobs.clear()", ""),
    ),
)
