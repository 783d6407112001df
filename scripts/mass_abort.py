"""A thousand requests, an abort-all when most of them are done, and an account of every single one.

    python scripts/mass_abort.py --variant both

Two variants. `workers`: fifty threads submit one request after the other through `Engine`; when
800 have completed, submitting stops and an atomic abort-all ends what is live. `inflight`: all
thousand are in flight at once through `AsyncEngine`; when 800 have completed, one abort-all ends
the 200 that are left.

Either way each request must end as completed or aborted (with its partial tokens), or never have
been sent, and all KV blocks must come back. The exit status is 1 if a request is unaccounted for
or a block leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from caesura import (
    AsyncEngine,
    Engine,
    EngineConfig,
    FrontendConfig,
    RequestStream,
    SamplingParams,
)
from frontend.config import BUNDLED_MODEL_DIRECTORY
from ipc.lifecycle import EngineStatus

PROGRESS_INTERVAL_S = 0.1
COMPLETED = ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for."""

    num_requests: int = 1000
    num_workers: int = 50
    """Threads of the `workers` variant."""
    abort_at: float = 0.8
    """Share of the requests to complete before the abort-all."""
    max_new_tokens: int = 64
    """On average; each request draws its own limit, for equal ones would end in lockstep."""

    @property
    def target(self) -> int:
        """Completed requests at which to abort."""
        return int(self.num_requests * self.abort_at)

    def prompt(self, index: int) -> list[int]:
        """Token ids, so that any model will do; no two prompts are alike."""
        return [1 + (7 * index + 31 * place + place * place) % 250 for place in range(16)]

    def sampling(self, index: int) -> SamplingParams:
        half = self.max_new_tokens // 2
        limit = random.Random(index).randint(self.max_new_tokens - half, self.max_new_tokens + half)
        return SamplingParams(max_tokens=max(1, limit), seed=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a run went."""

    variant: str
    requests: int
    sent: int
    by_finish_reason: dict[str, int]
    completed: int
    aborted: int
    not_sent: int
    unaccounted: int
    """Must be 0. Requests that ended with an error count here."""
    aborted_tokens: int
    """Tokens that the aborted requests returned."""
    target: int
    actual: int
    """Completed when the abort-all was issued."""
    total_s: float
    requests_per_s: float
    blocks_free_before: int
    """Free or cached, of all engines."""
    blocks_free_after: int
    abort_to_free_ms: float
    """From issuing the abort-all to its receipt, which comes after the blocks are free."""

    @property
    def is_clean(self) -> bool:
        return self.unaccounted == 0 and self.blocks_free_before == self.blocks_free_after

    def print(self, out: TextIO) -> None:
        """A table, one line a figure."""
        reasons = ", ".join(f"{name} {count}" for name, count in self.by_finish_reason.items())
        rows = [
            ("requests", self.requests),
            ("sent", self.sent),
            ("completed", self.completed),
            ("aborted", self.aborted),
            ("not sent", self.not_sent),
            ("unaccounted", self.unaccounted),
            ("by finish_reason", reasons),
            ("tokens returned by aborted requests", self.aborted_tokens),
            ("completed at abort: target, actual", f"{self.target}, {self.actual}"),
            ("total time", f"{self.total_s:.2f} s"),
            ("rate", f"{self.requests_per_s:.1f} requests/s"),
            (
                "KV blocks free before, after",
                f"{self.blocks_free_before}, {self.blocks_free_after}",
            ),
            ("abort-all until blocks are free", f"{self.abort_to_free_ms:.1f} ms"),
            ("verdict", "clean" if self.is_clean else "NOT CLEAN"),
        ]
        print(f"\n{self.variant}", file=out)
        for name, value in rows:
            print(f"  {name:<36}{value}", file=out)


class Tally:
    """Counts requests as they are sent and end; any thread may add to it."""

    def __init__(self, variant: str, plan: Plan) -> None:
        self.num_sent = 0
        self.num_ended = 0
        self._variant = variant
        self._plan = plan
        self._by_finish_reason: Counter[str] = Counter()
        self._aborted_tokens = 0
        self._lock = threading.Lock()
        self._is_open = True
        self._percent_shown = 0
        self._started_s = time.perf_counter()

    @property
    def num_completed(self) -> int:
        return sum(self._by_finish_reason[reason] for reason in COMPLETED)

    @property
    def is_target_reached(self) -> bool:
        """Also when it cannot be reached any more, because everything has ended."""
        plan = self._plan
        return self.num_completed >= plan.target or self.num_ended >= plan.num_requests

    def take(self) -> int | None:
        """The next request to send; None if there is none, or none may be sent any more."""
        with self._lock:
            if not self._is_open or self.num_sent == self._plan.num_requests:
                return None
            self.num_sent += 1
            return self.num_sent - 1

    def close(self) -> None:
        """From now on nothing more is sent."""
        with self._lock:
            self._is_open = False

    def add(self, finish_reason: str, num_tokens: int) -> None:
        with self._lock:
            self.num_ended += 1
            self._by_finish_reason[finish_reason] += 1
            if finish_reason == "abort":
                self._aborted_tokens += num_tokens

    def show_progress(self) -> None:
        """One line that is rewritten on a terminal; elsewhere a new one for every tenth."""
        percent = 100 * self.num_ended // self._plan.num_requests
        is_terminal = sys.stderr.isatty()
        if not is_terminal and percent // 10 == self._percent_shown // 10:
            return
        self._percent_shown = percent
        rate = self.num_ended / (time.perf_counter() - self._started_s)
        print(
            f"{self._variant}: {self.num_ended} of {self._plan.num_requests} ended "
            f"({percent} %), {rate:.1f} requests/s ",
            end="\r" if is_terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def report(self, *, actual: int, before: int, after: int, abort_to_free_s: float) -> Report:
        total_s = time.perf_counter() - self._started_s
        num_aborted = self._by_finish_reason["abort"]
        num_not_sent = self._plan.num_requests - self.num_sent
        num_accounted = self.num_completed + num_aborted + num_not_sent
        return Report(
            variant=self._variant,
            requests=self._plan.num_requests,
            sent=self.num_sent,
            by_finish_reason=dict(self._by_finish_reason),
            completed=self.num_completed,
            aborted=num_aborted,
            not_sent=num_not_sent,
            unaccounted=self._plan.num_requests - num_accounted,
            aborted_tokens=self._aborted_tokens,
            target=self._plan.target,
            actual=actual,
            total_s=total_s,
            requests_per_s=self.num_ended / total_s,
            blocks_free_before=before,
            blocks_free_after=after,
            abort_to_free_ms=abort_to_free_s * 1000,
        )


def num_free_blocks(statuses: Mapping[int, EngineStatus]) -> int:
    """Blocks that no request holds; those that cache a prefix count, for they can be reused."""
    return sum(status.num_free_blocks + status.num_cached_blocks for status in statuses.values())


def run_workers(config: FrontendConfig, plan: Plan) -> Report:
    """Threads submit one request after the other, until the abort-all."""
    with Engine(config=config) as engine:
        before = num_free_blocks(engine.status())
        tally = Tally("workers", plan)

        def work() -> None:
            while (index := tally.take()) is not None:
                result = engine.generate(
                    input_ids=plan.prompt(index), sampling_params=plan.sampling(index)
                )
                tally.add(result["meta_info"]["finish_reason"]["type"], len(result["output_ids"]))

        threads = [threading.Thread(target=work) for _ in range(plan.num_workers)]
        for thread in threads:
            thread.start()
        while not tally.is_target_reached and any(thread.is_alive() for thread in threads):
            tally.show_progress()
            time.sleep(PROGRESS_INTERVAL_S / 10)
        tally.close()
        actual, aborted_s = tally.num_completed, time.perf_counter()
        engine.abort_request(abort_all=True)
        abort_to_free_s = time.perf_counter() - aborted_s
        for thread in threads:
            thread.join()
        tally.show_progress()
        after = num_free_blocks(engine.status())
        return tally.report(
            actual=actual, before=before, after=after, abort_to_free_s=abort_to_free_s
        )


async def run_inflight(config: FrontendConfig, plan: Plan) -> Report:
    """All requests are in flight at once, until the abort-all."""
    async with await AsyncEngine.start(config) as engine:
        before = num_free_blocks(await engine.status())
        tally = Tally("inflight", plan)
        is_target_reached = asyncio.Event()

        async def finish(stream: RequestStream) -> None:
            result = await stream.result()
            tally.add(result.finish_reason, len(result.token_ids))
            if tally.is_target_reached:
                is_target_reached.set()

        async def show_progress() -> None:
            while True:
                tally.show_progress()
                await asyncio.sleep(PROGRESS_INTERVAL_S)

        finishing = []
        while (index := tally.take()) is not None:
            stream = engine.generate(
                prompt_token_ids=plan.prompt(index), sampling_params=plan.sampling(index)
            )
            finishing.append(asyncio.create_task(finish(stream)))
        progress = asyncio.create_task(show_progress())
        await is_target_reached.wait()
        actual, aborted_s = tally.num_completed, time.perf_counter()
        await engine.abort(abort_all=True)
        abort_to_free_s = time.perf_counter() - aborted_s
        await asyncio.gather(*finishing)
        progress.cancel()
        tally.show_progress()
        after = num_free_blocks(await engine.status())
        return tally.report(
            actual=actual, before=before, after=after, abort_to_free_s=abort_to_free_s
        )


def main() -> int:
    """Run the chosen variants; returns the exit status."""
    plan = Plan()
    parser = argparse.ArgumentParser(description="Abort-all in the midst of a thousand requests.")
    parser.add_argument("--requests", type=int, default=plan.num_requests)
    parser.add_argument("--workers", type=int, default=plan.num_workers)
    parser.add_argument("--variant", choices=("workers", "inflight", "both"), default="both")
    parser.add_argument("--abort-at", type=float, default=plan.abort_at, help="share to complete")
    parser.add_argument("--max-new-tokens", type=int, default=plan.max_new_tokens)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--model", default=str(BUNDLED_MODEL_DIRECTORY))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    plan = Plan(
        num_requests=arguments.requests,
        num_workers=arguments.workers,
        abort_at=arguments.abort_at,
        max_new_tokens=arguments.max_new_tokens,
    )
    config = FrontendConfig(
        engine=EngineConfig(model=arguments.model), data_parallel_size=arguments.engines
    )
    reports = []
    if arguments.variant in ("workers", "both"):
        reports.append(run_workers(config, plan))
    if arguments.variant in ("inflight", "both"):
        reports.append(asyncio.run(run_inflight(config, plan)))
    for report in reports:
        report.print(sys.stdout)
    if arguments.json is not None:
        figures = [dataclasses.asdict(report) for report in reports]
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(report.is_clean for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
