"""Renders the counts in Prometheus' exposition formats. Names and meanings: docs/metrics.md.

Families are built anew for each scrape; nothing is done for them in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from frontend.metrics.histogram import Histogram
from frontend.metrics.recorder import Metrics
from frontend.requests.pause_reports import PauseState

_PAUSE_STATES = ("running", "draining", "paused")


class LiveState(Protocol):
    """What is asked at the moment of a scrape: an `AsyncEngine`."""

    @property
    def num_live_requests(self) -> int: ...

    @property
    def num_ending_requests(self) -> int: ...

    @property
    def alive_engines(self) -> Collection[int]: ...

    @property
    def pause_state(self) -> PauseState: ...

    @property
    def weight_version(self) -> str | None: ...


class Exposition:
    """The page that Prometheus scrapes, with the metrics of the process itself."""

    def __init__(
        self,
        metrics: Metrics,
        state: LiveState,
        *,
        num_engines: int,
        model_name: str,
        version: str,
    ) -> None:
        info = {"model_name": model_name, "version": version}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_FamilyCollector(metrics, state, num_engines, info))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type, in the best format that the Accept header allows."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # What it raises for a version that is no number.
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type


class _FamilyCollector(Collector):
    def __init__(
        self, metrics: Metrics, state: LiveState, num_engines: int, info: dict[str, str]
    ) -> None:
        self._metrics = metrics
        self._state = state
        self._num_engines = num_engines
        self._info = info

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("caesura", "What is served, and by which version.", self._info)
        yield from self._requests()
        yield from self._latencies()
        yield from self._aborts()
        yield from self._pauses()
        yield from self._engines()

    def _requests(self) -> Iterator[Metric]:
        metrics, state = self._metrics, self._state
        yield _gauge("num_connections", "Open HTTP connections.", metrics.num_connections())
        yield _gauge(
            "num_requests_live", "Requests accepted and not ended.", state.num_live_requests
        )
        yield _gauge(
            "num_requests_ending",
            "Requests that ended here and that an engine still runs.",
            state.num_ending_requests,
        )
        yield _counter("requests_accepted", "Requests accepted.", metrics.num_accepted)
        yield _labelled_counter(
            "requests_refused",
            "Calls and connections turned away, by the limit that they met.",
            ["reason"],
            (([reason], count) for reason, count in metrics.num_refused.items()),
        )
        yield _labelled_counter(
            "requests_finished",
            "Requests ended, by the finish reason of their last output.",
            ["finish_reason"],
            (([reason], count) for reason, count in metrics.num_finished.items()),
        )
        yield _counter(
            "prompt_tokens",
            "Prompt tokens of requests that got their first token, cached ones too.",
            metrics.num_prompt_tokens,
        )
        yield _counter(
            "generation_tokens", "Tokens given to requests.", metrics.num_generation_tokens
        )
        yield _histogram(
            "request_prompt_tokens", "Prompt tokens of an ended request.", metrics.prompt_lengths
        )
        yield _histogram(
            "request_generation_tokens",
            "Output tokens of an ended request.",
            metrics.output_lengths,
        )
        yield _counter(
            "preemptions", "Times that a request lost its blocks.", metrics.num_preemptions
        )

    def _latencies(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, help_text, histogram in (
            (
                "time_to_first_token_seconds",
                "From acceptance to the first token.",
                metrics.time_to_first_token,
            ),
            (
                "inter_token_latency_seconds",
                "From a token of a request to its next.",
                metrics.inter_token_latency,
            ),
            (
                "request_queue_time_seconds",
                "From an engine's queue into its batch.",
                metrics.queue_time,
            ),
            ("e2e_request_latency_seconds", "From acceptance to the end.", metrics.e2e_latency),
        ):
            yield _histogram(name, help_text, histogram)

    def _aborts(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _labelled_counter(
            "aborts",
            "Aborts, by cause and by the stage in which they found the request.",
            ["cause", "stage"],
            (([cause, stage], count) for (cause, stage), count in metrics.num_aborts.items()),
        )
        yield _counter(
            "abort_frames", "Abort frames sent to engines.", sum(metrics.abort_frame_ids.counts)
        )
        yield _histogram(
            "abort_frame_ids", "Requests that one Abort frame names.", metrics.abort_frame_ids
        )
        yield _histogram(
            "hang_up_to_blocks_freed_seconds",
            "From a client's hang-up to its request's blocks being free.",
            metrics.hang_up_to_blocks_freed,
        )
        yield _counter(
            "wasted_tokens",
            "Tokens sampled for requests that had ended here.",
            metrics.num_wasted_tokens,
        )

    def _pauses(self) -> Iterator[Metric]:
        metrics, pause = self._metrics, self._state.pause_state
        yield _gauge(
            "pause_state", "0 running, 1 draining, 2 paused.", _PAUSE_STATES.index(pause.state)
        )
        yield _gauge(
            "num_requests_held", "Requests that wait for the end of a pause.", pause.num_held
        )
        yield _histogram(
            "pause_seconds",
            "From the call of a pause until all engines stood still.",
            metrics.pause_time,
        )
        yield _labelled_counter(
            "weight_updates",
            "Weight updates, by what came of them.",
            ["result"],
            (([result], count) for result, count in metrics.num_weight_updates.items()),
        )
        yield _histogram(
            "weight_update_pause_seconds",
            "How long a weight update kept the engines paused.",
            metrics.weight_update_pauses,
        )
        version = self._state.weight_version
        if version is not None:
            yield InfoMetricFamily(
                "caesura_weights", "The weights that all engines serve.", {"version": version}
            )

    def _engines(self) -> Iterator[Metric]:
        alive = self._state.alive_engines
        engines = {rank: self._metrics.engines[rank] for rank in range(self._num_engines)}
        # What a dead engine last said of its state is no longer so.
        living = {rank: engine for rank, engine in engines.items() if rank in alive}
        yield _engine_gauge(
            "engine_up", "Whether an engine serves.", {rank: rank in alive for rank in engines}
        )
        yield _engine_gauge(
            "num_requests_running",
            "Requests in the engine's batch.",
            {rank: engine.num_running for rank, engine in living.items()},
        )
        yield _engine_gauge(
            "num_requests_waiting",
            "Requests in the engine's queue.",
            {rank: engine.num_waiting for rank, engine in living.items()},
        )
        yield _engine_gauge(
            "kv_cache_usage_ratio",
            "Share of the KV blocks that requests hold, 0 to 1.",
            {rank: engine.kv_cache_usage for rank, engine in living.items()},
        )
        yield _engine_counter(
            "prefix_cache_queries_tokens",
            "Prompt tokens looked up in the prefix cache.",
            {rank: engine.num_prefix_cache_queries for rank, engine in engines.items()},
        )
        yield _engine_counter(
            "prefix_cache_hits_tokens",
            "Prompt tokens found in the prefix cache.",
            {rank: engine.num_prefix_cache_hits for rank, engine in engines.items()},
        )
        yield _engine_counter(
            "integrity_violations",
            "Times that the engine's books of its blocks were wrong.",
            {rank: engine.num_integrity_violations for rank, engine in engines.items()},
        )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"caesura_{name}", help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"caesura_{name}", help_text, value=value)


def _labelled_counter(
    name: str,
    help_text: str,
    labels: Sequence[str],
    counts: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    family = CounterMetricFamily(f"caesura_{name}", help_text, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _engine_gauge(name: str, help_text: str, values: Mapping[int, float]) -> Metric:
    family = GaugeMetricFamily(f"caesura_{name}", help_text, labels=["engine"])
    for rank, value in values.items():
        family.add_metric([str(rank)], value)
    return family


def _engine_counter(name: str, help_text: str, values: Mapping[int, float]) -> Metric:
    by_label = (([str(rank)], value) for rank, value in values.items())
    return _labelled_counter(name, help_text, ["engine"], by_label)


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(
        f"caesura_{name}", help_text, buckets=buckets, sum_value=histogram.total
    )
