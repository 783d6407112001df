"""Requests whose long prompt is being tokenized: accepted, abortable, droppable, not yet sent."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from frontend.async_engine import AsyncEngine
from frontend.errors import DuplicateRequestIdError, PromptTooLongError
from frontend.outputs import AbortCause
from frontend.requests.intake import MAX_INLINE_CHARS
from frontend.sampling_params import SamplingParams
from frontend.text.tokenizer import Tokenizer
from ipc.engine_config import EngineConfig
from tests.support.mock_engine import MockEngine
from tests.support.mock_fleet import mock_fleet

LONG_TEXT = "x = 1\n" * MAX_INLINE_CHARS


@contextlib.asynccontextmanager
async def stuck_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[AsyncEngine, MockEngine, threading.Event]]:
    """A fleet whose tokenizer takes until the event is set, and then says [5, 6, 7]."""
    release = threading.Event()

    def encode(self: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert release.wait(10)
        return [5, 6, 7]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    async with mock_fleet() as (frontend, [engine]):
        try:
            yield frontend, engine, release
        finally:
            release.set()


async def test_a_long_prompt_is_tokenized_beside_the_loop_and_then_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stuck_tokenizer(monkeypatch) as (frontend, engine, release):
        stream = frontend.generate(LONG_TEXT, request_id="long")
        await engine.expect_silence(0.05)
        release.set()
        request = await engine.next_add()
        assert request.prompt_token_ids == [5, 6, 7]
        stream.close()


async def test_L4_L5_an_abort_finds_a_request_that_is_being_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stuck_tokenizer(monkeypatch) as (frontend, engine, release):
        stream = frontend.generate(LONG_TEXT, request_id="long")
        receipt = await frontend.abort("long")
        assert receipt.requests["long"].status == "aborted"
        assert receipt.requests["long"].stage == "tokenizing"
        result = await stream.result()
        assert (result.finish_reason, result.token_ids) == ("abort", ())
        assert result.abort_cause is AbortCause.EXPLICIT
        release.set()
        await engine.expect_silence(0.1)


async def test_L4_a_request_dropped_while_it_is_being_tokenized_is_never_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stuck_tokenizer(monkeypatch) as (frontend, engine, release):
        frontend.generate(LONG_TEXT).close()
        await asyncio.sleep(0)
        release.set()
        await engine.expect_silence(0.1)
        assert frontend.num_live_requests == 0


async def test_L6_abort_all_ends_requests_that_are_being_tokenized_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stuck_tokenizer(monkeypatch) as (frontend, engine, release):
        before = [frontend.generate(LONG_TEXT) for _ in range(3)]
        await frontend.abort(abort_all=True)
        after = frontend.generate(LONG_TEXT, request_id="after")
        release.set()
        for stream in before:
            assert (await stream.result()).finish_reason == "abort"
        assert (await engine.next_add()).external_req_id == "after"
        after.close()


async def test_L8_the_id_of_a_request_that_is_being_tokenized_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stuck_tokenizer(monkeypatch) as (frontend, _, _release):
        stream = frontend.generate(LONG_TEXT, request_id="long")
        with pytest.raises(DuplicateRequestIdError):
            frontend.generate(prompt_token_ids=[1], request_id="long")
        stream.close()


async def test_L1_a_long_prompt_that_turns_out_too_long_ends_with_an_error_that_says_so() -> None:
    async with mock_fleet() as (frontend, [engine]):
        num_tokens = len(Tokenizer.load(frontend.config.engine.model).encode(LONG_TEXT))
        result = await frontend.generate(LONG_TEXT).result()
        assert result.finish_reason == "error"
        assert result.error is not None
        assert result.error.code == "context_length_exceeded"
        assert f"{num_tokens} tokens" in result.error.message
        assert f"max_model_len={frontend.max_model_len}" in result.error.message
        await engine.expect_silence(0.05)


async def test_L1_a_tokenizer_that_fails_ends_only_that_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mock_fleet() as (frontend, [engine]):
        monkeypatch.setattr(Tokenizer, "encode", lambda self, text: 1 / 0)
        result = await frontend.generate(LONG_TEXT).result()
        assert result.error is not None
        assert result.error.code == "internal_error"
        stream = frontend.generate(prompt_token_ids=[1], sampling_params=SamplingParams())
        await engine.next_add()
        stream.close()


async def test_L1_when_the_engines_die_meanwhile_the_request_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stuck_tokenizer(monkeypatch) as (frontend, engine, release):
        stream = frontend.generate(LONG_TEXT)
        await engine.die()
        while frontend.is_healthy:  # noqa: ASYNC110 (nothing tells when it changes)
            await asyncio.sleep(0.01)
        release.set()
        result = await asyncio.wait_for(stream.result(), 5)
        assert result.error is not None
        assert "no engine is alive" in result.error.message


async def test_a_short_prompt_that_is_too_long_for_the_context_is_refused_at_once() -> None:
    async with mock_fleet() as (frontend, _):
        too_many = [1] * frontend.max_model_len
        with pytest.raises(PromptTooLongError, match=f"has {len(too_many)} tokens"):
            frontend.generate(prompt_token_ids=too_many)
        assert frontend.num_live_requests == 0


async def test_an_engine_without_a_tokenizer_asks_for_token_ids() -> None:
    fake = EngineConfig(model="fake", runner="fake")
    async with mock_fleet(engine=fake) as (frontend, _):
        with pytest.raises(ValueError, match="prompt_token_ids"):
            frontend.generate("text")


async def test_L8_an_id_is_free_again_as_soon_as_its_stream_is_closed() -> None:
    async with mock_fleet() as (frontend, [engine]):
        first = frontend.generate(prompt_token_ids=[1], request_id="again")
        first.close()
        second = frontend.generate(prompt_token_ids=[2], request_id="again")
        adds = [await engine.next_add(), await engine.next_add()]
        assert [add.prompt_token_ids for add in adds] == [[1], [2]]
        assert await engine.next_abort() == [adds[0].request_id]
        second.close()
