"""SGLang's `generate` call and its result dictionaries.

A call carries one prompt or a batch of them, as text or as token ids; everything else may be given
once for all prompts or as a list with one entry a prompt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frontend.errors import CALLERS_FAULTS, InvalidRequestError
from frontend.outputs import RequestOutput, RequestResult, TokenLogprobs
from frontend.sampling_params import SamplingParams

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("image_data", "audio_data", "video_data", "lora_path"), (None,)),
    **dict.fromkeys(("custom_logit_processor", "session_params", "token_ids_logprob"), (None,)),
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room"), (None,)),
    **dict.fromkeys(("routed_dp_rank", "external_trace_header", "session_id"), (None,)),
    "cache_salt": (None,),
    "return_hidden_states": (None, False),
    "logprob_start_len": (None, -1),
}
"""SGLang's arguments without a counterpart here, with the values that ask for nothing."""

SamplingArgument = SamplingParams | Mapping[str, object] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One prompt of a call."""

    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    sampling_params: SamplingParams
    request_id: str | None
    priority: int
    """Lower runs first (SGLang's runs higher first)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One call: its prompts, and the id by which all of them can be aborted."""

    requests: tuple[PromptRequest, ...]
    is_batch: bool
    batch_id: str | None
    """Set for a batch with one string as `rid`; its children are `rid_0`, `rid_1`, ..."""
    started_at_s: float = field(default_factory=time.monotonic)


def read_call(
    prompt: str | Sequence[str] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    sampling_params: SamplingArgument | Sequence[SamplingArgument],
    *,
    return_logprob: bool | Sequence[bool],
    top_logprobs_num: int | Sequence[int] | None,
    rid: str | Sequence[str] | None,
    priority: int | None,
    others: Mapping[str, object],
) -> GenerateCall:
    """Sort out the arguments of `generate`; of `others`, SGLang's further ones may be None.

    Raises InvalidRequestError or ValueError for bad values and TypeError for an unknown argument.
    """
    for name, value in others.items():
        if name not in _UNSUPPORTED:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value not in _UNSUPPORTED[name]:
            raise InvalidRequestError(f"{name}={value!r:.80} is not supported; leave it out")
    if (prompt is None) == (input_ids is None):
        raise InvalidRequestError("give either prompt or input_ids, one of them")
    if not isinstance(prompt, Sequence | None):
        raise InvalidRequestError(f"prompt must be a str or a list of them, not {prompt!r:.80}")
    texts: list[str | None]
    ids: list[Sequence[int] | None]
    if prompt is not None:
        is_batch = not isinstance(prompt, str)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [None] * len(texts)
    else:
        assert input_ids is not None
        is_batch = any(isinstance(entry, Sequence) for entry in input_ids[:1])
        ids = list(input_ids) if is_batch else [input_ids]  # type: ignore[arg-type, list-item]
        texts = [None] * len(ids)
    num = len(texts)
    batch_id = rid if is_batch and isinstance(rid, str) else None
    rids = [f"{rid}_{index}" for index in range(num)] if batch_id is not None else rid
    columns = zip(
        texts,
        ids,
        _one_each("sampling_params", sampling_params, num),
        _one_each("return_logprob", return_logprob, num),
        _one_each("top_logprobs_num", top_logprobs_num, num),
        _one_each("rid", rids, num),
        strict=True,
    )
    requests = tuple(
        PromptRequest(
            prompt=text,
            prompt_token_ids=token_ids,
            sampling_params=_sampling_params(params, wants_logprobs, num_top),
            request_id=request_id or None,
            priority=-(priority or 0),
        )
        for text, token_ids, params, wants_logprobs, num_top, request_id in columns
    )
    return GenerateCall(requests=requests, is_batch=is_batch, batch_id=batch_id)


def _one_each(name: str, value: Any, num: int) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != num:
            raise InvalidRequestError(
                f"{name} has {len(value)} entries for {num} prompts; "
                "give one for each, or a single one for all"
            )
        return list(value)
    return [value] * num


def _sampling_params(
    params: SamplingArgument, return_logprob: bool, top_logprobs_num: int | None
) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        params = SamplingParams.from_sglang(params or {})
    if return_logprob:
        params = dataclasses.replace(params, logprobs=top_logprobs_num or 0)
    return params


class ResultBuilder:
    """Gathers a request's outputs into SGLang's dictionary, which is cumulative."""

    def __init__(self, call: GenerateCall, index: int, *, has_text: bool) -> None:
        """`index` is the prompt's place in the call."""
        self._call = call
        self._index = index
        self._has_text = has_text
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, output: RequestOutput | RequestResult) -> dict[str, Any]:
        """Take the next output; returns the dictionary for all of them so far."""
        self._text += output.text
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        meta_info: dict[str, Any] = {
            "id": output.request_id,
            "finish_reason": self._finish_reason(output),
            "prompt_tokens": output.num_prompt_tokens,
            "completion_tokens": len(self._token_ids),
            "cached_tokens": output.num_cached_tokens,
            "e2e_latency": time.monotonic() - self._call.started_at_s,
        }
        num_top = self._call.requests[self._index].sampling_params.logprobs
        if num_top is not None:
            meta_info["input_token_logprobs"] = []
            meta_info["output_token_logprobs"] = [
                (entry.logprob, entry.token_id, None) for entry in self._logprobs
            ]
        if num_top:
            meta_info["input_top_logprobs"] = []
            meta_info["output_top_logprobs"] = [
                [(logprob, token_id, None) for token_id, logprob in entry.top]
                for entry in self._logprobs
            ]
        result: dict[str, Any] = {"text": self._text} if self._has_text else {}
        result |= {"output_ids": list(self._token_ids), "meta_info": meta_info}
        return result

    def _finish_reason(self, output: RequestOutput | RequestResult) -> dict[str, Any] | None:
        """SGLang knows no reason `error`: such a request was aborted with a status code."""
        match output.finish_reason:
            case None:
                return None
            case "length":
                return {"type": "length", "length": len(self._token_ids)}
            case "stop" | "repetition":
                matched = output.stop_reason
                if matched is None and self._token_ids:
                    matched = self._token_ids[-1]  # the model's own EOS
                return {"type": "stop", "matched": matched}
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
