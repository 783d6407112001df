"""Sampling parameters: what is refused and how, SGLang's names, and what an engine is sent."""

from __future__ import annotations

import dataclasses
import math

import pytest

from frontend.sampling_params import SamplingParams
from ipc import sampling_params as wire
from ipc.codec import unpack


def sent_by(
    params: SamplingParams, eos_token_ids: tuple[int, ...] = (), *, num_tokens_left: int
) -> wire.SamplingParams:
    """What an engine reads of what it is sent."""
    return wire.SamplingParams.from_wire(
        unpack(params.to_wire(eos_token_ids, num_tokens_left=num_tokens_left))
    )


def test_the_defaults_ask_for_plain_sampling_without_limit() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (
        1.0,
        1.0,
        0,
        None,
    )
    assert params.stop == ()
    assert params.detokenize


def test_one_stop_string_may_be_given_plainly_and_lists_become_tuples() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[3, 4])
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert hash(params) == hash(SamplingParams(stop=["END"], stop_token_ids=(3, 4)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.0),
        ("min_p", -0.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("seed", "7"),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("stop", [""]),
        ("stop", [b"x"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("ignore_eos", 1),
        ("logprobs", -2),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {"x": 1.0}),
        ("allowed_token_ids", [1.5]),
        ("skip_special_tokens", None),
        ("detokenize", 0),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}.*expected .*got "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_there_is_no_n() -> None:
    with pytest.raises(TypeError, match="'n'"):
        SamplingParams(n=2)  # type: ignore[call-arg]


def test_an_engine_stops_on_the_first_eos_and_is_told_the_others_as_stop_tokens() -> None:
    sent = sent_by(SamplingParams(stop_token_ids=[9, 5]), (2, 5, 6), num_tokens_left=100)
    assert sent.eos_token_id == 2
    assert sent.stop_token_ids == (9, 5, 6)
    assert sent.all_stop_token_ids == {2, 5, 6, 9}


def test_ignoring_eos_names_none_of_them_as_an_end_but_min_tokens_still_holds_them_back() -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=[9])
    sent = sent_by(params, (2, 5), num_tokens_left=100)
    assert sent.eos_token_id is None
    assert sent.stop_token_ids == (9,)
    assert sent.all_stop_token_ids == {2, 5, 9}
    assert params.ending_token_ids((2, 5)) == {9}


def test_a_model_without_eos_has_none_to_send() -> None:
    sent = sent_by(SamplingParams(), (), num_tokens_left=100)
    assert sent.eos_token_id is None
    assert sent.all_stop_token_ids == frozenset()


def test_max_tokens_is_bounded_by_the_room_in_the_context() -> None:
    assert sent_by(SamplingParams(), num_tokens_left=7).max_tokens == 7
    assert sent_by(SamplingParams(max_tokens=5), num_tokens_left=7).max_tokens == 5
    assert sent_by(SamplingParams(max_tokens=50), num_tokens_left=7).max_tokens == 7


def test_stop_strings_stay_here_and_everything_else_is_sent() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        seed=3,
        min_tokens=2,
        stop=["END"],
        logprobs=5,
        logit_bias={4: -1.0},
        allowed_token_ids=[1, 2],
    )
    sent = sent_by(params, num_tokens_left=9)
    assert sent.stop == ()
    for name in set(_names()) - {"stop", "max_tokens"}:
        assert getattr(sent, name) == getattr(params, name), name


def test_sglangs_names_are_understood() -> None:
    params = SamplingParams.from_sglang(
        {
            "max_new_tokens": 64,
            "min_new_tokens": 2,
            "temperature": 0,
            "top_k": -1,
            "stop": ["\n\n"],
            "stop_token_ids": None,
            "ignore_eos": True,
            "logit_bias": {"5": 1.5},
            "no_stop_trim": True,
            "sampling_seed": 42,
            "n": 1,
            "json_schema": None,
            "spaces_between_special_tokens": True,
        }
    )
    assert params == SamplingParams(
        max_tokens=64,
        min_tokens=2,
        temperature=0.0,
        top_k=-1,
        stop=("\n\n",),
        ignore_eos=True,
        logit_bias={5: 1.5},
        include_stop_str_in_output=True,
        seed=42,
    )


def test_sglangs_default_is_128_new_tokens_and_none_is_no_limit() -> None:
    assert SamplingParams.from_sglang({}).max_tokens == 128
    assert SamplingParams.from_sglang({"max_new_tokens": None}).max_tokens is None


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"'max_tokens'; did you mean 'max_new_tokens'"):
        SamplingParams.from_sglang({"max_tokens": 5})
    with pytest.raises(ValueError, match=r"'temprature'; did you mean 'temperature'"):
        SamplingParams.from_sglang({"temprature": 0.5})


def test_what_only_sglang_does_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match=r"n=4 is not supported; pass the prompt"):
        SamplingParams.from_sglang({"n": 4})
    with pytest.raises(ValueError, match=r"regex='a\+' is not supported"):
        SamplingParams.from_sglang({"regex": "a+"})


def _names() -> tuple[str, ...]:
    kept = ("include_stop_str_in_output", "skip_special_tokens", "detokenize")
    return tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in kept)


@pytest.mark.parametrize(
    ("stop", "complaint"),
    [
        (["x"] * 65, "stop: 65 strings, but at most 64"),
        (["x", "y" * 1025], r"stop\[1\]: a string of 1025 characters, but at most 1024"),
        ("y" * 100_000, r"stop\[0\]: a string of 100000 characters"),
    ],
)
def test_stop_strings_that_would_slow_every_token_are_refused(stop: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SamplingParams(stop=stop)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=complaint):
        SamplingParams.from_sglang({"stop": stop})
    assert len(SamplingParams(stop=["y" * 1024] * 64).stop) == 64


def test_what_is_wrong_is_said_in_sglangs_names() -> None:
    with pytest.raises(ValueError, match=r"^max_new_tokens: "):
        SamplingParams.from_sglang({"max_new_tokens": -1})
    with pytest.raises(ValueError, match=r"^min_new_tokens: 9 exceeds max_new_tokens 3"):
        SamplingParams.from_sglang({"max_new_tokens": 3, "min_new_tokens": 9})
    with pytest.raises(ValueError, match="'zzzzz'; known are "):
        SamplingParams.from_sglang({"zzzzz": 3})
