"""The routes that tell how the server is, over real sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from frontend.config import FrontendConfig
from frontend.version import version
from ipc.engine_config import EngineConfig
from tests.support.served_engine import ServedEngine, served_engine

FAKE = FrontendConfig(
    engine=EngineConfig(model="none", runner="fake", fake_step_time_ms=2),
    served_model_name="fake",
)
PROMPT = [5, 6, 7]


@pytest.fixture
async def served() -> AsyncIterator[ServedEngine]:
    async with served_engine(FAKE, api_key="sesame") as server:
        yield server


def request(**fields: Any) -> dict[str, Any]:
    return {
        "json": {"prompt": PROMPT} | fields,
        "headers": {"authorization": "Bearer sesame"},
    }


async def scrape(served: ServedEngine) -> dict[str, float]:
    """The values of the metrics without labels."""
    page = (await served.http.get("/metrics")).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.labels
    }


async def test_probes_and_metrics_need_no_key(served: ServedEngine) -> None:
    for path in ("/health", "/ping", "/ready", "/version", "/load", "/metrics"):
        assert (await served.http.get(path)).status_code == 200
    assert (await served.http.get("/v1/models")).status_code == 401


async def test_the_version_is_the_packages(served: ServedEngine) -> None:
    assert (await served.http.get("/version")).json() == {"version": version()}


async def test_the_load_is_the_number_of_live_requests(served: ServedEngine) -> None:
    post = asyncio.create_task(served.http.post("/v1/completions", **request(max_tokens=3000)))
    await served.wait_for_live_requests(1)
    assert (await served.http.get("/load")).json() == {"server_load": 1}
    await served.engine.abort(abort_all=True)
    assert (await post).status_code == 200
    assert (await served.http.get("/load")).json() == {"server_load": 0}


async def test_a_request_is_in_the_metrics_from_its_first_token_to_its_end(
    served: ServedEngine,
) -> None:
    before = await scrape(served)
    assert before["caesura_generation_tokens_total"] == 0
    answer = await served.http.post("/v1/completions", **request(max_tokens=12))
    assert answer.status_code == 200
    after = await scrape(served)
    assert after["caesura_requests_accepted_total"] == 1
    assert after["caesura_prompt_tokens_total"] == len(PROMPT)
    assert after["caesura_generation_tokens_total"] == 12
    assert after["caesura_time_to_first_token_seconds_count"] == 1
    assert after["caesura_inter_token_latency_seconds_count"] == 11
    assert after["caesura_request_queue_time_seconds_count"] == 1
    assert after["caesura_e2e_request_latency_seconds_count"] == 1
    assert after["caesura_num_requests_live"] == 0
    assert after["caesura_num_connections"] >= 1


async def test_a_scraper_that_asks_for_openmetrics_gets_it(served: ServedEngine) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = await served.http.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = openmetrics.text_string_to_metric_families(answer.text)  # type: ignore[no-untyped-call]
    assert "caesura_info" in {sample.name for family in families for sample in family.samples}


async def test_a_server_without_engines_is_neither_healthy_nor_ready(
    served: ServedEngine,
) -> None:
    served.engine._supervisor.kill()
    async with asyncio.timeout(10):
        while served.engine.is_healthy:  # noqa: ASYNC110  # no event to await
            await asyncio.sleep(0.01)
    for path in ("/health", "/ping", "/ready", "/health_generate"):
        answer = await served.http.get(path)
        assert answer.status_code == 503
        assert "no engine" in answer.json()["error"]["message"]
    headers = {"authorization": "Bearer sesame"}
    loads = (await served.http.get("/v1/loads", headers=headers)).json()
    assert (loads["dp_rank_count"], [load["dp_rank"] for load in loads["loads"]]) == (1, [0])
    page = (await served.http.get("/metrics")).text
    assert 'caesura_engine_up{engine="0"} 0.0' in page


async def test_the_log_of_a_request_that_failed_says_why(
    served: ServedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    served.engine.log_requests()
    post = asyncio.create_task(served.http.post("/v1/completions", **request(max_tokens=3000)))
    await served.wait_for_live_requests(1)
    served.engine._supervisor.kill()
    assert (await post).status_code == 503
    (ended,) = [one for one in caplog.records if one.message.startswith("request ")]
    assert vars(ended)["error_code"] == "engine_dead"
    assert f"error engine_dead: {vars(ended)['error_message']}" in ended.message
    assert "None" not in ended.message
