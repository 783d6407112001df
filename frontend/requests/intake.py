"""Accepts requests: validates them, tokenizes their prompts and hands them to the dispatcher.

Acceptance is synchronous: when `accept` returns, the requests are in the registry and an abort
finds them. Short prompts and token ids are on their way to an engine by then; a long text is
tokenized on a worker thread first, and may be aborted or dropped meanwhile.

Invariant: the requests of a call are accepted together or not at all; a refusal leaves nothing
behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from frontend.engines.engine_calls import CLIENT_INDEX
from frontend.errors import (
    CALLERS_FAULTS,
    CONTEXT_LENGTH_EXCEEDED,
    VALIDATION_ERROR,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
)
from frontend.ids import new_id
from frontend.outputs import Terminal
from frontend.requests.admission import Admission
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.mailbox import Mailbox
from frontend.requests.new_request import NewRequest
from frontend.requests.origin import origin_of
from frontend.requests.registry import Entry
from frontend.text.output_processor import OutputProcessor
from frontend.text.tokenizer import Tokenizer
from ipc import expect
from ipc.errors import WireError
from ipc.output import OutputError
from ipc.request import encode_new

MAX_INLINE_CHARS = 8192
"""Longer prompts are tokenized on a worker thread, so that they do not hold up other streams."""


class RequestIntake:
    """The door through which all requests of a front end come."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer | None,
        admission: Admission,
        *,
        max_model_len: int,
        stream_interval: int,
        on_deadline: Callable[[Entry], None],
    ) -> None:
        """Without a tokenizer, only token ids can be accepted."""
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._admission = admission
        self._max_model_len = max_model_len
        self._stream_interval = stream_interval
        self._on_deadline = on_deadline
        self._loop = asyncio.get_running_loop()

    def accept(self, requests: Sequence[NewRequest]) -> list[Entry]:
        """All of them or none. Raises InvalidRequestError, PromptTooLongError,
        DuplicateRequestIdError, OverloadedError, EnginePausedError or EngineDeadError.
        """
        requests = [new.checked() for new in requests]
        prompts = self._prompts_at_once(requests)
        entries = [self._new_entry(new) for new in requests]
        for entry, new, token_ids in zip(entries, requests, prompts, strict=True):
            if token_ids is not None:
                self._prepare(entry, new, token_ids)
        self._admit(prompts)
        accepted: list[Entry] = []
        try:
            for entry, token_ids in zip(entries, prompts, strict=True):
                self._dispatcher.registry.register(entry)
                accepted.append(entry)
                entry.place = self._admission.enter(len(token_ids or ()))
            for entry in entries:
                if entry.add_frames:
                    self._dispatcher.send(entry)
        except BaseException:
            for entry in accepted:
                self._dispatcher.take_back(entry)
            raise
        self._tokenize_long(entries, requests, prompts)
        for entry, new in zip(entries, requests, strict=True):
            self._dispatcher.metrics.on_accepted()
            if new.timeout_s is not None and entry.terminal is None:
                entry.deadline = self._loop.call_later(new.timeout_s, self._on_deadline, entry)
        return entries

    def _admit(self, prompts: Sequence[list[int] | None]) -> None:
        try:
            self._dispatcher.gate.check_newcomers(len(prompts))
            num_tokens = sum(len(token_ids) for token_ids in prompts if token_ids is not None)
            self._admission.check(len(prompts), num_tokens)
        except OverloadedError as error:
            self._dispatcher.metrics.on_refused(error.limit)
            raise

    def _new_entry(self, new: NewRequest) -> Entry:
        suffix = new_id()
        request_id = new.request_id if new.request_id is not None else suffix
        return Entry(
            internal_id=f"{request_id}-{suffix}",
            request_id=request_id,
            mailbox=Mailbox(request_id, self._stream_interval, is_final_only=new.is_final_only),
            accepted_s=self._dispatcher.clock(),
            arrival_time_s=time.time(),
            aliases=tuple(new.aliases),
            batch_id=new.batch_id,
            tags=frozenset(new.tags),
            priority=new.priority,
        )

    # -- prompts -------------------------------------------------------------------------------

    def _prompts_at_once(self, requests: Sequence[NewRequest]) -> list[list[int] | None]:
        """Each prompt's tokens, checked; None for a text too long to tokenize here and now.

        The completions of one prompt (`n`) share its object, and its tokens.
        """
        known: dict[tuple[int, bool], list[int] | None] = {}
        prompts = []
        for new in requests:
            key = new.prompt_key
            if key not in known:
                known[key] = self._token_ids_at_once(new)
            prompts.append(known[key])
        return prompts

    def _token_ids_at_once(self, new: NewRequest) -> list[int] | None:
        if (resumed := new.resume_from) is not None:
            token_ids = [*resumed.prompt_token_ids, *resumed.output_token_ids]
        elif new.prompt_token_ids is not None:
            token_ids = list(new.prompt_token_ids)
        else:
            if not isinstance(new.prompt, str):
                raise InvalidRequestError(f"the prompt must be a str, not {new.prompt!r:.80}")
            tokenizer = self._tokenizer_for_text()
            tokenizer.check_fits(new.prompt, self._max_model_len)
            if len(new.prompt) > MAX_INLINE_CHARS:
                return None
            try:
                token_ids = tokenizer.encode(new.prompt, add_special_tokens=new.add_special_tokens)
            except ValueError as error:
                raise InvalidRequestError(str(error)) from error
        self._check_prompt(token_ids)
        return token_ids

    def _tokenize_long(
        self,
        entries: Sequence[Entry],
        requests: Sequence[NewRequest],
        prompts: Sequence[list[int] | None],
    ) -> None:
        """Send each distinct long text of a call to a worker thread, once."""
        waiting: dict[tuple[int, bool], list[tuple[Entry, NewRequest]]] = {}
        for entry, new, token_ids in zip(entries, requests, prompts, strict=True):
            if token_ids is None:
                waiting.setdefault(new.prompt_key, []).append((entry, new))
        for siblings in waiting.values():
            new = siblings[0][1]
            assert new.prompt is not None
            encode = partial(
                self._tokenizer_for_text().encode,
                new.prompt,
                add_special_tokens=new.add_special_tokens,
            )
            encoding = self._loop.run_in_executor(None, encode)
            encoding.add_done_callback(partial(self._on_encoded, siblings))

    def _on_encoded(
        self, siblings: list[tuple[Entry, NewRequest]], encoding: asyncio.Future[list[int]]
    ) -> None:
        """A long prompt was tokenized; requests for it may have ended meanwhile."""
        live = [(entry, new) for entry, new in siblings if entry.terminal is None]
        try:
            token_ids = encoding.result()
            self._check_prompt(token_ids)
            self._admission.check(0, len(token_ids) * len(live))
            self._dispatcher.gate.check_room(len(live))
            for entry, new in live:
                assert entry.place is not None
                entry.place.set_num_prompt_tokens(len(token_ids))
                self._prepare(entry, new, token_ids)
            for entry, _ in live:
                if entry.terminal is None:
                    self._dispatcher.send(entry)
        except Exception as error:
            if isinstance(error, OverloadedError):
                self._dispatcher.metrics.on_refused(error.limit)
            terminal = Terminal("error", error=_fault(error))
            for entry, _ in live:
                if entry.engine_index is None:
                    self._dispatcher.end_unsent(entry, terminal)

    def _prepare(self, entry: Entry, new: NewRequest, token_ids: list[int]) -> None:
        """Everything that can be wrong with a request is found here, before an engine hears of it.

        Raises InvalidRequestError.
        """
        eos_token_ids = self._tokenizer.eos_token_ids if self._tokenizer is not None else ()
        origin = origin_of(token_ids, new.sampling_params, new.resume_from, self._max_model_len)
        # Plain vLLM would count from the end of all that it is sent.
        is_plain = bool(self._dispatcher.foreign_engines)
        try:
            entry.add_frames = encode_new(
                request_id=entry.internal_id,
                prompt_token_ids=token_ids,
                sampling_params=origin.sampling_params.to_wire(
                    eos_token_ids,
                    num_tokens_left=origin.max_num_tokens,
                    num_resumed_tokens=0 if is_plain else len(origin.earlier_token_ids),
                ),
                arrival_time=entry.arrival_time_s,
                client_index=CLIENT_INDEX,
                priority=entry.priority,
                external_req_id=entry.request_id,
                cache_salt=new.cache_salt,
            )
        except ValueError as error:
            raise InvalidRequestError(str(error)) from error
        entry.processor = OutputProcessor(
            self._tokenizer,
            origin.sampling_params,
            origin.prompt_token_ids,
            earlier_token_ids=origin.earlier_token_ids,
            stop_tail_text=origin.stop_tail_text,
        )
        entry.mailbox.prompt_token_ids = origin.prompt_token_ids
        entry.origin = origin

    def _tokenizer_for_text(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError("this engine has no tokenizer; give prompt_token_ids")
        return self._tokenizer

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; it needs at least one token")
        try:
            expect.token_ids(token_ids, "prompt_token_ids")
        except WireError as error:
            raise InvalidRequestError(str(error)) from None
        if len(token_ids) >= self._max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, but the model's context holds "
                f"max_model_len={self._max_model_len}, prompt and output together; shorten the "
                f"prompt"
            )


def _fault(error: Exception) -> OutputError:
    """What a client is told of a request that failed after it was accepted."""
    code = "internal_error"
    if isinstance(error, OverloadedError):
        code = error.code
    elif isinstance(error, PromptTooLongError):
        code = CONTEXT_LENGTH_EXCEEDED
    elif isinstance(error, ValueError):
        code = VALIDATION_ERROR
    return OutputError(code, str(error), retryable=code not in CALLERS_FAULTS)
