"""The bytes of SGLang's results.

A stream is cumulative: each event repeats all that came before it. What is repeated is kept
encoded and grows at its end, so an event costs one copy of it, and encodes only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from frontend.http.errors import ApiError
from frontend.outputs import RequestOutput, TokenLogprobs
from frontend.requests.stream import RequestStream
from frontend.sglang.calls import GenerateCall
from frontend.sglang.results import (
    ResultBuilder,
    TokenText,
    meta_info,
    prompt_entries,
    sampled_entries,
    top_entries,
)

_encode = msgspec.json.Encoder().encode


class GenerateForm:
    """One call's outcome, as a ReplyForm."""

    streams: Sequence[RequestStream] = ()

    def __init__(
        self,
        call: GenerateCall,
        token_text: TokenText | None,
        weight_version: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`weight_version` tells the label of the weights that serve now."""
        self._call = call
        self._token_text = token_text
        self._weight_version = weight_version
        self._events = [
            _GrowingEvent(call, index, token_text) for index in range(len(call.requests))
        ]

    def plain_event(self, index: int, text: str, token_ids: Sequence[int]) -> bytes | None:
        """None: each event repeats everything before it."""
        return None

    def event(self, index: int, output: RequestOutput) -> bytes:
        return self._events[index].add(output, self.streams[index], self._weight_version())

    def error_event(self, index: int, error: ApiError) -> bytes:
        body = {
            "message": str(error),
            "type": "invalid_request_error" if error.status < 500 else "server_error",
            "code": error.status,
            "retryable": error.status == 503,
        }
        event = {"error": body, "index": index} if self._call.is_list else {"error": body}
        return b"data: " + _encode(event) + b"\n\n"

    def end(self) -> bytes:
        return b"data: [DONE]\n\n"

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        results = [
            ResultBuilder(self._call, index, token_text=self._token_text).add(
                output, stream.prompt_token_ids, self._weight_version()
            )
            for index, (output, stream) in enumerate(zip(outputs, self.streams, strict=True))
        ]
        return _encode(results if self._call.is_list else results[0])


class _GrowingEvent:
    """The event of one request, with everything up to now."""

    __slots__ = (
        *("_ids", "_last_token_id", "_num_tokens", "_num_top", "_sampled", "_started_at_s"),
        *("_is_prompt_only", "_prompt", "_prompt_top", "_start", "_tail", "_text"),
        *("_token_text", "_top"),
    )

    def __init__(self, call: GenerateCall, index: int, token_text: TokenText | None) -> None:
        self._started_at_s = call.started_at_s
        self._num_top = call.requests[index].sampling_params.logprobs
        self._token_text = token_text if call.return_text_in_logprobs else None
        self._text = bytearray()
        self._ids = bytearray()
        self._start = call.logprob_starts[index]
        self._is_prompt_only = call.is_prompt_only[index]
        self._prompt = self._prompt_top = b"[]"
        self._sampled = bytearray()
        self._top = bytearray()
        self._num_tokens = 0
        self._last_token_id: int | None = None
        self._tail = b'},"index":%d}\n\n' % index if call.is_list else b"}}\n\n"

    def add(
        self, output: RequestOutput, stream: RequestStream, weight_version: str | None
    ) -> bytes:
        if self._is_prompt_only:
            output = output._replace(text="", token_ids=(), logprobs=())
        self._text += _encode(output.text)[1:-1]
        if output.token_ids:
            self._num_tokens += len(output.token_ids)
            self._last_token_id = output.token_ids[-1]
            _extend(self._ids, output.token_ids)
        info = meta_info(
            output, self._num_tokens, self._last_token_id, self._started_at_s, weight_version
        )
        parts: list[bytes | bytearray] = [
            *(b'data: {"text":"', self._text, b'","output_ids":[', self._ids),
            *(b'],"meta_info":', _encode(info)[:-1]),
        ]
        if self._num_top is not None:
            _extend(self._sampled, sampled_entries(output.logprobs, self._token_text))
            if output.prompt_logprobs:
                self._set_prompt(output.prompt_logprobs, stream.prompt_token_ids)
            parts += (
                *(b',"input_token_logprobs":', self._prompt),
                *(b',"output_token_logprobs":[', self._sampled, b"]"),
            )
        if self._num_top:
            _extend(self._top, top_entries(output.logprobs, self._token_text))
            parts += (
                *(b',"input_top_logprobs":', self._prompt_top),
                *(b',"output_top_logprobs":[', self._top, b"]"),
            )
        parts.append(self._tail)
        return b"".join(parts)

    def _set_prompt(
        self, records: Sequence[TokenLogprobs], prompt_token_ids: Sequence[int]
    ) -> None:
        told, top = prompt_entries(prompt_token_ids, records, self._start, self._token_text)
        self._prompt, self._prompt_top = _encode(told), _encode(top)


def _extend(array: bytearray, values: Sequence[object]) -> None:
    """Add values to the inside of a JSON array."""
    if values:
        if array:
            array += b","
        array += _encode(values)[1:-1]
