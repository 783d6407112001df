"""The OpenAPI page, and what OpenAI's and vLLM's small routes answer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest

import frontend
from frontend.async_engine import AsyncEngine
from frontend.errors import PromptTooLongError
from frontend.http import openai, openapi
from frontend.http.access import Access
from frontend.http.bodies import read_body
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.openai.requests import DetokenizeBody, TokenizeBody
from frontend.http.openai.tokenize import detokenize, tokenize
from frontend.http.router import Route
from frontend.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(frontend.__file__).parent / "bundled_model")


def engine(tokenizer: Tokenizer | None = TOKENIZER) -> AsyncEngine:
    """As much of an engine as these routes look at."""
    config = SimpleNamespace(engine=SimpleNamespace(model="path/of/model"))
    plain = SimpleNamespace(
        served_model_name="org/model", max_model_len=4096, tokenizer=tokenizer, config=config
    )
    return cast(AsyncEngine, plain)


class Answer:
    """An exchange that keeps what it is answered."""

    def __init__(self, **path_params: str) -> None:
        self.path_params = path_params
        self.json: Any = None

    def respond_json(self, value: object) -> None:
        self.json = json.loads(msgspec.json.encode(value))

    def respond(self, status: int, body: bytes) -> None:
        assert status == 200
        self.json = json.loads(body)


def get(routes: list[Route], path: str, **path_params: str) -> Any:
    """What the route answers at once."""
    [route] = [route for route in routes if (route.method, route.path) == ("GET", path)]
    answer = Answer(**path_params)
    assert route.handler(cast(Exchange, answer)) is None
    return answer.json


# -- the page ------------------------------------------------------------------------------------


class Query(msgspec.Struct, kw_only=True):
    prefix: str
    wait: bool = True


def nothing(exchange: Exchange) -> None:
    pass


def control_route(**fields: Any) -> Route:
    return Route(
        method="GET",
        path="/requests/{request_id}",
        handler=nothing,
        summary="One request",
        tag="Caesura",
        access=Access.ADMIN,
        query=Query,
        **fields,
    )


def page() -> dict[str, Any]:
    return cast(dict[str, Any], get(openapi.routes(openai.routes(engine())), "/openapi.json"))


def test_the_page_names_every_route_with_what_it_takes_and_answers() -> None:
    document = page()
    assert document["openapi"].startswith("3.2")
    assert set(document["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/v1/models"}
    operation = document["paths"]["/v1/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/CompletionBody"}
    content = operation["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/Completion")
    data = content["text/event-stream"]["itemSchema"]["properties"]["data"]
    [event, error] = data["anyOf"][0]["contentSchema"]["anyOf"]
    assert event["$ref"].endswith("/Completion")
    assert error["$ref"].endswith("/ErrorReply")
    assert {"400", "401", "404", "413", "503", "default"} <= set(operation["responses"])
    assert "403" not in operation["responses"]


def test_every_reference_of_the_page_leads_somewhere() -> None:
    document = page()
    refs = {
        value
        for value in _strings(document)
        if isinstance(value, str) and value.startswith("#/components/")
    }
    assert refs
    for ref in refs:
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.values() for text in _strings(entry)]
    if isinstance(value, list):
        return [text for entry in value for text in _strings(entry)]
    return [value] if isinstance(value, str) else []


def test_the_pages_schemas_agree_with_the_parser_on_what_is_wrong() -> None:
    document = page()
    schema = document["components"]["schemas"]["CompletionBody"]
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    assert validator.is_valid({"prompt": [1, 2], "n": 2, "stop": "x", "logit_bias": {"5": 1}})
    for wrong in (
        {"prompt": 5},
        {"prompt": "", "top_p": 1.5},
        {"prompt": "", "bad_words": ["a"]},
    ):
        assert not validator.is_valid(wrong), wrong


def test_queries_and_paths_become_parameters_and_control_needs_its_key() -> None:
    [operation] = openapi.document([control_route()])["paths"]["/requests/{request_id}"].values()
    parameters = {entry["name"]: entry for entry in operation["parameters"]}
    assert parameters["request_id"]["in"] == "path"
    assert (parameters["prefix"]["in"], parameters["prefix"]["required"]) == ("query", True)
    assert parameters["wait"]["schema"] == {"type": "boolean", "default": True}
    assert operation["security"] == [{"adminKey": []}, {}]
    assert {"403", "404"} <= set(operation["responses"])


def test_a_dialect_with_errors_of_its_own_does_not_promise_openais() -> None:
    route = control_route(error_body=lambda error: b"{}")
    [operation] = openapi.document([route])["paths"]["/requests/{request_id}"].values()
    assert operation["responses"]["400"]["content"]["application/json"]["schema"] == {}


# -- models --------------------------------------------------------------------------------------


def test_the_served_model_is_listed_and_found_by_its_name() -> None:
    routes = openai.routes(engine())
    [card] = get(routes, "/v1/models")["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("org/model", "path/of/model", 4096)
    assert get(routes, "/v1/models/{model}", model="org/model") == card
    with pytest.raises(ApiError, match="'gpt-x' is not served here") as caught:
        get(routes, "/v1/models/{model}", model="gpt-x")
    assert caught.value.status == 404


# -- tokens --------------------------------------------------------------------------------------


def tokenize_body(**body: Any) -> TokenizeBody:
    return read_body(json.dumps(body).encode(), TokenizeBody)


async def test_a_text_is_tokenized_as_a_prompt_is() -> None:
    found = await tokenize(tokenize_body(prompt="def f", return_token_strs=True), engine())
    assert found.tokens == TOKENIZER.encode("def f")
    assert (found.count, found.max_model_len) == (len(found.tokens), 4096)
    assert found.token_strs is not None
    assert "".join(found.token_strs) == "def\u0120f"
    assert (await tokenize(tokenize_body(prompt="def f"), engine())).token_strs is None


async def test_a_long_text_is_tokenized_beside_the_loop_with_the_same_result() -> None:
    text = "x = 1\n" * 5000
    found = await tokenize(tokenize_body(prompt=text), engine())
    assert found.tokens == TOKENIZER.encode(text)


async def test_a_chat_is_tokenized_with_its_template() -> None:
    body = tokenize_body(messages=[{"role": "user", "content": "hi"}])
    found = await tokenize(body, engine())
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert detokenize(DetokenizeBody(tokens=found.tokens), engine()).prompt == prompt


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user"}]}])
async def test_a_text_or_a_chat_is_tokenized_and_not_both(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="either prompt or messages"):
        await tokenize(tokenize_body(**body), engine())


async def test_without_a_tokenizer_there_is_nothing_to_tokenize() -> None:
    with pytest.raises(ApiError, match="no tokenizer") as caught:
        await tokenize(tokenize_body(prompt="a"), engine(None))
    assert caught.value.status == 400
    with pytest.raises(ApiError, match="no tokenizer"):
        detokenize(DetokenizeBody(tokens=[1]), engine(None))


async def test_a_text_that_no_context_holds_is_not_tokenized() -> None:
    with pytest.raises(PromptTooLongError, match="max_model_len=4096 tokens holds at most"):
        await tokenize(tokenize_body(prompt="x" * 1_000_000), engine())
