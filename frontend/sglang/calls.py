"""SGLang's `generate` call: one prompt or a batch of them, read as requests.

Everything but the prompts may be given once for all of them or as a list with one entry a prompt.
With `n` above 1 a prompt becomes that many requests, and the answer is one flat list, all samples
of the first prompt first. With `max_new_tokens` 0 a prompt is scored and nothing generated: an
engine samples at least one token, which is then withheld and not counted.

Names: a request is called by its own `rid`. A string that names several requests is the name of
their batch; the requests themselves are `rid_0`, `rid_1`, ...
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frontend.errors import DuplicateRequestIdError, InvalidRequestError
from frontend.outputs import ResumeFrom
from frontend.requests.new_request import NewRequest
from frontend.requests.resume_from import read_resume_from
from frontend.sampling_params import SamplingParams

MAX_SAMPLES = 4096
"""The most requests that one call may become through `n`."""

NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("image_data", "audio_data", "video_data", "modalities"), (None, [])),
    **dict.fromkeys(("lora_path", "lora_id", "input_embeds", "session_params"), (None,)),
    **dict.fromkeys(("custom_logit_processor", "token_ids_logprob", "extra_key"), (None,)),
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room"), (None,)),
    **dict.fromkeys(("routed_dp_rank", "data_parallel_rank", "external_trace_header"), (None,)),
    **dict.fromkeys(("session_id", "cache_salt"), (None,)),
    **dict.fromkeys(("return_hidden_states", "return_routed_experts", "background"), (None, False)),
    "routed_experts_start_len": (None, 0),
    "log_metrics": (None, True, False),
}
"""SGLang's arguments without a counterpart here, with the values that ask for nothing."""

_ONE_TOKEN = {
    **dict.fromkeys(("min_new_tokens", "stop", "stop_token_ids")),
    "max_new_tokens": 1,
    "ignore_eos": True,
}
"""In place of `max_new_tokens` 0: the prompt is computed, and the end is always by length."""

