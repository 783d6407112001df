"""The codec turns any bytes into an object or a WireError, within bounds of depth, size and
type."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest

from ipc import codec, expect
from ipc.codec import pack, unpack
from ipc.errors import WireError, shorten


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xa2\xff\xfe",
        b"\x81\x90\x01",
        b"\xd9\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x03",
        b"\xd6\xff\x00",
    ],
    ids=[
        "nothing",
        "a reserved byte",
        "a truncated array",
        "trailing bytes",
        "a string that is not UTF-8",
        "a map keyed by an array",
        "a truncated string",
        "an array of four billion entries",
        "a map of four billion entries",
        "an extension of four billion bytes",
        "a truncated timestamp",
    ],
)
def test_bad_bytes_raise_a_wire_error(payload: bytes) -> None:
    with pytest.raises(WireError):
        unpack(payload)


@pytest.mark.parametrize("code", [1, 2])
def test_pickles_are_refused_and_named(code: int) -> None:
    with pytest.raises(WireError, match=rf"extension type {code} \(a pickle\) is refused"):
        unpack(msgpack.packb([msgpack.ExtType(code, b"cos\nsystem\n")]))


def test_every_extension_type_but_array_data_is_refused() -> None:
    for code in set(range(128)) - {codec.ARRAY_EXT_TYPE}:
        with pytest.raises(WireError, match=f"extension type {code}"):
            unpack(msgpack.packb(msgpack.ExtType(code, b"x")))
    assert unpack(msgpack.packb(msgpack.ExtType(3, b"x"))) == msgpack.ExtType(3, b"x")


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x01", b"\xdc\x00\x01", b"\x81\xc0"])
@pytest.mark.parametrize("depth", [33, 500, 1_000, 1_100, 100_000])
def test_deep_nesting_never_crashes_and_is_refused_where_shapes_are_open(
    opening: bytes, depth: int
) -> None:
    with pytest.raises(WireError) as caught:
        expect.opaque(unpack(opening * depth + b"\xc0"), "value")
    assert len(str(caught.value)) < 300


def test_nesting_up_to_the_limit_is_accepted() -> None:
    value = unpack(b"\x91" * expect.MAX_DEPTH + b"\xc0")
    assert expect.opaque(value, "value") is value


def test_a_payload_over_the_size_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_PAYLOAD_BYTES", 10)
    assert unpack(bytes([0xA9]) + b"123456789") == "123456789"
    with pytest.raises(WireError, match="11 bytes exceed the limit of 10"):
        unpack(bytes([0xAA]) + b"1234567890")
    with pytest.raises(WireError, match="16 bytes exceed"):
        unpack(memoryview(bytes(16)).cast("H"))


def test_a_small_frame_cannot_claim_much_memory() -> None:
    claims = b"\xdd\x00\x00\x40\x00" * 1_000  # each an array of 16,384 entries, inside the last
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(claims)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 1024 * 1024


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, -(2**63) - 1, "\ud800", 1j])
def test_what_cannot_be_packed_raises_a_wire_error(value: object) -> None:
    with pytest.raises(WireError, match="not packable"):
        pack([value])


def test_a_structure_that_contains_itself_is_not_packable() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(WireError, match="not packable"):
        pack(loop)


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, -(2**63), 0, -1, 2**31])
def test_integers_keep_all_their_bits(number: int) -> None:
    assert unpack(pack(number)) == number


def test_timestamps_are_no_plain_data() -> None:
    with pytest.raises(WireError, match="plain data"):
        expect.opaque(unpack(b"\xd6\xff\x00\x00\x00\x00"), "value")


def test_error_messages_stay_short_whatever_the_value() -> None:
    deep: object = "x" * 1000
    for _ in range(900):
        deep = [deep, {"k": deep}]
    huge = [b"y" * 10_000_000, msgpack.ExtType(3, b"z" * 10_000_000), 10**300, "é" * 10_000]
    for value in (deep, huge, *huge, memoryview(b"12")):
        assert len(shorten(value)) <= 100
    assert shorten(b"1234") == "<4 bytes>"
