"""What the answer to a request must be, worked out from its prompt and parameters alone.

Written apart from the product's code for it: whole contexts and whole texts, no increments.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.simulation.tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, token_bytes

SALT_STRIDE = 7919


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What a request asks for, as far as its answer depends on it."""

    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    include_stop: bool = False

    @property
    def ending_token_ids(self) -> set[int]:
        return {*self.stop_token_ids, *(() if self.ignore_eos else (EOS_TOKEN_ID,))}


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ends by itself."""

    num_tokens: int
    finish_reason: str
    stop_reason: int | str | None
    text: str
    """All of it."""


def cell(token_id: int, salt: int) -> int:
    """What the KV cache holds for a token that these weights computed."""
    return token_id + SALT_STRIDE * salt


def next_token(context: Sequence[int], cell_salts: Sequence[int], salt: int) -> int:
    """The fake model: its next token depends on the last token, the middle one and the length, on
    its weights, and on the weights under which the two tokens' cells were written.
    """
    length = len(context)
    last = cell(context[-1], cell_salts[length - 1])
    middle = cell(context[length // 2], cell_salts[length // 2])
    return (3 * last + 5 * middle + length + SALT_STRIDE * salt) % VOCAB_SIZE


def uninterrupted(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The outputs behind a prompt, under the first weights."""
    context, salts = list(prompt), [0] * (len(prompt) + num_tokens)
    for _ in range(num_tokens):
        context.append(next_token(context, salts, 0))
    return context[len(prompt) :]


def text_of(token_ids: Sequence[int], wants: Wants, *, final: bool = True) -> str:
    """The text of an output; unless `final`, without a last character that is cut off."""
    if not wants.detokenize:
        return ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(b"".join(map(token_bytes, token_ids)), final)


def natural_end(token_ids: Sequence[int], wants: Wants, num_left: int) -> End | None:
    """Where and how an answer of these tokens ends by itself, if it does; at most `num_left` fit.

    Whole texts, no increments: slow, and plain to see.
    """
    most, text = min(wants.max_tokens, num_left), ""
    for num_tokens, token_id in enumerate(token_ids, start=1):
        is_ending = token_id in wants.ending_token_ids and num_tokens >= wants.min_tokens
        is_last = is_ending or num_tokens == most
        shown = token_ids[:num_tokens]
        if is_last and token_id in wants.ending_token_ids and not wants.include_stop:
            shown = shown[:-1]
        if wants.stop or is_last:
            now = text_of(shown, wants, final=False)
            if num_tokens > wants.min_tokens:
                found = _first_stop(now, len(text), wants.stop)
                if found is not None:
                    start, end, stop = found
                    return End(
                        num_tokens, "stop", stop, now[: end if wants.include_stop else start]
                    )
            text = now
        if is_last:
            whole = text_of(shown, wants)
            if not is_ending:
                return End(num_tokens, "length", None, whole)
            is_eos = token_id == EOS_TOKEN_ID and not wants.ignore_eos
            return End(num_tokens, "stop", None if is_eos else token_id, whole)
    return None


def _first_stop(text: str, num_seen: int, stops: Sequence[str]) -> tuple[int, int, str] | None:
    """The stop string that ends first behind `num_seen` characters; of several the longest."""
    found = [
        (end, end - len(stop), stop)
        for stop in stops
        for end in range(num_seen + 1, len(text) + 1)
        if text[:end].endswith(stop)
    ]
    if not found:
        return None
    end, start, stop = min(found)
    return start, end, stop
