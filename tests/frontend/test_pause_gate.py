"""The gate by itself: who is held, for how long, and in which order they leave."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.errors import EnginePausedError, InvalidRequestError
from frontend.requests.mailbox import Mailbox
from frontend.requests.pause_gate import MAX_HOLD_S, MAX_NUM_HELD, PauseGate, PauseOrder
from frontend.requests.registry import Entry


def entry(name: str) -> Entry:
    return Entry(name, name, Mailbox(name, 1), accepted_s=0.0, add_frames=[b"add"])


def closed_gate(now: float = 0.0, **fields: Any) -> PauseGate:
    gate = PauseGate(now)
    gate.close(PauseOrder(**{"mode": "keep", "pause_id": "p"} | fields), now)
    return gate


def test_L9_a_pause_goes_from_running_over_draining_to_paused_and_back() -> None:
    gate = PauseGate(1.0)
    assert (gate.state, gate.is_open, gate.pause_id) == ("running", True, None)
    gate.close(PauseOrder(mode="keep", pause_id="p"), 2.0)
    assert (gate.state, gate.is_open, gate.pause_id, gate.since_s) == ("draining", False, "p", 2.0)
    gate.settle(3.0)
    assert (gate.state, gate.is_open, gate.since_s, gate.closed_s) == ("paused", False, 3.0, 2.0)
    assert gate.open(4.0) == []
    assert (gate.state, gate.is_open, gate.pause_id, gate.since_s) == ("running", True, None, 4.0)


def test_L9_what_is_held_leaves_in_order_and_once() -> None:
    gate = closed_gate()
    entries = [entry(name) for name in "abc"]
    for one in entries:
        gate.hold(one, 1.0)
    assert gate.open(2.0) == entries
    assert (gate.open(3.0), len(gate)) == ([], 0)


def test_L11_what_ends_while_held_leaves_at_once() -> None:
    gate = closed_gate()
    first, second = entry("first"), entry("second")
    gate.hold(first, 1.0)
    gate.hold(second, 1.0)
    gate.forget(first)
    gate.forget(first)
    assert gate.held == [second]


def test_L9_a_later_pause_rules_over_newcomers_and_keeps_what_an_earlier_one_holds() -> None:
    gate = closed_gate()
    gate.hold(entry("early"), 1.0)
    gate.check_newcomers(1)
    gate.close(PauseOrder(mode="wait", pause_id="q", newcomers="reject"), 2.0)
    assert (len(gate), gate.pause_id, gate.closed_s) == (1, "q", 0.0)
    with pytest.raises(EnginePausedError, match="'q'"):
        gate.check_newcomers(1)
    gate.check_room(1)  # Who was accepted before the pause and is ready only now.


def test_L9_a_call_is_held_whole_or_refused_whole_when_too_many_wait() -> None:
    gate = closed_gate()
    for index in range(MAX_NUM_HELD - 2):
        gate.hold(entry(str(index)), 1.0)
    gate.check_newcomers(2)
    with pytest.raises(EnginePausedError, match="3 more would exceed 4096"):
        gate.check_newcomers(3)
    gate.open(2.0)
    gate.check_newcomers(10 * MAX_NUM_HELD)


def test_L9_nobody_is_held_for_longer_than_the_limit() -> None:
    gate = closed_gate()
    assert gate.next_expiry_s(5.0) == 5.0 + MAX_HOLD_S
    early, late = entry("early"), entry("late")
    gate.hold(early, 10.0)
    gate.hold(late, 20.0)
    assert gate.next_expiry_s(50.0) == 10.0 + MAX_HOLD_S
    assert gate.expired(9.9 + MAX_HOLD_S) == []
    assert gate.expired(10.0 + MAX_HOLD_S) == [early]
    assert gate.expired(20.0 + MAX_HOLD_S) == [early, late]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mode": "stop"}, "mode='stop'"),
        ({"newcomers": "drop"}, "newcomers='drop'"),
        ({"lease_s": 0.0}, "lease_s=0.0"),
        ({"lease_s": float("inf")}, "lease_s=inf"),
        ({"lease_s": float("nan")}, "lease_s=nan"),
        ({"lease_s": 10**30}, "lease_s=1000"),
        ({"pause_id": "\ud800"}, "pause_id="),
        ({"pause_id": 5}, "pause_id=5"),
    ],
)
def test_a_wrong_order_names_its_field_and_value(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        PauseOrder(**{"mode": "keep", "pause_id": "p"} | fields)
