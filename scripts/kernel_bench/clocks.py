"""How launches are timed: on a GPU by replaying a CUDA graph, in the interpreter by the host.

Several launches make one measurement, each on data of its own, so that none finds in the cache what
an earlier one left there; a clock's answer is the time of one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

import torch

Launch = Callable[[], object]


class Clock(Protocol):
    """Times launches."""

    device: torch.device

    def time_us(self, launches: Sequence[Launch]) -> float:
        """Microseconds of one of the launches, when they run one after the other."""


class GraphClock:
    """Captures the launches in a CUDA graph and replays it; the median of some replays.

    Between replays, a buffer larger than any L2 is written, so that a graph that doesn't displace
    its own data from L2 begins without it too.
    """

    def __init__(self, num_replays: int = 10) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._num_replays = num_replays
        self._flushed = torch.empty(2**28, dtype=torch.uint8, device=self.device)

    def time_us(self, launches: Sequence[Launch]) -> float:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and allocates what is allocated once
            for launch in launches:
                launch()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        graph.replay()
        times_us: list[float] = []
        for _ in range(self._num_replays):
            begin, end = _event(), _event()
            self._flushed.zero_()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times_us.append(begin.elapsed_time(end) * 1000 / len(launches))
        return median(times_us)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class HostClock:
    """Runs each launch once. What it says about the interpreter is of no use but to try this."""

    device = torch.device("cpu")

    def time_us(self, launches: Sequence[Launch]) -> float:
        begin_s = time.perf_counter()
        for launch in launches:
            launch()
        return (time.perf_counter() - begin_s) * 1e6 / len(launches)
