"""The asynchronous engine: requests in, streams out, and exact control over everything in between.

    engine = await AsyncEngine.start(FrontendConfig())
    async for output in engine.generate("def ", sampling_params=SamplingParams(max_tokens=32)):
        print(output.text, end="")
    await engine.shutdown()

Invariants
- A request is accepted inside `generate`, synchronously: when the stream is returned, an abort
  finds it.
- Everything runs on the event loop that called `start`; only dropping a stream may happen on any
  thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from functools import partial

from frontend.config import FrontendConfig
from frontend.engines.engine_client import EngineClient
from frontend.engines.supervisor import EngineSupervisor
from frontend.errors import EngineDeadError, ShuttingDownError
from frontend.metrics import Metrics
from frontend.outputs import AbortCause, ResumeFrom, Terminal
from frontend.requests.admission import Admission
from frontend.requests.controls import RequestControls
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.explicit_abort import ExplicitAborts, Selector
from frontend.requests.intake import RequestIntake
from frontend.requests.new_request import NewRequest
from frontend.requests.pauses import Pauses
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from frontend.text.tokenizer import Tokenizer
from frontend.weights.controls import WeightControls
from frontend.weights.updates import WeightUpdates

logger = logging.getLogger(__name__)

SHUTDOWN_ABORT_TIMEOUT_S = 2.0
FIRST_STATUS_TIMEOUT_S = 1.0
"""For engines to tell the label of their weights at the start; a later word of theirs does too."""


class AsyncEngine(RequestControls, WeightControls):
    """A running front end with its engines. Create it with `start`."""

    def __init__(
        self,
        config: FrontendConfig,
        tokenizer: Tokenizer | None,
        dispatcher: Dispatcher,
        supervisor: EngineSupervisor,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._loop = asyncio.get_running_loop()
        self._dispatcher = dispatcher
        self._supervisor = supervisor
        self._aborts = ExplicitAborts(dispatcher)
        self._pauses = Pauses(dispatcher)
        self._weights = WeightUpdates(dispatcher, self._pauses, self._aborts)
        self._is_all_local = config.num_local_engines == config.data_parallel_size
        self._thread_id = threading.get_ident()
        self._shutdown: asyncio.Task[None] | None = None
        self._grace_is_over = asyncio.Event()
        self._grace_timer: asyncio.TimerHandle | None = None
        self._is_shut_down = False
        registrations = dispatcher.client.registrations
        dispatcher.foreign_engines.update(
            rank for rank, peer in registrations.items() if peer.caesura_protocol is None
        )
        self.dtype = next(iter(registrations.values())).dtype
        """Of the weights."""
        self.max_model_len = min(peer.max_model_len for peer in registrations.values())
        self._intake = RequestIntake(
            dispatcher,
            tokenizer,
            Admission(
                max_num_queued_requests=config.max_num_queued_requests,
                max_num_queued_tokens=config.max_num_queued_tokens,
            ),
            max_model_len=self.max_model_len,
            stream_interval=config.stream_interval,
            on_deadline=self._aborts.expire,
        )

    @classmethod
    async def start(cls, config: FrontendConfig) -> AsyncEngine:
        """Start the local engines, wait until all engines are up, and return the engine ready to
        serve.

        Raises EngineStartupError (an engine did not come up; says what it last wrote) or
        TokenizerError.
        """
        loop = asyncio.get_running_loop()
        tokenizer = None if config.engine.runner == "fake" else Tokenizer.load(config.engine.model)
        ranks = range(config.data_parallel_size)
        is_all_local = config.num_local_engines == config.data_parallel_size
        dispatcher = Dispatcher(config.data_parallel_size)
        client = dispatcher.client = EngineClient(
            ranks,
            handshake_address=None if is_all_local else config.handshake_tcp_address,
            host=config.data_parallel_address,
            events=dispatcher,
        )

        def on_exit(rank: int, returncode: int) -> None:
            """Runs on a thread of the supervisor; after a shutdown the loop may be gone."""
            reason = supervisor.describe_exit(rank, returncode)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_note_exit, dispatcher, rank, reason)

        supervisor = EngineSupervisor(
            config.engine,
            handshake_address=client.handshake_address,
            ranks=config.local_ranks,
            on_exit=on_exit,
        )
        try:
            supervisor.start()
            await client.wait_until_up(config.startup_timeout_s)
        except BaseException:
            with contextlib.closing(client):
                await loop.run_in_executor(None, supervisor.terminate)
            raise
        engine = cls(config, tokenizer, dispatcher, supervisor)
        await engine.status(FIRST_STATUS_TIMEOUT_S, check_integrity=False)
        return engine

    # -- requests ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        aliases: Sequence[str] = (),
        batch_id: str | None = None,
        priority: int = 0,
        tags: Sequence[str] = (),
        timeout_s: float | None = None,
        resume_from: ResumeFrom | None = None,
    ) -> RequestStream:
        """Accept a request and return its stream. Give either a text, or token ids, or the
        `resume_from` of an aborted result, to go on where it ended: with its seed and its token
        limits (but a smaller `max_tokens` counts), and otherwise the sampling parameters given
        here, which should be those of before. The result is then about new tokens only.

        `request_id` must not name a live request; `aliases` are further names for it, `batch_id` is
        a name that it shares with its siblings. A lower `priority` runs first. `tags` select
        requests for an abort. At the age of `timeout_s` it is aborted, and returns what it has.

        Raises InvalidRequestError, PromptTooLongError, DuplicateRequestIdError, OverloadedError,
        EnginePausedError or EngineDeadError; then nothing was accepted. A long text is tokenized
        after acceptance, and turns out too long by ending with `error`.
        """
        if sampling_params is None:
            sampling_params = SamplingParams()
        new = NewRequest(
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            sampling_params=sampling_params,
            request_id=request_id,
            aliases=aliases,
            batch_id=batch_id,
            priority=priority,
            tags=tags,
            timeout_s=timeout_s,
            resume_from=resume_from,
        )
        return self.accept([new])[0]

    def accept(self, requests: Sequence[NewRequest]) -> list[RequestStream]:
        """`generate` for several requests that are accepted together or not at all."""
        self._check_serving()
        return [
            RequestStream(
                entry.mailbox,
                drop=partial(self._drop, entry.internal_id),
                drop_later=partial(self._drop_later, entry.internal_id),
            )
            for entry in self._intake.accept(requests)
        ]

    def _drop(self, internal_id: str, cause: AbortCause) -> None:
        """Drop a stream: at once on the loop's own thread, else as soon as it gets to it."""
        if threading.get_ident() == self._thread_id:
            self._dispatcher.drop(internal_id, cause)
        else:
            self._drop_later(internal_id, cause)

    def _drop_later(self, internal_id: str, cause: AbortCause = AbortCause.DROPPED_STREAM) -> None:
        """For any thread, and for the middle of a garbage collection."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it every request
            self._loop.call_soon_threadsafe(self._dispatcher.drop, internal_id, cause)

    # -- what it is like now -------------------------------------------------------------------

    @property
    def metrics(self) -> Metrics:
        return self._dispatcher.metrics

    def log_requests(self) -> None:
        """From now on, log the end of each request."""
        self._dispatcher.request_log.level = logging.INFO

    @property
    def is_healthy(self) -> bool:
        """Whether at least one engine can serve, and the front end is not shut down."""
        return not self._is_shut_down and bool(self._dispatcher.alive_engines)

    @property
    def is_ready(self) -> bool:
        """Whether a request that came now would be accepted, and run."""
        return (
            self._shutdown is None
            and bool(self._dispatcher.alive_engines)
            and self._dispatcher.gate.is_open
        )

    @property
    def shutdown_left_s(self) -> float | None:
        """How long requests may still run; None unless it is shutting down."""
        if self._shutdown is None:
            return None
        timer = None if self._grace_is_over.is_set() else self._grace_timer
        return 0.0 if timer is None else max(0.0, timer.when() - self._loop.time())

    @property
    def alive_engines(self) -> frozenset[int]:
        return frozenset(self._dispatcher.alive_engines)

    @property
    def served_model_name(self) -> str:
        return self.config.served_model_name

    @property
    def num_live_requests(self) -> int:
        return len(self._dispatcher.registry)

    @property
    def num_in_flight(self) -> Sequence[int]:
        """By rank: requests that each engine was sent and, as far as is known here, still runs."""
        return tuple(self._dispatcher.registry.num_in_flight)

    @property
    def num_ending_requests(self) -> int:
        """Those that have ended here and that their engine has not yet let go."""
        return self._dispatcher.registry.num_ending

    def _check_serving(self, remedy: str = "send the request elsewhere") -> None:
        if self._shutdown is not None:
            raise ShuttingDownError(f"the server is shutting down; {remedy}")
        if not self._dispatcher.alive_engines:
            raise EngineDeadError("no engine is alive; restart the server")

    async def shutdown(self, grace_s: float = 0.0) -> None:
        """Accept nothing more, let requests finish for so long, end the rest with what they have
        (cause `shutdown`), then all engines. While paused nothing can finish, so all end at once;
        while draining, what has begun may.

        Harmless to repeat, and a shorter grace then counts: every call returns when all of it is
        done, and giving one up stops nothing.
        """
        if self._shutdown is None:
            self._dispatcher.on_idle = self._grace_is_over.set
            self._shutdown = self._loop.create_task(self._shut_down())
        if grace_s <= 0 or not self.can_finish_requests:
            self._grace_is_over.set()
        elif self._grace_timer is None:
            self._grace_timer = self._loop.call_later(grace_s, self._grace_is_over.set)
            if self.pause_state.state == "draining":
                self._pauses.call_when_paused(self._end_grace_if_paused)
        await asyncio.shield(self._shutdown)

    @property
    def can_finish_requests(self) -> bool:
        """Whether there are any, and nobody has to resume for them."""
        pause = self.pause_state
        is_stuck = pause.state == "paused" and pause.lease_left_s is None
        return self.num_live_requests > 0 and not (is_stuck and not self._weights.is_committing)

    def _end_grace_if_paused(self) -> None:
        if not self.can_finish_requests:
            self._grace_is_over.set()

    async def _shut_down(self) -> None:
        with contextlib.closing(self._dispatcher.client):  # Also when the loop itself is given up.
            await self._grace_is_over.wait()
            if self._grace_timer is not None:
                self._grace_timer.cancel()
            self._pauses.close()
            try:
                pending = self._aborts.start(Selector(everything=True), AbortCause.SHUTDOWN)
                await self._aborts.finish(pending, SHUTDOWN_ABORT_TIMEOUT_S)
                terminal = Terminal("abort", abort_cause=AbortCause.SHUTDOWN)
                self._dispatcher.end_without_engine(list(self._dispatcher.registry), terminal)
            finally:
                self._is_shut_down = True
                self._dispatcher.close()
                await self._loop.run_in_executor(None, self._supervisor.terminate)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()


def _note_exit(dispatcher: Dispatcher, rank: int, reason: str) -> None:
    """An engine process of ours ended, in a failed start, in its service, or at our shutdown."""
    if not dispatcher.client.is_up:
        dispatcher.client.fail_startup(reason)
    elif rank in dispatcher.alive_engines:
        dispatcher.on_engine_dead(rank, reason)
    elif not dispatcher.is_closing:
        logger.error("%s", reason)  # Its connection ended before it, which said less.
