"""FastDeploy's life-cycle tests without a counterpart elsewhere; `docs/peer_tests.md` lists all."""

from __future__ import annotations

import asyncio

from frontend.sampling_params import SamplingParams
from tests.support.auto_answers import AutoAnswers
from tests.support.mock_fleet import mock_fleet
from tests.support.served_engine import serving


async def test_L5_L12_an_abort_is_answered_although_one_engine_is_silent() -> None:
    """The one that answers is told as aborted; of the other's request nothing is claimed."""
    async with mock_fleet(2) as (frontend, [good, silent]):
        async with AutoAnswers(good), serving(frontend) as served:
            params = SamplingParams(max_tokens=100_000)
            streams = [
                frontend.generate(prompt_token_ids=[5], request_id=name, sampling_params=params)
                for name in ("a", "b")
            ]
            await silent.next_add()
            call = served.http.post("/v1/abort_requests", json={"abort_all": True}, timeout=20)
            answer = await asyncio.wait_for(call, 15)
            assert answer.status_code == 200
            reply = answer.json()
            assert reply["status"] == "success"
            assert len(reply["result"]["aborted"]) == 1
            assert sorted(each["status"] for each in reply["requests"].values()) == [
                "aborted",
                "pending",
            ]
            assert sorted(reply["engines"].values()) == ["ok", "timeout"]
            del streams
