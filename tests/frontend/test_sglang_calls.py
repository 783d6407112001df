"""SGLang's `generate` call as requests: their names, their samples, their parameters."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.errors import InvalidRequestError
from frontend.sampling_params import SamplingParams
from frontend.sglang.aborts import read_abort
from frontend.sglang.calls import MAX_SAMPLES, GenerateCall, read_call

ONE, TWO = [1], [[1], [2]]


def call(input_ids: Any, n: int = 1, **arguments: Any) -> GenerateCall:
    return read_call(None, input_ids, {"n": n}, **arguments)


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (call(ONE), [(None, None)]),
        (call(ONE, rid="x"), [("x", None)]),
        (call(ONE, rid=""), [(None, None)]),
        (call(ONE, n=2, rid="x"), [("x_0", "x"), ("x_1", "x")]),
        (call(ONE, n=2), [(None, None)] * 2),
        (call([[1]], rid="x"), [("x_0", "x")]),
        (call(TWO, rid="x"), [("x_0", "x"), ("x_1", "x")]),
        (call(TWO, rid=["a", "b"]), [("a", None), ("b", None)]),
        (call(TWO, n=2, rid=["a", "b"]), [(f"{p}_{i}", p) for p in "ab" for i in (0, 1)]),
        (call(TWO, n=2, rid="x"), [(f"x_{i}", "x") for i in range(4)]),
        (call(ONE, call_name="header"), [("header", None)]),
        (call(TWO, call_name="header"), [("header_0", "header"), ("header_1", "header")]),
        (call(TWO, rid=["a", "b"], call_name="header"), [("a", "header"), ("b", "header")]),
    ],
)
def test_L3_each_request_has_a_name_of_its_own_and_shares_that_of_its_batch(
    made: GenerateCall, names: list[tuple[str | None, str | None]]
) -> None:
    assert [(request.request_id, request.batch_id) for request in made.requests] == names


def test_L3_a_further_name_of_the_call_is_an_alias_beside_its_rid() -> None:
    for made in (call(ONE, rid="x", call_name="h"), call(TWO, rid="x", call_name="h")):
        assert {request.aliases for request in made.requests} == {("h",)}
    assert call(ONE, rid="h", call_name="h").requests[0].aliases == ()


def test_L3_two_prompts_of_a_call_cannot_have_one_name() -> None:
    with pytest.raises(InvalidRequestError, match="rid has 'a' for 2 prompts of this call"):
        call([[1], [2], [3]], rid=["a", "b", "a"])
    assert len(call([[1], [2]], rid=["", ""]).requests) == 2


def test_samples_differ_by_their_seed_and_plain_parameters_are_one_sample() -> None:
    seeded = read_call(None, ONE, {"n": 3, "sampling_seed": 7})
    assert [request.sampling_params.seed for request in seeded.requests] == [7, 8, 9]
    assert seeded.is_list
    assert len(read_call(None, ONE, SamplingParams(seed=1)).requests) == 1
    assert not read_call(None, ONE, {"n": None}).is_list


@pytest.mark.parametrize("n", [0, -1, MAX_SAMPLES + 1, True, "2", 1.0])
def test_a_bad_number_of_samples_is_refused_with_its_value(n: object) -> None:
    with pytest.raises(InvalidRequestError, match="must be an integer from 1 to"):
        read_call(None, ONE, {"n": n})


def test_prompts_logprobs_are_wanted_only_with_return_logprob_and_a_start() -> None:
    def wanted(**arguments: Any) -> list[int | None]:
        made = read_call(None, TWO, None, top_logprobs_num=2, **arguments)
        return [request.sampling_params.prompt_logprobs for request in made.requests]

    assert wanted(logprob_start_len=0) == [None, None]
    assert wanted(return_logprob=True) == [None, None]
    assert wanted(return_logprob=True, logprob_start_len=-1) == [None, None]
    assert wanted(return_logprob=True, logprob_start_len=[3, -1]) == [2, None]


def test_a_higher_priority_is_a_lower_one_here() -> None:
    assert call(ONE, priority=5).requests[0].priority == -5


def test_arguments_that_ask_for_nothing_are_welcome_and_others_are_named() -> None:
    call(ONE, others={"image_data": None, "return_hidden_states": False, "log_metrics": True})
    with pytest.raises(InvalidRequestError, match="image_data='cat' is not supported"):
        call(ONE, others={"image_data": "cat"})
    with pytest.raises(TypeError, match="'promt'"):
        call(ONE, others={"promt": None})


def test_an_abort_is_exact_unless_it_says_otherwise() -> None:
    def read(rid: Any = None, abort_all: bool = False, **more: Any) -> Any:
        selector = read_abort(rid, abort_all, **more)
        if selector is None:
            return None
        return selector.request_ids, selector.prefix, selector.tag, selector.everything

    assert read("a") == (["a"], None, None, False)
    assert read(["a", "b"]) == (["a", "b"], None, None, False)
    assert read("a", prefix=True) == (None, "a", None, False)
    assert read("", tag="t") == (None, None, "t", False)
    assert read("a", True, tag="t") == (None, None, None, True)
    assert read("", prefix=True) is None
    assert read([]) is None
    with pytest.raises(InvalidRequestError, match="one string"):
        read(["a", "b"], prefix=True)
