"""The handle that a client holds of its running request.

Dropping it ends the request: `close()`, leaving an `async with`, cancelling the task that reads it,
or losing the last reference to it. A dropped stream needs no further care; its abort is sent for
it, together with all others of its time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from frontend.outputs import AbortCause, RequestOutput, RequestResult, TokenLogprobs
from frontend.requests.mailbox import Mailbox, OnDelta


class RequestStream:
    """An async iterator over a request's events, the last of which carries its finish reason."""

    __slots__ = (
        "__weakref__",
        "_drop",
        "_drop_later",
        "_is_done",
        "_last",
        "_logprobs",
        "_mailbox",
        "_prompt_logprobs",
        "_text",
    )

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        drop: Callable[[AbortCause], None],
        drop_later: Callable[[], None],
    ) -> None:
        """`drop` takes effect at once where it can; `drop_later` may be called in the midst of
        anything, as the garbage collector does.
        """
        self._mailbox = mailbox
        self._drop = drop
        self._drop_later = drop_later
        self._is_done = False
        # What the iterator has given out, for `result`; the tokens lie in the mailbox.
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._last: RequestOutput | None = None

    @property
    def request_id(self) -> str:
        return self._mailbox.request_id

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt's tokens, from the first event on."""
        return self._mailbox.prompt_token_ids

    @property
    def num_unread_tokens(self) -> int:
        """Tokens that have arrived and were not taken."""
        return self._mailbox.num_unread_tokens

    # -- for a reader that is a task -----------------------------------------------------------

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_done:
            raise StopAsyncIteration
        try:
            while (output := self.take()) is None:
                await self._mailbox.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        self._text.append(output.text)
        self._logprobs += output.logprobs
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        self._last = output
        return output

    async def result(self) -> RequestResult:
        """Read to the end, and return the whole outcome, whatever of it was iterated over before.

        Raises RuntimeError if the stream was closed.
        """
        async for _ in self:
            pass
        last = self._last
        if last is None or last.finish_reason is None:
            raise RuntimeError(f"stream {self.request_id!r} was closed before its end")
        return RequestResult(
            request_id=last.request_id,
            text="".join(self._text),
            token_ids=tuple(self._mailbox.token_ids),
            logprobs=tuple(self._logprobs),
            num_prompt_tokens=last.num_prompt_tokens,
            num_cached_tokens=last.num_cached_tokens,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            abort_cause=last.abort_cause,
            error=last.error,
            prompt_logprobs=self._prompt_logprobs,
            weight_spans=last.weight_spans,
            resume_from=last.resume_from,
        )

    # -- for a reader that is called -----------------------------------------------------------

    def take(self) -> RequestOutput | None:
        """What is new, without waiting; None if nothing is, or if the end was taken."""
        output = self._mailbox.take()
        if output is not None and output.finish_reason is not None:
            self._is_done = True
            self._mailbox.stop_listening()  # It held the reader, which holds this stream.
        return output

    def listen(self, on_news: Callable[[], object], on_delta: OnDelta | None = None) -> None:
        """Have `on_news` called on the event loop whenever there is something to take, at once if
        there is already; plain deltas are offered to `on_delta` before. Neither may raise.
        """
        self._mailbox.listen(on_news, on_delta)

    # -- the end -------------------------------------------------------------------------------

    def close(self, cause: AbortCause = AbortCause.DROPPED_STREAM) -> None:
        """Drop the request, unless it has ended. Harmless to repeat; what was not read is lost."""
        if not self._is_done:
            self._is_done = True
            self._mailbox.stop_listening()
            self._drop(cause)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_done:
            self._drop_later()
