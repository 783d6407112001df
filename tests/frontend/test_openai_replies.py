"""OpenAI's replies as bytes: events, whole answers, usage and log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import frontend
from frontend.http.bodies import read_body
from frontend.http.errors import ApiError
from frontend.http.openai.chat import parse_chat
from frontend.http.openai.completions import parse_completion
from frontend.http.openai.forms import GenerationForm
from frontend.http.openai.replies import ChatCompletion, ChatCompletionChunk, Completion
from frontend.http.openai.requests import ChatBody, CompletionBody
from frontend.outputs import AbortCause, RequestOutput, TokenLogprobs
from frontend.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(frontend.__file__).parent / "bundled_model")
PROMPT = TOKENIZER.encode("def f")
FIRST, SECOND = TOKENIZER.encode("("), TOKENIZER.encode("x")
USAGE = {"include_usage": True}


@dataclass
class Stream:
    prompt_token_ids: Sequence[int]


def completion(tokenizer: Tokenizer | None = TOKENIZER, **body: Any) -> GenerationForm[Any]:
    parsed = read_body(json.dumps({"prompt": "def f"} | body).encode(), CompletionBody)
    call = parse_completion(
        parsed, {"x-request-id": "call"}, served_model_name="m", tokenizer=tokenizer
    )
    call.form.streams = [Stream(PROMPT)] * len(call.requests)  # type: ignore[list-item]
    return call.form


def chat(**body: Any) -> GenerationForm[Any]:
    messages = [{"role": "user", "content": "hi"}]
    parsed = read_body(json.dumps({"messages": messages} | body).encode(), ChatBody)
    call = parse_chat(parsed, {"x-request-id": "call"}, served_model_name="m", tokenizer=TOKENIZER)
    call.form.streams = [Stream(PROMPT)] * len(call.requests)  # type: ignore[list-item]
    return call.form


def output(text: str, token_ids: Sequence[int], **fields: Any) -> RequestOutput:
    return RequestOutput(
        request_id="call",
        text=text,
        token_ids=tuple(token_ids),
        num_prompt_tokens=len(PROMPT),
        num_cached_tokens=1,
        **fields,
    )


def record(token_id: int, logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(token_id, logprob, 1, top)


def events(data: bytes, kind: Any = Completion) -> list[Any]:
    """The data of each event; every one but `[DONE]` fits the schema of the route."""
    assert data.endswith(b"\n\n")
    decoded: list[Any] = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        assert event.startswith("data: ")
        text = event.removeprefix("data: ")
        if text == "[DONE]":
            decoded.append(text)
        else:
            msgspec.json.decode(text, type=kind)
            decoded.append(json.loads(text))
    return decoded


def choice(data: bytes, kind: Any = Completion) -> Any:
    [event] = events(data, kind)
    [found] = event["choices"]
    return found


# -- completions ---------------------------------------------------------------------------------


def test_a_stream_has_the_text_the_end_the_usage_and_done() -> None:
    form = completion(stream=True, stream_options=USAGE)
    [first] = events(form.event(0, output("(", FIRST)))
    assert first["id"] == "cmpl-call"
    assert (first["object"], first["model"]) == ("text_completion", "m")
    assert "usage" not in first
    plain = choice(form.event(0, output('x"\u20ac\n', SECOND)))
    assert plain == {"index": 0, "text": 'x"\u20ac\n', "logprobs": None, "finish_reason": None}
    last = choice(form.event(0, output("", SECOND, finish_reason="stop", stop_reason="END")))
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "END")
    usage, done = events(form.end())
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 3,
        "total_tokens": len(PROMPT) + 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_a_plain_event_differs_from_a_full_one_in_its_text_alone() -> None:
    forms: list[tuple[Any, Any]] = [
        (completion(stream=True), Completion),
        (chat(stream=True), ChatCompletionChunk),
    ]
    for form, kind in forms:
        *_, full = events(form.event(0, output("same", FIRST)), kind)
        [plain] = events(form.event(0, output("same", FIRST)), kind)
        assert plain == full


def test_a_stream_without_usage_ends_with_done_alone() -> None:
    form = completion(stream=True)
    form.event(0, output("(", FIRST, finish_reason="length"))
    assert events(form.end()) == ["[DONE]"]


def test_usage_may_come_with_every_event() -> None:
    form = completion(stream=True, stream_options={"continuous_usage_stats": True})
    counts = [
        events(form.event(0, output("(", FIRST)))[0]["usage"]["completion_tokens"] for _ in "ab"
    ]
    assert counts == [1, 2]


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    form = completion(n=2, prompt=["a", "b"])
    whole = json.loads(form.body([output("(", FIRST, finish_reason="length")] * 4))
    assert [found["index"] for found in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["prompt_tokens"] == 2 * len(PROMPT)
    assert whole["usage"]["completion_tokens"] == 4


def test_L2_an_aborted_request_is_an_answer_with_its_cause() -> None:
    ended = output("(", FIRST, finish_reason="abort", abort_cause=AbortCause.DEADLINE)
    [found] = json.loads(completion().body([ended]))["choices"]
    assert (found["text"], found["finish_reason"], found["abort_cause"]) == (
        "(",
        "abort",
        "deadline",
    )
    assert found["stop_reason"] is None
    ended = output("", (), finish_reason="abort", abort_cause=AbortCause.EXPLICIT)
    assert choice(completion(stream=True).event(0, ended))["abort_cause"] == "explicit"
    ended = output("", (), finish_reason="length")
    assert "abort_cause" not in choice(completion(stream=True).event(0, ended))


def test_L2_token_ids_come_with_every_event_and_the_prompts_with_the_first() -> None:
    form = completion(stream=True, return_token_ids=True)
    first = choice(form.event(0, output("(", FIRST)))
    second = choice(form.event(0, output("x", SECOND)))
    assert (first["token_ids"], first["prompt_token_ids"]) == (FIRST, PROMPT)
    assert second["token_ids"] == SECOND
    assert "prompt_token_ids" not in second


def test_echo_puts_the_prompt_before_the_first_text_only() -> None:
    form = completion(stream=True, echo=True)
    assert choice(form.event(0, output("(", FIRST)))["text"] == "def f("
    assert choice(form.event(0, output("x", SECOND)))["text"] == "x"
    from_ids = completion(prompt=PROMPT, echo=True)
    [found] = json.loads(from_ids.body([output("(", FIRST, finish_reason="length")]))["choices"]
    assert found["text"] == "def f("


def test_logprobs_are_parallel_lists_whose_offsets_go_on_from_event_to_event() -> None:
    form = completion(stream=True, logprobs=1)
    other = SECOND[0]
    logprobs = (record(FIRST[0], -0.5, (other, -0.25)),)
    first = choice(form.event(0, output("(", FIRST, logprobs=logprobs)))["logprobs"]
    assert first == {
        "tokens": ["("],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"x": -0.25, "(": -0.5}],
        "text_offset": [0],
    }
    second = choice(form.event(0, output("(", FIRST, logprobs=logprobs)))["logprobs"]
    assert second["text_offset"] == [1]


def test_an_impossible_token_has_a_number_too() -> None:
    logprobs = (record(FIRST[0], -0.5, (SECOND[0], float("-inf"))),)
    form = completion(stream=True, logprobs=1)
    found = choice(form.event(0, output("(", FIRST, logprobs=logprobs)))
    assert found["logprobs"]["top_logprobs"] == [{"x": -9999.0, "(": -0.5}]


def test_tokens_may_be_named_by_their_ids_and_are_without_a_tokenizer() -> None:
    for form in (
        completion(logprobs=0, return_tokens_as_token_ids=True),
        completion(None, logprobs=0),
    ):
        ended = output("(", FIRST, logprobs=(record(FIRST[0], -1.0),), finish_reason="length")
        [found] = json.loads(form.body([ended]))["choices"]
        assert found["logprobs"]["tokens"] == [f"token_id:{FIRST[0]}"]


def test_echo_with_logprobs_tells_those_of_the_prompt_and_none_of_its_first_token() -> None:
    of_prompt = tuple(record(token_id, -2.0) for token_id in PROMPT[1:])
    ended = output(
        "(",
        FIRST,
        logprobs=(record(FIRST[0], -0.5),),
        prompt_logprobs=of_prompt,
        finish_reason="length",
    )
    [found] = json.loads(completion(echo=True, logprobs=0).body([ended]))["choices"]
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"] == "def f("
    assert logprobs["token_logprobs"] == [None, *([-2.0] * (len(PROMPT) - 1)), -0.5]
    assert logprobs["top_logprobs"][0] is None


def test_L4_a_prompt_that_was_aborted_before_its_logprobs_has_none() -> None:
    ended = output("", (), finish_reason="abort", abort_cause=AbortCause.EXPLICIT)
    [found] = json.loads(completion(echo=True, logprobs=0).body([ended]))["choices"]
    assert found["logprobs"]["token_logprobs"] == [None] * len(PROMPT)
    form = completion(echo=True, logprobs=0, prompt_logprobs=1)
    form.streams = [Stream(())]  # type: ignore[list-item]  # not even tokenized
    [found] = json.loads(form.body([ended]))["choices"]
    assert found["logprobs"]["tokens"] == found["prompt_logprobs"] == []


def test_a_prompt_alone_comes_without_the_token_that_was_sampled() -> None:
    ended = output(
        "(",
        FIRST,
        logprobs=(record(FIRST[0], -0.5),),
        prompt_logprobs=tuple(record(token_id, -2.0) for token_id in PROMPT[1:]),
        finish_reason="stop",
        stop_reason=FIRST[0],
    )
    asked: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 0, "return_token_ids": True}
    whole = json.loads(completion(**asked).body([ended]))
    [found] = whole["choices"]
    assert (found["text"], found["token_ids"]) == ("def f", [])
    assert (found["finish_reason"], found["stop_reason"]) == ("length", None)
    assert len(found["logprobs"]["tokens"]) == len(PROMPT)
    assert whole["usage"]["completion_tokens"] == 0
    streamed = choice(completion(**asked, stream=True).event(0, ended))
    assert streamed["text"] == "def f"


def test_prompt_logprobs_are_told_in_vllms_shape() -> None:
    of_prompt = tuple(record(token_id, -2.0, (FIRST[0], -0.1)) for token_id in PROMPT[1:])
    ended = output("(", FIRST, prompt_logprobs=of_prompt, finish_reason="length")
    [found] = json.loads(completion(prompt_logprobs=1).body([ended]))["choices"]
    first, second, *_ = found["prompt_logprobs"]
    assert first is None
    assert second[str(FIRST[0])] == {"logprob": -0.1, "rank": 1, "decoded_token": "("}
    assert second[str(PROMPT[1])]["logprob"] == -2.0


def test_an_error_in_a_stream_is_an_event_of_its_own() -> None:
    event = completion(stream=True).error_event(0, ApiError(503, "gone", code="engine_dead"))
    data = json.loads(event.removeprefix(b"data: "))
    assert data["error"]["message"] == "gone"
    assert event.endswith(b"\n\n")


# -- chats ---------------------------------------------------------------------------------------


def test_a_chats_first_event_has_the_role_and_travels_with_the_first_token() -> None:
    form = chat(stream=True, stream_options=USAGE)
    greeting, first = events(form.event(0, output("(", FIRST)), ChatCompletionChunk)
    assert greeting["id"] == "chatcmpl-call"
    assert greeting["object"] == "chat.completion.chunk"
    assert greeting["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["choices"][0]["delta"] == {"content": "("}
    last = choice(form.event(0, output("x", SECOND, finish_reason="stop")), ChatCompletionChunk)
    assert (last["delta"], last["finish_reason"]) == ({"content": "x"}, "stop")
    usage, done = events(form.end(), ChatCompletionChunk)
    assert usage["usage"]["completion_tokens"] == 2
    assert done == "[DONE]"


def test_each_choice_of_a_chat_begins_with_its_role() -> None:
    form = chat(stream=True, n=2)
    for index in (0, 1):
        greeting, _ = events(form.event(index, output("(", FIRST)), ChatCompletionChunk)
        assert greeting["choices"][0]["index"] == index
    [_] = events(form.event(1, output("(", FIRST)), ChatCompletionChunk)


def test_a_whole_chat_completion_has_messages_and_fits_its_schema() -> None:
    form = chat(n=2, return_token_ids=True)
    body = form.body([output("(x", [*FIRST, *SECOND], finish_reason="length")] * 2)
    msgspec.json.decode(body, type=ChatCompletion)
    whole = json.loads(body)
    assert whole["object"] == "chat.completion"
    assert whole["prompt_token_ids"] == PROMPT
    for index, found in enumerate(whole["choices"]):
        assert found["index"] == index
        assert found["message"]["role"] == "assistant"
        assert found["message"]["content"] == "(x"
        assert found["token_ids"] == [*FIRST, *SECOND]
    assert whole["usage"]["prompt_tokens"] == len(PROMPT)


def test_a_chats_logprobs_have_the_bytes_of_every_token() -> None:
    form = chat(logprobs=True, top_logprobs=1)
    half_a_character = TOKENIZER.encode("\u20ac")[0]
    logprobs = (record(half_a_character, -1.0, (FIRST[0], -0.5)),)
    ended = output("", [half_a_character], logprobs=logprobs, finish_reason="length")
    [found] = json.loads(form.body([ended]))["choices"]
    [token] = found["logprobs"]["content"]
    assert bytes(token["bytes"]) == TOKENIZER.token_bytes(half_a_character)
    assert token["logprob"] == -1.0
    assert token["top_logprobs"] == [{"token": "(", "logprob": -0.5, "bytes": [0x28]}]
