"""Limits on what may wait for its first token, so that an overloaded server says so at once
instead of making everyone wait.

A request waits from its acceptance until its first token or its end, also where a pause holds it.
Both limits are over all engines together.

- `max_num_queued_requests` bounds the requests that wait. A call is let in whole or not at all.
- `max_num_queued_tokens` bounds their prompt tokens, hence the time to first token: it is about the
  TTFT to be kept times the speed of prefill. With nothing ahead of it a call may have any length,
  or a long prompt would be refused for ever. A text that is tokenized after its acceptance counts,
  and is checked, from then on.

Invariant: the counts are the sums over the places that are held.
"""

from __future__ import annotations

from typing import Literal

from frontend.errors import InvalidRequestError, OverloadedError

LimitName = Literal["max_num_queued_requests", "max_num_queued_tokens"]


class Place:
    """A request's place among those that wait. It is held until `leave`."""

    __slots__ = ("_admission", "_num_prompt_tokens")

    def __init__(self, admission: Admission, num_prompt_tokens: int) -> None:
        self._admission: Admission | None = admission
        self._num_prompt_tokens = num_prompt_tokens
        admission.num_queued_requests += 1
        admission.num_queued_tokens += num_prompt_tokens

    def set_num_prompt_tokens(self, num_prompt_tokens: int) -> None:
        """Its prompt was tokenized after all. Whether so many are welcome is `check`ed before, for
        all requests of the call together.
        """
        if self._admission is not None:
            self._admission.num_queued_tokens += num_prompt_tokens
            self._num_prompt_tokens += num_prompt_tokens

    def leave(self) -> None:
        """The first token came, or the request ended. Harmless to repeat."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.num_queued_requests -= 1
            admission.num_queued_tokens -= self._num_prompt_tokens


class Admission:
    """Says whether more may wait, and counts what does."""

    def __init__(
        self, *, max_num_queued_requests: int | None, max_num_queued_tokens: int | None
    ) -> None:
        """None is no limit."""
        self._max_num_requests = max_num_queued_requests
        self._max_num_tokens = max_num_queued_tokens
        self.num_queued_requests = 0
        self.num_queued_tokens = 0

    def check(self, num_requests: int, num_prompt_tokens: int) -> None:
        """Raise OverloadedError unless a call of so many requests may come in now, or
        InvalidRequestError if it never may.

        `num_prompt_tokens` is the sum over its prompts, without those not tokenized yet.
        """
        limit = self._max_num_requests
        if limit is not None and num_requests > limit:
            raise InvalidRequestError(
                f"the call has {num_requests} requests, but at most "
                f"max_num_queued_requests={limit} may wait; send it in parts"
            )
        if limit is not None and self.num_queued_requests + num_requests > limit:
            raise OverloadedError(
                f"{self.num_queued_requests} requests wait for their first token, and "
                f"{num_requests} more would exceed max_num_queued_requests={limit}; try again "
                f"later, or raise --max-num-queued-requests",
                "max_num_queued_requests",
            )
        limit, num_queued = self._max_num_tokens, self.num_queued_tokens
        if limit is not None and num_queued > 0 and num_queued + num_prompt_tokens > limit:
            raise OverloadedError(
                f"{num_queued} prompt tokens wait to be computed, and {num_prompt_tokens} more "
                f"would exceed max_num_queued_tokens={limit}; try again later, or raise "
                f"--max-num-queued-tokens",
                "max_num_queued_tokens",
            )

    def enter(self, num_prompt_tokens: int = 0) -> Place:
        """A request was accepted and waits; its prompt has so many tokens, 0 while unknown."""
        return Place(self, num_prompt_tokens)
