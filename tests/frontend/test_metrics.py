"""What is counted, and how Prometheus reads it: every page here is parsed back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from frontend.metrics import Metrics
from frontend.metrics.exposition import Exposition
from frontend.metrics.histogram import Histogram, doubling_buckets, seconds_buckets
from frontend.outputs import AbortCause
from frontend.requests.pause_reports import PauseState
from ipc.output import EngineCoreEvent, EventType
from ipc.stats import PrefixCacheStats, SchedulerStats
from tests.support.scripted_frontend import REPOSITORY

DOCUMENTATION = Path(REPOSITORY) / "docs" / "metrics.md"


RUNNING = PauseState(
    state="running",
    mode=None,
    pause_id=None,
    for_s=1.0,
    newcomers=None,
    num_held=0,
    lease_left_s=None,
)


@dataclass
class Frontend:
    """What is asked at a scrape."""

    num_live_requests: int = 3
    num_ending_requests: int = 1
    alive_engines: Collection[int] = (0, 1)
    pause_state: PauseState = RUNNING
    weight_version: str | None = "v1"


class Page:
    """A scrape of a front end with two engines."""

    def __init__(self, metrics: Metrics, frontend: Frontend | None = None) -> None:
        self.exposition = Exposition(
            metrics,
            frontend if frontend is not None else Frontend(),
            num_engines=2,
            model_name='the "model"\n',
            version="1.2.3",
        )
        body, self.content_type = self.exposition.render()
        self.families = list(text_string_to_metric_families(body.decode()))
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """A sample's value; None if there is no such sample."""
        return self._values.get((name, frozenset(labels.items())))


def test_a_value_at_a_bound_is_in_its_bucket_and_one_above_is_in_the_next() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 99.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.total == 106.5


def test_latency_buckets_are_at_most_twice_apart_and_span_what_is_asked() -> None:
    bounds = seconds_buckets(-3, 300.0)
    assert (bounds[0], bounds[-1]) == (0.001, 300.0)
    ratios = [upper / lower for lower, upper in itertools.pairwise(bounds)]
    assert all(1.0 < ratio < 1.7 for ratio in ratios)
    assert doubling_buckets(1024) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def test_buckets_are_cumulative_and_end_with_the_count_of_all() -> None:
    metrics = Metrics()
    for gap_s in (0.00005, 0.012, 0.012, 50.0):
        metrics.on_tokens(1, gap_s)
    page = Page(metrics)
    name = "caesura_inter_token_latency_seconds"
    assert page.value(f"{name}_bucket", le="0.0001") == 1
    assert page.value(f"{name}_bucket", le="0.01") == 1
    assert page.value(f"{name}_bucket", le="0.015") == 3
    assert page.value(f"{name}_bucket", le="10.0") == 3
    assert page.value(f"{name}_bucket", le="+Inf") == 4
    assert page.value(f"{name}_count") == 4
    assert page.value(f"{name}_sum") == pytest.approx(50.02405)


def test_tokens_that_come_together_share_their_gap() -> None:
    metrics = Metrics()
    metrics.on_tokens(4, 0.04)
    page = Page(metrics)
    name = "caesura_inter_token_latency_seconds"
    assert page.value(f"{name}_bucket", le="0.0075") == 0
    assert page.value(f"{name}_bucket", le="0.01") == 4
    assert page.value(f"{name}_sum") == pytest.approx(0.04)


