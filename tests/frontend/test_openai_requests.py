"""OpenAI's requests as data: what a body asks the engine for, and what is refused, by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import frontend
from frontend.http.bodies import read_body
from frontend.http.errors import ApiError
from frontend.http.openai.chat import parse_chat
from frontend.http.openai.completions import parse_completion
from frontend.http.openai.forms import Call
from frontend.http.openai.requests import ChatBody, CompletionBody
from frontend.sampling_params import SamplingParams
from frontend.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import tiny_tokenizer

BUNDLED = Tokenizer(Path(frontend.__file__).parent / "bundled_model")
HELLO = [{"role": "user", "content": "hello"}]


def completion(headers: dict[str, str] | None = None, **body: Any) -> Call:
    parsed = read_body(json.dumps({"prompt": "def "} | body).encode(), CompletionBody)
    return parse_completion(parsed, headers or {}, served_model_name="m", tokenizer=BUNDLED)


def chat(tokenizer: Tokenizer | None = BUNDLED, **body: Any) -> Call:
    parsed = read_body(json.dumps({"messages": HELLO} | body).encode(), ChatBody)
    return parse_chat(parsed, {}, served_model_name="m", tokenizer=tokenizer)


def params(**body: Any) -> SamplingParams:
    [request] = completion(**body).requests
    return request.sampling_params


def chat_prompt(**body: Any) -> str:
    [request] = chat(**body).requests
    assert request.prompt is not None
    return request.prompt


# -- sampling parameters -------------------------------------------------------------------------


def test_the_defaults_are_openais() -> None:
    assert params() == SamplingParams(max_tokens=16)
    assert chat().requests[0].sampling_params == SamplingParams(max_tokens=None)


def test_null_stands_for_a_default_but_lifts_max_tokens() -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "logprobs", "tools"))
    assert params(**nulls) == params()
    assert params(max_tokens=None).max_tokens is None


def test_every_sampling_parameter_of_vllm_arrives() -> None:
    fields: dict[str, Any] = {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "seed": 7,
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": ["END"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "allowed_token_ids": [1, 2],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    expected = SamplingParams(**fields, logit_bias={5: 1.5})
    assert params(**fields, logit_bias={"5": 1.5}) == expected


def test_the_completions_of_a_prompt_draw_with_seeds_of_their_own() -> None:
    requests = completion(prompt=["a", "b"], n=2, seed=10).requests
    assert [request.sampling_params.seed for request in requests] == [10, 11, 10, 11]
    unseeded = completion(n=3).requests
    assert {request.sampling_params.seed for request in unseeded} == {None}


def test_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    assert params(echo=True).prompt_logprobs is None
    assert params(echo=True, logprobs=2).prompt_logprobs == 2


def test_a_prompt_alone_is_scored_with_one_token_that_is_withheld() -> None:
    assert params(echo=True, max_tokens=0, logprobs=1).max_tokens == 1


def test_of_a_chats_two_limits_the_newer_one_wins() -> None:
    def limit(**body: Any) -> int | None:
        return chat(**body).requests[0].sampling_params.max_tokens

    assert limit(max_tokens=5) == 5
    assert limit(max_tokens=5, max_completion_tokens=3) == 3


def test_a_chats_logprobs_are_a_switch_and_a_number() -> None:
    def logprobs(**body: Any) -> int | None:
        return chat(**body).requests[0].sampling_params.logprobs

    assert logprobs() is None
    assert logprobs(logprobs=True) == 0
    assert logprobs(logprobs=True, top_logprobs=4) == 4


# -- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_a_text_or_token_ids_or_several_of_them(
    prompt: Any, expected: list[Any]
) -> None:
    requests = completion(prompt=prompt).requests
    assert [request.prompt or request.prompt_token_ids for request in requests] == expected


def test_choices_are_ordered_prompt_by_prompt() -> None:
    requests = completion(prompt=["a", "b"], n=2).requests
    assert [request.prompt for request in requests] == ["a", "a", "b", "b"]


def test_special_tokens_are_added_to_a_text_and_not_to_a_chat() -> None:
    assert completion().requests[0].add_special_tokens
    assert not completion(add_special_tokens=False).requests[0].add_special_tokens
    assert not chat().requests[0].add_special_tokens
    assert chat(add_special_tokens=True).requests[0].add_special_tokens


# -- names ---------------------------------------------------------------------------------------


def test_L3_a_call_is_known_by_its_own_id_the_headers_and_that_of_its_response() -> None:
    [request] = completion({"x-request-id": "header"}, request_id="own").requests
    assert request.request_id == "own"
    assert set(request.aliases) == {"header", "cmpl-own"}
    assert request.batch_id is None
    [by_header] = completion({"x-request-id": "header"}).requests
    assert (by_header.request_id, by_header.aliases) == ("header", ("cmpl-header",))


def test_L3_the_choices_of_a_call_have_names_of_their_own_and_its_names_as_a_batch() -> None:
    requests = completion(n=3, request_id="own").requests
    assert [request.request_id for request in requests] == ["own-0", "own-1", "own-2"]
    assert {request.batch_id for request in requests} == {"own"}
    assert {request.aliases for request in requests} == {("cmpl-own",)}


def test_L8_calls_without_a_name_get_one_each_that_nothing_else_has() -> None:
    names = {completion().requests[0].request_id for _ in range(100)}
    assert len(names) == 100
    assert None not in names
    assert chat().requests[0].aliases[0].startswith("chatcmpl-")


def test_a_call_may_carry_a_priority_tags_and_a_deadline() -> None:
    [request] = completion(priority=-3, tags=["a", "b"], timeout_s=2).requests
    assert (request.priority, list(request.tags), request.timeout_s) == (-3, ["a", "b"], 2.0)


# -- chats ---------------------------------------------------------------------------------------


def test_a_chat_becomes_the_prompt_that_the_models_template_makes() -> None:
    assert chat_prompt() == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    bare = chat_prompt(add_generation_prompt=False)
    assert bare == "<|im_start|>user\nhello<|im_end|>\n"


def test_parts_of_text_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompt = chat_prompt(messages=[{"role": "developer", "content": parts}])
    assert prompt.startswith("<|im_start|>system\na\nb<|im_end|>\n")


def test_a_final_message_is_continued_where_it_ends() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "def f(x): "}]
    prompt = chat_prompt(messages=messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\ndef f(x): ")


def test_a_history_with_tool_calls_is_rendered() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    assert "<|im_start|>tool\n5<|im_end|>" in chat_prompt(messages=messages)


# -- refusals ------------------------------------------------------------------------------------

WRONG_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "got []"),
    ({"prompt": [1, "a"]}, "prompt", 'got [1, "a"]'),
    ({"prompt": ["a", [1]]}, "prompt", 'got ["a", [1]]'),
    ({"prompt": [1, -1]}, "prompt[1]", "got -1"),
    ({"temperature": -1}, "temperature", "expected a number of at least 0.0, got -1"),
    ({"top_p": 1.5}, "top_p", "at most 1.0, got 1.5"),
    ({"min_tokens": 5, "max_tokens": 3}, "min_tokens", "5 exceeds max_tokens 3"),
    ({"max_tokens": 0}, "max_tokens", "or 0 with echo, got 0"),
    ({"n": 0}, "n", "got 0"),
    ({"prompt": ["a"] * 9, "n": 500}, "n", "exceed 4096"),
    ({"n": 2, "best_of": 3}, "best_of", "got 3"),
    ({"n": 2, "seed": 2**63 - 1}, "seed", f"got {2**63}"),
    ({"stop": [""]}, "stop[0]", 'got ""'),
    ({"stop": ["x"] * 65}, "stop", "(65 entries)"),
    ({"stop": ["x" * 1025]}, "stop[0]", "(1025 characters)"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20, got 21"),
    ({"logprobs": -1}, "logprobs", "from 0 to 20, got -1"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20, got 21"),
    ({"logit_bias": {"x": 1}}, "logit_bias", '{"x": 1}'),
    ({"suffix": "end"}, "suffix", 'not supported, got "end"'),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "json_object"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs", "not supported"),
    ({"guided_regex": "a+"}, "guided_regex", "leave it out"),
    ({"bad_words": ["no"]}, "bad_words", '["no"]'),
    ({"stream_options": {}}, "stream_options", "stream=true"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream=false"),
    ({"request_id": ""}, "request_id", '""'),
    ({"tags": "rollout"}, "tags", '"rollout"'),
    ({"timeout_s": 0}, "timeout_s", "above 0"),
    ({"timeout_s": 1e9}, "timeout_s", "at most 604800"),
    ({"priority": 2**63}, "priority", str(2**63)),
]


@pytest.mark.parametrize(("body", "param", "complaint"), WRONG_COMPLETIONS)
def test_a_wrong_completion_is_refused_by_field_and_value(
    body: dict[str, Any], param: str, complaint: str
) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert complaint in str(caught.value)


WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "a list of 1 to 4096 objects"),
    ({"messages": HELLO * 4097}, "messages", "(4097 entries)"),
    ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role", '"x"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "got null"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "image_url",
    ),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "auto"}, "tool_choice", "not supported, got \"auto\"; only 'none' is"),
    ({"response_format": {"type": "json_schema"}}, "response_format.type", "json_schema"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20, got 21"),
    ({"echo": True}, "echo", "not supported"),
    ({"max_tokens": 0}, "max_tokens", "got 0"),
    (
        {"add_generation_prompt": True, "continue_final_message": True},
        "add_generation_prompt",
        "continue_final_message",
    ),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self", "leave it out"),
]


@pytest.mark.parametrize(("body", "param", "complaint"), WRONG_CHATS)
def test_a_wrong_chat_is_refused_by_field_and_value(
    body: dict[str, Any], param: str, complaint: str
) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert complaint in str(caught.value)


def test_what_asks_for_nothing_of_the_unsupported_is_welcome() -> None:
    asked = chat(tool_choice="none", response_format={"type": "text"}, tools=[], user="me")
    assert asked.requests[0].prompt == chat_prompt()
    assert len(completion(n=2, best_of=2, suffix="", use_beam_search=False).requests) == 2


def test_another_model_is_not_found() -> None:
    for call in (completion, chat):
        with pytest.raises(ApiError, match="'gpt-x' is not served here") as caught:
            call(model="gpt-x")
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_an_id_that_is_too_long_is_refused_from_the_header_too() -> None:
    with pytest.raises(ApiError) as caught:
        completion({"x-request-id": "x" * 257})
    assert caught.value.param == "X-Request-Id"


def test_a_chat_needs_a_template() -> None:
    for tokenizer, complaint in ((None, "no tokenizer"), (tiny_tokenizer("byte_level"), "no chat")):
        with pytest.raises(ApiError, match=complaint) as caught:
            chat(tokenizer)
        assert caught.value.status == 400
