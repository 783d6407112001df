"""A request that is refused was never accepted: nothing was sent, and nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.errors import EngineDeadError, InvalidRequestError, PromptTooLongError
from frontend.sampling_params import SamplingParams
from tests.support.mock_fleet import mock_fleet

REFUSED: dict[str, dict[str, Any]] = {
    "no prompt": {},
    "two prompts": {"prompt": "a", "prompt_token_ids": [1]},
    "an empty prompt": {"prompt_token_ids": []},
    "a text that is none": {"prompt": 5},
    "a lone surrogate": {"prompt": "\ud800"},
    "a negative token": {"prompt_token_ids": [-1]},
    "a token beyond 32 bits": {"prompt_token_ids": [2**40]},
    "a token beyond 64 bits": {"prompt_token_ids": [2**70]},
    "a token that is no number": {"prompt_token_ids": ["1"]},
    "more min_tokens than there is room": {
        "prompt_token_ids": [1] * 10,
        "sampling_params": SamplingParams(min_tokens=5000),
    },
    "a priority beyond 64 bits": {"prompt_token_ids": [1], "priority": 2**70},
    "an id that is no text": {"prompt_token_ids": [1], "request_id": "\ud800"},
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED.keys())
async def test_L11_a_refused_request_leaves_nothing_behind(arguments: dict[str, Any]) -> None:
    async with mock_fleet() as (frontend, [engine]):
        with pytest.raises(InvalidRequestError):
            frontend.generate(**{"request_id": "refused"} | arguments)
        assert frontend.num_live_requests == 0
        await engine.expect_silence(0.02)
        # Its id is free.
        frontend.generate(prompt_token_ids=[1], request_id="refused").close()


async def test_L11_a_programming_error_in_a_request_leaves_nothing_behind() -> None:
    async with mock_fleet() as (frontend, [engine]):
        no_params: Any = {"max_tokens": 3}
        with pytest.raises(AttributeError):
            frontend.generate(prompt_token_ids=[1], sampling_params=no_params, request_id="refused")
        assert frontend.num_live_requests == 0
        await engine.expect_silence(0.02)
        frontend.generate(prompt_token_ids=[1], request_id="refused").close()


async def test_L11_a_prompt_that_does_not_fit_is_refused_with_the_limit() -> None:
    async with mock_fleet() as (frontend, [engine]):
        assert frontend.max_model_len == 4096
        with pytest.raises(PromptTooLongError, match="4096"):
            frontend.generate(prompt_token_ids=[1] * 4096)
        assert frontend.num_live_requests == 0
        await engine.expect_silence(0.02)


async def test_L11_after_a_shutdown_requests_are_refused() -> None:
    async with mock_fleet() as (frontend, _):
        await frontend.shutdown()
        assert not frontend.is_healthy
        with pytest.raises(EngineDeadError):
            frontend.generate(prompt_token_ids=[1])
