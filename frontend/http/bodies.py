"""JSON bodies and query strings as typed structs, with errors that name the field and its value.

Invariants
- What is accepted is what the OpenAPI page says: both come from one struct.
- A field of type None (or a list of at most 0 items) is known and not supported.
- Only a refused body costs more than decoding it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from frontend.guesses import known_names
from frontend.http.errors import ApiError
from ipc.expect import INT64_MAX, INT64_MIN

T = TypeVar("T", bound=msgspec.Struct)

_OBJECTS = (inspect.StructType, inspect.DataclassType)
_MAX_VALUE_LENGTH = 80
_WHERE = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]")
_PYTHON_VALUE = re.compile(r"(?<==)(?:True|False|None)\b")
_JSON_VALUES = {"True": "true", "False": "false", "None": "null"}
_FIELD = re.compile(r"Object (?P<fault>missing required|contains unknown) field `(?P<name>.*)`")


def read_body(body: bytes, kind: type[T]) -> T:
    """Decode a JSON body. Raises ApiError(400) naming the field, what it takes and the value.

    Where `kind` forbids unknown fields, the nearest known one is named.
    """
    try:
        decoded: T = _decoder(kind).decode(body)
        return decoded
    except msgspec.ValidationError as error:
        fault = str(error)
    except (ValueError, RecursionError) as error:
        raise _not_json(body, error) from None
    try:
        value = json.loads(body)  # It reads larger numbers than msgspec, so they can be shown.
    except (ValueError, RecursionError) as error:
        raise _not_json(body, error) from None
    raise _refusal(fault, value, kind)


def read_optional_body(body: bytes, kind: type[T]) -> T:
    """`read_body`, where an empty body and null stand for an empty object."""
    return read_body(b"{}" if _is_empty(body) else body, kind)


def read_query(query: Mapping[str, list[str]], kind: type[T]) -> T:
    """Read a query string's values, as `read_body` does. Of a repeated field that takes one value,
    the last counts.
    """
    lists = _list_fields(kind)
    values = {name: given if name in lists else given[-1] for name, given in query.items()}
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), values, kind) from None


def read_query_or_body(query: Mapping[str, list[str]], body: bytes, kind: type[T]) -> T:
    """For calls whose fields are in the query, and which some clients send in a body. Raises
    ApiError(400) also if both have fields.
    """
    if _is_empty(body):
        return read_query(query, kind)
    if query:
        raise ApiError(400, "there are fields in the query and in the body; send one of them")
    return read_body(body, kind)


def _is_empty(body: bytes) -> bool:
    return body.strip() in (b"", b"null")


def bad_field(path: str, expected: str, value: object) -> ApiError:
    """The error for a field's value that is not what the field takes."""
    return ApiError(400, f"{path}: expected {expected}, got {shorten(value)}", param=path)


def not_supported(path: str, value: object, remedy: str = "leave it out") -> ApiError:
    """The error for a field that is known and asks for what is not done here."""
    return ApiError(400, f"{path}: not supported, got {shorten(value)}; {remedy}", param=path)


def shorten(value: object) -> str:
    """A value's JSON, or the beginning of it and how large the string or list is."""
    text = ""
    for piece in json.JSONEncoder().iterencode(value):  # It may be as long as a body.
        text += piece
        if len(text) > _MAX_VALUE_LENGTH:
            break
    else:
        return text
    size = ""
    if isinstance(value, str | list):
        size = f" ({len(value)} {'characters' if isinstance(value, str) else 'entries'})"
    return f"{text[: _MAX_VALUE_LENGTH - 3]}...{size}"


def json_spelling(message: str) -> str:
    """A message about values in Python, with those of JSON."""
    return _PYTHON_VALUE.sub(lambda found: _JSON_VALUES[found[0]], message)


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


@functools.cache
def _list_fields(kind: type[msgspec.Struct]) -> frozenset[str]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return frozenset(
        field.encode_name
        for field in info.fields
        if any(isinstance(option, inspect.CollectionType) for option in _options(field.type))
    )


def _not_json(body: bytes, error: ValueError | RecursionError) -> ApiError:
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply")
    if not body.strip():
        return ApiError(400, "the body is empty; send a JSON object")
    return ApiError(400, f"the body is not JSON: {error}")


