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
from frontend.errors import (
    EngineDeadError,
    ShuttingDownError,
)
from frontend.metrics import Metrics
from frontend.outputs import AbortCause, AbortReceipt, LiveRequest, Terminal
from frontend.requests.admission import Admission
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.explicit_abort import ExplicitAborts, Selector
from frontend.requests.inspection import engine_statuses, list_requests
from frontend.requests.intake import NewRequest, RequestIntake
from frontend.requests.stream import RequestStream
from frontend.sampling_params import SamplingParams
from frontend.text.tokenizer import Tokenizer
from ipc.lifecycle import EngineStatus

logger = logging.getLogger(__name__)

SHUTDOWN_ABORT_TIMEOUT_S = 2.0


class AsyncEngine:
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
        self._thread_id = threading.get_ident()
        self._shutdown: asyncio.Task[None] | None = None
        self._grace_is_over = asyncio.Event()
        self._grace_timer: asyncio.TimerHandle | None = None
        self._is_shut_down = False
        registrations = dispatcher.client.registrations
        dispatcher.foreign_engines.update(
            rank for rank, peer in registrations.items() if peer.caesura_protocol is None
        )
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
        return cls(config, tokenizer, dispatcher, supervisor)

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
    ) -> RequestStream:
        """Accept a request and return its stream. Give either a text or token ids.

        `request_id` must not name a live request; `aliases` are further names for it, `batch_id` is
        a name that it shares with its siblings. A lower `priority` runs first. `tags` select
        requests for an abort. At the age of `timeout_s` it is aborted, and returns what it has.

        Raises InvalidRequestError, PromptTooLongError, DuplicateRequestIdError, OverloadedError or
        EngineDeadError; then nothing was accepted. A long text is tokenized after acceptance, and
        turns out too long by ending with `error`.
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

    # -- control -------------------------------------------------------------------------------

    async def abort(
        self,
        request_id: str | Sequence[str] | None = None,
        *,
        prefix: str | None = None,
        tag: str | None = None,
        abort_all: bool = False,
        wait: bool = True,
        timeout_s: float = 5.0,
    ) -> AbortReceipt:
        """Abort requests by exact id (or several), id prefix, tag, or all of them.

        Each ends as a success with its partial result and the finish reason `abort`. The receipt
        comes after the effect: blocks have left the requests and terminals are with their streams;
        what is not confirmed within `timeout_s` is `pending`, and still follows. With `wait=False`
        the receipt only says what was asked for. Raises InvalidRequestError unless exactly one
        selector is given.
        """
        names = [request_id] if isinstance(request_id, str) else request_id
        selector = Selector(request_ids=names, prefix=prefix, tag=tag, everything=abort_all)
        pending = self._aborts.start(selector, AbortCause.EXPLICIT)
        return await self._aborts.finish(pending, timeout_s) if wait else pending.receipt

    async def status(
        self, timeout_s: float = 5.0, *, check_integrity: bool = True
    ) -> dict[int, EngineStatus]:
        """What each living Caesura engine says of itself; one that does not answer rightly and in
        time is left out. Checking its books holds up its next step, by some milliseconds where it
        is full.
        """
        return await engine_statuses(self._dispatcher, timeout_s, check_integrity=check_integrity)

    async def list_requests(self) -> list[LiveRequest]:
        """Every request that holds something, here or in an engine, in order of acceptance; those
        that have ended here and that their engine has not yet let go come last.
        """
        return await list_requests(self._dispatcher)

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
        """Whether a request that came now would be accepted."""
        return self._shutdown is None and bool(self._dispatcher.alive_engines)

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

    def _check_serving(self) -> None:
        if self._shutdown is not None:
            raise ShuttingDownError("the server is shutting down; send the request elsewhere")
        if not self._dispatcher.alive_engines:
            raise EngineDeadError("no engine is alive; restart the server")

    async def shutdown(self, grace_s: float = 0.0) -> None:
        """Accept nothing more, let requests finish for so long, end the rest with what they have
        (cause `shutdown`), then all engines.

        Harmless to repeat, and a shorter grace then counts: every call returns when all of it is
        done, and giving one up stops nothing.
        """
        if self._shutdown is None:
            self._dispatcher.on_idle = self._grace_is_over.set
            self._shutdown = self._loop.create_task(self._shut_down())
        if grace_s <= 0 or not self.num_live_requests:
            self._grace_is_over.set()
        elif self._grace_timer is None:
            self._grace_timer = self._loop.call_later(grace_s, self._grace_is_over.set)
        await asyncio.shield(self._shutdown)

    async def _shut_down(self) -> None:
        with contextlib.closing(self._dispatcher.client):  # Also when the loop itself is given up.
            await self._grace_is_over.wait()
            if self._grace_timer is not None:
                self._grace_timer.cancel()
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
