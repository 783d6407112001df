"""Carries requests to engines and their outputs to mailboxes, and sees to it that each request ends
once.

Every event of a request's life is a method here: it is accepted, sent, fed with outputs, dropped by
its client, ended by its engine, by a stop string, by an abort or by its engine's death. asyncio
only calls these methods; none awaits.

Invariants
- `_end` is the one place where a live request ends: it leaves the registry and its mailbox gets
  its terminal.
- Outputs of requests that ended here are discarded before any detokenizing.
- Requests that end here while their engine runs them are aborted there, by way of the abort queue.
- One engine's fault ends only that engine's requests.
"""

from __future__ import annotations

import asyncio
import logging

from frontend.engines.engine_client import CLIENT_INDEX, EngineClient
from frontend.errors import EngineDeadError
from frontend.outputs import AbortCause, FinishReasonName, Terminal
from frontend.requests.abort_queue import AbortQueue
from frontend.requests.balancer import Balancer
from frontend.requests.logprobs import token_logprobs
from frontend.requests.registry import Entry, RequestRegistry
from ipc.abort import encode_abort
from ipc.errors import WireError
from ipc.output import EngineCoreOutput, EngineCoreOutputs, FinishReason, OutputError
from ipc.request import EngineCoreRequest, SamplingParams, encode_add

logger = logging.getLogger(__name__)

NUM_IDS_LOGGED = 4
"""Flushes of so few ids name them in their log line; larger ones do at debug level."""

_FINISH_REASONS: dict[FinishReason, FinishReasonName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.REPETITION: "repetition",
}


