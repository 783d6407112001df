"""`/v1/completions`: prompts parsed, choices shaped.

`echo` puts the prompt before the output, and with `logprobs` its log-probabilities too. With
`max_tokens` 0 it is all there is: an engine samples at least one token, which is then withheld
and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import UNSET, Struct, UnsetType

from frontend.http.bodies import bad_field, not_supported
from frontend.http.errors import ApiError
from frontend.http.openai.calls import (
    CallNames,
    Prompt,
    check_call,
    new_requests,
    sampling_params,
)
from frontend.http.openai.forms import Call, GenerationForm, sse
from frontend.http.openai.logprobs import CompletionLogprobsWriter
from frontend.http.openai.replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from frontend.http.openai.requests import CompletionBody
from frontend.outputs import RequestOutput
from frontend.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


def parse_completion(
    body: CompletionBody,
    headers: Mapping[str, str],
    *,
    served_model_name: str,
    tokenizer: Tokenizer | None,
) -> Call:
    """Raises ApiError naming the field that cannot be."""
    check_call(body, served_model_name)
    if body.best_of not in (None, body.n or 1):
        raise not_supported("best_of", body.best_of, "leave it out, and rank the n choices")
    if body.max_tokens == 0 and not body.echo:
        raise bad_field("max_tokens", "an integer of at least 1, or 0 with echo", 0)
    names = CallNames.of(body, headers, "cmpl")
    prompts = _prompts(body)
    wanted: dict[str, int | None] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        wanted["prompt_logprobs"] = body.logprobs
    max_tokens = body.max_tokens
    if max_tokens is UNSET:
        max_tokens = DEFAULT_MAX_TOKENS if body.resume_from is None else None
    max_tokens = 1 if max_tokens == 0 else max_tokens
    params = sampling_params(body, max_tokens=max_tokens, **wanted)
    add_special_tokens = body.add_special_tokens is not False
    requests = new_requests(body, prompts, params, names, add_special_tokens=add_special_tokens)
    form = CompletionForm(body, names, prompts, model=served_model_name, tokenizer=tokenizer)
    return Call(requests, form)


def _prompts(body: CompletionBody) -> list[Prompt]:
    """One or several. Raises ApiError if they are none or of several kinds."""
    value, resume_from = body.prompt, body.resume_from
    if (value is None) == (resume_from is None):
        raise ApiError(400, "give either prompt or resume_from, one of them", param="prompt")
    if resume_from is not None:
        if body.echo:
            raise bad_field("echo", "false beside resume_from", True)
        return [resume_from]
    if isinstance(value, str):
        return [value]
    assert value is not None
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]  # type: ignore[list-item]  # a list of token ids
    if kinds in ({str}, {list}):
        return list(value)  # type: ignore[arg-type]  # a list of prompts
    expected = "a text, a list of token ids, or a list of several texts or of lists of token ids"
    raise bad_field("prompt", expected, value)


class CompletionForm(GenerationForm[CompletionChoice]):
    """The shape of a completion."""

    PLAIN_START = '"text":'
    EVENT_KIND = "text_completion"

    def __init__(
        self,
        body: CompletionBody,
        names: CallNames,
        prompts: Sequence[Prompt],
        *,
        model: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(
            body,
            names,
            model=model,
            num_prompts=len(prompts),
            tokenizer=tokenizer,
            has_logprobs=body.logprobs is not None,
        )
        self._echoed = prompts if body.echo else ()
        self._tokenizer = tokenizer
        self._is_prompt_only = body.max_tokens == 0
        self._has_logprobs = body.logprobs is not None
        num_choices = len(self._num_output_tokens)
        self._writers = [CompletionLogprobsWriter(self.token_names) for _ in range(num_choices)]

    def event(self, index: int, output: RequestOutput) -> bytes:
        return super().event(index, self._kept(output) if self._is_prompt_only else output)

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        if self._is_prompt_only:
            outputs = [self._kept(output) for output in outputs]
        return super().body(outputs)

    def full_event(self, index: int, output: RequestOutput, *, is_first: bool) -> bytes:
        choice = self._choice(index, output, has_prompt=is_first)
        return sse(self.chunk([choice], usage=self.usage_so_far(index, output)))

    def chunk(self, choices: list[CompletionChoice], *, usage: Usage | UnsetType) -> Completion:
        return Completion(
            id=self._response_id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def whole(self, outputs: Sequence[RequestOutput]) -> Struct:
        choices = [
            self._choice(index, output, has_prompt=True) for index, output in enumerate(outputs)
        ]
        return self.chunk(choices, usage=self.usage())

    def _kept(self, output: RequestOutput) -> RequestOutput:
        """What a caller that asked for the prompt alone is to have of an output."""
        has_stopped = output.finish_reason == "stop"
        return output._replace(
            text="",
            token_ids=(),
            logprobs=(),
            finish_reason="length" if has_stopped else output.finish_reason,
            stop_reason=None,
            weight_spans=(),
            resume_from=None,
        )

    def _choice(self, index: int, output: RequestOutput, *, has_prompt: bool) -> CompletionChoice:
        text = output.text
        if has_prompt and self._echoed:
            text = self._prompt_text(index) + text
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, output, has_prompt=has_prompt),
            prompt_token_ids=self.prompt_token_ids(index) if has_prompt else UNSET,
            prompt_logprobs=self.prompt_logprobs(index, output),
            resume_from=UNSET if output.resume_from is None else output.resume_from,
            **self.ending(output),
        )

    def _logprobs(
        self, index: int, output: RequestOutput, *, has_prompt: bool
    ) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        if not (has_prompt and self._echoed):
            return self._writers[index].write(output.logprobs)
        prompt_token_ids = self.streams[index].prompt_token_ids
        num_unpredicted = len(prompt_token_ids) - len(output.prompt_logprobs)
        return self._writers[index].write(
            (*output.prompt_logprobs, *output.logprobs), prompt_token_ids[:num_unpredicted]
        )

    def _prompt_text(self, index: int) -> str:
        prompt = self._echoed[index // self._n]
        if isinstance(prompt, str):
            return prompt
        assert isinstance(prompt, list)  # Nothing that is resumed is echoed.
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt)