def test_a_request_is_counted_from_its_acceptance_to_its_end() -> None:
    metrics = Metrics()
    metrics.on_accepted()
    metrics.on_first_tokens(1, 0.2, 7)
    metrics.on_tokens(1, 0.01)
    metrics.on_tokens(2, 0.01)
    metrics.on_end("length", 0.3, 7, 4)
    page = Page(metrics)
    assert page.value("caesura_requests_accepted_total") == 1
    assert page.value("caesura_prompt_tokens_total") == 7
    assert page.value("caesura_generation_tokens_total") == 4
    assert page.value("caesura_time_to_first_token_seconds_sum") == 0.2
    assert page.value("caesura_inter_token_latency_seconds_count") == 3
    assert page.value("caesura_requests_finished_total", finish_reason="length") == 1
    assert page.value("caesura_requests_finished_total", finish_reason="stop") == 0
    assert page.value("caesura_e2e_request_latency_seconds_sum") == 0.3
    assert page.value("caesura_request_prompt_tokens_bucket", le="8.0") == 1
    assert page.value("caesura_request_prompt_tokens_bucket", le="4.0") == 0
    assert page.value("caesura_request_generation_tokens_sum") == 4


def test_queue_time_ends_with_the_first_step_and_a_preemption_does_not_count_into_it() -> None:
    metrics = Metrics()
    metrics.on_events(
        [
            EngineCoreEvent(EventType.QUEUED, 100.0),
            EngineCoreEvent(EventType.SCHEDULED, 100.5),
            EngineCoreEvent(EventType.PREEMPTED, 101.0),
            EngineCoreEvent(EventType.SCHEDULED, 109.0),
        ]
    )
    metrics.on_events([EngineCoreEvent(EventType.SCHEDULED, 120.0)])
    page = Page(metrics)
    assert page.value("caesura_request_queue_time_seconds_count") == 1
    assert page.value("caesura_request_queue_time_seconds_sum") == 0.5
    assert page.value("caesura_preemptions_total") == 1


def test_L7_an_abort_frame_is_counted_once_whatever_it_names() -> None:
    metrics = Metrics()
    metrics.on_abort_frame(1024)
    metrics.on_abort_frame(3)
    page = Page(metrics)
    assert page.value("caesura_abort_frames_total") == 2
    assert page.value("caesura_abort_frame_ids_sum") == 1027
    assert page.value("caesura_abort_frame_ids_bucket", le="4.0") == 1


def test_aborts_are_told_apart_by_cause_and_stage() -> None:
    metrics = Metrics()
    metrics.on_abort(AbortCause.DROPPED_STREAM, "decode")
    metrics.on_freed(0.002)
    metrics.on_wasted_tokens(2)
    page = Page(metrics)
    assert page.value("caesura_aborts_total", cause="dropped_stream", stage="decode") == 1
    assert page.value("caesura_aborts_total", cause="dropped_stream", stage="waiting") == 0
    assert page.value("caesura_hang_up_to_blocks_freed_seconds_bucket", le="0.002") == 1
    assert page.value("caesura_wasted_tokens_total") == 2


def test_every_refusal_names_its_limit_and_the_known_ones_start_at_zero() -> None:
    metrics = Metrics()
    metrics.on_refused("max_connections")
    page = Page(metrics)
    assert page.value("caesura_requests_refused_total", reason="max_connections") == 1
    assert page.value("caesura_requests_refused_total", reason="max_num_queued_tokens") == 0


def test_an_engine_reports_its_state_whole_and_its_cache_hits_in_portions() -> None:
    metrics = Metrics()
    for num_running, hits in ((5, 16), (2, 32)):
        cache = PrefixCacheStats(queries=64, hits=hits)
        metrics.on_scheduler_stats(
            1,
            SchedulerStats(
                num_running_reqs=num_running,
                num_waiting_reqs=7,
                kv_cache_usage=0.25,
                prefix_cache_stats=cache,
            ),
        )
    metrics.on_integrity_violations(1, 3)
    metrics.on_integrity_violations(1, 3)
    page = Page(metrics)
    assert page.value("caesura_num_requests_running", engine="1") == 2
    assert page.value("caesura_num_requests_waiting", engine="1") == 7
    assert page.value("caesura_kv_cache_usage_ratio", engine="1") == 0.25
    assert page.value("caesura_prefix_cache_queries_tokens_total", engine="1") == 128
    assert page.value("caesura_prefix_cache_hits_tokens_total", engine="1") == 48
    assert page.value("caesura_integrity_violations_total", engine="1") == 3
    assert page.value("caesura_num_requests_running", engine="0") == 0


