"""What a front end counts. The dispatcher tells it each event of a request's life as it happens.

Invariants
- All methods are called on one event loop, so nothing is locked; none waits or can fail.
- Nothing here knows an exposition format: these are plain numbers, read by whoever asks.
- `on_tokens` runs once per output of an engine, thousands of times a second. It is one bisection
  and a few additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from frontend.errors import ENGINE_PAUSED
from frontend.metrics.histogram import Histogram, doubling_buckets, seconds_buckets
from frontend.outputs import AbortCause, FinishReasonName, Stage
from frontend.requests.abort_queue import MAX_IDS_PER_FRAME
from frontend.requests.admission import LimitName
from ipc.output import EngineCoreEvent, EventType
from ipc.stats import SchedulerStats

_MAX_REQUEST_TOKENS = 1 << 20

WeightUpdateResult = Literal["committed", "failed", "discarded", "incomplete"]
"""`failed` and `discarded` changed nothing, `incomplete` ones only some engines."""


@dataclass(slots=True)
class EngineMetrics:
    """What one engine last said of itself, and the sums of what it reports in portions."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of the blocks that requests hold, 0 to 1."""
    num_prefix_cache_queries: int = 0
    """Prompt tokens that were looked up."""
    num_prefix_cache_hits: int = 0
    """Those that were found."""
    num_integrity_violations: int = 0


class Metrics:
    """All counts of one front end. Times are in seconds."""

    def __init__(self) -> None:
        self.num_connections: Callable[[], int] = lambda: 0
        """Asked at each scrape; an HTTP server sets it."""
        self.engines: defaultdict[int, EngineMetrics] = defaultdict(EngineMetrics)
        """By rank."""
        self.time_to_first_token = Histogram(seconds_buckets(-3, 300.0))
        self.inter_token_latency = Histogram(seconds_buckets(-4, 10.0))
        self.queue_time = Histogram(seconds_buckets(-3, 300.0))
        self.e2e_latency = Histogram(seconds_buckets(-2, 3000.0))
        self.hang_up_to_blocks_freed = Histogram(seconds_buckets(-4, 10.0))
        self.prompt_lengths = Histogram(doubling_buckets(_MAX_REQUEST_TOKENS))
        self.output_lengths = Histogram(doubling_buckets(_MAX_REQUEST_TOKENS))
        self.abort_frame_ids = Histogram(doubling_buckets(MAX_IDS_PER_FRAME))
        self.pause_time = Histogram(seconds_buckets(-3, 300.0))
        self.weight_update_pauses = Histogram(seconds_buckets(-3, 300.0))
        self.num_weight_updates: Counter[WeightUpdateResult] = Counter(
            dict.fromkeys(get_args(WeightUpdateResult), 0)
        )
        self.num_accepted = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_wasted_tokens = 0
        self.num_preemptions = 0
        # Every label is there from the start, at 0: a rate sees the first event of a new series
        # only so.
        self.num_finished: Counter[FinishReasonName] = Counter(
            dict.fromkeys(get_args(FinishReasonName), 0)
        )
        self.num_aborts: Counter[tuple[AbortCause, Stage]] = Counter(
            dict.fromkeys(product(AbortCause, get_args(Stage)), 0)
        )
        self.num_refused: Counter[str] = Counter(
            dict.fromkeys((*get_args(LimitName), "max_connections", ENGINE_PAUSED), 0)
        )

    # -- the life of requests ------------------------------------------------------------------

    def on_accepted(self) -> None:
        """A request entered the registry."""
        self.num_accepted += 1

    def on_first_tokens(self, num_tokens: int, ttft_s: float, num_prompt_tokens: int) -> None:
        """The first token of a request came, and what came with it, `ttft_s` after its acceptance.
        Its whole prompt has been computed by now, or was cached."""
        self.num_generation_tokens += num_tokens
        self.num_prompt_tokens += num_prompt_tokens
        self.time_to_first_token.observe(ttft_s)

    def on_tokens(self, num_tokens: int, gap_s: float) -> None:
        """More tokens of a request came, `gap_s` after the ones before. Tokens that come together
        share the gap. `num_tokens` is at least 1."""
        self.num_generation_tokens += num_tokens
        latency = self.inter_token_latency
        latency.counts[bisect_left(latency.bounds, gap_s / num_tokens)] += num_tokens
        latency.total += gap_s

    def on_events(self, events: Sequence[EngineCoreEvent]) -> None:
        """The events that came with an output: its request was queued, scheduled, preempted."""
        queued_at_s: float | None = None
        for event in events:
            if event.type is EventType.QUEUED:
                queued_at_s = event.timestamp
            elif event.type is EventType.PREEMPTED:
                self.num_preemptions += 1
            elif queued_at_s is not None:
                self.queue_time.observe(event.timestamp - queued_at_s)
                queued_at_s = None  # Scheduled again after a preemption, it did not queue anew.

    def on_end(
        self,
        finish_reason: FinishReasonName,
        e2e_s: float,
        num_prompt_tokens: int,
        num_output_tokens: int,
    ) -> None:
        """A request ended, `e2e_s` after it was accepted. One that ended before its tokens were
        known has `num_prompt_tokens=0`."""
        self.num_finished[finish_reason] += 1
        self.e2e_latency.observe(e2e_s)
        self.prompt_lengths.observe(num_prompt_tokens)
        self.output_lengths.observe(num_output_tokens)

    def on_refused(self, reason: str) -> None:
        """A call or a connection was turned away. `reason` names the limit that it met; it becomes
        a label, so it comes from a small fixed set."""
        self.num_refused[reason] += 1

    # -- aborts --------------------------------------------------------------------------------

    def on_abort(self, cause: AbortCause, stage: Stage) -> None:
        """A request is aborted; `stage` is where the abort found it."""
        self.num_aborts[cause, stage] += 1

    def on_abort_frame(self, num_ids: int) -> None:
        """An Abort frame went to an engine."""
        self.abort_frame_ids.observe(num_ids)

    def on_freed(self, since_hang_up_s: float) -> None:
        """The blocks of a request whose client hung up are free."""
        self.hang_up_to_blocks_freed.observe(since_hang_up_s)

    def on_wasted_tokens(self, num_tokens: int) -> None:
        """An engine sampled tokens for a request that had ended here."""
        self.num_wasted_tokens += num_tokens

    # -- pauses and weights --------------------------------------------------------------------

    def on_paused(self, after_s: float) -> None:
        """All engines stand still, so long after the pause was asked for."""
        self.pause_time.observe(after_s)

    def on_weight_update(self, result: WeightUpdateResult) -> None:
        """A weight update came to its end."""
        self.num_weight_updates[result] += 1

    def on_weight_update_pause(self, duration_s: float) -> None:
        """The engines were paused for so long that new weights could take effect."""
        self.weight_update_pauses.observe(duration_s)

    # -- engines -------------------------------------------------------------------------------

    def on_scheduler_stats(self, rank: int, stats: SchedulerStats) -> None:
        """An engine reported its scheduler's state."""
        engine = self.engines[rank]
        engine.num_running = stats.num_running_reqs
        engine.num_waiting = stats.num_waiting_reqs
        engine.kv_cache_usage = stats.kv_cache_usage
        engine.num_prefix_cache_queries += stats.prefix_cache_stats.queries
        engine.num_prefix_cache_hits += stats.prefix_cache_stats.hits

    def on_integrity_violations(self, rank: int, total: int) -> None:
        """An engine told how often its books were wrong since it started."""
        self.engines[rank].num_integrity_violations = total
