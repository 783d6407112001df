"""Carries requests to engines and their outputs to mailboxes, and sees to it that each request ends
once.

Every event of a request's life is a method here: it is accepted, sent, fed with outputs, dropped by
its client, ended by its engine, by a stop string, by an abort or by its engine's death. asyncio
only calls these methods; none awaits.

Invariants
- `_end` is the one place where a live request ends: it leaves the registry and its mailbox gets
  its terminal.
- Tokens that arrive in one turn of the event loop become text together, at the end of the turn:
  under a backlog the cost is per turn, not per token.
- Outputs of requests that ended here are discarded before any detokenizing.
- Requests that end here while their engine runs them are aborted there, by way of the abort queue.
- One engine's fault ends only that engine's requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from frontend.engines.engine_client import EngineClient
from frontend.errors import EngineDeadError
from frontend.metrics import Metrics
from frontend.outputs import AbortCause, Stage, Terminal
from frontend.requests.auto_aborts import AutoAborts
from frontend.requests.balancer import Balancer
from frontend.requests.delivery import Delivery, End
from frontend.requests.pause_gate import PauseGate
from frontend.requests.registry import Entry, RequestRegistry
from frontend.requests.request_log import RequestLog
from frontend.requests.terminals import finish_mailbox
from ipc.errors import WireError
from ipc.output import EngineCoreOutput, EngineCoreOutputs, OutputError

logger = logging.getLogger(__name__)


class Dispatcher:
    """The life of all requests of one front end; implements `EngineEvents`."""

    def __init__(self, num_engines: int) -> None:
        """Must be created inside the event loop; `client` is set before the first request."""
        self.client: EngineClient
        self.registry = RequestRegistry(num_engines)
        self.metrics = Metrics()
        self.alive_engines = set(range(num_engines))
        self.foreign_engines: set[int] = set()
        """Engines that are plain vLLM: they do not say when an aborted request has left them."""
        self.is_closing = False
        self.on_idle: Callable[[], None] | None = None
        """Called when the last live request has ended."""
        self.request_log = RequestLog()
        self.clock: Callable[[], float] = time.monotonic
        """Tells ages and latencies; the event loop's own clock counts whole milliseconds."""
        self.gate = PauseGate(self.clock())
        """Everything that goes to an engine for the first time passes here."""
        self.weight_versions: dict[int, str] = {}
        """By engine: the label of its weights, as far as it has told."""
        self.weight_version: str | None = None
        """The label that all living engines have told; None if they differ or have not."""
        self._balancer = Balancer(num_engines)
        self._auto_aborts = AutoAborts(
            self.registry,
            self.metrics,
            self.foreign_engines,
            lambda engine_index, frames: self.client.send(engine_index, frames),
        )
        self._delivery = Delivery(self.metrics)
        self._with_unprocessed: list[Entry] = []

    # -- from clients --------------------------------------------------------------------------

    def send(self, entry: Entry) -> None:
        """Hand a live request to an engine, or to the gate while that is closed. Raises
        EngineDeadError if there is no engine.

        An engine that turns out to be gone ends as any dead engine does, and the next one is asked.
        """
        if not self.gate.is_open and self.alive_engines:
            self.gate.hold(entry, self.clock())
            return
        frames, entry.add_frames = entry.add_frames, ()
        prompt_token_ids = entry.mailbox.prompt_token_ids
        while self.alive_engines:
            engine_index = self._balancer.choose(
                prompt_token_ids, self.registry.num_in_flight, sorted(self.alive_engines)
            )
            try:
                self.client.send(engine_index, frames)
            except EngineDeadError as error:
                self.on_engine_dead(engine_index, str(error))
                if self.registry.get(entry.internal_id) is None:
                    return  # A sibling ended with that engine, and its call with the sibling.
                continue
            self.registry.mark_sent(entry, engine_index)
            if (version := self.weight_versions.get(engine_index)) is not None:
                entry.weight_marks.append((0, version))
            return
        raise EngineDeadError("no engine is alive")

    def open_gate(self) -> int:
        """The engines run again: send them what was held. Returns how many requests that were."""
        released = self.gate.open(self.clock())
        for entry in released:
            if entry.terminal is not None:
                continue  # It ended with an engine that died meanwhile.
            try:
                self.send(entry)
            except EngineDeadError as error:
                fault = OutputError("engine_dead", str(error), True)
                self.end_unsent(entry, Terminal("error", error=fault))
        return len(released)

    def drop(self, internal_id: str, cause: AbortCause = AbortCause.DROPPED_STREAM) -> None:
        """The client let go of its stream. Nothing happens if the request has ended."""
        entry = self.registry.get(internal_id)
        if entry is not None:
            self._end(entry, Terminal("abort", abort_cause=cause), abort_in_engine=cause)

    def take_back(self, entry: Entry) -> None:
        """Undo an acceptance that nobody was told of; an engine that knows already is told."""
        entry.leave_queue()
        self.gate.forget(entry)
        if self.registry.remove_running(entry, AbortCause.REFUSED, self.clock()):
            self._auto_aborts.push(entry.internal_id, AbortCause.REFUSED)

    def close(self) -> None:
        """No engine serves from now on, and that they end is no fault. Their last aborts leave."""
        self._auto_aborts.flush()
        self.is_closing = True
        self.alive_engines.clear()

    def end_unsent(self, entry: Entry, terminal: Terminal) -> None:
        """End a request that no engine knows. Nothing happens if it has ended."""
        assert entry.engine_index is None
        self._end(entry, terminal)

    def end_without_engine(self, entries: list[Entry], terminal: Terminal) -> None:
        """End requests with what was received, and tell their engines at once, each in frames of
        its own.

        For engines that give no terminal for an abort, and for when there is no time to wait for
        it. The terminal names the cause.
        """
        assert terminal.abort_cause is not None
        if not entries:
            return
        self.on_turn_end()
        for entry in entries:
            self._end(entry, terminal, abort_in_engine=terminal.abort_cause)
        self._auto_aborts.flush()

    # -- from engines --------------------------------------------------------------------------

    def on_outputs(self, rank: int, outputs: EngineCoreOutputs) -> None:
        version = outputs.weight_version
        if version is not None and version != self.weight_versions.get(rank):
            self.note_weight_version(rank, version)
        live = self.registry.get
        for output in outputs.outputs:
            entry = live(output.request_id)
            if entry is None or entry.engine_index != rank:
                self._note_stray(rank, output)
            elif (
                output.finish_reason is None
                and output.new_logprobs is None
                and output.prefill_stats is None
                and output.events is None
            ):
                if not entry.unprocessed:
                    self._with_unprocessed.append(entry)
                entry.unprocessed += output.new_token_ids
            else:
                try:
                    end = self._delivery.output(entry, output, self.clock())
                except Exception:
                    self._end_by_fault(entry)
                else:
                    self._end_with(entry, end)
        for internal_id in outputs.finished_requests or ():
            self._note_left(rank, internal_id)
        stats = outputs.scheduler_stats
        if stats is not None:
            self._balancer.report(rank, stats.num_running_reqs + stats.num_waiting_reqs)
            self.metrics.on_scheduler_stats(rank, stats)

    def note_weight_version(self, rank: int, version: str) -> None:
        """The tokens of an engine that have not arrived yet come of weights of this label."""
        if version == self.weight_versions.get(rank):
            return
        self.weight_versions[rank] = version
        self._note_engines_changed()
        for entry in self.registry:
            if entry.engine_index == rank:
                num_tokens = entry.num_output_tokens + len(entry.unprocessed)
                entry.weight_marks.append((num_tokens, version))

    def _note_engines_changed(self) -> None:
        versions = {self.weight_versions.get(rank) for rank in self.alive_engines}
        self.weight_version = versions.pop() if len(versions) == 1 else None

    def on_turn_end(self) -> None:
        """What had arrived is read; deliver it."""
        entries, self._with_unprocessed = self._with_unprocessed, []
        now = self.clock()
        for entry in entries:
            if entry.unprocessed and entry.terminal is None:
                try:
                    end = self._delivery.tokens(entry, entry.unprocessed, now)
                except Exception:
                    self._end_by_fault(entry)
                else:
                    self._end_with(entry, end)

    def _end_by_fault(self, entry: Entry) -> None:
        """A fault of ours in one request's processing is that request's alone."""
        logger.exception("request %s met a fault of the front end", entry.request_id)
        error = OutputError("internal_error", "the front end met a fault; its log says which")
        entry.processor = None  # It may be what failed.
        terminal = Terminal("error", abort_cause=AbortCause.FRONTEND_FAULT, error=error)
        self._end(entry, terminal, abort_in_engine=AbortCause.FRONTEND_FAULT)

    def _note_stray(self, rank: int, output: EngineCoreOutput) -> None:
        """News of a request that is not live here, or not this engine's."""
        if self.registry.get_ending(output.request_id, rank) is not None:
            self.metrics.on_wasted_tokens(len(output.new_token_ids))
            if output.finish_reason is not None:
                self._note_left(rank, output.request_id)

    def _note_left(self, rank: int, internal_id: str) -> None:
        """An engine no longer runs a request; its blocks are free."""
        if self.registry.get(internal_id) is not None:
            self.on_turn_end()  # What it sampled before may hold a stop string, and end it here.
        ending = self.registry.get_ending(internal_id, rank)
        if ending is not None:
            if ending.cause is AbortCause.DROPPED_STREAM:
                self.metrics.on_freed(self.clock() - ending.ended_s)
            self.registry.end(internal_id)
            return
        entry = self.registry.get(internal_id)
        if entry is not None and entry.engine_index == rank:
            fault = f"engine {rank} let the request go without saying how it ended"
            error = OutputError("engine_protocol_error", fault, True)
            self._end(entry, Terminal("error", error=error))

    def on_bad_frame(self, rank: int, error: WireError) -> None:
        """What the frame said is lost, so none of this engine's requests can end rightly; it may
        have said that some had left, which another abort will have it repeat.
        """
        logger.error("engine %d sent a frame that cannot be decoded: %s", rank, error)
        for internal_id, cause in self.registry.forget_aborts(rank):
            self._auto_aborts.push(internal_id, cause)
        entries = self.registry.select(lambda entry: entry.engine_index == rank)
        fault = OutputError("engine_protocol_error", f"an output of engine {rank} was lost", True)
        self.end_without_engine(
            entries, Terminal("error", abort_cause=AbortCause.ENGINE_FAULT, error=fault)
        )

    def on_engine_dead(self, rank: int, reason: str) -> None:
        """End this engine's requests, each with what it has; the other engines go on."""
        if rank not in self.alive_engines:
            return
        self.on_turn_end()
        self.alive_engines.discard(rank)
        self._note_engines_changed()
        self.client.disconnect(rank, reason)
        entries = self.registry.select(lambda entry: entry.engine_index == rank)
        if not self.alive_engines:
            entries += self.gate.held
        logger.error("%s; %d of its requests end with an error", reason, len(entries))
        fault = OutputError("engine_dead", reason.splitlines()[0], True)
        for entry in entries:
            self._end(entry, Terminal("error", error=fault))
        self.registry.end_all_of(rank)

    # -- ends ----------------------------------------------------------------------------------

    def _end_with(self, entry: Entry, end: End | None) -> None:
        if end is not None:
            self._end(entry, end.terminal, abort_in_engine=end.abort_in_engine)

    def _end(
        self, entry: Entry, terminal: Terminal, *, abort_in_engine: AbortCause | None = None
    ) -> None:
        """End a live request here. `abort_in_engine`: its engine does not know yet, and is told."""
        now = self.clock()
        if abort_in_engine is None:
            is_ours = self.registry.remove(entry)
        else:
            is_ours = self.registry.remove_running(entry, abort_in_engine, now)
        if not is_ours:
            return
        stage, entry.terminal = entry.stage, terminal
        entry.leave_queue()
        self.gate.forget(entry)
        if entry.deadline is not None:
            entry.deadline.cancel()
        self._note_end(entry, abort_in_engine, stage, now)
        if terminal.abort_cause is AbortCause.DROPPED_STREAM:
            entry.mailbox.finish(terminal)  # Nobody reads it.
        else:
            finish_mailbox(entry, terminal)
        if self.on_idle is not None and not self.registry:
            self.on_idle()
        if abort_in_engine is not None and entry.engine_index is not None:
            self._auto_aborts.push(entry.internal_id, abort_in_engine)

    def _note_end(
        self, entry: Entry, abort_in_engine: AbortCause | None, stage: Stage, now: float
    ) -> None:
        assert entry.terminal is not None
        reason, age_s = entry.terminal.finish_reason, now - entry.accepted_s
        num_prompt_tokens = len(entry.mailbox.prompt_token_ids)
        self.metrics.on_end(reason, age_s, num_prompt_tokens, entry.num_output_tokens)
        cause = entry.terminal.abort_cause or abort_in_engine
        if cause is not None:
            self.metrics.on_abort(cause, stage)
        self.request_log.note_end(entry, cause, stage, age_s)
