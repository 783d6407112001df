"""The engine for programs without an event loop: SGLang's method names, from any thread.

    with Engine() as engine:
        print(engine.generate("def ", {"max_new_tokens": 32})["text"])

Invariants
- Every method may be called from any number of threads at once.
- Each thread that waits in `generate` returns: with its result, with what an abort or `shutdown`
  left of it, or with an error.
- Whoever gives up on a request (Ctrl-C, a cancelled task, a stream that is closed or forgotten)
  ends it in the engine.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from frontend.config import FrontendConfig
from frontend.errors import EngineDeadError
from frontend.outputs import AbortReceipt, RequestOutput
from frontend.requests.stream import RequestStream
from frontend.sglang.aborts import read_abort
from frontend.sglang.calls import GenerateCall, ResumeArgument, SamplingArgument, read_call
from frontend.sglang.results import ResultBuilder
from frontend.sync.controls import EngineControls
from frontend.sync.loop_thread import AsyncReader, BlockingReader, LoopThread
from frontend.sync.sglang_arguments import EngineArguments, read_arguments
from frontend.sync.start_up import start_engine
from frontend.text.tokenizer import Tokenizer
from ipc.lifecycle import EngineStatus

Result = dict[str, Any]
"""{"text": str, "output_ids": [int], "meta_info": {...}}; in a streamed batch also "index"."""
News = tuple[int, RequestOutput, Sequence[int], str | None]
"""(the request's place in its call, what is new, the prompt's token ids, the weights' label)."""
Event = News | None
"""The first event, None, says that all prompts were accepted."""


class Engine(EngineControls):
    """A running engine. It keeps a thread and processes until `shutdown` or the end of the
    program."""

    def __init__(
        self,
        model_path: str | None = None,
        *,
        config: FrontendConfig | None = None,
        **keywords: Any,
    ) -> None:
        """Start engine processes and return when they are ready.

        Takes SGLang's keywords (`model_path` or `model`, `dp_size`, `context_length`, ...) or
        Caesura's whole `config`. Without a model, the bundled one is served.

        Raises TypeError for an unknown keyword, ValueError for a bad value, TokenizerError and
        EngineStartupError.
        """
        if model_path is not None:
            keywords["model_path"] = model_path
        if config is None:
            arguments = read_arguments(keywords)
        elif keywords:
            raise TypeError(f"give either config or keywords, not both: {', '.join(keywords)}")
        else:
            arguments = EngineArguments(config=config)
        self._has_text = not arguments.skip_tokenizer_init
        self._loop_thread = LoopThread("caesura-engine")
        try:
            self._engine = self._loop_thread.run(start_engine(arguments))
        except BaseException:
            self._loop_thread.stop()
            raise
        atexit.register(self._shut_down_at_exit)

    # -- requests ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingArgument | Sequence[SamplingArgument] = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
        return_logprob: bool | Sequence[bool] = False,
        top_logprobs_num: int | Sequence[int] | None = None,
        logprob_start_len: int | Sequence[int] | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
        resume_from: ResumeArgument | Sequence[ResumeArgument] | None = None,
        **others: object,
    ) -> Any:
        """Generate from one prompt or a list of them, given as text or as token ids.

        Returns one dictionary, or a list for a list of prompts or for samples (`n`): `text`,
        `output_ids` and `meta_info` (`id`, `finish_reason`, `prompt_tokens`, `completion_tokens`,
        `cached_tokens`, `weight_version`, `e2e_latency` in seconds, with `return_logprob` the
        log-probabilities, and at the end `weight_versions`: which weights sampled which tokens).
        With `stream=True` it returns an iterator whose dictionaries grow; those of a list carry
        `index`. `logprob_start_len` asks for the prompt's log-probabilities too.

        `sampling_params` are SGLang's dictionary or SamplingParams. A string as `rid` of a list
        names all of it, its children being `rid_0`, `rid_1`, ... A higher `priority` runs first.
        `tags` are names by which many requests can be aborted at once.

        An aborted request is a result with `finish_reason["type"] == "abort"`. Its
        `meta_info["resume_from"]`, or a list of them, given in place of prompts goes on where it
        ended, with new tokens only in the result; give the sampling parameters of before.

        Raises InvalidRequestError (a ValueError), OverloadedError or EngineDeadError; then nothing
        was accepted.
        """
        call = read_call(
            prompt,
            input_ids,
            sampling_params,
            return_logprob=return_logprob,
            top_logprobs_num=top_logprobs_num,
            logprob_start_len=logprob_start_len,
            rid=rid,
            priority=priority,
            tags=tags,
            resume_from=resume_from,
            others=others,
        )
        if stream:
            reader: BlockingReader[Event] = BlockingReader(
                self._loop_thread, partial(self._emit, call)
            )
            next(reader)
            return self._stream(call, reader)
        results = self._loop_thread.run(self._collect(call))
        return results if call.is_list else results[0]

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingArgument | Sequence[SamplingArgument] = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
        return_logprob: bool | Sequence[bool] = False,
        top_logprobs_num: int | Sequence[int] | None = None,
        logprob_start_len: int | Sequence[int] | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
        resume_from: ResumeArgument | Sequence[ResumeArgument] | None = None,
        **others: object,
    ) -> Any:
        """`generate` for a running event loop, whichever; with `stream=True` returns an async
        iterator.
        """
        call = read_call(
            prompt,
            input_ids,
            sampling_params,
            return_logprob=return_logprob,
            top_logprobs_num=top_logprobs_num,
            logprob_start_len=logprob_start_len,
            rid=rid,
            priority=priority,
            tags=tags,
            resume_from=resume_from,
            others=others,
        )
        if stream:
            reader: AsyncReader[Event] = AsyncReader(self._loop_thread, partial(self._emit, call))
            await anext(reader)
            return self._async_stream(call, reader)
        results = await self._loop_thread.run_from_another_loop(self._collect(call))
        return results if call.is_list else results[0]

    def abort_request(
        self,
        rid: str | Sequence[str] = "",
        abort_all: bool = False,
        *,
        prefix: bool = False,
        tag: str | None = None,
        wait: bool = True,
    ) -> AbortReceipt | None:
        """Abort the request or batch named `rid` (or several), or every request.

        With `prefix=True`, `rid` is the beginning of ids; in its place, `tag` names requests.
        Returns after the effect, with a receipt; `wait=False` only sends it off, for callers that
        must not block. If nothing is named, nothing happens, and None is returned.
        """
        selector = read_abort(rid, abort_all, prefix=prefix, tag=tag)
        if selector is None:
            return None
        return self._loop_thread.run(
            self._engine.abort(
                selector.request_ids,
                prefix=selector.prefix,
                tag=selector.tag,
                abort_all=selector.everything,
                wait=wait,
            )
        )

    # -- life ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def is_healthy(self) -> bool:
        """Whether at least one engine can serve."""
        return self._engine.is_healthy

    def status(self) -> dict[int, EngineStatus]:
        """What each living engine says of itself, its books checked."""
        return self._loop_thread.run(self._engine.status())

    def shutdown(self) -> None:
        """End every request, with what it has, and the engine processes. Harmless to repeat."""
        atexit.unregister(self._shut_down_at_exit)
        try:
            self._loop_thread.run(self._engine.shutdown())
        except EngineDeadError:
            pass  # it was shut down before
        finally:
            self._loop_thread.stop()

    def _shut_down_at_exit(self) -> None:
        # Python has closed its thread pools by now, where the end of the processes is waited for.
        # They end with this process.
        with contextlib.suppress(RuntimeError):
            self.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    # -- on the engine's loop ------------------------------------------------------------------

    async def _collect(self, call: GenerateCall) -> list[Result]:
        async def finish(index: int, stream: RequestStream) -> Result:
            result = await stream.result()
            return self._builder(call, index).add(
                result, stream.prompt_token_ids, self._engine.weight_version
            )

        streams = self._engine.accept(call.requests)
        return await asyncio.gather(*(finish(*place) for place in enumerate(streams)))

    async def _emit(self, call: GenerateCall, emit: Callable[[Event], object]) -> None:
        async def forward(index: int, stream: RequestStream) -> None:
            async for output in stream:
                emit((index, output, stream.prompt_token_ids, self._engine.weight_version))

        streams = self._engine.accept(call.requests)
        emit(None)
        await asyncio.gather(*(forward(*place) for place in enumerate(streams)))

    # -- on the reader's side ------------------------------------------------------------------

    def _builder(self, call: GenerateCall, index: int) -> ResultBuilder:
        return ResultBuilder(call, index, has_text=self._has_text)

    def _stream(self, call: GenerateCall, reader: BlockingReader[Event]) -> Iterator[Result]:
        builders = [self._builder(call, index) for index in range(len(call.requests))]
        for event in reader:
            assert event is not None
            yield _streamed(call, builders, event)

    async def _async_stream(
        self, call: GenerateCall, reader: AsyncReader[Event]
    ) -> AsyncIterator[Result]:
        builders = [self._builder(call, index) for index in range(len(call.requests))]
        async for event in reader:
            assert event is not None
            yield _streamed(call, builders, event)


def _streamed(call: GenerateCall, builders: Sequence[ResultBuilder], event: News) -> Result:
    index, output, prompt_token_ids, weight_version = event
    result = builders[index].add(output, prompt_token_ids, weight_version)
    return result | {"index": index} if call.is_list else result
