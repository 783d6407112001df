"""Where a request's own tokens begin: behind a prompt, and behind outputs that it may have brought
along; and from there on, what a successor needs to continue it.

Invariant: a request that is aborted, continued, aborted again and so on knows everything of the
whole chain; its result is about its own tokens only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from frontend.errors import InvalidRequestError
from frontend.outputs import ResumeFrom, WeightSpan
from frontend.requests.weight_spans import joined
from frontend.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Origin:
    """A request's beginning."""

    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    """Of its own tokens."""
    max_num_tokens: int
    """The most tokens of its own, cut to the model's context."""
    resumed: ResumeFrom | None = None
    """Whom it continues."""

    @property
    def earlier_token_ids(self) -> Sequence[int]:
        """Outputs that it brought along."""
        return self.resumed.output_token_ids if self.resumed is not None else ()

    @property
    def stop_tail_text(self) -> str:
        return self.resumed.stop_tail_text if self.resumed is not None else ""

    def resume_from(
        self,
        token_ids: Sequence[int],
        weight_spans: Sequence[WeightSpan],
        stop_tail_text: str,
    ) -> ResumeFrom | None:
        """How to continue behind its own `token_ids`, which `weight_spans` are over; None if
        nothing is left to be sampled.
        """
        num_left = self.max_num_tokens - len(token_ids)
        if num_left < 1:
            return None
        outputs = (*self.earlier_token_ids, *token_ids)
        earlier_spans = self.resumed.weight_spans if self.resumed is not None else ()
        return ResumeFrom(
            prompt_token_ids=tuple(self.prompt_token_ids),
            output_token_ids=outputs,
            num_output_tokens_left=num_left,
            position=len(self.prompt_token_ids) + len(outputs),
            seed=self.sampling_params.seed,
            min_tokens_left=max(0, self.sampling_params.min_tokens - len(token_ids)),
            stop_tail_text=stop_tail_text,
            weight_spans=joined(earlier_spans, len(self.earlier_token_ids), weight_spans),
        )


def origin_of(
    token_ids: Sequence[int],
    sampling_params: SamplingParams,
    resumed: ResumeFrom | None,
    max_model_len: int,
) -> Origin:
    """The origin of a request that an engine is sent with `token_ids`, those that it resumes from
    included. Raises InvalidRequestError.
    """
    num_tokens_left = max_model_len - len(token_ids)
    if resumed is None:
        max_num_tokens = sampling_params.num_tokens_within(num_tokens_left)
        return Origin(token_ids, sampling_params, max_num_tokens)
    if sampling_params.prompt_logprobs is not None:
        raise InvalidRequestError(
            f"prompt_logprobs={sampling_params.prompt_logprobs} cannot be told of a resumed "
            f"request; ask for them with the prompt"
        )
    max_num_tokens = min(
        sampling_params.num_tokens_within(num_tokens_left), resumed.num_output_tokens_left
    )
    params = dataclasses.replace(
        sampling_params,
        max_tokens=max_num_tokens,
        min_tokens=min(resumed.min_tokens_left, max_num_tokens),
        seed=resumed.seed,
    )
    return Origin(resumed.prompt_token_ids, params, max_num_tokens, resumed)
