"""The routes of OpenAI's API, and vLLM's two for tokens beside it."""

from __future__ import annotations

import time

from frontend.async_engine import AsyncEngine
from frontend.http.bodies import read_body
from frontend.http.exchange import Exchange
from frontend.http.generation import generate
from frontend.http.openai.calls import check_model
from frontend.http.openai.chat import parse_chat
from frontend.http.openai.completions import parse_completion
from frontend.http.openai.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    DetokenizedPrompt,
    ModelCard,
    ModelList,
    Tokens,
)
from frontend.http.openai.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from frontend.http.openai.tokenize import detokenize, tokenize
from frontend.http.router import Route


def routes(engine: AsyncEngine) -> list[Route]:
    """`/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/tokenize`, `/detokenize`."""
    model_card = ModelCard(
        id=engine.served_model_name,
        created=int(time.time()),
        root=engine.config.engine.model,
        max_model_len=engine.max_model_len,
    )

    def on_completion(exchange: Exchange) -> None:
        body = read_body(exchange.body, CompletionBody)
        call = parse_completion(
            body,
            exchange.headers,
            served_model_name=engine.served_model_name,
            tokenizer=engine.tokenizer,
        )
        generate(exchange, engine, call.requests, call.form, stream=body.stream is True)

    def on_chat(exchange: Exchange) -> None:
        body = read_body(exchange.body, ChatBody)
        call = parse_chat(
            body,
            exchange.headers,
            served_model_name=engine.served_model_name,
            tokenizer=engine.tokenizer,
        )
        generate(exchange, engine, call.requests, call.form, stream=body.stream is True)

    def on_models(exchange: Exchange) -> None:
        exchange.respond_json(ModelList(data=[model_card]))

    def on_model(exchange: Exchange) -> None:
        check_model(exchange.path_params["model"], engine.served_model_name)
        exchange.respond_json(model_card)

    async def on_tokenize(exchange: Exchange) -> None:
        exchange.respond_json(await tokenize(read_body(exchange.body, TokenizeBody), engine))

    def on_detokenize(exchange: Exchange) -> None:
        exchange.respond_json(detokenize(read_body(exchange.body, DetokenizeBody), engine))

    return [
        Route(
            method="POST",
            path="/v1/completions",
            handler=on_completion,
            summary="Continue prompts",
            tag="OpenAI",
            body=CompletionBody,
            reply=Completion,
            event=Completion,
        ),
        Route(
            method="POST",
            path="/v1/chat/completions",
            handler=on_chat,
            summary="Answer a chat",
            tag="OpenAI",
            body=ChatBody,
            reply=ChatCompletion,
            event=ChatCompletionChunk,
        ),
        Route(
            method="GET",
            path="/v1/models",
            handler=on_models,
            summary="The model that is served",
            tag="OpenAI",
            reply=ModelList,
        ),
        Route(
            method="GET",
            path="/v1/models/{model}",
            handler=on_model,
            summary="One model, by its name",
            tag="OpenAI",
            reply=ModelCard,
        ),
        *(
            Route(
                method="POST",
                path=path,
                handler=on_tokenize,
                summary="The tokens of a text or of a chat",
                tag="vLLM",
                body=TokenizeBody,
                reply=Tokens,
            )
            for path in ("/tokenize", "/v1/tokenize")
        ),
        *(
            Route(
                method="POST",
                path=path,
                handler=on_detokenize,
                summary="The text of tokens",
                tag="vLLM",
                body=DetokenizeBody,
                reply=DetokenizedPrompt,
            )
            for path in ("/detokenize", "/v1/detokenize")
        ),
    ]
