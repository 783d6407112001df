"""Streams and the mailboxes behind them: merging, waiting, ending, dropping."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import pytest

from frontend.outputs import AbortCause, RequestOutput, Terminal
from frontend.requests.mailbox import Mailbox
from frontend.requests.stream import RequestStream

LENGTH = Terminal("length")


def opened(*, stream_interval: int = 1) -> tuple[Mailbox, RequestStream, list[str]]:
    """A mailbox, its stream, and a list that grows when the stream is dropped."""
    mailbox = Mailbox("r", stream_interval)
    drops: list[str] = []

    def drop(_: object = None) -> None:
        drops.append("r")

    return mailbox, RequestStream(mailbox, drop=drop, drop_later=drop), drops


async def test_events_merge_while_nobody_reads() -> None:
    mailbox, stream, _ = opened()
    mailbox.put("a", [1])
    mailbox.put("b", [2, 3])
    output = await anext(stream)
    assert (output.text, output.token_ids) == ("ab", (1, 2, 3))
    assert mailbox.take() is None


async def test_a_waiting_reader_is_woken() -> None:
    mailbox, stream, _ = opened()
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    mailbox.put("a", [1])
    assert (await reader).text == "a"


async def test_L1_the_terminal_comes_last_once_and_with_what_was_not_read() -> None:
    mailbox, stream, drops = opened()
    mailbox.put("a", [1])
    mailbox.finish(LENGTH)
    outputs = [output async for output in stream]
    assert [(output.text, output.finish_reason) for output in outputs] == [("a", "length")]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    with pytest.raises(AssertionError, match="follow"):
        mailbox.put("late", [2])
    with pytest.raises(AssertionError, match="one terminal"):
        mailbox.finish(LENGTH)
    stream.close()
    assert drops == []


async def test_a_result_gathers_everything() -> None:
    mailbox, stream, _ = opened()
    mailbox.prompt_token_ids = [1] * 7
    mailbox.put("a", [1])
    task = asyncio.ensure_future(stream.result())
    await asyncio.sleep(0)
    mailbox.put("b", [2])
    mailbox.finish(Terminal("abort", abort_cause=AbortCause.EXPLICIT))
    result = await task
    assert (result.text, result.token_ids, result.num_prompt_tokens) == ("ab", (1, 2), 7)
    assert (result.finish_reason, result.abort_cause) == ("abort", AbortCause.EXPLICIT)
    assert await stream.result() == result


async def test_a_result_is_whole_whatever_was_iterated_over_before() -> None:
    mailbox, stream, _ = opened()
    mailbox.put("a", [1])
    assert (await anext(stream)).text == "a"
    mailbox.put("b", [2])
    mailbox.finish(Terminal("length"))
    result = await stream.result()
    assert (result.text, result.token_ids) == ("ab", (1, 2))


async def test_a_stream_that_was_closed_has_no_result() -> None:
    mailbox, stream, _ = opened()
    mailbox.put("a", [1])
    await anext(stream)
    stream.close()
    with pytest.raises(RuntimeError, match="closed before its end"):
        await stream.result()


async def test_with_a_stream_interval_the_first_token_comes_at_once_and_others_in_groups() -> None:
    mailbox, stream, _ = opened(stream_interval=3)
    sizes: list[int] = []

    async def read() -> None:
        sizes.extend([len(output.token_ids) async for output in stream])

    reader = asyncio.ensure_future(read())
    for token_id in range(8):
        mailbox.put("x", [token_id])
        for _ in range(3):
            await asyncio.sleep(0)
    mailbox.finish(LENGTH)
    await reader
    assert sizes == [1, 3, 3, 1]


async def test_a_second_reader_is_told_off() -> None:
    _, stream, _ = opened()
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task"):
        await anext(stream)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_drops_once() -> None:
    _, stream, drops = opened()
    stream.close()
    stream.close()
    assert drops == ["r"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_leaving_a_with_block_drops() -> None:
    _, stream, drops = opened()
    async with stream as entered:
        assert entered is stream
        assert entered.request_id == "r"
    assert drops == ["r"]


async def test_cancelling_the_reading_task_drops() -> None:
    _, stream, drops = opened()
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert drops == ["r"]


async def test_losing_the_last_reference_drops() -> None:
    mailbox, stream, drops = opened()
    mailbox.put("a", [1])
    output: RequestOutput = await anext(stream)
    assert output.text == "a"
    del stream
    gc.collect()
    assert drops == ["r"]


async def test_a_plain_delta_that_finds_nothing_unread_is_offered_the_short_way() -> None:
    mailbox, stream, _ = opened()
    taken: list[tuple[str, list[int]]] = []
    keeps_up = True

    def on_delta(text: str, token_ids: Sequence[int]) -> bool:
        if keeps_up:
            taken.append((text, list(token_ids)))
        return keeps_up

    news: list[None] = []
    stream.listen(lambda: news.append(None), on_delta)
    mailbox.put("a", [1])
    assert (taken, news) == ([("a", [1])], [])
    keeps_up = False
    mailbox.put("b", [2])
    keeps_up = True
    mailbox.put("c", [3])
    assert taken == [("a", [1])], "what came later must not overtake what is unread"
    output = stream.take()
    assert output is not None
    assert (output.text, output.token_ids) == ("bc", (2, 3))
    mailbox.put("d", [4])
    mailbox.put("e", [5], is_last=True)
    mailbox.finish(LENGTH)
    assert taken == [("a", [1]), ("d", [4])]
    last = stream.take()
    assert last is not None
    assert (last.token_ids, last.finish_reason) == ((5,), "length")


async def test_with_a_stream_interval_no_delta_takes_the_short_way() -> None:
    mailbox, stream, _ = opened(stream_interval=3)
    stream.listen(lambda: None, lambda text, token_ids: True)
    mailbox.put("a", [1])
    output = stream.take()
    assert output is not None
    assert output.token_ids == (1,)
    mailbox.put("b", [2])
    assert stream.take() is None
