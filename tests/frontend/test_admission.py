"""The limits on what may wait for its first token."""

from __future__ import annotations

import random

import pytest

from frontend.errors import InvalidRequestError, OverloadedError
from frontend.requests.admission import Admission, Place


def limited(*, requests: int | None = None, tokens: int | None = None) -> Admission:
    return Admission(max_num_queued_requests=requests, max_num_queued_tokens=tokens)


def test_without_limits_everything_may_wait() -> None:
    admission = limited()
    places = [admission.enter(10**6) for _ in range(1000)]
    admission.check(10**6, 10**9)
    assert admission.num_queued_requests == len(places)


def test_a_full_queue_refuses_and_says_how_many_wait_and_which_flag_raises_the_limit() -> None:
    admission = limited(requests=2)
    for _ in range(2):
        admission.check(1, 5)
        admission.enter(5)
    with pytest.raises(OverloadedError) as refusal:
        admission.check(1, 5)
    assert refusal.value.limit == "max_num_queued_requests"
    assert str(refusal.value).startswith("2 requests wait for their first token, and 1 more would")
    assert "--max-num-queued-requests" in str(refusal.value)
    assert admission.num_queued_requests == 2


def test_a_first_token_makes_room_for_the_next_request() -> None:
    admission = limited(requests=1, tokens=10)
    place = admission.enter(10)
    with pytest.raises(OverloadedError):
        admission.check(1, 1)
    place.leave()
    admission.check(1, 1)


def test_a_call_of_several_requests_comes_in_whole_or_not_at_all() -> None:
    admission = limited(requests=3)
    admission.enter(1)
    admission.check(2, 2)
    with pytest.raises(OverloadedError):
        admission.check(3, 3)
    assert admission.num_queued_requests == 1


def test_a_call_that_could_never_come_in_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequestError, match="the call has 4 requests, but at most max_num_"):
        limited(requests=3).check(4, 4)


def test_so_many_tokens_wait_and_no_more() -> None:
    admission = limited(tokens=100)
    admission.enter(60)
    admission.check(1, 40)
    with pytest.raises(OverloadedError) as refusal:
        admission.check(1, 41)
    assert refusal.value.limit == "max_num_queued_tokens"
    assert str(refusal.value).startswith("60 prompt tokens wait to be computed, and 41 more would")
    assert "--max-num-queued-tokens" in str(refusal.value)


def test_a_long_prompt_with_nothing_ahead_of_it_may_exceed_the_limit_on_tokens() -> None:
    admission = limited(tokens=100)
    admission.check(1, 5000)
    admission.enter(5000)
    with pytest.raises(OverloadedError):
        admission.check(1, 1)


def test_a_text_counts_from_when_it_is_tokenized() -> None:
    admission = limited(tokens=100)
    place = admission.enter()
    assert (admission.num_queued_requests, admission.num_queued_tokens) == (1, 0)
    place.set_num_prompt_tokens(70)
    assert admission.num_queued_tokens == 70
    place.leave()
    assert (admission.num_queued_requests, admission.num_queued_tokens) == (0, 0)


def test_a_text_that_turns_out_too_long_for_the_queue_is_refused_and_leaves_nothing() -> None:
    admission = limited(tokens=100)
    place, ahead = admission.enter(), admission.enter(80)
    with pytest.raises(OverloadedError):
        admission.check(0, 70)
    assert admission.num_queued_tokens == 80
    place.leave()
    ahead.leave()
    assert (admission.num_queued_requests, admission.num_queued_tokens) == (0, 0)


def test_a_full_queue_of_requests_does_not_refuse_the_tokens_of_one_that_is_in_it() -> None:
    admission = limited(requests=1, tokens=100)
    admission.enter().set_num_prompt_tokens(100)
    assert admission.num_queued_tokens == 100


def test_a_place_is_left_once_however_often_it_is_said() -> None:
    admission = limited()
    place, other = admission.enter(10), admission.enter(20)
    place.leave()
    place.leave()
    place.set_num_prompt_tokens(500)
    assert (admission.num_queued_requests, admission.num_queued_tokens) == (1, 20)
    other.leave()
    assert (admission.num_queued_requests, admission.num_queued_tokens) == (0, 0)


def test_L11_whatever_happens_the_counts_are_those_of_the_places_that_are_held() -> None:
    chance = random.Random(1)
    admission = limited(requests=40, tokens=500)
    held: dict[Place, int] = {}
    for _ in range(5000):
        try:
            match chance.randrange(3):
                case 0:
                    num_tokens = chance.choice([0, chance.randrange(100)])
                    admission.check(1, num_tokens)
                    held[admission.enter(num_tokens)] = num_tokens
                case 1 if unknown := [place for place, num in held.items() if num == 0]:
                    place, num_tokens = chance.choice(unknown), chance.randrange(100)
                    place.set_num_prompt_tokens(num_tokens)
                    held[place] = num_tokens
                case 2 if held:
                    place = chance.choice(list(held))
                    del held[place]
                    place.leave()
        except OverloadedError:
            pass
        assert admission.num_queued_requests == len(held) <= 40
        assert admission.num_queued_tokens == sum(held.values())
