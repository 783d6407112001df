"""The checks of single values: strict types, ranges, and errors that name the field and the
value."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ipc import expect
from ipc.errors import WireError


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (expect.integer, [0, -1, 2**63 - 1, -(2**63)]),
        (expect.count, [0, 2**63 - 1]),
        (expect.number, [0.5, -1.5, 1e300]),
        (expect.boolean, [True, False]),
        (expect.text, ["", "é"]),
        (expect.array, [[], [1]]),
        (expect.mapping, [{}, {1: 2}]),
        (expect.texts, [[], ["a", "b"]]),
        (expect.token_ids, [[], [0, 2**31 - 1]]),
    ],
)
def test_good_values_pass_unchanged(
    check: Callable[[object, str], object], good: list[object]
) -> None:
    for value in good:
        assert check(value, "field") is value


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (expect.integer, [True, 1.0, "1", None, 2**63, -(2**63) - 1]),
        (expect.count, [-1, False, 2**63]),
        (expect.number, [math.nan, math.inf, -math.inf, True, "1", None, 10**400]),
        (expect.boolean, [0, 1, None, "true"]),
        (expect.text, [b"a", None, 1]),
        (expect.array, [(), {}, None, "ab"]),
        (expect.mapping, [[], None]),
        (expect.texts, [[1], ["a", None], "ab"]),
        (expect.token_ids, [[-1], [1, True], [1.0], ["1"], [2**31], [None], None, "12"]),
    ],
)
def test_bad_values_are_refused_by_field_path(
    check: Callable[[object, str], object], bad: list[object]
) -> None:
    for value in bad:
        with pytest.raises(WireError, match=r"^frame\.field"):
            check(value, "frame.field")


def test_an_integer_is_a_number_and_becomes_a_float() -> None:
    assert type(expect.number(3, "field")) is float


def test_errors_name_path_value_and_expectation() -> None:
    with pytest.raises(WireError) as caught:
        expect.token_ids([3, 4, -5], "request.prompt_token_ids")
    assert str(caught.value) == (
        "request.prompt_token_ids[2]: expected an integer from 0 to 2147483647, got -5"
    )


def test_a_short_array_is_refused_and_a_long_one_is_not() -> None:
    assert expect.array([1, 2, 3], "field", 2) == [1, 2, 3]
    with pytest.raises(WireError, match="at least 2 entries"):
        expect.array([1], "field", 2)


def test_only_nil_passes_an_optional_check() -> None:
    assert expect.optional(expect.text, None, "field") is None
    assert expect.nullable(expect.text)(None, "field") is None
    no_nil: list[object] = [False, 0, [], {}]
    for absent in no_nil:
        with pytest.raises(WireError):
            expect.optional(expect.text, absent, "field")
