"""Accepts requests: validates them, tokenizes their prompts and hands them to the dispatcher.

Acceptance is synchronous: when `accept` returns, the request is in the registry and an abort finds
it. Short prompts and token ids are on their way to an engine by then; a long text is tokenized on a
worker thread first, and may be aborted or dropped meanwhile.

Invariant: a request that is refused leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from frontend.errors import (
    CALLERS_FAULTS,
    CONTEXT_LENGTH_EXCEEDED,
    VALIDATION_ERROR,
    InvalidRequestError,
    PromptTooLongError,
)
from frontend.outputs import Terminal
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.mailbox import Mailbox
from frontend.requests.registry import Entry
from frontend.sampling_params import SamplingParams
from frontend.text.output_processor import OutputProcessor
from frontend.text.tokenizer import Tokenizer
from ipc import expect
from ipc.errors import WireError
from ipc.output import OutputError

MAX_INLINE_CHARS = 8192
"""Longer prompts are tokenized on a worker thread, so that they do not hold up other streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """What a caller asks for. Either `prompt` or `prompt_token_ids` is set."""

    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    sampling_params: SamplingParams
    request_id: str | None
    """None makes one up."""
    aliases: Sequence[str] = ()
    batch_id: str | None = None
    priority: int = 0
    tags: Sequence[str] = ()


class RequestIntake:
    """The door through which all requests of a front end come."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        stream_interval: int,
    ) -> None:
        """Without a tokenizer, only token ids can be accepted."""
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._stream_interval = stream_interval

    def accept(self, new: NewRequest) -> Entry:
        """Raises InvalidRequestError, PromptTooLongError, DuplicateRequestIdError or
        EngineDeadError.
        """
        token_ids = self._token_ids_at_once(new)
        request_id = new.request_id if new.request_id is not None else secrets.token_hex(8)
        entry = Entry(
            internal_id=f"{request_id}-{secrets.token_hex(4)}",
            request_id=request_id,
            mailbox=Mailbox(request_id, self._stream_interval),
            aliases=tuple(new.aliases),
            batch_id=new.batch_id,
            tags=frozenset(new.tags),
        )
        arrival_time_s = time.time()
        self._dispatcher.registry.register(entry)
        if token_ids is None:
            assert new.prompt is not None
            tokenizer = self._tokenizer_for_text()
            loop = asyncio.get_running_loop()
            encoding = loop.run_in_executor(None, tokenizer.encode, new.prompt)
            encoding.add_done_callback(partial(self._on_encoded, entry, new, arrival_time_s))
            return entry
        try:
            self._send(entry, new, arrival_time_s, token_ids)
        except BaseException as error:
            self._dispatcher.registry.remove(entry.internal_id, engine_runs_it=False)
            if isinstance(error, ValueError):
                raise InvalidRequestError(str(error)) from error
            raise
        return entry

    def _token_ids_at_once(self, new: NewRequest) -> list[int] | None:
        """The prompt's tokens, checked; None if its text is too long to tokenize here and now."""
        if (new.prompt is None) == (new.prompt_token_ids is None):
            raise InvalidRequestError("give either prompt or prompt_token_ids, one of them")
        if new.prompt_token_ids is not None:
            token_ids = list(new.prompt_token_ids)
        else:
            if not isinstance(new.prompt, str):
                raise InvalidRequestError(f"the prompt must be a str, not {new.prompt!r:.80}")
            tokenizer = self._tokenizer_for_text()
            if len(new.prompt) > MAX_INLINE_CHARS:
                return None
            try:
                token_ids = tokenizer.encode(new.prompt)
            except ValueError as error:
                raise InvalidRequestError(str(error)) from error
        self._check_prompt(token_ids)
        return token_ids

    def _on_encoded(
        self,
        entry: Entry,
        new: NewRequest,
        arrival_time_s: float,
        encoding: asyncio.Future[list[int]],
    ) -> None:
        """A long prompt was tokenized; its request may have ended meanwhile."""
        if self._dispatcher.registry.get(entry.internal_id) is None:
            return
        try:
            token_ids = encoding.result()
            self._check_prompt(token_ids)
            self._send(entry, new, arrival_time_s, token_ids)
        except Exception as error:
            code = "internal_error"
            if isinstance(error, ValueError):
                is_too_long = isinstance(error, PromptTooLongError)
                code = CONTEXT_LENGTH_EXCEEDED if is_too_long else VALIDATION_ERROR
            fault = OutputError(code, str(error), retryable=code not in CALLERS_FAULTS)
            self._dispatcher.end_unsent(entry, Terminal("error", error=fault))

    def _send(
        self, entry: Entry, new: NewRequest, arrival_time_s: float, token_ids: list[int]
    ) -> None:
        params, tokenizer = new.sampling_params, self._tokenizer
        entry.processor = OutputProcessor(tokenizer, params, token_ids)
        self._dispatcher.send(
            entry,
            token_ids,
            params.to_wire(
                tokenizer.eos_token_ids if tokenizer is not None else (),
                num_tokens_left=self._max_model_len - len(token_ids),
            ),
            priority=new.priority,
            arrival_time_s=arrival_time_s,
        )

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
