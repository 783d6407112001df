"""Reading JSON bodies and query strings: what is wrong is named, with its value and the remedy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from frontend.http.bodies import json_spelling, read_body, read_query
from frontend.http.errors import ApiError


class Part(Struct):
    type: Literal["text"]
    text: str


class Body(Struct, kw_only=True):
    name: str
    count: Annotated[int, Meta(ge=1, le=128)] | None = None
    share: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    suffix: Literal[""] | None = None
    few: Annotated[list[str], Meta(max_length=2)] | None = None
    label: Annotated[str, Meta(min_length=1, max_length=4)] | None = None
    flag: bool | None = None
    ids: list[int] | None = None
    bias: dict[int, float] | None = None
    parts: list[Part] | None = None
    mode: Literal["abort", "keep"] = "abort"
    tools: None = None
    words: Annotated[list[str], Meta(max_length=0)] | None = None


class Control(Struct, kw_only=True, forbid_unknown_fields=True):
    abort_all: bool = False
    wait: bool = True
    timeout_s: float | None = None
    tags: list[str] | None = None
    mode: Literal["abort", "keep"] = "abort"


class Nothing(Struct, forbid_unknown_fields=True):
    pass


def refusal(body: bytes, kind: type[Struct] = Body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_body(body, kind)
    assert caught.value.status == 400
    return caught.value


def test_a_body_becomes_a_struct_and_unknown_fields_are_ignored() -> None:
    body = read_body(b'{"name":"a","count":3,"bias":{"5":1},"what":[{}]}', Body)
    assert body == Body(name="a", count=3, bias={5: 1.0})


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ('"name":5', "name", "name: expected a string, got 5"),
        ('"count":0', "count", "count: expected an integer from 1 to 128, got 0"),
        ('"count":true', "count", "count: expected an integer from 1 to 128, got true"),
        ('"count":1' + "0" * 30, "count", f"got 1{'0' * 30}"),
        ('"share":0', "share", "share: expected a number above 0.0 and at most 1.0, got 0"),
        ('"share":1e999', "share", "got Infinity"),
        ('"label":""', "label", 'label: expected a string of 1 to 4 characters, got ""'),
        ('"flag":"yes"', "flag", 'flag: expected true or false, got "yes"'),
        ('"ids":5', "ids", "ids: expected a list of integers, got 5"),
        ('"ids":[1,"a"]', "ids[1]", 'ids[1]: expected an integer, got "a"'),
        ('"bias":{"x":1}', "bias", "with integers for keys and numbers for values"),
        ('"bias":{"5":"1"}', "bias", 'got {"5": "1"}'),
        ('"parts":[{"type":"text"}]', "parts[0].text", "parts[0].text: missing"),
        (
            '"parts":[{"type":"image"}]',
            "parts[0].type",
            "not supported, got \"image\"; only 'text' is",
        ),
        ('"mode":"stop"', "mode", "mode: expected 'abort' or 'keep', got \"stop\""),
        ('"words":["a"]', "words", 'words: not supported, got ["a"]; leave it out'),
        ('"suffix":"x"', "suffix", 'suffix: not supported, got "x"; leave it out'),
        ('"few":["a","b","c"]', "few", "few: expected a list of 0 to 2 strings, got"),
        ('"tools":[]', "tools", "tools: not supported, got []; leave it out"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_takes_and_its_value(
    fields: str, param: str, message: str
) -> None:
    error = refusal(f'{{"name":"a",{fields}}}'.encode())
    assert error.param == param
    assert message in str(error)


def test_a_missing_field_is_named_with_what_it_takes() -> None:
    error = refusal(b"{}")
    assert str(error) == "name: missing; expected a string"
    assert error.param == "name"


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (b"[" + b"1," * 9_999 + b"1]", "... (10000 entries)"),
        (b'"' + b"x" * 10_000 + b'"', "... (10000 characters)"),
    ],
)
def test_a_long_value_is_shown_by_its_beginning_and_its_size(value: bytes, size: str) -> None:
    message = str(refusal(b'{"name":"a","bias":' + value + b"}"))
    assert message.endswith(size)
    assert len(message) < 250


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; send a JSON object"),
        (b"{", "the body is not JSON"),
        (b'{"name":"a"} x', "the body is not JSON"),
        (b'{"name":"\xff"}', "the body is not JSON"),
        (b'{"name":NaN}', "the body is not JSON"),
        (b"[]", "the body must be a JSON object, not []"),
        (b'"name"', 'the body must be a JSON object, not "name"'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"name":"a","what":' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_told_apart(body: bytes, message: str) -> None:
    error = refusal(body)
    assert message in str(error)
    assert error.param is None


def test_an_unknown_field_of_a_control_route_names_the_nearest_one() -> None:
    error = refusal(b'{"stop_all":true}', Control)
    assert error.param == "stop_all"
    assert "unknown field 'stop_all'; did you mean 'abort_all'? Known are abort_all, wait" in str(
        error
    )
    assert "'a`b'" in str(refusal(b'{"a`b":1}', Control))


def test_no_field_is_guessed_for_a_name_that_resembles_none() -> None:
    error = refusal(b'{"zzz":true}', Control)
    assert str(error).startswith("unknown field 'zzz'; known are abort_all, wait, ")
    long = refusal(b'{"' + b"abort_all" * 10_000 + b'":true}', Control)
    assert len(str(long)) < 300


def test_strange_names_are_shown_as_they_are() -> None:
    assert "does not fit" in str(refusal(b'{"a` - at `$.b[0]":1}', Control))
    assert "it takes no fields" in str(refusal(b'{"a":1}', Nothing))


def test_values_are_spelled_as_json_has_them() -> None:
    assert json_spelling("say x=True, y=None or z=False") == "say x=true, y=null or z=false"
    assert json_spelling("Trueness and None=Truely") == "Trueness and None=Truely"


def test_a_query_string_is_read_like_a_body() -> None:
    given: dict[str, list[str]] = {
        "abort_all": ["true"],
        "wait": ["1", "0"],
        "timeout_s": ["1.5"],
        "tags": ["a", "b"],
    }
    assert read_query(given, Control) == Control(
        abort_all=True, wait=False, timeout_s=1.5, tags=["a", "b"]
    )
    assert read_query({}, Control) == Control()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"wait": ["maybe"]}, 'wait: expected true or false, got "maybe"'),
        ({"timeout_s": ["soon"]}, 'timeout_s: expected a number, got "soon"'),
        ({"mode": ["stop"]}, "mode: expected 'abort' or 'keep', got \"stop\""),
        ({"tag": ["a"]}, "unknown field 'tag'; did you mean 'tags'?"),
    ],
)
def test_a_wrong_query_is_refused_like_a_body(query: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_query(query, Control)
    assert caught.value.status == 400
    assert message in str(caught.value)
