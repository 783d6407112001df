"""The stop-string matcher against a plain reference that reads character by character."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.text.stop_strings import StopMatch, StopStrings

STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def run(matcher: StopStrings, pieces: list[str]) -> tuple[str, str | None, int]:
    """The text given out, the stop string that ended it, and how many pieces were read."""
    text = ""
    for num_read, piece in enumerate(pieces, start=1):
        found = matcher.add(piece)
        if isinstance(found, StopMatch):
            return text + found.text, found.stop, num_read
        text += found
    return text + matcher.finish(), None, len(pieces)


def reference(stops: list[str], text: str, include: bool) -> tuple[str, str | None, int]:
    """Cut text, stop string, and how many characters had to be read for it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop, end
    return text, None, len(text)


@given(stops=STOPS, pieces=st.lists(st.text("abcd", max_size=5), max_size=8), include=st.booleans())
def test_any_cut_into_pieces_ends_the_text_where_the_reference_does(
    stops: list[str], pieces: list[str], include: bool
) -> None:
    text, stop, num_read = run(StopStrings(stops, include_in_output=include), pieces)
    expected_text, expected_stop, num_characters = reference(stops, "".join(pieces), include)
    assert (text, stop) == (expected_text, expected_stop)
    if stop is not None:
        num_before = len("".join(pieces[: num_read - 1]))
        assert num_before < num_characters <= num_before + len(pieces[num_read - 1])


@given(stops=STOPS, text=st.text("abcd", max_size=20))
def test_only_what_may_become_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher, given_out = StopStrings(stops), ""
    for num_read, character in enumerate(text, start=1):
        found = matcher.add(character)
        if isinstance(found, StopMatch):
            return
        given_out += found
        seen = text[:num_read]
        ends = [seen[start:] for start in range(num_read)]
        undecided = [end for end in ends if any(stop.startswith(end) for stop in stops)]
        assert given_out == seen.removesuffix(max(undecided, key=len, default=""))


def test_a_stop_string_spread_over_pieces_is_cut_and_its_beginning_never_given_out() -> None:
    matcher = StopStrings(["</answer>"])
    assert matcher.add("42</an") == "42"
    assert matcher.add("swer") == ""
    assert matcher.add("> more") == StopMatch("</answer>", "")


def test_a_beginning_that_comes_to_nothing_is_given_out_with_what_decided_it() -> None:
    matcher = StopStrings(["</answer>"])
    assert matcher.add("x</an") == "x"
    assert matcher.add("d>") == "</and>"
    assert matcher.add(" <") == " "
    assert matcher.finish() == "<"


def test_many_long_stop_strings_take_little_more_memory_than_themselves() -> None:
    stops = [f"{place:02}" * 512 for place in range(64)]
    tracemalloc.start()
    try:
        matchers = [StopStrings(stops) for _ in range(256)]
        assert matchers[-1].add(f"x{stops[-1][:-1]}") == "x"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert matchers[-1].add("3") == StopMatch(stops[-1], "")


def test_the_stop_string_stays_in_the_text_if_asked_for() -> None:
    matcher = StopStrings(["END"], include_in_output=True)
    assert matcher.add("the E") == "the "
    assert matcher.add("ND of it") == StopMatch("END", "END")


@pytest.mark.parametrize("pieces", [["xab", "cd"], ["xabcd"], ["x", "a", "b", "c", "d"]])
def test_of_two_stop_strings_the_one_complete_first_wins_however_the_text_is_cut(
    pieces: list[str],
) -> None:
    assert run(StopStrings(["abcd", "bc"]), pieces)[:2] == ("xa", "bc")


def test_without_match_a_complete_stop_string_passes_but_a_begun_one_may_still_be_completed() -> (
    None
):
    matcher = StopStrings(["ab"])
    assert matcher.add("ab a", match=False) == "ab "
    assert matcher.add("b") == StopMatch("ab", "")


def test_a_stop_string_that_passed_is_not_found_later() -> None:
    matcher = StopStrings(["ab", "abab"])
    assert matcher.add("ab", match=False) == ""
    assert matcher.add("x") == "abx"
