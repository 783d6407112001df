"""The incremental detokenizer: its pieces are the full decode, and none holds half a character."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.text.detokenizer import IncrementalDetokenizer
from frontend.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import KINDS, tiny_tokenizer, token_id


def pieces_of(
    tokenizer: Tokenizer, deltas: list[list[int]], *, skip_special_tokens: bool = True
) -> list[str]:
    """What a stream of `deltas` gives out, the last piece at its end."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*map(detokenizer.add, deltas), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_the_pieces_of_any_ids_are_their_full_decode(
    kind: str, data: st.DataObject, skip_special_tokens: bool
) -> None:
    tokenizer = tiny_tokenizer(kind)
    any_id = st.integers(0, tokenizer.vocab_size + 2)
    deltas = data.draw(st.lists(st.lists(any_id, max_size=4), max_size=10))
    pieces = pieces_of(tokenizer, deltas, skip_special_tokens=skip_special_tokens)
    ids = [each for delta in deltas for each in delta]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=20).filter(lambda text: "▁" not in text))
def test_any_text_comes_back_and_no_piece_holds_half_a_character(kind: str, text: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    pieces = pieces_of(tokenizer, [[each] for each in tokenizer.encode(text)])
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_a_character_of_several_tokens_appears_with_its_last_one() -> None:
    tokenizer = tiny_tokenizer("byte_fallback")
    half = [token_id("byte_fallback", f"<0x{b:02X}>") for b in "🦊".encode()]
    fox = tokenizer.encode("fox")
    assert pieces_of(tokenizer, [fox, *([b] for b in half), fox]) == [
        *("fox", "", "", "", "🦊", " fox", ""),
    ]


def test_a_cut_off_character_is_flushed_at_the_end_like_in_a_full_decode() -> None:
    tokenizer = tiny_tokenizer("byte_level")
    ids = tokenizer.encode("a🦊")[:-1]
    pieces = pieces_of(tokenizer, [[each] for each in ids])
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == tokenizer.decode(ids) == "a\ufffd"


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(0, 12))
def test_a_continued_prompt_keeps_the_space_before_the_next_word(kind: str, cut: int) -> None:
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer.encode("the quick fox jumps over")
    prompt, output = ids[:cut], ids[cut:]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    text = detokenizer.add(output) + detokenizer.finish()
    assert tokenizer.decode(prompt) + text == "the quick fox jumps over"


def test_a_prompt_of_special_tokens_alone_is_no_text_to_continue() -> None:
    tokenizer = tiny_tokenizer("byte_fallback")
    bos = token_id("byte_fallback", "<s>")
    output = tokenizer.encode("fox")
    assert IncrementalDetokenizer(tokenizer, prompt_token_ids=[bos]).add(output) == "fox"
    kept = IncrementalDetokenizer(tokenizer, prompt_token_ids=[bos], skip_special_tokens=False)
    assert kept.add(output) == " fox"


def test_a_long_stream_costs_the_same_per_token_as_a_short_one() -> None:
    tokenizer = tiny_tokenizer("byte_level")
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 20)

    def seconds_per_token(num_repeats: int) -> float:
        detokenizer = IncrementalDetokenizer(tokenizer)
        start = time.process_time()
        for _ in range(num_repeats):
            for each in ids:
                detokenizer.add((each,))
        return (time.process_time() - start) / (num_repeats * len(ids))

    short = min(seconds_per_token(1) for _ in range(5))
    assert seconds_per_token(60) < 10 * short
