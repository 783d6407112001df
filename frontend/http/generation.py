"""From a call's streams to its HTTP answer, whatever dialect it speaks.

No task and no queue of its own: each output is written from within the callback that brings it. A
dialect says what the bytes are (`ReplyForm`); when they leave, and how a call ends, is decided
here.

Invariants
- Nothing is sent before the first output is there, so an early failure still has its HTTP status.
- A hang-up drops every request of the call within the callback that tells of it.
- While the client's socket is full, outputs stay in their mailboxes, where they merge; a client
  that lets more than `max_unread_tokens` wait there ends its call as a slow reader.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from frontend.async_engine import AsyncEngine
from frontend.http import errors
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.outputs import AbortCause, RequestOutput
from frontend.requests.new_request import NewRequest
from frontend.requests.stream import RequestStream

logger = logging.getLogger(__name__)


class ReplyForm(Protocol):
    """A dialect's shape of one call's outcome; `index` is a request's place in the call."""

    streams: Sequence[RequestStream]
    """Set before any other use."""

    def plain_event(self, index: int, text: str, token_ids: Sequence[int]) -> bytes | None:
        """The event of an output that has text and tokens alone; None if this dialect, this call or
        this event needs the whole output. Once a token: it is what a stream costs.
        """

    def event(self, index: int, output: RequestOutput) -> bytes:
        """The server-sent event (or events) of one output."""

    def end(self) -> bytes:
        """What follows the last output of a stream."""

    def error_event(self, index: int, error: ApiError) -> bytes:
        """A request failed after the stream had begun."""

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The answer that is no stream, from the total of each request."""


def generate(
    exchange: Exchange,
    engine: AsyncEngine,
    requests: Sequence[NewRequest],
    form: ReplyForm,
    *,
    stream: bool,
) -> None:
    """Have the engine accept a call's requests, all or none, and answer with what they bring.

    Raises what `AsyncEngine.accept` raises; the answer is written from the event loop.
    """
    if not stream:
        requests = [dataclasses.replace(request, is_final_only=True) for request in requests]
    streams = engine.accept(requests)
    exchange.request_id = exchange.request_id or requests[0].batch_id or streams[0].request_id
    answer = StreamedAnswer if stream else WholeAnswer
    answer(exchange, streams, form)


class _Answer:
    """What both kinds have: an exchange, its streams, and the end of both if one fails."""

    def __init__(
        self, exchange: Exchange, streams: Sequence[RequestStream], form: ReplyForm
    ) -> None:
        self._exchange = exchange
        self._streams = streams
        self._form = form
        self._num_open = len(streams)
        form.streams = streams
        exchange.on_hang_up = self._close_streams

    def _call(
        self, on_news: Callable[[int, RequestStream], None], index: int, stream: RequestStream
    ) -> None:
        """A dialect's fault in shaping one answer ends that call alone."""
        try:
            on_news(index, stream)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        logger.exception("an answer to %s %s failed", self._exchange.method, self._exchange.path)
        self._close_streams()
        self._exchange.fail()

    def _close_streams(self, cause: AbortCause = AbortCause.DROPPED_STREAM) -> None:
        for stream in self._streams:
            stream.close(cause)


class StreamedAnswer(_Answer):
    """Sends each output as it comes."""

    def __init__(
        self, exchange: Exchange, streams: Sequence[RequestStream], form: ReplyForm
    ) -> None:
        super().__init__(exchange, streams, form)
        exchange.on_writable = self._on_writable
        for index, stream in enumerate(streams):
            if exchange.is_finished:
                return  # The news of another one ended the call.
            on_news = partial(self._call, self._on_news, index, stream)
            stream.listen(on_news, partial(self._on_delta, index))

    def _on_delta(self, index: int, text: str, token_ids: Sequence[int]) -> bool:
        """The short way of nearly every token."""
        exchange = self._exchange
        if not (exchange.has_begun and exchange.is_writable):
            return False
        try:
            event = self._form.plain_event(index, text, token_ids)
        except Exception:
            self._fail()
            return True
        if event is None:
            return False
        exchange.write(event)
        return True

    def _on_news(self, index: int, stream: RequestStream) -> None:
        exchange = self._exchange
        if exchange.is_finished:
            return
        if not exchange.is_writable:
            num_unread_tokens = sum(one.num_unread_tokens for one in self._streams)
            if num_unread_tokens > exchange.max_unread_tokens:
                self._end_slow_reader(index, num_unread_tokens)
            return
        output = stream.take()
        if output is None:
            return
        if output.finish_reason is not None:
            self._write_last(index, output)
        elif exchange.has_begun:
            exchange.write(self._form.event(index, output))
        else:
            exchange.start_stream(self._form.event(index, output))

    def _on_writable(self) -> None:
        for index, stream in enumerate(self._streams):
            if self._exchange.is_finished:
                return
            self._call(self._on_news, index, stream)

    def _write_last(self, index: int, output: RequestOutput) -> None:
        """A request of the call has ended."""
        self._num_open -= 1
        error = errors.from_terminal(output)
        if error is not None:
            if not self._exchange.has_begun:
                error.answer(self._exchange)
                self._close_streams()  # One failed before anything was sent, so the call did.
                return
            data = self._form.error_event(index, error)
        else:
            data = self._form.event(index, output)
        if self._num_open == 0:
            self._finish(data)
        elif self._exchange.has_begun:
            self._exchange.write(data)
        else:
            self._exchange.start_stream(data)

    def _finish(self, data: bytes) -> None:
        if not self._exchange.has_begun:
            self._exchange.start_stream()
        self._exchange.finish(data + self._form.end())

    def _end_slow_reader(self, index: int, num_unread_tokens: int) -> None:
        self._close_streams(AbortCause.SLOW_READER)
        error = errors.slow_reader(num_unread_tokens, self._exchange.max_unread_tokens)
        self._exchange.keep_alive = False
        self._finish(self._form.error_event(index, error))


class WholeAnswer(_Answer):
    """Sends one answer when every request of the call has ended."""

    def __init__(
        self, exchange: Exchange, streams: Sequence[RequestStream], form: ReplyForm
    ) -> None:
        super().__init__(exchange, streams, form)
        self._outputs: list[RequestOutput | None] = [None] * len(streams)
        for index, stream in enumerate(streams):
            if exchange.is_finished:
                return
            stream.listen(partial(self._call, self._on_end, index, stream))

    def _on_end(self, index: int, stream: RequestStream) -> None:
        output = self._outputs[index] = stream.take()
        if output is None or self._exchange.has_begun:
            return
        self._num_open -= 1
        error = errors.from_terminal(output)
        if error is not None:
            error.answer(self._exchange)
            self._close_streams()  # One failed, so the call did.
        elif self._num_open == 0:
            outputs = [output for output in self._outputs if output is not None]
            self._exchange.respond(200, self._form.body(outputs))