SamplingArgument = SamplingParams | Mapping[str, object] | None
ResumeArgument = ResumeFrom | Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One call."""

    requests: tuple[NewRequest, ...]
    is_list: bool
    """Whether the answer is a list: the prompts came as one, or a prompt has several samples."""
    return_text_in_logprobs: bool = False
    logprob_starts: tuple[int, ...]
    """For each request the first position of the prompt whose log-probability is told, if any is.
    """
    is_prompt_only: tuple[bool, ...]
    """For each request whether it asks for no output."""
    started_at_s: float = field(default_factory=time.monotonic)


def read_call(
    prompt: str | Sequence[str] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    sampling_params: SamplingArgument | Sequence[SamplingArgument],
    *,
    return_logprob: bool | Sequence[bool] | None = None,
    top_logprobs_num: int | Sequence[int] | None = None,
    logprob_start_len: int | Sequence[int] | None = None,
    return_text_in_logprobs: bool = False,
    rid: str | Sequence[str] | None = None,
    call_name: str | None = None,
    priority: int | None = None,
    tags: Sequence[str] = (),
    timeout_s: float | None = None,
    resume_from: ResumeArgument | Sequence[ResumeArgument] | None = None,
    others: Mapping[str, object] | None = None,
) -> GenerateCall:
    """Sort out the arguments of `generate`.

    `call_name` is a further name of the whole call. `others` are those of SGLang's arguments that
    have no parameter here; they may only ask for nothing. A higher `priority` runs first.
    `resume_from` stands in the prompts' place; then `max_new_tokens` is by default what is left.

    Raises InvalidRequestError or ValueError for bad values and TypeError for an unknown argument.
    """
    for name, value in (others or {}).items():
        if name not in NOT_SUPPORTED:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value not in NOT_SUPPORTED[name]:
            raise InvalidRequestError(f"{name}={value!r:.80} is not supported; leave it out")
    prompts, is_batch = _prompts(prompt, input_ids, resume_from)
    num = len(prompts)
    starts = _one_each("logprob_start_len", logprob_start_len, num)
    params_of_each = _one_each("sampling_params", sampling_params, num)
    if resume_from is not None:
        params_of_each = [_for_the_rest(params) for params in params_of_each]
    columns = zip(
        params_of_each,
        _one_each("return_logprob", return_logprob, num),
        _one_each("top_logprobs_num", top_logprobs_num, num),
        starts,
        strict=True,
    )
    samples: list[list[SamplingParams]] = []
    total = 0
    for column in columns:
        samples.append(_samples(*column))
        total += len(samples[-1])
        if total > max(num, MAX_SAMPLES):
            raise InvalidRequestError(
                f"n: the samples of {num} prompts exceed {MAX_SAMPLES} in all; make several calls"
            )
    is_list = is_batch or any(len(each) > 1 for each in samples)
    rid = rid or call_name
    names = _names(rid, [len(each) for each in samples], is_list=is_list, call_name=call_name)
    is_alias = isinstance(rid, str) and call_name not in (None, rid)
    requests = tuple(
        NewRequest(
            **one,
            sampling_params=params,
            request_id=request_id,
            batch_id=batch_id,
            aliases=(call_name,) if call_name is not None and is_alias else (),
            priority=-(priority or 0),  # here a lower one runs first
            tags=tags,
            timeout_s=timeout_s,
        )
        for one, each in zip(prompts, samples, strict=True)
        for params, (request_id, batch_id) in zip(each, names, strict=False)
    )
    return GenerateCall(
        requests=requests,
        is_list=is_list,
        return_text_in_logprobs=return_text_in_logprobs,
        logprob_starts=tuple(
            max(0, start or 0) for start, each in zip(starts, samples, strict=True) for _ in each
        ),
        is_prompt_only=tuple(
            _asks_for_no_output(params)
            for params, each in zip(params_of_each, samples, strict=True)
            for _ in each
        ),
    )


def _asks_for_no_output(params: SamplingArgument) -> bool:
    if isinstance(params, SamplingParams) or not params:
        return False
    num_tokens = params.get("max_new_tokens")
    return type(num_tokens) is int and num_tokens == 0


def _prompts(
    prompt: str | Sequence[str] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    resume_from: ResumeArgument | Sequence[ResumeArgument] | None,
) -> tuple[list[dict[str, Any]], bool]:
    """Where each request begins, as a field of NewRequest, and whether they came as a list."""
    if sum(given is not None for given in (prompt, input_ids, resume_from)) != 1:
        raise InvalidRequestError(
            "give either a prompt text or input_ids or resume_from, one of them"
        )
    if not isinstance(prompt, Sequence | None):
        raise InvalidRequestError(f"prompt must be a str or a list of them, not {prompt!r:.80}")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else prompt
        return [{"prompt": text} for text in texts], not isinstance(prompt, str)
    if resume_from is not None:
        is_batch = isinstance(resume_from, Sequence)
        origins = resume_from if isinstance(resume_from, Sequence) else [resume_from]
        return [{"resume_from": read_resume_from(origin)} for origin in origins], is_batch
    assert input_ids is not None
    num_lists = sum(isinstance(entry, Sequence) for entry in input_ids)
    if 0 < num_lists < len(input_ids):
        raise InvalidRequestError("input_ids mixes token ids and lists of them; give one kind")
    lists = input_ids if num_lists else [input_ids]
    return [{"prompt_token_ids": ids} for ids in lists], num_lists > 0


def _for_the_rest(params: SamplingArgument) -> SamplingArgument:
    """The parameters of a request that is continued, by default with all tokens that are left."""
    if isinstance(params, SamplingParams):
        return params
    params = {"max_new_tokens": None, **(params or {})}
    if params.get("n") not in (None, 1):
        raise InvalidRequestError(
            f"n={params['n']!r:.80} cannot be had with resume_from; continue each sample by its own"
        )
    if _asks_for_no_output(params):
        raise InvalidRequestError(
            "max_new_tokens=0 cannot be had with resume_from; leave it out for all that is left"
        )
    return params


def _names(
    rid: str | Sequence[str] | None,
    num_samples: Sequence[int],
    *,
    is_list: bool,
    call_name: str | None,
) -> Iterator[tuple[str | None, str | None]]:
    """For each request of the call (its id, the id of its batch)."""
    total = sum(num_samples)
    if not rid:
        yield from [(None, None)] * total
    elif isinstance(rid, str):
        yield from ((f"{rid}_{i}", rid) for i in range(total)) if is_list else ((rid, None),)
    else:
        names = _one_each("rid", rid, len(num_samples))
        for own, times in Counter(filter(None, names)).items():
            if times > 1:
                raise DuplicateRequestIdError(
                    f"rid has {own!r:.80} for {times} prompts of this call; give each its own"
                )
        for own, num in zip(names, num_samples, strict=True):
            if num == 1:
                yield own or None, call_name
            else:
                yield from _names(own, [num], is_list=True, call_name=None)


def _samples(
    params: SamplingArgument,
    return_logprob: bool | None,
    top_logprobs_num: int | None,
    logprob_start_len: int | None,
) -> list[SamplingParams]:
    """The parameters of each sample of one prompt; seeded ones differ by their seed."""
    num_samples = 1
    if not isinstance(params, SamplingParams):
        params = dict(params or {})
        if (given := params.pop("n", None)) is not None:
            if type(given) is not int or not 1 <= given <= MAX_SAMPLES:
                raise InvalidRequestError(
                    f"n={given!r:.80} must be an integer from 1 to {MAX_SAMPLES}"
                )
            num_samples = given
        if _asks_for_no_output(params):
            params |= _ONE_TOKEN
        params = SamplingParams.from_sglang(params)
    if return_logprob:
        num_top = top_logprobs_num or 0
        params = dataclasses.replace(params, logprobs=num_top)
        if logprob_start_len is not None and logprob_start_len >= 0:
            params = dataclasses.replace(params, prompt_logprobs=num_top)
    if (seed := params.seed) is None:
        return [params] * num_samples
    return [dataclasses.replace(params, seed=seed + index) for index in range(num_samples)]


def _one_each(name: str, value: Any, num: int) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != num:
            raise InvalidRequestError(
                f"{name} has {len(value)} entries for {num} prompts; "
                "give one for each, or a single one for all"
            )
        return list(value)
    return [value] * num