def test_L12_a_dead_engine_is_down_and_says_no_more_of_its_state() -> None:
    metrics = Metrics()
    stats = SchedulerStats(
        num_running_reqs=9, prefix_cache_stats=PrefixCacheStats(queries=5, hits=5)
    )
    metrics.on_scheduler_stats(1, stats)
    page = Page(metrics, Frontend(alive_engines=[0]))
    assert page.value("caesura_engine_up", engine="0") == 1
    assert page.value("caesura_engine_up", engine="1") == 0
    assert page.value("caesura_num_requests_running", engine="1") is None
    assert page.value("caesura_kv_cache_usage_ratio", engine="1") is None
    assert page.value("caesura_prefix_cache_hits_tokens_total", engine="1") == 5


def test_gauges_are_read_at_the_scrape() -> None:
    metrics, frontend = Metrics(), Frontend()
    exposition = Page(metrics, frontend).exposition
    frontend.num_live_requests = 77
    metrics.num_connections = lambda: 1001
    body, _ = exposition.render()
    assert b"caesura_num_requests_live 77.0\n" in body
    assert b"caesura_num_requests_ending 1.0\n" in body
    assert b"caesura_num_connections 1001.0\n" in body


def test_a_model_name_may_hold_any_character() -> None:
    page = Page(Metrics())
    assert page.value("caesura_info", model_name='the "model"\n', version="1.2.3") == 1


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text; version=1.0.0,text/plain;q=0.5", "application/openmetrics"),
        ("application/openmetrics-text; version=newest", "text/plain; version=0.0.4"),
        ("text/plain; version=x.y", "text/plain; version=0.0.4"),
    ],
)
def test_the_format_is_the_one_that_the_scraper_asks_for(accept: str, content_type: str) -> None:
    metrics = Metrics()
    metrics.on_tokens(1, 0.01)
    body, answered = Page(metrics).exposition.render(accept)
    assert answered.startswith(content_type)
    is_openmetrics = answered.startswith("application/openmetrics")
    parse = (
        openmetrics.text_string_to_metric_families
        if is_openmetrics
        else text_string_to_metric_families
    )
    assert "caesura_inter_token_latency_seconds" in {family.name for family in parse(body.decode())}


def test_the_documentation_lists_exactly_the_metrics_that_there_are() -> None:
    documented = set(re.findall(r"^\| `(caesura_\w+)`", DOCUMENTATION.read_text(), re.MULTILINE))
    served = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in Page(Metrics()).families
        if family.name.startswith("caesura_")
    }
    assert documented == served


def test_a_pause_shows_in_its_state_what_it_holds_and_how_long_it_took() -> None:
    metrics = Metrics()
    metrics.on_paused(0.2)
    page = Page(metrics, Frontend(pause_state=replace(RUNNING, state="paused", num_held=4)))
    assert page.value("caesura_pause_state") == 2
    assert page.value("caesura_num_requests_held") == 4
    assert page.value("caesura_pause_seconds_sum") == 0.2
    assert Page(metrics).value("caesura_pause_state") == 0


def test_weight_updates_are_told_apart_by_what_came_of_them() -> None:
    metrics = Metrics()
    metrics.on_weight_update("committed")
    metrics.on_weight_update_pause(0.05)
    page = Page(metrics)
    assert page.value("caesura_weight_updates_total", result="committed") == 1
    assert page.value("caesura_weight_updates_total", result="failed") == 0
    assert page.value("caesura_weight_update_pause_seconds_sum") == 0.05
    assert page.value("caesura_weights_info", version="v1") == 1
    differing = Page(metrics, Frontend(weight_version=None))
    assert "caesura_weights" not in {family.name for family in differing.families}


def test_the_process_tells_of_itself() -> None:
    page = Page(Metrics())
    resident_bytes = page.value("process_resident_memory_bytes")
    assert resident_bytes is not None
    assert resident_bytes > 1e6
