"""`/v1/chat/completions`: messages made a prompt, choices shaped.

A stream's first event has the role and no content, as clients expect; it travels with the first
token's. Tools are not supported, but a history that tells of them is rendered as the model's
template does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from frontend.http.bodies import bad_field, not_supported
from frontend.http.errors import ApiError
from frontend.http.openai.calls import CallNames, check_call, new_requests, sampling_params
from frontend.http.openai.forms import Call, GenerationForm, sse
from frontend.http.openai.logprobs import chat_logprobs
from frontend.http.openai.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
    Usage,
)
from frontend.http.openai.requests import ChatBody, ChatMessage, TokenizeBody
from frontend.outputs import RequestOutput
from frontend.text.chat_template import ChatTemplateError
from frontend.text.tokenizer import Tokenizer

_NO_VARIABLES = ("self", "messages", "add_generation_prompt", "continue_final_message")
"""What a template is given by other ways."""


def parse_chat(
    body: ChatBody,
    headers: Mapping[str, str],
    *,
    served_model_name: str,
    tokenizer: Tokenizer | None,
) -> Call:
    """Raises ApiError naming the field that cannot be."""
    check_call(body, served_model_name)
    if body.echo:
        raise not_supported("echo", True)
    if body.resume_from is not None:
        remedy = "send it to /v1/completions, which goes on where the tokens end"
        raise not_supported("resume_from", body.resume_from, remedy)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    names = CallNames.of(body, headers, "chatcmpl")
    max_tokens = body.max_completion_tokens or body.max_tokens
    num_alternatives = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, max_tokens=max_tokens, logprobs=num_alternatives)
    prompt = render_chat(body, body.messages, tokenizer)
    add_special_tokens = body.add_special_tokens is True
    requests = new_requests(body, [prompt], params, names, add_special_tokens=add_special_tokens)
    form = ChatForm(body, names, model=served_model_name, tokenizer=tokenizer)
    return Call(requests, form)


def render_chat(
    body: ChatBody | TokenizeBody, messages: Sequence[ChatMessage], tokenizer: Tokenizer | None
) -> str:
    """The prompt that a chat becomes. Raises ApiError if it becomes none."""
    if tokenizer is None:
        raise ApiError(400, "messages: this engine has no tokenizer", param="messages")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise bad_field("add_generation_prompt", "false beside continue_final_message", True)
    variables = body.chat_template_kwargs or {}
    for name in _NO_VARIABLES:
        if name in variables:
            raise not_supported(f"chat_template_kwargs.{name}", variables[name])
    try:
        return tokenizer.apply_chat_template(
            [_as_template_sees(message, place) for place, message in enumerate(messages)],
            add_generation_prompt=not continues and body.add_generation_prompt is not False,
            continue_final_message=continues,
            **variables,
        )
    except ChatTemplateError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None


def _as_template_sees(message: ChatMessage, place: int) -> dict[str, Any]:
    """Templates know one string of content, no developers, and arguments as objects."""
    content = message.content
    if content is None and message.role != "assistant":
        raise bad_field(f"messages[{place}].content", "a string or a list of text parts", None)
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    seen: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(message, content=None))
    for call in seen.get("tool_calls") or ():
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"], place)
    return seen | {"role": role, "content": content or ""}


def _arguments(text: str, place: int) -> object:
    try:
        return msgspec.json.decode(text)
    except ValueError:
        raise bad_field(f"messages[{place}].tool_calls", "JSON as arguments", text) from None


class ChatForm(GenerationForm[ChatChunkChoice]):
    """The shape of a chat completion."""

    PLAIN_START = '"delta":{"content":'
    PLAIN_END = b'},"logprobs":null,"finish_reason":null}]}\n\n'
    EVENT_KIND = "chat.completion.chunk"

    def __init__(
        self, body: ChatBody, names: CallNames, *, model: str, tokenizer: Tokenizer | None
    ) -> None:
        super().__init__(
            body,
            names,
            model=model,
            num_prompts=1,
            tokenizer=tokenizer,
            has_logprobs=bool(body.logprobs),
        )
        self._has_logprobs = bool(body.logprobs)

    def full_event(self, index: int, output: RequestOutput, *, is_first: bool) -> bytes:
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=output.text),
            logprobs=self._logprobs(output),
            **self.ending(output),
        )
        event = sse(self.chunk([choice], usage=self.usage_so_far(index, output)))
        if not is_first:
            return event
        greeting = ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
        first = self.chunk([greeting], usage=UNSET)
        first.prompt_token_ids = self.prompt_token_ids(index)
        return sse(first) + event

    def chunk(
        self, choices: list[ChatChunkChoice], *, usage: Usage | UnsetType
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._response_id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def whole(self, outputs: Sequence[RequestOutput]) -> Struct:
        return ChatCompletion(
            id=self._response_id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=output.text),
                    logprobs=self._logprobs(output),
                    **self.ending(output),
                )
                for index, output in enumerate(outputs)
            ],
            usage=self.usage(),
            prompt_token_ids=self.prompt_token_ids(0),
            prompt_logprobs=self.prompt_logprobs(0, outputs[0]),
        )

    def _logprobs(self, output: RequestOutput) -> ChatLogprobs | None:
        return chat_logprobs(output.logprobs, self.token_names) if self._has_logprobs else None
