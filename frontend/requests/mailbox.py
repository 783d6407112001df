"""Where the front end leaves a request's events for its one reader.

Invariants
- Events merge while nobody reads, so a slow reader costs the memory of its own tokens and nothing
  else.
- The first tokens and the terminal are delivered at once; between them at least `stream_interval`
  tokens are.
- The terminal is delivered once, last, together with whatever had not been read.
- `put`, `close` and the reader run on one event loop; nothing here is shared between threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from frontend.outputs import RequestOutput, Terminal, TokenLogprobs


class Mailbox:
    """A single-reader buffer of one request's output."""

    def __init__(self, request_id: str, stream_interval: int = 1) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._terminal: Terminal | None = None
        self._stream_interval = stream_interval
        self._wake_at_num_tokens = 1
        self._has_news = False
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the terminal was put."""
        return self._terminal is not None

    def put(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        assert self._terminal is None, "nothing may follow a terminal"
        self._text.append(text)
        self._token_ids.extend(token_ids)
        self._logprobs.extend(logprobs)
        if len(self._token_ids) >= self._wake_at_num_tokens:
            self._wake()

    def finish(self, terminal: Terminal) -> None:
        assert self._terminal is None, "a request has one terminal"
        self._terminal = terminal
        self._wake()

    def take(self) -> RequestOutput | None:
        """Everything that arrived since the last take, as one event; None if nothing did."""
        if not self._has_news:
            return None
        self._has_news = False
        self._wake_at_num_tokens = self._stream_interval
        terminal = self._terminal
        output = RequestOutput(
            request_id=self.request_id,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=None if terminal is None else terminal.finish_reason,
            stop_reason=None if terminal is None else terminal.stop_reason,
            abort_cause=None if terminal is None else terminal.abort_cause,
            error=None if terminal is None else terminal.error,
        )
        self._text.clear()
        self._token_ids.clear()
        self._logprobs.clear()
        return output

    async def wait(self) -> None:
        """Return when there is something to take."""
        if self._has_news:
            return
        if self._reader is not None:
            raise RuntimeError(f"stream {self.request_id!r} is being read by another task already")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        self._has_news = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
