"""The synchronous heart of an engine: inputs and time go in, frames for the clients come out.

No sockets, no threads, no clock. A driver alternates `apply` (the step boundary: everything that
arrived takes effect, in arrival order) and `step` (one model step). Between the two nothing is in
flight, so an abort that `apply` handles has freed its blocks by the time its receipt is built, and
its frames leave before the next step begins.

Invariants
- Every request accepted here gets exactly one terminal output, except those ended by an ABORT
  frame, which are silent as the protocol demands.
- Every end, silent or not, is confirmed to the request's own client, after its blocks left it. An
  ABORT frame has it confirmed again.
- Terminal outputs stand before the utility reply that reports them; a reply shares its frame with
  nothing.
- While paused nothing is computed; whatever else a client asks for happens all the same.
- An id is known from its ADD to its terminal; whatever is wrong with one message harms only its
  sender.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from engine_core.aborts import Aborts
from engine_core.batch import NO_TOKEN, ModelRunner
from engine_core.config import SchedulerConfig
from engine_core.jobs import Job, JobDone
from engine_core.outbox import Outbox, Outgoing
from engine_core.pause import PauseOrder, Pauses
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from engine_core.utilities import Utilities
from engine_core.validation import InvalidRequest, build_request
from engine_core.weight_updates import WeightUpdates
from ipc.frames import Abort, InputError
from ipc.output import EngineCoreOutput, LogprobsLists, OutputError
from ipc.request import EngineCoreRequest
from ipc.utility import UtilityCall, UtilityReply

logger = logging.getLogger(__name__)

Input = EngineCoreRequest | Abort | UtilityCall | InputError | JobDone

STATS_INTERVAL_S = 0.1
"""Scheduler statistics leave at most this often while stepping, and once when the engine falls
idle.
"""
ENGINE_PAUSED = "engine_paused"
NUMERICAL_ERROR = "numerical_error"


class EngineCore:
    """One engine without its process: a scheduler, a model runner and the life-cycle's rules."""

    def __init__(
        self, config: SchedulerConfig, runner: ModelRunner, *, engine_index: int = 0
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, runner.num_blocks, runner.vocab_size)
        self.pauses = Pauses(self.scheduler)
        self.weights = WeightUpdates(runner, self.scheduler)
        self.jobs: list[Job] = []
        """Asked for by calls, and not taken yet."""
        self.num_steps = 0
        self.counters = {
            "requests_added": 0,
            "requests_refused": 0,
            "requests_aborted": 0,
            "duplicate_ids_ignored": 0,
            "abort_frames": 0,
            "malformed_messages": 0,
            "integrity_violations": 0,
        }
        self._runner = runner
        self._engine_index = engine_index
        self._requests: dict[str, Request] = {}
        self._num_arrivals = 0
        self._last_stats_s = float("-inf")
        self._reported_load = (0, 0)
        self.aborts = Aborts(self._requests, self.scheduler, self.counters)
        self._utilities = Utilities(self)

    def bind_thread(self) -> None:
        """Settle the calling thread, which will make all further calls; see `ModelRunner`."""
        self._runner.bind_thread()

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something."""
        return self.pauses.state != "paused" and self.scheduler.has_work

    @property
    def lease_ends_s(self) -> float | None:
        """When `apply` must be called even if nothing arrived: a pause ends by itself."""
        return self.pauses.lease_ends_s

    @property
    def num_live_requests(self) -> int:
        return len(self._requests)

    def take_jobs(self) -> list[Job]:
        """Work for another thread; each must come back as a JobDone. Asked for after `apply`."""
        jobs, self.jobs = self.jobs, []
        return jobs

    # -- the boundary --------------------------------------------------------------------------

    def apply(self, inputs: Iterable[tuple[int, Input]], now: float) -> list[Outgoing]:
        """Let inputs take effect in order.

        Each input comes with the index of the client on whose socket it arrived: that client is
        answered, whatever index the message itself claims. `now` is monotonic, in seconds.
        """
        outbox = Outbox(self._engine_index, now)
        was_busy = bool(self._requests)
        if self.lease_ends_s is not None and now >= self.lease_ends_s:
            self.pauses.resume(outbox, now, "its lease is over")
        for client_index, message in inputs:
            match message:
                case EngineCoreRequest():
                    self._add(client_index, message, outbox, now)
                case Abort():
                    self.aborts.silent(client_index, message, outbox)
                case UtilityCall():
                    reply = self._utilities.call(client_index, message, outbox, now)
                    if reply is not None:
                        outbox.reply(client_index, reply)
                case JobDone():
                    self._utilities.finish(message, outbox)
                case InputError():
                    self._answer_malformed(client_index, message, outbox)
        if was_busy and not self._requests:
            self._fall_idle(outbox, now)
        self.pauses.settle(outbox, now)
        if self.pauses.state == "paused" and self._load != self._reported_load:
            self._report_stats(outbox, now)  # No step will.
        return outbox.frames()

    def _add(
        self, client_index: int, message: EngineCoreRequest, outbox: Outbox, now: float
    ) -> None:
        live = self._requests.get(message.request_id)
        if live is not None and live.client_index == client_index:
            self.counters["duplicate_ids_ignored"] += 1
            logger.warning(
                "ignored a second ADD of live request %r of client %d; ids must be unique",
                message.request_id,
                client_index,
            )
            return
        if message.abort_immediately:
            return
        if self.pauses.rejects_newcomers:
            error = OutputError(ENGINE_PAUSED, "the engine is paused; try again later", True)
            outbox.refuse(client_index, message.request_id, error)
            return
        try:
            if live is not None:
                raise InvalidRequest(
                    f"request id {message.request_id!r} is another client's; ids must be unique"
                )
            request = build_request(
                message, client_index, self._num_arrivals, self.config, self._runner.vocab_size
            )
        except InvalidRequest as error:
            self.counters["requests_refused"] += 1
            outbox.refuse(client_index, message.request_id, _invalid(error))
            return
        self._num_arrivals += 1
        self.counters["requests_added"] += 1
        self._requests[request.request_id] = request
        self.scheduler.add(request, now)

    def _answer_malformed(self, client_index: int, error: InputError, outbox: Outbox) -> None:
        """A message that could not be decoded: its sender alone hears of it, if it awaits a word.

        An ADD that names a live request may not end that one.
        """
        self.counters["malformed_messages"] += 1
        if error.call_id is not None:
            outbox.reply(client_index, UtilityReply(error.call_id, str(error)))
        elif error.request_id is not None and error.request_id not in self._requests:
            outbox.refuse(client_index, error.request_id, _invalid(error))

    def live_requests(self, client_index: int) -> Iterator[Request]:
        """A client's own, in order of arrival."""
        return (
            request for request in self._requests.values() if request.client_index == client_index
        )

    def pause(
        self, client_index: int, call: UtilityCall, order: PauseOrder, outbox: Outbox, now: float
    ) -> None:
        """Begin to pause; the call is answered behind everything that comes of it."""
        ended = self.aborts.everything(outbox) if order.mode == "abort" else []
        self.pauses.begin(client_index, call.call_id, call.method, order, ended, now)

    def abort_everything(self, now: float) -> list[Outgoing]:
        """The engine is shutting down: every live request ends with `abort`, told to its client."""
        outbox = Outbox(self._engine_index, now)
        self.aborts.everything(outbox)
        return outbox.frames()

    # -- a step --------------------------------------------------------------------------------

    def step(self, now: float, clock: Callable[[], float] | None = None) -> list[Outgoing]:
        """Run one model step; returns its outputs, none if there was nothing to compute.

        `now` stamps scheduling; `clock`, where given, is asked once more after the model ran and
        stamps the outputs.
        """
        batch = self.scheduler.schedule(now)
        if batch is None:
            return []
        result = self._runner.execute(batch)
        self.num_steps += 1
        if result.prompt_logprobs:
            for request in self.scheduler.running:
                if (logprobs := result.prompt_logprobs.get(request.slot)) is not None:
                    request.prompt_logprobs.append(logprobs)
        sampled = self.scheduler.commit(result.token_ids)
        now = clock() if clock is not None else now
        outbox = Outbox(self._engine_index, now, weight_version=self.weights.version)
        for client_index, streamed in sampled.streamed.items():
            outbox.stream(client_index, *streamed)
        self._emit(sampled.others, result.logprobs, outbox)
        if not self._requests:
            self._fall_idle(outbox, now)
        elif now - self._last_stats_s >= STATS_INTERVAL_S:
            self._report_stats(outbox, now)
        self.pauses.settle(outbox, now)
        return outbox.frames()

    def _emit(
        self,
        sampled: Iterable[tuple[Request, int]],
        logprobs: dict[int, LogprobsLists],
        outbox: Outbox,
    ) -> None:
        """Append sampled tokens that end a request or do not come alone, and build their outputs.

        `logprobs` are by slot.
        """
        failed: list[Request] = []
        for request, token_id in sampled:
            if token_id == NO_TOKEN:
                failed.append(request)
                continue
            new_logprobs = logprobs.get(request.slot)
            ended = request.append_token(token_id)
            if ended is not None:
                del self._requests[request.request_id]
                self.scheduler.remove(request)
                outbox.confirm_end(request.client_index, request.request_id)
            outbox.add(
                request.client_index,
                EngineCoreOutput(
                    request.request_id,
                    (token_id,),
                    new_logprobs=new_logprobs,
                    prompt_logprobs=request.take_prompt_logprobs(),
                    finish_reason=None if ended is None else ended[0],
                    stop_reason=None if ended is None else ended[1],
                    events=tuple(request.events) if request.events else None,
                    prefill_stats=request.prefill_stats(),
                ),
            )
            request.events.clear()
        if failed:
            self._fail(failed, outbox)

    def _fail(self, requests: Sequence[Request], outbox: Outbox) -> None:
        """The model gave nothing to choose a token from; what it gave before has been sent."""
        message = "the model's logits are not finite, so no token can be chosen; check its weights"
        logger.error(
            "%d requests ended, such as %r: %s", len(requests), requests[0].request_id, message
        )
        error = OutputError(NUMERICAL_ERROR, message, retryable=False)
        for request in requests:
            del self._requests[request.request_id]
            self.scheduler.remove(request)
            outbox.refuse(request.client_index, request.request_id, error)

    # -- statistics ----------------------------------------------------------------------------

    def _fall_idle(self, outbox: Outbox, now: float) -> None:
        """The last request left: the books must balance, and the client learns that this engine is
        free.
        """
        pool = self.scheduler.pool
        if pool.num_available != pool.num_blocks:
            self.counters["integrity_violations"] += 1
            logger.error("blocks leaked: %s", "; ".join(self.scheduler.check_integrity()))
        self._report_stats(outbox, now)

    @property
    def _load(self) -> tuple[int, int]:
        return len(self.scheduler.running), self.scheduler.num_waiting

    def _report_stats(self, outbox: Outbox, now: float) -> None:
        self._last_stats_s, self._reported_load = now, self._load
        outbox.set_stats(self.scheduler.take_stats(self.num_steps))


def _invalid(error: Exception) -> OutputError:
    return OutputError("validation_error", str(error), retryable=False)
