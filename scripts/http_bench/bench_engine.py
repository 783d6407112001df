"""A process that plays engines, lean enough that what a benchmark sees is the front end.

Each engine answers one token to every live request at every step, in one frame. Steps come every
`step_ms`; with 1 ms an engine outruns any front end, while what is ahead of the front end stays
bounded by the requests in flight. All requests of a step get the same token, another one at the
next, so that a frame is one join of prepared bytes, whatever the number of requests.

Invariants
- Messages take effect on arrival. Every end, by length or by abort, is confirmed once in a frame's
  `finished_requests`, with or after the request's last output.
- ABORT frames are recorded with the time of their arrival (CLOCK_MONOTONIC, the same in every
  process of a machine). No output follows them; `caesura_abort` gives a terminal output.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, inf
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import zmq

from ipc.codec import pack, unpack
from ipc.lifecycle import AbortReceipt, RequestReceipt
from ipc.utility import decode_utility
from scripts.http_bench.dialing import JOIN_TIMEOUT_S, Joined, join, utility_result

STATS_INTERVAL_S = 0.1
DEFAULT_MAX_TOKENS = 16
ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x03"
TOKENS = [b"\xcd" + token_id.to_bytes(2, "big") for token_id in range(300, 800)]
"""Packed ids of ordinary tokens, for the steps in turn."""
LENGTH, ABORTED = b"\x01", b"\x02"
NIL = b"\xc0"


@dataclass(frozen=True, slots=True)
class AbortFrame:
    """One ABORT frame, as it arrived."""

    arrived_s: float
    num_ids: int
    num_ended: int
    """Ids that were live."""


@dataclass(slots=True)
class EngineReport:
    """What an engine saw since it joined, or since `Engines.reset`."""

    rank: int
    num_added: int = 0
    num_live: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    most_late_ms: float = 0.0
    """The longest that a step began behind its time: how far this process fell short."""
    aborts: list[AbortFrame] = field(default_factory=list)


class Lane:
    """One engine towards one front-end process: its sockets and its live requests."""

    def __init__(self, engine: Joined, client_index: int) -> None:
        self.input = engine.inputs[client_index]
        self.due_s = inf
        """When the next step begins; never, while no request is live."""
        self.report = EngineReport(engine.rank)
        self._output = engine.outputs[client_index]
        self._rank = engine.rank
        self._live: dict[str, bytes] = {}
        """By id, how its rows begin: everything up to the token."""
        self._first: dict[str, bytes] = {}
        """Prefill statistics of those that had no token yet."""
        self._last_ids: defaultdict[int, list[str]] = defaultdict(list)
        """By step, those that reach their `max_tokens` there, unless they ended before."""
        self._step = 0
        self._stats_due_s = 0.0

    def receive(self, step_s: float) -> None:
        """Take in everything that has arrived."""
        with suppress(zmq.Again):
            while True:
                frames = self.input.recv_multipart(zmq.NOBLOCK)
                now = time.monotonic()
                if frames[0] == ADD:
                    self._add(unpack(frames[1]))
                    self.due_s = min(self.due_s, now + step_s)
                elif frames[0] == ABORT:
                    self._abort(unpack(frames[1]), now)
                elif frames[0] == UTILITY:
                    self._call(frames[1])

    def step(self, now: float) -> None:
        """One token for every live request."""
        self._step += 1
        token = TOKENS[self._step % len(TOKENS)]
        done = [name for name in self._last_ids.pop(self._step, ()) if name in self._live]
        rows = []
        for name in done:
            stats = self._first.pop(name, NIL)
            rows.append(_long_row(self._live.pop(name), token, LENGTH, stats))
        for name, stats in self._first.items():
            rows.append(_long_row(self._live.pop(name), token, NIL, stats))
        num_rows = len(rows) + len(self._live)
        if self._live:
            rows.append(token.join(self._live.values()) + token)
        for name in self._first:
            self._live[name] = _row_start(name)
        self._first.clear()
        stats = NIL
        if now >= self._stats_due_s or not self._live:
            self._stats_due_s = now + STATS_INTERVAL_S
            stats = pack(_scheduler_stats(len(self._live), self._step))
        self._send(b"".join(rows), num_rows, stats, done)
        report = self.report
        report.num_steps += 1
        report.num_tokens += num_rows
        report.most_late_ms = max(report.most_late_ms, (now - self.due_s) * 1000)

    def reset(self) -> None:
        """Begin a new report."""
        self.report = EngineReport(self._rank)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def _add(self, fields: Any) -> None:
        name, prompt, sampling = fields[0], fields[1], fields[3]
        self._live[name] = _row_start(name)
        num_prompt_tokens = len(prompt)
        self._first[name] = pack(
            {"num_prompt_tokens": num_prompt_tokens, "num_computed_tokens": num_prompt_tokens}
        )
        self._last_ids[self._step + sampling.get("max_tokens", DEFAULT_MAX_TOKENS)].append(name)
        self.report.num_added += 1

    def _end(self, names: Any) -> list[str]:
        """Forget these requests; returns those that were live."""
        ended = [name for name in names if self._live.pop(name, None) is not None]
        for name in ended:
            self._first.pop(name, None)
        return ended

    def _abort(self, names: Any, now: float) -> None:
        ended = self._end(names)
        self.report.aborts.append(AbortFrame(now, len(names), len(ended)))
        if ended:
            self._send(b"", 0, NIL, ended)

    def _call(self, payload: bytes) -> None:
        call = decode_utility(payload)
        try:
            if call.method == "caesura_abort":
                result = self._abort_with_receipt(call.args[0])
            else:
                result = utility_result(call.method, len(self._live))
        except LookupError as error:
            reply: list[object] = [call.call_id, str(error), None]
        else:
            reply = [call.call_id, None, [None, result]]
        self._output.send(pack([self._rank, [], None, time.monotonic(), reply]))

    def _abort_with_receipt(self, names: Any) -> object:
        ended = self._end(names)
        rows = [_long_row(_row_start(name, num_tokens=0), b"", ABORTED, NIL) for name in ended]
        if rows:
            self._send(b"".join(rows), len(rows), NIL, ended)
        receipts = {
            name: RequestReceipt("aborted" if name in ended else "unknown") for name in names
        }
        return AbortReceipt(receipts).to_wire()

    def _send(self, rows: bytes, num_rows: int, stats: bytes, ended: list[str]) -> None:
        head = b"\x96" + pack(self._rank) + b"\xdd" + num_rows.to_bytes(4, "big")
        tail = stats + pack(time.monotonic()) + NIL + (pack(ended) if ended else NIL)
        self._output.send(head + rows + tail)


def _row_start(name: str, num_tokens: int = 1) -> bytes:
    """A row of two positions, up to its token: the id, and the head of the list of tokens."""
    return b"\x92" + pack(name) + bytes([0x90 + num_tokens])


def _long_row(start: bytes, token: bytes, finish_reason: bytes, prefill_stats: bytes) -> bytes:
    """A row of twelve positions, with the finish reason (5) and the prefill statistics (11)."""
    return b"\x9c" + start[1:] + token + 3 * NIL + finish_reason + 5 * NIL + prefill_stats


def _scheduler_stats(num_running: int, step_counter: int) -> dict[str, object]:
    return {
        "num_running_reqs": num_running,
        "num_waiting_reqs": 0,
        "step_counter": step_counter,
        "current_wave": 0,
        "kv_cache_usage": 0.0,
        "prefix_cache_stats": {
            "reset": False,
            "requests": 0,
            "queries": 0,
            "hits": 0,
            "preempted_requests": 0,
            "preempted_queries": 0,
            "preempted_hits": 0,
        },
        "kv_cache_eviction_events": [],
    }


def _play(address: str, num_engines: int, control: Connection) -> None:
    """The process: joins the front end at `address`, then steps until the other end hangs up."""
    context: zmq.Context[Any] = zmq.Context()
    lanes = [
        Lane(engine, index)
        for engine in join(context, address, num_engines)
        for index in range(len(engine.inputs))
    ]
    control.send("joined")
    by_socket = {lane.input: lane for lane in lanes}
    poller = zmq.Poller()
    poller.register(control.fileno(), zmq.POLLIN)
    for socket in by_socket:
        poller.register(socket, zmq.POLLIN)
    step_s = 0.01
    while True:
        wait_s = min(lane.due_s for lane in lanes) - time.monotonic()
        timeout_ms = None if wait_s == inf else max(0, ceil(wait_s * 1000))
        for source, _ in poller.poll(timeout_ms):
            if source in by_socket:
                by_socket[source].receive(step_s)
                continue
            try:
                command, value = control.recv()
            except EOFError:
                context.destroy(linger=0)
                return
            if command == "pace":
                step_s = value / 1000
            elif command == "reset":
                for lane in lanes:
                    lane.reset()
            else:
                for lane in lanes:
                    lane.report.num_live = lane.num_live
                control.send([lane.report for lane in lanes])
        now = time.monotonic()
        for lane in lanes:
            if lane.due_s <= now:
                lane.step(now)
                # One that has fallen behind does not catch up with a burst of steps.
                lane.due_s = max(lane.due_s + step_s, now) if lane.num_live else inf


class Engines:
    """The process, seen from the benchmark."""

    def __init__(self, address: str, num_engines: int) -> None:
        """Start to dial the handshake at `address`, which need not be there yet."""
        spawn = multiprocessing.get_context("spawn")
        self._control, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_play, args=(address, num_engines, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def wait_until_joined(self) -> None:
        """Raises TimeoutError, or EOFError if the process died."""
        if not self._control.poll(JOIN_TIMEOUT_S):
            raise TimeoutError(f"the engines did not join the front end in {JOIN_TIMEOUT_S:.0f} s")
        self._control.recv()

    def pace(self, step_ms: float) -> None:
        """Take a step so often from now on, and begin new reports."""
        self._control.send(("pace", step_ms))
        self._control.send(("reset", None))

    def report(self) -> list[EngineReport]:
        """One for each engine (and front-end process, if there are several).

        Raises EOFError or OSError if the process died.
        """
        self._control.send(("report", None))
        reports: list[EngineReport] = self._control.recv()
        return reports

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.join()
