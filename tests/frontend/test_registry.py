"""The registry: names, exclusivity, ending requests, and that each is removed once."""

from __future__ import annotations

import pytest

from frontend.errors import DuplicateRequestIdError
from frontend.outputs import AbortCause
from frontend.requests.mailbox import Mailbox
from frontend.requests.registry import Entry, RequestRegistry


def entry(request_id: str, *, aliases: tuple[str, ...] = (), batch_id: str | None = None) -> Entry:
    internal_id = f"{request_id}-0"
    return Entry(
        internal_id, request_id, Mailbox(request_id), 0.0, aliases=aliases, batch_id=batch_id
    )


def ending(registry: RequestRegistry, request_id: str, engine_index: int) -> str:
    """A request that ended here while its engine runs it: its internal id."""
    live = entry(request_id)
    registry.register(live)
    registry.mark_sent(live, engine_index)
    assert registry.remove_running(live, AbortCause.DROPPED_STREAM, now=1.0)
    return live.internal_id


def test_L1_a_request_can_be_removed_once_only() -> None:
    registry = RequestRegistry(1)
    live = entry("a")
    registry.register(live)
    assert registry.remove(live)
    assert not registry.remove(live)
    assert not registry.remove_running(live, AbortCause.DROPPED_STREAM, now=1.0)
    assert registry.num_ending == 0
    assert len(registry) == 0


@pytest.mark.parametrize("newcomer", ["a", "alias of a"])
def test_L8_a_name_of_a_live_request_is_refused_and_free_again_after_its_end(newcomer: str) -> None:
    registry = RequestRegistry(1)
    live = entry("a", aliases=("alias of a",))
    registry.register(live)
    with pytest.raises(DuplicateRequestIdError, match=repr(newcomer)):
        registry.register(entry("b", aliases=(newcomer,)))
    assert [live.request_id for live in registry] == ["a"]
    registry.remove(live)
    registry.register(entry(newcomer))


def test_L3_a_batch_id_leads_to_its_children_and_only_to_them() -> None:
    registry = RequestRegistry(1)
    for index in range(3):
        registry.register(entry(f"batch_{index}", batch_id="batch"))
    registry.register(entry("batch_10"))
    found = registry.select_names(["batch", "batch_1", "nobody"])
    assert [live.request_id for live in found["batch"]] == ["batch_0", "batch_1", "batch_2"]
    assert [live.request_id for live in found["batch_1"]] == ["batch_1"]
    assert found["nobody"] == []


def test_L8_a_batch_cannot_take_the_name_of_a_live_request_nor_a_request_that_of_a_batch() -> None:
    registry = RequestRegistry(1)
    registry.register(entry("solo"))
    with pytest.raises(DuplicateRequestIdError, match="'solo'"):
        registry.register(entry("solo_0", batch_id="solo"))
    registry.register(entry("batch_0", batch_id="batch"))
    with pytest.raises(DuplicateRequestIdError, match="'batch'"):
        registry.register(entry("batch"))
    registry.register(entry("batch_1", batch_id="batch"))


def test_L3_the_aliases_of_a_batch_are_names_of_all_its_children() -> None:
    registry = RequestRegistry(1)
    for index in range(2):
        registry.register(entry(f"b-{index}", batch_id="b", aliases=("cmpl-b",)))
    assert len(registry.select_names(["cmpl-b"])["cmpl-b"]) == 2
    with pytest.raises(DuplicateRequestIdError, match="'cmpl-b'"):
        registry.register(entry("c", aliases=("cmpl-b",)))


def test_L7_a_request_that_its_engine_still_runs_is_claimed_for_one_abort() -> None:
    registry = RequestRegistry(2)
    internal_id = ending(registry, "a", 1)
    assert (registry.num_ending, registry.num_in_flight) == (1, [0, 1])
    assert registry.claim_for_abort(internal_id) == 1
    assert registry.claim_for_abort(internal_id) is None
    assert (registry.num_ending, registry.num_in_flight) == (1, [0, 1])
    registry.end(internal_id)
    registry.end(internal_id)
    assert (registry.num_ending, registry.num_in_flight) == (0, [0, 0])


def test_L12_only_its_own_engine_has_a_say_in_an_ending_request() -> None:
    registry = RequestRegistry(2)
    internal_id = ending(registry, "a", 1)
    assert registry.get_ending(internal_id, 0) is None
    assert registry.get_ending(internal_id, 1) is not None


def test_a_request_that_no_engine_knows_ends_at_once() -> None:
    registry = RequestRegistry(1)
    live = entry("a")
    registry.register(live)
    assert registry.remove_running(live, AbortCause.DROPPED_STREAM, now=1.0)
    assert registry.num_ending == 0


def test_L12_what_was_ending_in_a_dead_engine_is_forgotten_and_nothing_else() -> None:
    registry = RequestRegistry(2)
    ending(registry, "a", 0)
    other = ending(registry, "b", 1)
    registry.end_all_of(0)
    assert registry.num_in_flight == [0, 1]
    assert registry.claim_for_abort(other) == 1
