"""vLLM's life-cycle tests that had no counterpart here; `docs/peer_tests.md` lists them all."""

from __future__ import annotations

import asyncio

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.sampling_params import SamplingParams
from tests.support.mock_fleet import mock_fleet
from tests.support.served_engine import PROMPT, fake, reset, served_engine


async def test_L3_L8_of_a_hundred_requests_every_tenth_is_cancelled_and_the_others_are_exact() -> (
    None
):
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        engine = served.engine

        async def run(number: int) -> list[int]:
            params = SamplingParams(max_tokens=3000 if number % 10 == 0 else 300)
            prompt = [number, 7]
            stream = engine.generate(
                prompt_token_ids=prompt, request_id=f"r-{number}", sampling_params=params
            )
            return list((await stream.result()).token_ids)

        tasks = [asyncio.create_task(run(number)) for number in range(100)]
        await served.wait_for_live_requests(100)
        for task in tasks[::10]:
            task.cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        for number, outcome in enumerate(done):
            if number % 10 == 0:
                assert isinstance(outcome, asyncio.CancelledError)
            else:
                assert outcome == expected_tokens([number, 7], 300)
        await served.wait_until_idle()
        again = engine.generate(
            prompt_token_ids=PROMPT, request_id="r-0", sampling_params=SamplingParams(max_tokens=5)
        )
        assert list((await again.result()).token_ids) == expected_tokens(PROMPT, 5)


async def test_L1_an_end_that_is_confirmed_without_an_output_still_ends_its_stream() -> None:
    async with mock_fleet() as (frontend, [engine]):
        stream = frontend.generate(prompt_token_ids=[1], request_id="a")
        request = await engine.next_add()
        await engine.send_tokens(request.request_id, [7])
        await engine.confirm([request.request_id])
        result = await asyncio.wait_for(stream.result(), 5)
        assert result.finish_reason == "error"
        assert list(result.token_ids) == [7]
        assert frontend.num_live_requests == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/inference/v1/generate"])
async def test_L4_the_load_is_zero_again_after_a_hang_up(path: str) -> None:
    async with served_engine(fake(fake_step_time_ms=1)) as served:
        connection = await served.connect()
        body = {"prompt": PROMPT, "token_ids": PROMPT, "stream": True, "max_tokens": 3000}
        await served.post(connection, path, body | {"sampling_params": {"max_tokens": 3000}})
        await served.receive_until(connection, b"data: ")
        assert (await served.http.get("/load")).json() == {"server_load": 1}
        reset(connection)
        await served.wait_until_idle()
        assert (await served.http.get("/load")).json() == {"server_load": 0}