class Dispatcher:
    """The life of all requests of one front end; implements `EngineEvents`."""

    def __init__(self, num_engines: int) -> None:
        """Must be created inside the event loop; `client` is set before the first request."""
        self.client: EngineClient
        self.registry = RequestRegistry(num_engines)
        self.alive_engines = set(range(num_engines))
        self.is_closing = False
        self._loop = asyncio.get_running_loop()
        self._balancer = Balancer(num_engines)
        self._abort_queue = AbortQueue()
        self._flush_timer: asyncio.TimerHandle | None = None

    # -- from clients --------------------------------------------------------------------------

    def send(
        self,
        entry: Entry,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        priority: int,
        arrival_time_s: float,
    ) -> None:
        """Hand a live request to an engine. Raises EngineDeadError if there is none.

        An engine that turns out to be gone ends as any dead engine does, and the next one is asked.
        """
        frames = encode_add(
            EngineCoreRequest(
                request_id=entry.internal_id,
                prompt_token_ids=prompt_token_ids,
                sampling_params=sampling_params,
                arrival_time=arrival_time_s,
                client_index=CLIENT_INDEX,
                priority=priority,
                external_req_id=entry.request_id,
            )
        )
        while self.alive_engines:
            engine_index = self._balancer.choose(
                prompt_token_ids, self.registry.num_in_flight, sorted(self.alive_engines)
            )
            try:
                self.client.send(engine_index, frames)
            except EngineDeadError as error:
                self.on_engine_dead(engine_index, str(error))
                continue
            self.registry.mark_sent(entry, engine_index)
            entry.mailbox.num_prompt_tokens = len(prompt_token_ids)
            return
        raise EngineDeadError("no engine is alive")

    def drop(self, internal_id: str) -> None:
        """The client let go of its stream. Nothing happens if the request has ended."""
        entry = self.registry.get(internal_id)
        if entry is None:
            return
        cause = AbortCause.DROPPED_STREAM
        self._end(entry, Terminal("abort", abort_cause=cause), abort_in_engine=cause)

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
        for entry in entries:
            self._end(entry, terminal, abort_in_engine=terminal.abort_cause)
        self.flush_aborts()

    # -- from engines --------------------------------------------------------------------------

    def on_outputs(self, rank: int, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            entry = self.registry.get(output.request_id)
            if entry is None:
                if output.finish_reason is not None:
                    self.registry.end_orphan(output.request_id, rank)
            elif entry.engine_index == rank:  # An engine has a say in its own requests only.
                self._deliver(entry, output)
        stats = outputs.scheduler_stats
        if stats is not None:
            self._balancer.report(rank, stats.num_running_reqs + stats.num_waiting_reqs)

    def on_bad_frame(self, rank: int, error: WireError) -> None:
        """What the frame said is lost, so none of this engine's requests can end rightly."""
        logger.error("engine %d sent a frame that cannot be decoded: %s", rank, error)
        entries = self.registry.select(lambda entry: entry.engine_index == rank)
        fault = OutputError("engine_protocol_error", f"an output of engine {rank} was lost", True)
        self.end_without_engine(
            entries, Terminal("error", abort_cause=AbortCause.ENGINE_FAULT, error=fault)
        )

    def on_engine_dead(self, rank: int, reason: str) -> None:
        """End this engine's requests, each with what it has; the other engines go on."""
        if rank not in self.alive_engines:
            return
        self.alive_engines.discard(rank)
        self.client.disconnect(rank, reason)
        entries = self.registry.select(lambda entry: entry.engine_index == rank)
        logger.error("%s; %d of its requests end with an error", reason, len(entries))
        fault = OutputError("engine_dead", reason.splitlines()[0], True)
        for entry in entries:
            self._end(entry, Terminal("error", error=fault))
        self.registry.forget_orphans(rank)

    def _deliver(self, entry: Entry, output: EngineCoreOutput) -> None:
        assert entry.processor is not None
        is_finished = output.finish_reason is not None
        if output.prefill_stats is not None:
            entry.mailbox.num_cached_tokens = output.prefill_stats.num_cached_tokens
        delta = entry.processor.process(output.new_token_ids, is_finished)
        num_tokens = delta.num_tokens_used
        entry.num_output_tokens += num_tokens
        if num_tokens or delta.text:
            entry.mailbox.put(
                delta.text,
                output.new_token_ids[:num_tokens],
                token_logprobs(output.new_logprobs, num_tokens) if output.new_logprobs else (),
            )
        if delta.stop_reason is not None:
            terminal = Terminal("stop", stop_reason=delta.stop_reason)
            cause = None if is_finished else AbortCause.STOP_STRING
            self._end(entry, terminal, abort_in_engine=cause)
        elif output.finish_reason is not None:
            terminal = _terminal(output, output.finish_reason, entry.abort_cause)
            self._end(entry, terminal)

    # -- ends ----------------------------------------------------------------------------------

    def _end(
        self, entry: Entry, terminal: Terminal, *, abort_in_engine: AbortCause | None = None
    ) -> None:
        """End a live request here. `abort_in_engine`: its engine does not know yet, and is told."""
        engine_runs_it = abort_in_engine is not None
        if self.registry.remove(entry.internal_id, engine_runs_it=engine_runs_it) is None:
            return
        entry.terminal = terminal
        if entry.processor is not None and terminal.finish_reason in ("abort", "error"):
            # Text held back for a stop string belongs to the partial result.
            entry.mailbox.put(entry.processor.process((), True).text, ())
        entry.mailbox.finish(terminal)
        logger.debug(
            "request %s ended: %s (cause %s, %d output tokens)",
            entry.request_id,
            terminal.finish_reason,
            terminal.abort_cause,
            entry.num_output_tokens,
        )
        if abort_in_engine is not None and entry.engine_index is not None:
            self._queue_abort(entry.internal_id, abort_in_engine)

    # -- auto-aborts ---------------------------------------------------------------------------

    def _queue_abort(self, internal_id: str, cause: AbortCause) -> None:
        self._abort_queue.push(internal_id, cause, self._loop.time())
        if self._flush_timer is None:
            due_at = self._abort_queue.due_at
            assert due_at is not None
            self._flush_timer = self._loop.call_at(due_at, self._flush_if_due)

    def _flush_if_due(self) -> None:
        self._flush_timer = None
        due_at = self._abort_queue.due_at
        if due_at is None:
            return
        if due_at > self._loop.time():
            self._flush_timer = self._loop.call_at(due_at, self._flush_if_due)
        else:
            self.flush_aborts()

    def close(self) -> None:
        """No engine serves from now on, and that they end is no fault."""
        self.is_closing = True
        self.alive_engines.clear()

    def flush_aborts(self) -> None:
        """Send every waiting auto-abort now."""
        frames, num_by_cause = self._abort_queue.drain(self.registry.claim_orphan)
        for frame in frames:
            try:
                self.client.send(frame.engine_index, encode_abort(frame.request_ids))
            except EngineDeadError as error:
                logger.warning(
                    "abort frame to engine %d failed (%s); ids: %s",
                    frame.engine_index,
                    error,
                    ", ".join(frame.request_ids),
                )
            else:
                logger.debug("abort frame to engine %d: %s", frame.engine_index, frame.request_ids)
        if frames:
            causes = ", ".join(f"{cause.value}: {count}" for cause, count in num_by_cause.items())
            ids = [request_id for frame in frames for request_id in frame.request_ids]
            named = f": {', '.join(ids)}" if len(ids) <= NUM_IDS_LOGGED else ""
            logger.info(
                "aborted %d requests, %d frames (%s)%s", len(ids), len(frames), causes, named
            )


def _terminal(
    output: EngineCoreOutput, reason: FinishReason, abort_cause: AbortCause | None
) -> Terminal:
    """An engine's last word on a request."""
    name = _FINISH_REASONS[reason]
    if name == "abort":
        return Terminal(name, abort_cause=abort_cause or AbortCause.ENGINE)
    if name == "error":
        unexplained = OutputError("internal_error", "the engine failed on this request", False)
        return Terminal(name, error=output.error or unexplained)
    return Terminal(name, stop_reason=output.stop_reason)
