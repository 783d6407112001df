"""The registry: names, exclusivity, orphans, and that each request is removed once."""

from __future__ import annotations

import pytest

from frontend.errors import DuplicateRequestIdError
from frontend.requests.mailbox import Mailbox
from frontend.requests.registry import Entry, RequestRegistry


def entry(request_id: str, *, aliases: tuple[str, ...] = (), batch_id: str | None = None) -> Entry:
    internal_id = f"{request_id}-0"
    return Entry(internal_id, request_id, Mailbox(request_id), aliases=aliases, batch_id=batch_id)


def test_L1_a_request_can_be_removed_once_only() -> None:
    registry = RequestRegistry(1)
    live = entry("a")
    registry.register(live)
    assert registry.remove("a-0", engine_runs_it=False) is live
    assert registry.remove("a-0", engine_runs_it=False) is None
    assert len(registry) == 0


@pytest.mark.parametrize("newcomer", ["a", "alias of a"])
def test_L8_a_name_of_a_live_request_is_refused_and_free_again_after_its_end(newcomer: str) -> None:
    registry = RequestRegistry(1)
    registry.register(entry("a", aliases=("alias of a",)))
    with pytest.raises(DuplicateRequestIdError, match=repr(newcomer)):
        registry.register(entry("b", aliases=(newcomer,)))
    assert [live.request_id for live in registry] == ["a"]
    registry.remove("a-0", engine_runs_it=False)
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


def test_an_id_its_engine_still_runs_is_an_orphan_until_claimed() -> None:
    registry = RequestRegistry(2)
    live = entry("a")
    registry.register(live)
    registry.mark_sent(live, 1)
    registry.remove("a-0", engine_runs_it=True)
    assert (registry.num_orphans, registry.num_in_flight) == (1, [0, 1])
    assert registry.claim_orphan("a-0") == 1
    assert registry.claim_orphan("a-0") is None
    assert (registry.num_orphans, registry.num_in_flight) == (0, [0, 0])


def test_L12_only_its_own_engine_can_end_an_orphan() -> None:
    registry = RequestRegistry(2)
    live = entry("a")
    registry.register(live)
    registry.mark_sent(live, 1)
    registry.remove("a-0", engine_runs_it=True)
    registry.end_orphan("a-0", 0)
    assert registry.num_orphans == 1
    registry.end_orphan("a-0", 1)
    assert registry.num_orphans == 0


def test_a_request_that_no_engine_knows_leaves_no_orphan() -> None:
    registry = RequestRegistry(1)
    registry.register(entry("a"))
    registry.remove("a-0", engine_runs_it=True)
    assert registry.num_orphans == 0


def test_L12_the_orphans_of_a_dead_engine_are_forgotten_and_no_others() -> None:
    registry = RequestRegistry(2)
    for rank, request_id in enumerate(["a", "b"]):
        live = entry(request_id)
        registry.register(live)
        registry.mark_sent(live, rank)
        registry.remove(live.internal_id, engine_runs_it=True)
    registry.forget_orphans(0)
    assert registry.num_in_flight == [0, 1]
    assert registry.claim_orphan("b-0") == 1
