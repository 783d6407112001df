"""Log-probabilities in OpenAI's two shapes, and those of prompts in vLLM's.

Invariant: every number is finite, since JSON knows no infinity: nothing is less likely than
`LEAST_LOGPROB`, as in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Sequence

from frontend.http.openai.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)
from frontend.outputs import TokenLogprobs
from frontend.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0


class TokenNames:
    """What tokens are called: by their text, or `token_id:ID` if asked for or without tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.text(token_id) or ""

    def text(self, token_id: int) -> str | None:
        """None without a tokenizer."""
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int] | None:
        """None without a tokenizer."""
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


class CompletionLogprobsWriter:
    """The logprobs of one choice of a completion, piece by piece: text offsets go on."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._text_offset = 0

    def write(
        self, records: Sequence[TokenLogprobs], unpredicted: Sequence[int] = ()
    ) -> CompletionLogprobs:
        """`unpredicted` are tokens before them that have no probability, as a prompt's first."""
        token_ids = [*unpredicted, *(record.token_id for record in records)]
        nothing = [None] * len(unpredicted)
        tokens, text_offset = [], []
        for token_id in token_ids:
            tokens.append(self._names.name(token_id))
            text_offset.append(self._text_offset)
            self._text_offset += len(self._names.text(token_id) or "")
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[*nothing, *(_finite(record.logprob) for record in records)],
            top_logprobs=[*nothing, *map(self._top, records)],
            text_offset=text_offset,
        )

    def _top(self, record: TokenLogprobs) -> dict[str, float]:
        name = self._names.name
        top = {name(token_id): _finite(logprob) for token_id, logprob in record.top}
        # Last, so that of two tokens with one text the sampled one is told.
        top[name(record.token_id)] = _finite(record.logprob)
        return top


def chat_logprobs(records: Sequence[TokenLogprobs], names: TokenNames) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ContentLogprob(
                token=names.name(record.token_id),
                logprob=_finite(record.logprob),
                bytes=names.bytes(record.token_id),
                top_logprobs=[
                    TokenLogprob(
                        token=names.name(token_id),
                        logprob=_finite(logprob),
                        bytes=names.bytes(token_id),
                    )
                    for token_id, logprob in record.top
                ],
            )
            for record in records
        ]
    )


def prompt_logprobs(
    records: Sequence[TokenLogprobs], names: TokenNames, num_prompt_tokens: int
) -> PromptLogprobs:
    """Of a whole prompt, from the records of all its tokens but the first (or of none, if it ended
    before they were made).
    """
    positions: PromptLogprobs = [None] * (num_prompt_tokens - len(records))
    for record in records:
        ranked = [(token_id, value, rank) for rank, (token_id, value) in enumerate(record.top, 1)]
        positions.append(
            {
                str(token_id): PromptLogprob(
                    logprob=_finite(logprob), rank=rank, decoded_token=names.text(token_id)
                )
                for token_id, logprob, rank in (
                    (record.token_id, record.logprob, record.rank),
                    *ranked,
                )
            }
        )
    return positions


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
