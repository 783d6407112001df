"""Receipts and status cross the wire as plain data."""

from __future__ import annotations

import pytest

from ipc.codec import pack, unpack
from ipc.errors import WireError
from ipc.lifecycle import AbortReceipt, EngineStatus, LiveRequest, LiveRequests, RequestReceipt


def test_L5_an_abort_receipt_survives_the_wire() -> None:
    receipt = AbortReceipt(
        {
            "a": RequestReceipt("aborted", num_output_tokens=7, stage="running"),
            "b": RequestReceipt("unknown"),
        },
        num_blocks_freed=3,
        num_blocks_cached=2,
    )
    assert AbortReceipt.from_wire(unpack(pack(receipt.to_wire()))) == receipt
    assert AbortReceipt.from_wire(unpack(pack(AbortReceipt().to_wire()))) == AbortReceipt()


def test_L11_an_engine_status_survives_the_wire() -> None:
    status = EngineStatus(
        state="paused",
        num_running=1,
        num_waiting=2,
        num_blocks=30,
        num_free_blocks=20,
        num_cached_blocks=9,
        num_steps=1000,
        weight_version="v3",
        integrity_errors=("block 7 is free and held",),
        counters={"num_duplicate_adds": 1},
    )
    assert EngineStatus.from_wire(unpack(pack(status.to_wire()))) == status
    assert EngineStatus.from_wire(status.to_wire()) == status


def test_a_list_of_live_requests_survives_the_wire_in_its_order() -> None:
    live = LiveRequests({"b": LiveRequest("decode", 7, num_preemptions=2), "a": LiveRequest("", 0)})
    received = LiveRequests.from_wire(unpack(pack(live.to_wire())))
    assert received == live
    assert list(received.requests) == ["b", "a"]
    assert LiveRequests.from_wire({}) == LiveRequests()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([], "live_requests: expected a map"),
        ({5: {"stage": "decode", "num_output_tokens": 1}}, "live_requests: expected"),
        ({"a": {"num_output_tokens": 1}}, r"live_requests\['a'\].stage"),
        ({"a": {"stage": "decode"}}, r"live_requests\['a'\].num_output_tokens"),
    ],
)
def test_a_bad_list_of_live_requests_is_refused_by_path(value: object, path: str) -> None:
    with pytest.raises(WireError, match=path):
        LiveRequests.from_wire(value)


def test_unknown_keys_are_ignored_and_missing_counts_are_zero() -> None:
    assert EngineStatus.from_wire({"state": "running", "new": 1}) == EngineStatus(state="running")
    assert RequestReceipt.from_wire({"status": "finished", "new": 1}) == RequestReceipt("finished")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (None, "abort_receipt: expected a map"),
        ({}, "abort_receipt.requests"),
        ({"requests": {5: {"status": "aborted"}}}, "abort_receipt.requests"),
        (
            {"requests": {"a": {"status": "gone"}}},
            r"requests\['a'\].status: expected one of",
        ),
        ({"requests": {"a": {"status": "aborted", "stage": 5}}}, r"requests\['a'\].stage"),
        ({"requests": {}, "num_blocks_freed": -1}, "abort_receipt.num_blocks_freed"),
    ],
)
def test_a_bad_receipt_is_refused_by_path(value: object, path: str) -> None:
    with pytest.raises(WireError, match=path):
        AbortReceipt.from_wire(value)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"state": None}, "engine_status.state"),
        ({"num_blocks": "x"}, "engine_status.num_blocks"),
        ({"integrity_errors": 5}, "engine_status.integrity_errors"),
        ({"integrity_errors": [5]}, r"engine_status.integrity_errors\[0\]"),
        ({"counters": {"a": 0.5}}, r"engine_status.counters\['a'\]"),
        ({"counters": []}, "engine_status.counters"),
    ],
)
def test_a_bad_status_is_refused_by_path(change: dict[str, object], path: str) -> None:
    with pytest.raises(WireError, match=path):
        EngineStatus.from_wire({"state": "running"} | change)
