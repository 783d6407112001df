"""Bugs of requests that continue an aborted one."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

ORIGIN = "frontend/requests/origin.py"
PROCESSOR = "frontend/text/output_processor.py"

MUTATIONS = (
    Mutation(
        "budget_granted_again",
        "A continued request may have as many tokens again as the first one.",
        Edit(
            ORIGIN,
            """
            max_num_tokens = min(
                sampling_params.num_tokens_within(num_tokens_left), resumed.num_output_tokens_left
            )
            """,
            "max_num_tokens = sampling_params.num_tokens_within(num_tokens_left)",
        ),
        origin="verl #7207; slime #2260",
    ),
    Mutation(
        "min_tokens_counted_again",
        "A continued request owes all its `min_tokens` again.",
        Edit(
            ORIGIN,
            "min_tokens=min(resumed.min_tokens_left, max_num_tokens)",
            "min_tokens=min(sampling_params.min_tokens, max_num_tokens)",
        ),
    ),
    Mutation(
        "outputs_taken_for_the_prompt",
        "An engine counts the outputs that a request brought along as prompt.",
        Edit(
            "engine_core/validation.py",
            "num_prompt_tokens=len(prompt) - num_resumed_tokens",
            "num_prompt_tokens=len(prompt)",
        ),
    ),
    Mutation(
        "outputs_counted_as_prompt",
        "The result of a continued request counts the earlier outputs as prompt.",
        Edit(
            "frontend/requests/intake.py",
            "entry.mailbox.prompt_token_ids = origin.prompt_token_ids",
            "entry.mailbox.prompt_token_ids = token_ids",
        ),
    ),
    Mutation(
        "chain_forgets_its_beginning",
        "A request that was continued twice forgets what the first one sampled.",
        Edit(
            ORIGIN,
            "outputs = (*self.earlier_token_ids, *token_ids)",
            "outputs = tuple(token_ids)",
        ),
    ),
    Mutation(
        "spans_not_shifted",
        "Spans of continued tokens begin at the beginning.",
        Edit(
            "frontend/requests/weight_spans.py",
            "WeightSpan(span.version, span.start + num_earlier, span.end + num_earlier)",
            "WeightSpan(span.version, span.start, span.end)",
        ),
    ),
    Mutation(
        "stop_string_cut_by_an_abort",
        "A stop string that begins before an abort and ends behind it is missed.",
        Edit(ORIGIN, "stop_tail_text=stop_tail_text,", 'stop_tail_text="",'),
    ),
    Mutation(
        "text_given_out_again",
        "Text that an aborted request gave out comes again when it is continued.",
        Edit(PROCESSOR, "self._num_given_out = len(self._stops.held_back)", "pass"),
    ),
    Mutation(
        "half_a_character_lost",
        "A character that an abort cut in two is broken.",
        Edit(PROCESSOR, "self._detokenizer.add(earlier_token_ids)", ""),
    ),
)
