"""What OpenAI's routes take. Extensions and their defaults are vLLM's; `tags` and `timeout_s` are
Caesura's own.

Null stands for a field's default, but lifts `max_tokens`. Unknown fields are ignored. A field of
type None or `Nothing` is known and not supported: ignoring it would answer another question.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from frontend.http.exchange import MAX_REQUEST_ID_LENGTH
from frontend.outputs import ResumeFrom
from frontend.requests.new_request import MAX_TIMEOUT_S
from frontend.sampling_params import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS
from ipc.expect import INT64_MAX, INT64_MIN, MAX_TOKEN_ID

MAX_CHOICES = 4096
"""Most choices of one call, over all its prompts."""
MAX_MESSAGES = 4096
"""Most messages of one chat: a template visits each in the event loop."""
MAX_DETOKENIZED = 1 << 20
"""Most tokens of one call that makes them a text, in the event loop."""
MAX_ALTERNATIVES = 20
"""Most log-probabilities told of one token; vLLM's `--max-logprobs` by default."""

Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Positive = Annotated[int, Meta(ge=1, le=INT64_MAX)]
NumAlternatives = Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
Seed = Annotated[Int64, Meta(description="Choice i of a prompt draws with seed + i.")]
RequestId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_REQUEST_ID_LENGTH,
        description="An id to abort the call by; the X-Request-Id header is another.",
    ),
]
Priority = Annotated[Int64, Meta(description="Lower runs first.")]
Tags = Annotated[list[str], Meta(description="Names by which many calls can be aborted.")]
CacheSalt = Annotated[
    str,
    Meta(
        min_length=1,
        description="Cached prefixes are shared only between requests of the same salt.",
    ),
]
Deadline = Annotated[
    float,
    Meta(
        gt=0.0,
        le=MAX_TIMEOUT_S,
        description="The age at which it is aborted, with its partial result.",
    ),
]
Resumed = Annotated[
    ResumeFrom,
    Meta(
        description="That of an aborted choice, to go on where it ended. Its seed, and what its "
        "max_tokens and min_tokens left, hold on; other parameters should be sent again."
    ),
]
NamedByIds = Annotated[bool, Meta(description="Tokens are called `token_id:ID` in logprobs.")]
NumTokens = Annotated[
    Count,
    Meta(
        description="Default: 16, after resume_from what is left. Null: as many as fit. 0 needs "
        "echo: the prompt alone is returned."
    ),
]
NumChatTokens = Annotated[
    Positive,
    Meta(description="Default: as many as fit. max_completion_tokens wins over max_tokens."),
]
Nothing = Annotated[list[Any], Meta(max_length=0)]
"""A list that is not supported unless it is empty."""


class StreamOptions(Struct, kw_only=True):
    """What a stream tells besides its choices."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(Struct, kw_only=True):
    """The one response format that is supported."""

    type: Literal["text"]


class GenerationBody(Struct, kw_only=True):
    """What completions of both kinds take."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    seed: Seed | None = None
    min_tokens: Count | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[TokenId, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    prompt_logprobs: NumAlternatives | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: NamedByIds | None = None

    request_id: RequestId | None = None
    priority: Priority | None = None
    tags: Tags | None = None
    timeout_s: Deadline | None = None
    cache_salt: CacheSalt | None = None

    use_beam_search: bool | None = None
    response_format: TextFormat | None = None
    bad_words: Nothing | None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_json: None = None
    guided_regex: None = None
    kv_transfer_params: None = None
    logits_processors: None = None
    prompt_embeds: None = None
    repetition_detection: None = None
    structured_outputs: None = None
    truncate_prompt_tokens: None = None


class CompletionBody(GenerationBody, kw_only=True):
    """A request to `/v1/completions`."""

    prompt: (
        Annotated[
            str | list[str | TokenId | list[TokenId]],
            Meta(description="Texts or token ids: one, or a list. One of this and resume_from."),
        ]
        | None
    ) = None
    resume_from: Resumed | None = None
    max_tokens: NumTokens | UnsetType | None = UNSET
    echo: bool | None = None
    logprobs: NumAlternatives | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None


class ContentPart(Struct, kw_only=True):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Struct, kw_only=True, omit_defaults=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    """Null only where an assistant called tools."""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(GenerationBody, kw_only=True):
    """A request to `/v1/chat/completions`."""

    messages: Messages
    add_generation_prompt: (
        Annotated[bool, Meta(description="Default: true, unless the final message is continued.")]
        | None
    ) = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: None = None
    documents: None = None

    max_tokens: NumChatTokens | None = None
    max_completion_tokens: NumChatTokens | None = None
    logprobs: bool | Annotated[int, Meta(ge=0, le=1)] | None = None
    top_logprobs: NumAlternatives | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None
    functions: None = None
    function_call: Literal["none"] | None = None
    echo: bool | None = None
    resume_from: Any = None
    """Not supported: completions take it."""
    audio: None = None
    web_search_options: None = None


class TokenizeBody(Struct, kw_only=True):
    """A request to `/tokenize`: a text or a chat, one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: (
        Annotated[bool, Meta(description="Default: true for a text, false for a chat.")] | None
    ) = None
    return_token_strs: bool | None = None
    tools: Nothing | None = None


class DetokenizeBody(Struct, kw_only=True):
    """A request to `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]
