"""`/tokenize` and `/detokenize`: what a server makes of a text, without generating."""

from __future__ import annotations

import asyncio
from functools import partial

from frontend.async_engine import AsyncEngine
from frontend.http.errors import ApiError
from frontend.http.openai.calls import check_model
from frontend.http.openai.chat import render_chat
from frontend.http.openai.replies import DetokenizedPrompt, Tokens
from frontend.http.openai.requests import DetokenizeBody, TokenizeBody
from frontend.requests.intake import MAX_INLINE_CHARS
from frontend.text.tokenizer import Tokenizer


async def tokenize(body: TokenizeBody, engine: AsyncEngine) -> Tokens:
    """A long text is tokenized on a worker thread, as that of a request is.

    Raises ApiError or PromptTooLongError.
    """
    check_model(body.model, engine.served_model_name)
    tokenizer = _tokenizer(engine)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give either prompt or messages, one of them", param="prompt")
    if body.messages is not None:
        text, add_special_tokens = render_chat(body, body.messages, tokenizer), False
    else:
        text, add_special_tokens = body.prompt or "", True
    if body.add_special_tokens is not None:
        add_special_tokens = body.add_special_tokens
    tokenizer.check_fits(text, engine.max_model_len)
    encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    token_ids = await asyncio.to_thread(encode) if len(text) > MAX_INLINE_CHARS else encode()
    return Tokens(
        count=len(token_ids),
        max_model_len=engine.max_model_len,
        tokens=token_ids,
        token_strs=[tokenizer.token_spelling(token_id) for token_id in token_ids]
        if body.return_token_strs
        else None,
    )


def detokenize(body: DetokenizeBody, engine: AsyncEngine) -> DetokenizedPrompt:
    """Special tokens are spelled out, so that tokenizing gives the same ids. Raises ApiError."""
    check_model(body.model, engine.served_model_name)
    tokenizer = _tokenizer(engine)
    return DetokenizedPrompt(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))


def _tokenizer(engine: AsyncEngine) -> Tokenizer:
    if engine.tokenizer is None:
        raise ApiError(400, "this engine has no tokenizer; only token ids can be sent to it")
    return engine.tokenizer
