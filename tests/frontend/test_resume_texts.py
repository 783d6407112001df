"""The text of a stream that is broken off and continued: characters, spaces and stop strings that
lie across the boundary."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from frontend.sampling_params import SamplingParams
from frontend.text.output_processor import OutputProcessor, ProcessedDelta
from tests.support.tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer("byte_level")


def ids_of(text: str) -> list[int]:
    """One token a character, or a byte."""
    return [token_id for character in text for token_id in TOKENIZER.encode(character)]


def continued(
    token_ids: Sequence[int], cuts: Sequence[int], params: SamplingParams, kind: str = "byte_level"
) -> tuple[list[str], ProcessedDelta]:
    """The texts of a chain that is broken off at each of the cuts, and its last delta."""
    tokenizer, tail = tiny_tokenizer(kind), ""
    texts: list[str] = []
    bounds = [0, *cuts, len(token_ids)]
    for start, end in itertools.pairwise(bounds):
        processor = OutputProcessor(
            tokenizer,
            params,
            [1],
            earlier_token_ids=token_ids[:start],
            stop_tail_text=tail,
        )
        delta = processor.process(token_ids[start:end], end == len(token_ids))
        if delta.stop_reason is not None or end == len(token_ids):
            return [*texts, delta.text], delta
        tail = processor.stop_tail_text
        texts.append(delta.text + processor.break_off())
    raise AssertionError("unreachable")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_L2_wherever_a_text_is_cut_its_parts_joined_are_the_whole(kind: str) -> None:
    token_ids = tiny_tokenizer(kind).encode("the fox 🦊 is über quick", add_special_tokens=False)
    whole = OutputProcessor(tiny_tokenizer(kind), SamplingParams(), [1]).process(token_ids, True)
    for first in range(len(token_ids)):
        for second in range(first, len(token_ids)):
            texts, _ = continued(token_ids, [first, second], SamplingParams(), kind)
            assert "".join(texts) == whole.text


def test_half_a_character_belongs_to_the_continuation_which_gives_it_whole() -> None:
    fox = TOKENIZER.encode("🦊")
    processor = OutputProcessor(TOKENIZER, SamplingParams())
    assert processor.process([*ids_of("a"), *fox[:-1]], False).text + processor.break_off() == "a"
    rest = OutputProcessor(TOKENIZER, SamplingParams(), earlier_token_ids=[*ids_of("a"), *fox[:-1]])
    assert rest.process(fox[-1:], True) == ProcessedDelta("🦊", 1)


def test_L2_a_stop_string_across_the_boundary_ends_the_continuation_wherever_it_is_cut() -> None:
    params = SamplingParams(stop=["fox"])
    token_ids = ids_of("a fofox hops")
    for first in range(1, 7):
        for second in range(first, 7):
            texts, last = continued(token_ids, [first, second], params)
            assert last.stop_reason == "fox"
            # What was given out before the stop string was complete cannot be taken back.
            assert "".join(texts) in ("a fo", "a fof", "a fofo")
            assert "".join(texts).startswith("a fo")
    texts, _ = continued(token_ids, [4, 6], params)
    assert texts == ["a fo", "fo", ""]


def test_a_tail_that_begins_no_stop_string_after_all_is_not_given_out_twice() -> None:
    params = SamplingParams(stop=["fox", "oxen"])
    texts, last = continued(ids_of("a foxy"), [], SamplingParams(stop=["foxes"]))
    assert texts == ["a foxy"]
    texts, last = continued(ids_of("a foam oxes"), [3, 4, 9, 10], params)
    assert last.stop_reason is None
    assert texts == ["a f", "o", "am ox", "e", "s"]


def test_an_included_stop_string_is_given_out_to_its_end_once() -> None:
    params = SamplingParams(stop=["fox"], include_stop_str_in_output=True)
    texts, last = continued(ids_of("a foxes"), [4], params)
    assert (texts, last.stop_reason) == (["a fo", "x"], "fox")


def test_min_tokens_that_are_left_hold_a_stop_string_off() -> None:
    params = SamplingParams(stop=["ab"], min_tokens=2)
    rest = OutputProcessor(TOKENIZER, params, stop_tail_text="a", earlier_token_ids=ids_of("a"))
    assert rest.process(ids_of("bcab"), False) == ProcessedDelta("bc", 4, "ab")
