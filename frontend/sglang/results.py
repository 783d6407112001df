"""SGLang's result dictionaries: `text`, `output_ids` and `meta_info`, cumulative in a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from frontend.errors import CALLERS_FAULTS
from frontend.outputs import RequestOutput, RequestResult, TokenLogprobs
from frontend.requests.resume_from import plain_resume_from, plain_weight_spans
from frontend.sglang.calls import GenerateCall

UNLABELLED = "default"
"""SGLang's label of weights that nobody has labelled."""

TokenText = Callable[[int], str]
LogprobEntry = tuple[float | None, int, str | None]
"""(logprob, token id, the token's text if asked for)."""


class ResultBuilder:
    """Gathers a request's outputs into SGLang's dictionary."""

    def __init__(
        self,
        call: GenerateCall,
        index: int,
        *,
        has_text: bool = True,
        token_text: TokenText | None = None,
    ) -> None:
        """`index` is the request's place in the call; without `token_text`, log-probabilities
        carry no text.
        """
        self._call = call
        self._is_prompt_only = call.is_prompt_only[index]
        self._num_top = call.requests[index].sampling_params.logprobs
        self._has_text = has_text
        self._token_text = token_text if call.return_text_in_logprobs else None
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._start = call.logprob_starts[index]
        self._prompt: tuple[list[LogprobEntry], list[list[LogprobEntry] | None]] = ([], [])

    def add(
        self,
        output: RequestOutput | RequestResult,
        prompt_token_ids: Sequence[int] = (),
        weight_version: str | None = None,
    ) -> dict[str, Any]:
        """Take the next output; returns the dictionary for all of them so far. `weight_version` is
        the label of the weights that serve now, if they have one.
        """
        if not self._is_prompt_only:
            self._text += output.text
            self._token_ids += output.token_ids
            self._logprobs += output.logprobs
        last_token_id = self._token_ids[-1] if self._token_ids else None
        info = meta_info(
            output, len(self._token_ids), last_token_id, self._call.started_at_s, weight_version
        )
        if self._num_top is not None:
            if output.prompt_logprobs:
                self._prompt = prompt_entries(
                    prompt_token_ids, output.prompt_logprobs, self._start, self._token_text
                )
            info["input_token_logprobs"] = self._prompt[0]
            info["output_token_logprobs"] = sampled_entries(self._logprobs, self._token_text)
        if self._num_top:
            info["input_top_logprobs"] = self._prompt[1]
            info["output_top_logprobs"] = top_entries(self._logprobs, self._token_text)
        result: dict[str, Any] = {"text": self._text} if self._has_text else {}
        result |= {"output_ids": list(self._token_ids), "meta_info": info}
        return result


def meta_info(
    output: RequestOutput | RequestResult,
    num_output_tokens: int,
    last_token_id: int | None,
    started_at_s: float,
    weight_version: str | None = None,
) -> dict[str, Any]:
    """What is known beside the output itself; the log-probabilities are added by the caller.

    `weight_version` is the label of the weights that serve now; a result names those that sampled
    its last token.
    """
    if output.weight_spans:
        weight_version = output.weight_spans[-1].version
    info: dict[str, Any] = {
        "id": output.request_id,
        "finish_reason": _finish_reason(output, num_output_tokens, last_token_id),
        "prompt_tokens": output.num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "cached_tokens": output.num_cached_tokens,
        "weight_version": UNLABELLED if weight_version is None else weight_version,
        "e2e_latency": time.monotonic() - started_at_s,
    }
    if output.finish_reason is not None:
        spans = output.weight_spans if num_output_tokens else ()
        info["weight_versions"] = plain_weight_spans(spans)
    if output.resume_from is not None:
        info["resume_from"] = plain_resume_from(output.resume_from)
    return info


def sampled_entries(
    records: Iterable[TokenLogprobs], token_text: TokenText | None
) -> list[LogprobEntry]:
    """`output_token_logprobs`: one entry for each sampled token."""
    return [_entry(record.logprob, record.token_id, token_text) for record in records]


def top_entries(
    records: Iterable[TokenLogprobs], token_text: TokenText | None
) -> list[list[LogprobEntry]]:
    """`output_top_logprobs`: for each sampled token the likeliest ones."""
    return [
        [_entry(logprob, token_id, token_text) for token_id, logprob in record.top]
        for record in records
    ]


def prompt_entries(
    prompt_token_ids: Sequence[int],
    records: Sequence[TokenLogprobs],
    start: int,
    token_text: TokenText | None,
) -> tuple[list[LogprobEntry], list[list[LogprobEntry] | None]]:
    """`input_token_logprobs` and `input_top_logprobs`, from the prompt's position `start` on.

    `records` has all positions but the first. As in SGLang, the first that is told has no
    log-probability, wherever it stands.
    """
    if start >= len(prompt_token_ids):
        return [], []
    first = (None, *_entry(0.0, prompt_token_ids[start], token_text)[1:])
    return (
        [first, *sampled_entries(records[start:], token_text)],
        [None, *top_entries(records[start:], token_text)],
    )


def _entry(logprob: float, token_id: int, token_text: TokenText | None) -> LogprobEntry:
    return logprob, token_id, None if token_text is None else token_text(token_id)


def _finish_reason(
    output: RequestOutput | RequestResult, num_output_tokens: int, last_token_id: int | None
) -> dict[str, Any] | None:
    """SGLang knows no reason `error`: such a request was aborted with a status code."""
    match output.finish_reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": num_output_tokens}
        case "stop" | "repetition":
            matched = output.stop_reason
            return {"type": "stop", "matched": last_token_id if matched is None else matched}
        case "abort":
            return {
                "type": "abort",
                "message": "Aborted",
                "status_code": None,
                "err_type": None,
                "abort_cause": output.abort_cause and output.abort_cause.value,
            }
        case "error":
            error = output.error
            is_users_fault = error is not None and error.code in CALLERS_FAULTS
            return {
                "type": "abort",
                "message": "the request failed" if error is None else error.message,
                "status_code": 400 if is_users_fault else 500,
                "err_type": None if error is None else error.code,
            }
