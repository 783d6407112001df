"""Detokenizing and stop strings together: text, tokens that count, and what ended the stream."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.sampling_params import SamplingParams
from frontend.text.output_processor import OutputProcessor, ProcessedDelta
from tests.support.tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer("byte_level")
EOS_ID = TOKENIZER.eos_token_ids[0]


def ids_of(text: str) -> list[int]:
    """One token a character."""
    return [token_id for character in text for token_id in TOKENIZER.encode(character)]


def test_text_streams_with_its_tokens() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams())
    assert processor.process(ids_of("the"), False) == ProcessedDelta("the", 3)
    assert processor.process([], False) == ProcessedDelta("", 0)
    assert processor.process(ids_of(" fox"), True) == ProcessedDelta(" fox", 4)


def test_L2_the_token_that_completes_a_stop_string_counts_and_later_ones_do_not() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=["fox"]))
    assert processor.process(ids_of("the f"), False) == ProcessedDelta("the ", 5)
    assert processor.process(ids_of("oxen"), False) == ProcessedDelta("", 2, "fox")


def test_L2_a_stop_string_in_the_last_delta_still_cuts_it() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop="fox"))
    delta = processor.process([*ids_of("a fox b"), EOS_ID], True)
    assert delta == ProcessedDelta("a ", 5, "fox")


def test_text_held_back_is_given_out_at_the_end() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=["fox"]))
    assert processor.process(ids_of("a fo"), False) == ProcessedDelta("a ", 4)
    assert processor.process([], True) == ProcessedDelta("fo", 0)


def test_a_cut_off_character_is_given_out_at_the_end_after_what_was_held_back() -> None:
    half = TOKENIZER.encode("🦊")[:-1]
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=["fox"]))
    assert processor.process([*ids_of("fo"), *half], True).text == "fo\ufffd"
    without_stops = OutputProcessor(TOKENIZER, SamplingParams())
    assert without_stops.process([*ids_of("fo"), *half], True).text == "fo\ufffd"


def test_the_stop_string_is_included_if_asked_for() -> None:
    params = SamplingParams(stop=["fox"], include_stop_str_in_output=True)
    delta = OutputProcessor(TOKENIZER, params).process(ids_of("a foxen"), False)
    assert delta == ProcessedDelta("a fox", 5, "fox")


def test_stop_strings_that_the_first_min_tokens_tokens_complete_do_not_count() -> None:
    params = SamplingParams(stop=["ab"], min_tokens=2)
    processor = OutputProcessor(TOKENIZER, params)
    assert processor.process(ids_of("abcab"), False) == ProcessedDelta("abc", 5, "ab")
    processor = OutputProcessor(TOKENIZER, params)
    assert processor.process(ids_of("xab"), False) == ProcessedDelta("x", 3, "ab")


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_a_token_that_ended_the_request_counts_but_has_no_text(stop: tuple[str, ...]) -> None:
    ids = ids_of("fox.")
    params = SamplingParams(stop=stop, stop_token_ids=[ids[-1]])
    assert OutputProcessor(TOKENIZER, params).process(ids, True) == ProcessedDelta("fox", 4)

    keeping = SamplingParams(stop=stop, skip_special_tokens=False)
    assert OutputProcessor(TOKENIZER, keeping).process([*ids, EOS_ID], True).text == "fox."
    ignoring = SamplingParams(stop=stop, skip_special_tokens=False, ignore_eos=True)
    assert OutputProcessor(TOKENIZER, ignoring).process([*ids, EOS_ID], True).text == "fox.</s>"
    including = SamplingParams(stop=stop, stop_token_ids=[ids[-1]], include_stop_str_in_output=True)
    assert OutputProcessor(TOKENIZER, including).process(ids, True).text == "fox."


def test_without_detokenizing_tokens_pass_and_have_no_text() -> None:
    for processor in (
        OutputProcessor(TOKENIZER, SamplingParams(detokenize=False)),
        OutputProcessor(None, SamplingParams()),
    ):
        assert processor.process(ids_of("fox"), False) == ProcessedDelta("", 3)
        assert processor.process([EOS_ID], True) == ProcessedDelta("", 1)


def test_an_output_continues_its_prompt() -> None:
    tokenizer = tiny_tokenizer("byte_fallback")
    prompt, output = tokenizer.encode("the"), tokenizer.encode("fox")
    assert OutputProcessor(tokenizer, SamplingParams(), prompt).process(output, True).text == " fox"


@given(
    ids=st.lists(st.integers(0, TOKENIZER.vocab_size), max_size=30),
    stops=st.lists(st.text("abcdefox ", min_size=1, max_size=3), max_size=3),
    cuts=st.sets(st.integers(0, 30)),
    min_tokens=st.integers(0, 10),
)
def test_L2_what_comes_out_does_not_depend_on_how_tokens_arrive(
    ids: list[int], stops: list[str], cuts: set[int], min_tokens: int
) -> None:
    params = SamplingParams(stop=stops, min_tokens=min_tokens)
    whole = OutputProcessor(TOKENIZER, params).process(ids, True)
    processor, bounds = OutputProcessor(TOKENIZER, params), sorted({0, *cuts, len(ids)})
    text, num_tokens, stop_reason = "", 0, None
    for start, end in itertools.pairwise(bounds):
        if start >= len(ids):
            break
        delta = processor.process(ids[start:end], end >= len(ids))
        text, num_tokens = text + delta.text, num_tokens + delta.num_tokens_used
        if (stop_reason := delta.stop_reason) is not None:
            break
    assert ProcessedDelta(text, num_tokens, stop_reason) == whole
    if not stops:
        kept = ids[:-1] if ids and ids[-1] == EOS_ID else ids
        assert whole == ProcessedDelta(TOKENIZER.decode(kept), len(ids))
