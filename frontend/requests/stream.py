"""The handle that a client holds of its running request.

Dropping it ends the request: `close()`, leaving an `async with`, cancelling the task that reads it,
or losing the last reference to it. A dropped stream needs no further care; its abort is sent for
it, together with all others of its time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from frontend.outputs import RequestOutput, RequestResult, TokenLogprobs
from frontend.requests.mailbox import Mailbox


class RequestStream:
    """An async iterator over a request's events, the last of which carries its finish reason."""

    def __init__(
        self, mailbox: Mailbox, *, drop: Callable[[], None], drop_later: Callable[[], None]
    ) -> None:
        """`drop` takes effect at once where it can; `drop_later` may be called in the midst of
        anything, as the garbage collector does.
        """
        self._mailbox = mailbox
        self._drop = drop
        self._drop_later = drop_later
        self._is_done = False

    @property
    def request_id(self) -> str:
        return self._mailbox.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_done:
            raise StopAsyncIteration
        try:
            while (output := self._mailbox.take()) is None:
                await self._mailbox.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        if output.finish_reason is not None:
            self._is_done = True
        return output

    async def result(self) -> RequestResult:
        """Read to the end and return the totals of all events read here."""
        text: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        async for output in self:
            text.append(output.text)
            token_ids.extend(output.token_ids)
            logprobs.extend(output.logprobs)
            if output.finish_reason is not None:
                return RequestResult(
                    request_id=output.request_id,
                    text="".join(text),
                    token_ids=tuple(token_ids),
                    logprobs=tuple(logprobs),
                    num_prompt_tokens=output.num_prompt_tokens,
                    num_cached_tokens=output.num_cached_tokens,
                    finish_reason=output.finish_reason,
                    stop_reason=output.stop_reason,
                    abort_cause=output.abort_cause,
                    error=output.error,
                )
        raise RuntimeError(f"stream {self.request_id!r} was read to its end or closed before")

    def close(self) -> None:
        """Drop the request, unless it has ended. Harmless to repeat; what was not read is lost."""
        if not self._is_done:
            self._is_done = True
            self._drop()

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
