"""From a parsed body to the requests that it asks for: ids, sampling parameters, fan-out.

A call's requests are ordered prompt by prompt: the choice with index `prompt * n + i` is the i-th
of its prompt. If there is one, it has the call's id; of several, each has an id of its own (the
call's with `-index`), and all the call's names are names of the batch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frontend.http.bodies import bad_field, not_supported
from frontend.http.errors import ApiError
from frontend.http.exchange import MAX_REQUEST_ID_LENGTH, REQUEST_ID_HEADER
from frontend.http.openai.requests import MAX_CHOICES, GenerationBody
from frontend.ids import new_id
from frontend.outputs import ResumeFrom
from frontend.requests.new_request import NewRequest
from frontend.sampling_params import SamplingParams

Prompt = str | list[int] | ResumeFrom

_SAMPLING_FIELDS = tuple(
    spec.name
    for spec in dataclasses.fields(SamplingParams)
    if spec.name in GenerationBody.__struct_fields__
)


@dataclass(frozen=True, slots=True)
class CallNames:
    """The ids under which a call is known, and an abort finds it."""

    request_id: str
    """The body's, the header's or a random one."""
    header_id: str | None
    response_id: str

    @classmethod
    def of(cls, body: GenerationBody, headers: Mapping[str, str], prefix: str) -> CallNames:
        """Raises ApiError if the header's id cannot be one."""
        header_id = headers.get(REQUEST_ID_HEADER)
        if header_id is not None and not 0 < len(header_id) <= MAX_REQUEST_ID_LENGTH:
            expected = f"a string of 1 to {MAX_REQUEST_ID_LENGTH} characters"
            raise bad_field("X-Request-Id", expected, header_id)
        request_id = body.request_id or header_id or new_id()
        return cls(request_id, header_id, f"{prefix}-{request_id}")

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names besides `request_id`."""
        if self.header_id in (None, self.request_id):
            return (self.response_id,)
        return (self.response_id, self.header_id)


def check_call(body: GenerationBody, served_model_name: str) -> None:
    """Raises ApiError for what the fields' types cannot say."""
    check_model(body.model, served_model_name)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise not_supported("prompt_logprobs", body.prompt_logprobs, "it needs stream=false")
    if body.use_beam_search:
        raise not_supported("use_beam_search", True)


def check_model(model: str | None, served_model_name: str) -> None:
    if model not in (None, served_model_name):
        raise ApiError(
            404,
            f"model: {model!r} is not served here; this server has {served_model_name!r}",
            param="model",
            code="model_not_found",
        )


def sampling_params(
    body: GenerationBody, *, max_tokens: int | None, **others: Any
) -> SamplingParams:
    """What `body` and `others` ask for; None stands for a default. Raises ApiError naming the
    field.
    """
    fields = {
        name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None
    }
    fields.update(others)
    try:
        return SamplingParams(max_tokens=max_tokens, **fields)
    except ValueError as error:
        first_word = re.match(r"\w*", str(error))  # The field, or an entry of it.
        name = first_word[0] if first_word is not None else ""
        is_field = name == "max_tokens" or name in fields
        raise ApiError(400, str(error), param=name if is_field else None) from None


def new_requests(
    body: GenerationBody,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    names: CallNames,
    *,
    add_special_tokens: bool,
) -> list[NewRequest]:
    """One for each choice. Raises ApiError if they are too many."""
    n = body.n or 1
    check_resumed(n, any(isinstance(prompt, ResumeFrom) for prompt in prompts))
    num_choices = n * len(prompts)
    if num_choices > MAX_CHOICES:
        raise ApiError(
            400,
            f"n: {n} choices for each of {len(prompts)} prompts exceed {MAX_CHOICES} in all; "
            "send several calls",
            param="n",
        )
    variants = [params] if n == 1 else _variants(params, n)
    return [
        NewRequest(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=prompt if isinstance(prompt, list) else None,
            resume_from=prompt if isinstance(prompt, ResumeFrom) else None,
            sampling_params=variant,
            request_id=(
                names.request_id
                if num_choices == 1
                else f"{names.request_id}-{place * n + sibling}"
            ),
            batch_id=None if num_choices == 1 else names.request_id,
            aliases=names.aliases,
            priority=body.priority or 0,
            tags=body.tags or (),
            timeout_s=body.timeout_s,
            cache_salt=body.cache_salt,
            add_special_tokens=add_special_tokens,
        )
        for place, prompt in enumerate(prompts)
        for sibling, variant in enumerate(variants)
    ]


def check_resumed(n: int, is_resumed: bool) -> None:
    """Raises ApiError if one aborted request is to have several successors."""
    if is_resumed and n > 1:
        raise ApiError(400, f"n: {n} choices cannot resume from one; leave n out", param="n")


def _variants(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The parameters of a prompt's choices, each with a seed of its own."""
    if params.seed is None:
        return [params] * n
    try:
        return [dataclasses.replace(params, seed=params.seed + place) for place in range(n)]
    except ValueError as error:
        raise ApiError(400, str(error), param="seed") from None
