"""Where the front end leaves a request's events for its one reader.

Invariants
- Events merge while nobody reads, so a slow reader costs the memory of its own tokens and nothing
  else.
- The first tokens and the terminal are delivered at once; between them at least `stream_interval`
  tokens are. With `is_final_only`, the terminal brings everything.
- The terminal is delivered once, last, together with whatever had not been read.
- `put`, `close` and the reader run on one event loop; nothing here is shared between threads.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence

from frontend.outputs import RequestOutput, ResumeFrom, Terminal, TokenLogprobs, WeightSpan

OnDelta = Callable[[str, Sequence[int]], bool]
"""(text, token ids) -> whether they were taken."""


class Mailbox:
    """A single-reader buffer of one request's output."""

    __slots__ = (
        "_has_news",
        "_listener",
        "_logprobs",
        "_num_taken",
        "_on_delta",
        "_reader",
        "_resume_from",
        "_stream_interval",
        "_terminal",
        "_text",
        "_wake_at_num_tokens",
        "_weight_spans",
        "num_cached_tokens",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "token_ids",
    )

    def __init__(
        self, request_id: str, stream_interval: int = 1, *, is_final_only: bool = False
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids: Sequence[int] = ()
        """Empty until the prompt's tokens are known; without the outputs that a resumed request
        brings along."""
        self.num_cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.token_ids: list[int] = []
        """All that were put, read or not."""
        self._num_taken = 0
        """So many of them were read."""
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._terminal: Terminal | None = None
        self._weight_spans: tuple[WeightSpan, ...] = ()
        self._resume_from: ResumeFrom | None = None
        self._stream_interval = sys.maxsize if is_final_only else stream_interval
        self._wake_at_num_tokens = sys.maxsize if is_final_only else 1
        self._has_news = False
        self._reader: asyncio.Future[None] | None = None
        self._listener: Callable[[], object] | None = None
        self._on_delta: OnDelta | None = None

    @property
    def num_unread_tokens(self) -> int:
        return len(self.token_ids) - self._num_taken

    def put(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        is_last: bool = False,
    ) -> None:
        """Leave more output. With `is_last` the terminal follows at once, and wakes the reader."""
        assert self._terminal is None, "nothing may follow a terminal"
        if (
            self._on_delta is not None
            and not (self._text or logprobs or is_last)
            and self._on_delta(text, token_ids)
        ):
            self.token_ids.extend(token_ids)
            self._num_taken += len(token_ids)
            return
        self._text.append(text)
        self.token_ids.extend(token_ids)
        if logprobs:
            self._logprobs += logprobs
        if len(self.token_ids) >= self._wake_at_num_tokens and not is_last:
            self._wake()

    def finish(
        self,
        terminal: Terminal,
        weight_spans: tuple[WeightSpan, ...] = (),
        resume_from: ResumeFrom | None = None,
    ) -> None:
        assert self._terminal is None, "a request has one terminal"
        self._terminal = terminal
        self._weight_spans, self._resume_from = weight_spans, resume_from
        self._wake()

    def take(self) -> RequestOutput | None:
        """Everything that arrived since the last take, as one event; None if nothing did."""
        if not self._has_news:
            return None
        self._has_news = False
        text = "".join(self._text)
        self._text.clear()
        start, stop = self._num_taken, len(self.token_ids)
        # Mostly it is one token, for which a slice costs several times as much.
        token_ids = (self.token_ids[-1],) if stop - start == 1 else tuple(self.token_ids[start:])
        self._num_taken = stop
        self._wake_at_num_tokens = stop + self._stream_interval
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._logprobs:
            logprobs = tuple(self._logprobs)
            self._logprobs.clear()
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, ()
        head = (self.request_id, text, token_ids, logprobs, len(self.prompt_token_ids))
        terminal = self._terminal
        if terminal is None:
            end = None, None, None, None
            return RequestOutput(*head, self.num_cached_tokens, *end, prompt_logprobs)
        return RequestOutput(
            *head,
            self.num_cached_tokens,
            terminal.finish_reason,
            terminal.stop_reason,
            terminal.abort_cause,
            terminal.error,
            prompt_logprobs,
            self._weight_spans,
            self._resume_from,
        )

    async def wait(self) -> None:
        """Return when there is something to take."""
        if self._has_news:
            return
        if self._reader is not None or self._listener is not None:
            raise RuntimeError(f"stream {self.request_id!r} is being read by another task already")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def listen(self, on_news: Callable[[], object], on_delta: OnDelta | None = None) -> None:
        """Call `on_news` whenever there is something to take, at once if there is already.

        For a reader that is no task: it costs no turn of the event loop. A delta that is text and
        tokens alone, and finds nothing unread, is first offered to `on_delta`: if it returns True,
        it has taken it, at a third of the cost. Neither may raise.
        """
        assert self._listener is None, "a stream has one reader"
        self._listener = on_news
        if self._stream_interval == 1:
            self._on_delta = on_delta
        if self._has_news:
            on_news()

    def stop_listening(self) -> None:
        self._listener = self._on_delta = None

    def _wake(self) -> None:
        self._has_news = True
        if self._listener is not None:
            self._listener()
        elif self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
