"""Sampling parameters on the wire: always valid, lenient about what they do not know, vLLM's
bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ipc.codec import unpack
from ipc.errors import WireError
from ipc.request import OutputKind, SamplingParams


def make(**fields: Any) -> SamplingParams:
    """From values of any type, as a caller without a type checker may give them."""
    return SamplingParams(**fields)


BAD_VALUES: list[tuple[str, object]] = [
    ("n", 0),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", None),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("max_tokens", 0),
    ("max_tokens", 1.0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("seed", 2**63),
    ("seed", 1.5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [1.0]),
    ("logprobs", -2),
    ("logprobs", True),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {-5: 1.0}),
    ("logit_bias", [5]),
    ("allowed_token_ids", [-1]),
    ("eos_token_id", -1),
    ("all_stop_token_ids", [None]),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("output_kind", 3),
    ("stream_interval", 0),
    ("structured_outputs", "json"),
    ("extra_args", {"a": object()}),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_on_the_wire_is_refused_by_path(name: str, value: object) -> None:
    private = name in ("eos_token_id", "all_stop_token_ids")
    with pytest.raises(WireError, match=rf"^sampling_params\.{name}"):
        SamplingParams.from_wire({"_" + name if private else name: value})


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(ValueError) as caught:
        make(top_p=1.5)
    assert str(caught.value) == "top_p: expected a number above 0.0 and at most 1.0, got 1.5"
    with pytest.raises(ValueError, match="lower it or raise max_tokens"):
        make(min_tokens=20, max_tokens=10)
    with pytest.raises(ValueError, match="set detokenize=True or use stop_token_ids"):
        make(stop="\n", detokenize=False)


def test_lists_and_plain_values_are_normalised() -> None:
    params = make(
        temperature=1,
        stop="\n",
        stop_token_ids=[3, 4],
        all_stop_token_ids={4, 3},
        output_kind=2,
        bad_words=None,
        max_tokens=None,
    )
    assert type(params.temperature) is float
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (3, 4)
    assert params.all_stop_token_ids == frozenset({3, 4})
    assert params.output_kind is OutputKind.FINAL_ONLY
    assert params.bad_words == ()
    assert params.max_tokens is None


def test_the_prefix_cache_is_skipped_for_prompt_logprobs_unless_told_otherwise() -> None:
    assert make().skip_reading_prefix_cache is False
    assert make(prompt_logprobs=1).skip_reading_prefix_cache is True
    assert (
        make(prompt_logprobs=1, skip_reading_prefix_cache=False).skip_reading_prefix_cache is False
    )


def test_unknown_keys_of_any_type_are_ignored() -> None:
    wire = {"temperature": 0.5, "a_newer_field": [1], 7: 7, b"temperature": 9, None: None}
    assert SamplingParams.from_wire(wire) == make(temperature=0.5)


def test_our_names_of_private_fields_mean_nothing_on_the_wire() -> None:
    assert SamplingParams.from_wire({"eos_token_id": 5}) == make()
    assert SamplingParams.from_wire({"_eos_token_id": 5}) == make(eos_token_id=5)


def test_the_map_that_vllm_rs_sends_is_understood() -> None:
    params = SamplingParams.from_wire(
        {
            "temperature": 1.0,
            "watermarking": True,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": 4,
            "min_tokens": 0,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [],
            "_eos_token_id": 0,
            "_all_stop_token_ids": [0],
            "routed_experts_prompt_start": 0,
        }
    )
    assert params == make(
        max_tokens=4, eos_token_id=0, all_stop_token_ids=frozenset({0}), watermarking=True
    )
    assert params.unsupported == ()


def test_defaults_are_left_out_but_for_the_four_that_vllm_always_writes() -> None:
    assert unpack(make().to_wire()) == {
        "stop": [],
        "stop_token_ids": [],
        "bad_words": [],
        "skip_reading_prefix_cache": False,
    }
    wire = make(eos_token_id=2, all_stop_token_ids={9, 2}, max_tokens=None, top_k=-1).to_wire()
    assert wire[:3] == b"\xde\x00\x08"
    fields = unpack(wire)
    assert isinstance(fields, dict)
    assert list(fields) == [
        "top_k",
        "stop",
        "stop_token_ids",
        "max_tokens",
        "_eos_token_id",
        "_all_stop_token_ids",
        "bad_words",
        "skip_reading_prefix_cache",
    ]
    assert fields["_all_stop_token_ids"] == [2, 9]


def test_features_that_our_engine_lacks_are_named() -> None:
    assert make().unsupported == ()
    params = make(structured_outputs={"json": "{}"}, bad_words=["x"], thinking_token_budget=0)
    assert set(params.unsupported) == {"structured_outputs", "bad_words", "thinking_token_budget"}
