"""Clients that read their streams: at once, late, slowly, by callbacks, or never."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from frontend.outputs import RequestOutput
from frontend.requests.stream import RequestStream
from scripts.simulation.model import Model
from scripts.simulation.model_request import ModelRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderHabits:
    """How a client reads."""

    kind: str = "iterate"
    """iterate, result, listen or never."""
    first_pause_s: float = 0.0
    pause_s: float = 0.0
    """After each event."""
    close_after: int | None = None
    """It hangs up when it has so many tokens."""
    takes_deltas: bool = False


async def read(
    model: Model, request: ModelRequest, stream: RequestStream, habits: ReaderHabits
) -> None:
    """A reading task. Cancelling it drops the request."""
    if habits.first_pause_s:
        await asyncio.sleep(habits.first_pause_s)
    if habits.kind == "result":
        try:
            result = await stream.result()
        except RuntimeError:
            if request.is_dropped:
                return  # Its client closed it meanwhile.
            raise
        model.on_output(
            request,
            RequestOutput(
                result.request_id,
                result.text,
                result.token_ids,
                result.logprobs,
                result.num_prompt_tokens,
                result.num_cached_tokens,
                result.finish_reason,
                result.stop_reason,
                result.abort_cause,
                result.error,
                result.prompt_logprobs,
                result.weight_spans,
                result.resume_from,
            ),
        )
        return
    async for output in stream:
        model.on_output(request, output)
        if output.finish_reason is not None:
            return
        if habits.close_after is not None and len(request.token_ids) >= habits.close_after:
            hang_up(request, stream)
            return
        if habits.pause_s:
            await asyncio.sleep(habits.pause_s)


def listen(
    model: Model, request: ModelRequest, stream: RequestStream, habits: ReaderHabits
) -> None:
    """A reader that is called. It holds its stream itself until the end."""

    def is_full() -> bool:
        return habits.close_after is not None and len(request.token_ids) >= habits.close_after

    def on_news() -> None:
        output = stream.take()
        if output is None:
            return
        model.on_output(request, output)
        if output.finish_reason is None and is_full():
            hang_up(request, stream)

    def on_delta(text: str, token_ids: Sequence[int]) -> bool:
        if is_full():
            return False
        model.on_delta(request, text, list(token_ids))
        return True

    stream.listen(on_news, on_delta if habits.takes_deltas else None)


def hang_up(request: ModelRequest, stream: RequestStream) -> None:
    """A client closes its stream."""
    if request.last is None:
        request.note_drop()
    stream.close()
