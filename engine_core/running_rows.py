"""The running requests: in order as a list, and what every step asks of them as arrays.

A decode step is the same for all its rows but a few, so what it needs of them (which lack a block,
which have filled one, which end) is found by comparing whole arrays; Python looks only at the rows
in question.

Invariants
- Rows are sorted by `Request.order`, without gaps; row i of every column is `requests[i]`'s.
- A column is a view that the next `insert` or `remove` makes stale: read it from here each time.
- `num_new` is 1 but for rows in prefill, whose chunk the scheduler chooses at each step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import numpy as np

from engine_core.batch import Integers
from engine_core.request import Request

NEVER = 2**62
"""More tokens than any request has."""

_NUM_COLUMNS = 10


class RunningRows:
    """A table of at most `capacity` rows."""

    slots: Integers
    clients: Integers
    num_new: Integers
    """Tokens that the next step computes."""
    num_computed: Integers
    num_known: Integers
    num_fitting: Integers
    """Tokens for which the request has blocks."""
    publishes_at: Integers
    """`num_computed` with which it has a block to publish."""
    ends_at: Integers
    """`num_known` with which it ends for its length."""
    is_prefilling: Integers
    """0 or 1: some of the tokens known when it joined have not been computed."""
    comes_alone: Integers
    """0 or 1: its next output has more than a token to tell."""

    def __init__(self, capacity: int) -> None:
        self.requests: list[Request] = []
        self.request_ids: list[str] = []
        self.token_ids: list[list[int]] = []
        """The requests' own lists."""
        self.num_by_client: Counter[int] = Counter()
        self._columns = np.zeros((_NUM_COLUMNS, capacity), np.int64)
        self._cut()

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def insert(
        self, request: Request, *, num_new: int, num_fitting: int, publishes_at: int
    ) -> None:
        """Let a request in that begins its prefill, at its place in the order."""
        row, end = self._find(request), len(self.requests)
        self._columns[:, row + 1 : end + 1] = self._columns[:, row:end]
        self._columns[:, row] = (
            request.slot,
            request.client_index,
            num_new,
            request.num_computed_tokens,
            len(request.token_ids),
            num_fitting,
            publishes_at,
            request.num_prompt_tokens + request.max_output_tokens,
            1,
            1,
        )
        self.requests.insert(row, request)
        self.request_ids.insert(row, request.request_id)
        self.token_ids.insert(row, request.token_ids)
        self.num_by_client[request.client_index] += 1
        self._cut()

    def remove(self, request: Request) -> None:
        """Raises ValueError if it does not run."""
        row, end = self._find(request), len(self.requests)
        if row == end or self.requests[row] is not request:
            raise ValueError(f"request {request.request_id} does not run")
        self._columns[:, row : end - 1] = self._columns[:, row + 1 : end]
        for of_rows in (self.requests, self.request_ids, self.token_ids):
            del of_rows[row]
        self.num_by_client[request.client_index] -= 1
        if not self.num_by_client[request.client_index]:
            del self.num_by_client[request.client_index]
        self._cut()

    def pop(self) -> Request:
        """Take out the last one in order."""
        last = self.requests[-1]
        self.remove(last)
        return last

    def check_integrity(self, block_size: int) -> list[str]:
        """What the columns tell of the requests that is not so, between steps."""
        errors = []
        for row, request in enumerate(self.requests):
            told = (self.slots, self.num_computed, self.num_known, self.num_fitting)
            actual = (
                request.slot,
                request.num_computed_tokens,
                len(request.token_ids),
                len(request.block_ids) * block_size,
            )
            if (columns := tuple(int(column[row]) for column in told)) != actual:
                errors.append(f"the row of {request.request_id} has {columns}, not {actual}")
            if (self.request_ids[row], self.token_ids[row]) != (
                request.request_id,
                request.token_ids,
            ):
                errors.append(f"the row of {request.request_id} is another request's")
        return errors

    def _find(self, request: Request) -> int:
        return bisect_left(self.requests, request.order, key=lambda one: one.order)

    def _cut(self) -> None:
        (
            self.slots,
            self.clients,
            self.num_new,
            self.num_computed,
            self.num_known,
            self.num_fitting,
            self.publishes_at,
            self.ends_at,
            self.is_prefilling,
            self.comes_alone,
        ) = self._columns[:, : len(self.requests)]