def _refusal(fault: str, value: Any, kind: type[msgspec.Struct]) -> ApiError:
    """The error for `value`, in which msgspec found `fault`."""
    where = _WHERE.search(fault)
    path = "" if where is None else where["path"].partition("[...]")[0]
    info: inspect.Type = inspect.type_info(kind)
    try:
        for name, index in _steps(path):
            info = _inner_type(info, name)
            value = value[name if name is not None else index]
    except (LookupError, TypeError):  # A client's own field name looks like a place.
        return ApiError(400, f"the body does not fit: {shorten(fault)}")
    name = path.removeprefix(".")
    if (field := _FIELD.fullmatch(_WHERE.sub("", fault))) is not None:
        inner = f"{name}.{field['name']}" if name else field["name"]
        if field["fault"] == "missing required":
            expected = describe(_inner_type(info, field["name"]))
            return ApiError(400, f"{inner}: missing; expected {expected}", param=inner)
        return _unknown_field(inner, field["name"], info)
    options = [option for option in _options(info) if not isinstance(option, inspect.NoneType)]
    if all(map(_takes_nothing, options)):
        return not_supported(name, value)
    match options:
        case [inspect.LiteralType(values=(only,))]:
            return not_supported(name, value, f"only {only!r} is")
    if not name:
        return ApiError(400, f"the body must be a JSON object, not {shorten(value)}")
    return bad_field(name, describe(info), value)


def _unknown_field(path: str, name: str, info: inspect.Type) -> ApiError:
    known = [
        field.encode_name
        for option in _options(info)
        if isinstance(option, _OBJECTS)
        for field in option.fields
    ]
    remedy = "it takes no fields; leave it out"
    if known:
        remedy = known_names(name, known)
    return ApiError(400, f"unknown field {path!r:.80}; {remedy}", param=path[:_MAX_VALUE_LENGTH])


def _steps(path: str) -> Iterator[tuple[str | None, int]]:
    """The way to a value; it ends where an object's keys are not a struct's fields."""
    end = 0
    while (step := _STEP.match(path, end)) is not None:
        yield step["name"], int(step["index"] or 0)
        end = step.end()


def _inner_type(info: inspect.Type, name: str | None) -> inspect.Type:
    """The type of a struct's field, or of a collection's items."""
    for option in _options(info):
        if name is None and isinstance(option, inspect.CollectionType):
            return option.item_type
        if name is not None and isinstance(option, _OBJECTS):
            return {field.encode_name: field.type for field in option.fields}[name]
    raise LookupError(name)


def _takes_nothing(info: inspect.Type) -> bool:
    is_empty_list = isinstance(info, inspect.CollectionType) and info.max_length == 0
    is_empty_text = isinstance(info, inspect.LiteralType) and info.values == ("",)
    return is_empty_list or is_empty_text


def _options(info: inspect.Type) -> tuple[inspect.Type, ...]:
    """The members of a union, or the type itself."""
    if isinstance(info, inspect.Metadata):
        return _options(info.type)
    if not isinstance(info, inspect.UnionType):
        return (info,)
    return tuple(inner for option in info.types for inner in _options(option))


def describe(info: inspect.Type) -> str:
    """What a type takes, in words."""
    options = _options(info)
    words = [_describe(option) for option in options if not isinstance(option, inspect.NoneType)]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _describe(info: inspect.Type) -> str:
    match info:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=int(low), le=int(high)) if high < INT64_MAX:
            return f"an integer from {low} to {high}"
        case inspect.IntType(ge=int(low)):
            return "an integer of 64 bits" if low == INT64_MIN else f"an integer of at least {low}"
        case inspect.IntType():
            return "an integer" + _bounds(info)
        case inspect.FloatType():
            return "a number" + _bounds(info)
        case inspect.StrType(min_length=int(low), max_length=int(high)):
            return f"a string of {low} to {high} characters"
        case inspect.StrType():
            return "a string that is not empty" if info.min_length else "a string"
        case inspect.LiteralType(values=values):
            return " or ".join(repr(value) for value in values)
        case inspect.EnumType(cls=cls):
            return " or ".join(repr(member.value) for member in cls)
        case inspect.CollectionType(item_type=item, min_length=low, max_length=int(high)):
            return f"a list of {low or 0} to {high} {_PLURALS.get(type(item), 'entries')}"
        case inspect.CollectionType(item_type=item, min_length=low):
            filled = " that is not empty" if low else ""
            return (
                f"a list of {_PLURALS[type(item)]}{filled}"
                if type(item) in _PLURALS
                else (f"a list{filled}")
            )
        case inspect.DictType(key_type=inspect.IntType(), value_type=item) if (
            type(item) in _PLURALS
        ):
            return f"an object with integers for keys and {_PLURALS[type(item)]} for values"
        case inspect.DictType() | inspect.StructType() | inspect.DataclassType():
            return "an object"
    return "another value"


_PLURALS: dict[type[inspect.Type], str] = {
    inspect.IntType: "integers",
    inspect.FloatType: "numbers",
    inspect.StrType: "strings",
    inspect.StructType: "objects",
}


def _bounds(info: inspect.IntType | inspect.FloatType) -> str:
    bounds = (
        ("above", info.gt),
        ("of at least", info.ge),
        ("below", info.lt),
        ("at most", info.le),
    )
    words = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
    return f" {words}" if words else ""
