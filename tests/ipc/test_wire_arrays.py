"""Arrays on the wire: inlined or in frames of their own, and never larger or smaller than they
say."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from ipc.arrays import decode_array, encode_array
from ipc.codec import pack, unpack
from ipc.errors import WireError


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4), (70, 4)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_array_survives_the_wire(dtype: str, shape: tuple[int, ...], as_tensor: bool) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    aux: list[bytes] = []
    body = pack(encode_array(array, aux, as_tensor=as_tensor))
    result = decode_array(unpack(body), [body, *aux], "array")
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert np.array_equal(result, array)
    assert not aux or not result.flags.writeable


def test_256_bytes_travel_in_a_frame_of_their_own_and_fewer_do_not() -> None:
    aux: list[bytes] = []
    assert encode_array(np.zeros(255, np.uint8), aux)[2] == msgpack.ExtType(3, bytes(255))
    assert encode_array(np.zeros(256, np.uint8), aux) == ["|u1", (256,), 1]
    assert encode_array(np.ones(256, np.int8), aux) == ["|i1", (256,), 2]
    assert aux == [bytes(256), bytes([1] * 256)]


def test_an_array_that_is_not_contiguous_is_written_in_order() -> None:
    aux: list[bytes] = []
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    wire = unpack(pack(encode_array(array, aux)))
    assert np.array_equal(decode_array(wire, [b""], "array"), array)


@pytest.mark.parametrize("dtype", ["<U1", "O", ">i4", "<c8", "<M8[s]"])
def test_other_dtypes_are_not_written(dtype: str) -> None:
    with pytest.raises(WireError, match="cannot cross the wire"):
        encode_array(np.zeros(1, dtype), [])


FOUR, EMPTY = msgpack.ExtType(3, bytes(4)), msgpack.ExtType(3, b"")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "array: expected an array"),
        (["<i4", [1]], "at least 3 entries"),
        (["|O", [1], FOUR], "array.dtype"),
        (["object", [1], FOUR], "array.dtype"),
        ([">i4", [1], FOUR], "array.dtype"),
        (["<U1", [1], FOUR], "array.dtype"),
        (["bfloat16", [2], FOUR], "array.dtype"),
        ([["<i4"], [1], FOUR], "array.dtype"),
        ([4, [1], FOUR], "array.dtype"),
        (["<i4", [2], FOUR], r"array.shape: expected the shape of 4 bytes of int32, got \[2\]"),
        (["<i4", [0], FOUR], "array.shape"),
        (["<i4", [-1], FOUR], "array.shape"),
        (["<i4", [-1, -1], FOUR], "array.shape"),
        (["<i4", [0, -1], EMPTY], "array.shape"),
        (["<i4", [True], FOUR], "array.shape"),
        (["<i4", [1.0], FOUR], "array.shape"),
        (["<i4", [None], FOUR], "array.shape"),
        (["<i4", [[1]], FOUR], "array.shape"),
        (["<i4", [2**31], FOUR], "array.shape"),
        (["<i4", [2**64 - 1], FOUR], "array.shape"),
        (["<i4", [2**30, 2**30, 2**30], FOUR], "array.shape"),
        (["<i4", [0, *[2**31 - 1] * 7], EMPTY], "array.shape"),
        (["<i4", [1] * 100, FOUR], "array.shape"),
        (["<i4", None, FOUR], "array.shape"),
        (["<i4", [1], msgpack.ExtType(3, bytes(5))], "array.shape"),
        (["<i4", [1], bytes(4)], "array.data"),
        (["<i4", [1], {"name": "psm_0", "size": 4}], "array.data"),
        (["<i4", [1], None], "array.data"),
        (["<i4", [1], 0], r"array.data: .* the number of an auxiliary frame \(the message has 1\)"),
        (["<i4", [1], 2], "array.data"),
        (["<i4", [1], -1], "array.data"),
        (["<i4", [1], True], "array.data"),
    ],
)
def test_a_bad_array_is_refused(value: object, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        decode_array(value, [b"body", bytes(4)], "array")


def test_a_frame_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(WireError, match="the shape of 3 bytes of int32"):
        decode_array(["<i4", [1], 1], [b"body", bytes(3)], "array")
