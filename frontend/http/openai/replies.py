"""What OpenAI's routes answer. A field that is not set is left out; one that may be null is there.

`finish_reason`, beyond OpenAI's, is `abort` with its `abort_cause` beside it for a request that
was ended with what it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from frontend.outputs import AbortCause, FinishReasonName, ResumeFrom, WeightSpan


class PromptTokensDetails(Struct, kw_only=True):
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Struct, kw_only=True):
    """A token at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, for each prompt token; None for the first."""


class Choice(Struct, kw_only=True):
    """What choices of all kinds have."""

    index: int
    finish_reason: FinishReasonName | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    """The stop token or stop string that matched."""
    abort_cause: AbortCause | UnsetType = UNSET
    weight_versions: Sequence[WeightSpan] | UnsetType = UNSET
    """At the end: by which weights the tokens were sampled."""
    token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct, kw_only=True):
    """Parallel lists. Offsets count characters of the tokens' own texts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    resume_from: ResumeFrom | UnsetType = UNSET
    """Of an aborted one: to be sent instead of a prompt, to go on where it ended."""


class Completion(Struct, kw_only=True):
    """The answer of `/v1/completions`, and an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time, in seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class TokenLogprob(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob, kw_only=True):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct, kw_only=True):
    content: list[ContentLogprob]


class AssistantMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice, kw_only=True):
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct, kw_only=True):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str


class ChatChunkChoice(Choice, kw_only=True):
    delta: Delta
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(Struct, kw_only=True):
    """An event of the stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["caesura"] = "caesura"
    root: str
    """The model's directory or hub id."""
    max_model_len: int


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Struct, kw_only=True):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """The vocabulary's own spelling of each token."""


class DetokenizedPrompt(Struct, kw_only=True):
    prompt: str
