"""What an engine makes of a front end's messages, and what it can still say to the sender of a bad
one."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from ipc.abort import Abort, decode_abort, encode_abort
from ipc.codec import MAX_PAYLOAD_BYTES, pack
from ipc.errors import WireError
from ipc.frames import InputError, RequestType, decode_input
from ipc.request import EngineCoreRequest, SamplingParams, decode_add, encode_add, encode_new
from ipc.utility import UtilityCall, encode_utility

ADD, ABORT, UTILITY = RequestType.ADD.frame, RequestType.ABORT.frame, RequestType.UTILITY.frame


def add_payload(length: int = 22, /, **changes: Any) -> list[object]:
    """The positions of a good ADD, some of them changed."""
    request = EngineCoreRequest(
        request_id="r", prompt_token_ids=[1], sampling_params=SamplingParams(), client_index=3
    )
    payload = msgpack.unpackb(encode_add(request)[1], strict_map_key=False)
    for name, value in changes.items():
        payload[EngineCoreRequest.__slots__.index(name)] = value
    return list(payload[:length])


def refusal(frames: list[bytes]) -> InputError:
    with pytest.raises(InputError) as caught:
        decode_input(frames)
    return caught.value


# ── ADD ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_add_needs_nine_positions_and_ignores_those_after_the_22nd() -> None:
    short = decode_input([ADD, pack(add_payload(9))])
    assert short == EngineCoreRequest(
        request_id="r", prompt_token_ids=[1], sampling_params=SamplingParams()
    )
    long = decode_input([ADD, pack([*add_payload(), {"new": 1}, b"x"])])
    assert isinstance(long, EngineCoreRequest)
    assert long.client_index == 3
    assert "at least 9 entries" in str(refusal([ADD, pack(add_payload(8))]))


def test_an_integer_arrival_time_is_tolerated() -> None:
    request = decode_add([ADD, pack(add_payload(arrival_time=7))])
    assert request.arrival_time == 7.0
    assert type(request.arrival_time) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_id", None),
        ("request_id", b"r"),
        ("request_id", ""),
        ("prompt_token_ids", [1, -1]),
        ("prompt_token_ids", "12"),
        ("prompt_token_ids", [True]),
        ("sampling_params", []),
        ("sampling_params", {"temperature": -1}),
        ("arrival_time", None),
        ("arrival_time", float("nan")),
        ("data_parallel_rank", -1),
        ("client_index", None),
        ("client_index", -1),
        ("client_index", True),
        ("priority", 0.5),
        ("priority", 2**63),
        ("resumable", None),
        ("abort_immediately", 0),
        ("trace_headers", []),
        ("cache_salt", 5),
        ("external_req_id", 5),
    ],
)
def test_a_bad_field_is_refused_by_path_and_the_sender_is_known(name: str, value: object) -> None:
    error = refusal([ADD, pack(add_payload(**{name: value}))])
    assert str(error).startswith((f"request.{name}", f"{name}."))
    assert error.request_id == (None if name == "request_id" else "r")
    assert error.client_index == (None if name == "client_index" else 3)
    assert error.call_id is None


def test_features_that_our_engine_lacks_decode_and_are_named() -> None:
    request = decode_add(
        [
            ADD,
            pack(
                add_payload(
                    mm_features=[{"data": [1, 2]}],
                    lora_request=["ad", 1, "/p", None, False, False],
                    prompt_embeds=["float32", [1], 1],
                    resumable=True,
                    sampling_params={"n": 2, "bad_words": ["x"]},
                )
            ),
            bytes(4),
        ]
    )
    assert set(request.unsupported) == {
        "mm_features",
        "lora_request",
        "prompt_embeds",
        "resumable",
        "bad_words",
        "n",
    }
    pooling = decode_add([ADD, pack(add_payload(sampling_params=None, pooling_params=[None] * 10))])
    assert pooling.unsupported == ("pooling_params",)
    assert decode_add([ADD, pack(add_payload(mm_features=[]))]).unsupported == ()


@pytest.mark.parametrize("code", [1, 2])
def test_a_pickled_field_is_refused_and_the_sender_is_known(code: int) -> None:
    payload = add_payload(mm_features=msgpack.ExtType(code, b"cos\nsystem\n"))
    error = refusal([ADD, msgpack.packb(payload)])
    assert "pickle" in str(error)
    assert (error.request_id, error.client_index) == ("r", 3)


def test_what_a_truncated_add_still_tells_is_kept() -> None:
    payload = pack(add_payload())
    error = refusal([ADD, payload[:-1]])
    assert (error.request_id, error.client_index) == ("r", 3)
    error = refusal([ADD, payload[:6]])
    assert (error.request_id, error.client_index) == ("r", None)
    error = refusal([ADD, payload[:3]])
    assert (error.request_id, error.client_index) == (None, None)


def test_L12_the_sender_of_a_message_beyond_the_size_limit_is_known() -> None:
    too_much = {"x": bytes(MAX_PAYLOAD_BYTES)}
    error = refusal([ADD, pack(add_payload(trace_headers=too_much))])
    assert "exceed the limit" in str(error)
    assert (error.request_id, error.client_index) == ("r", 3)
    error = refusal(encode_utility(UtilityCall(1, 7, "m", (too_much,))))
    assert (error.call_id, error.client_index) == (7, 1)


def test_a_client_index_that_an_add_may_leave_out_is_zero() -> None:
    error = refusal([ADD, pack(add_payload(9, arrival_time=None))])
    assert (error.request_id, error.client_index) == ("r", 0)


# ── ABORT ─────────────────────────────────────────────────────────────────────────────────────────


def test_bad_entries_of_an_abort_do_not_save_the_others() -> None:
    abort = decode_input([ABORT, pack(["a", None, "", 5, "b", ["c"], b"d", True, "a"])])
    assert abort == Abort(("a", "b", "a"), num_ignored=4)


def test_a_bare_string_is_one_id() -> None:
    assert decode_abort(pack("req-1")) == Abort(("req-1",))
    assert decode_abort(pack("")) == Abort(())
    assert decode_abort(pack([])) == Abort(())


@pytest.mark.parametrize("value", [None, 5, {"req-1": 1}, b"req-1"])
def test_an_abort_that_is_no_array_is_refused(value: object) -> None:
    error = refusal([ABORT, pack(value)])
    assert "request_ids: expected an array" in str(error)
    assert (error.request_id, error.client_index, error.call_id) == (None, None, None)


def test_an_abort_takes_any_iterable_and_keeps_its_order() -> None:
    frames = encode_abort(name for name in ("z", "a"))
    assert frames == [b"\x01", b"\x92\xa1z\xa1a"]


# ── UTILITY ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call_id", [0, 1, 2**63, 2**64 - 1, -1, -2])
def test_call_ids_keep_all_their_bits(call_id: int) -> None:
    call = UtilityCall(1, call_id, "is_sleeping", ())
    assert decode_input(encode_utility(call)) == call


@pytest.mark.parametrize(
    ("payload", "client_index", "call_id"),
    [
        ([2, 9, 5, []], 2, 9),
        ([2, 9, "m", None], 2, 9),
        ([2, 9, "m"], 2, 9),
        ([2, 2**64 - 1, "m", {}], 2, 2**64 - 1),
        ([2, "9", "m", []], 2, None),
        ([-1, 9, "m", []], None, 9),
        ([True, 9, "m", []], None, 9),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_a_bad_call_is_refused_and_can_be_answered(
    payload: object, client_index: int | None, call_id: int | None
) -> None:
    error = refusal([UTILITY, pack(payload)])
    assert (error.client_index, error.call_id) == (client_index, call_id)
    assert error.request_id is None


def test_a_call_with_trailing_entries_is_accepted() -> None:
    assert decode_input([UTILITY, pack([0, 1, "m", [2], "new"])]) == UtilityCall(0, 1, "m", (2,))


def test_arguments_nested_too_deep_are_refused() -> None:
    argument: object = 1
    for _ in range(40):
        argument = [argument]
    error = refusal([UTILITY, pack([0, 1, "m", [argument]])])
    assert "nested at most 32 deep" in str(error)
    assert error.call_id == 1


# ── the message as such ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("frames", [[], [b""], [ADD], [ABORT], [UTILITY]])
def test_a_message_without_a_payload_is_refused(frames: list[bytes]) -> None:
    assert "expected a type byte and a payload" in str(refusal(frames))


def test_decoding_an_add_alone_needs_its_payload_too() -> None:
    with pytest.raises(WireError, match="the payload frame is missing"):
        decode_add([ADD])


@pytest.mark.parametrize("kind", [b"", b"\x02", b"\x04", b"\x05", b"\xff", b"\x00\x00", b"ADD"])
def test_an_unknown_type_byte_is_refused_and_named(kind: bytes) -> None:
    error = refusal([kind, pack(add_payload())])
    assert repr(kind.hex()) in str(error)
    assert (error.request_id, error.client_index) == (None, None)


def test_frames_may_be_views_of_memory() -> None:
    frames = [memoryview(frame) for frame in encode_abort(["a"])]
    assert decode_input(frames) == Abort(("a",))


def test_an_input_error_is_a_wire_error() -> None:
    assert issubclass(InputError, WireError)


def test_the_cheap_encoding_of_a_new_request_is_that_of_the_whole_object() -> None:
    params = SamplingParams(
        temperature=0.5, stop_token_ids=(3,), all_stop_token_ids=frozenset({3, 4})
    )
    whole = encode_add(
        EngineCoreRequest(
            request_id="r",
            prompt_token_ids=[1, 2],
            sampling_params=params,
            arrival_time=1.5,
            client_index=2,
            priority=-1,
            external_req_id="mine",
        )
    )
    cheap = encode_new(
        request_id="r",
        prompt_token_ids=[1, 2],
        sampling_params=params.to_wire(),
        arrival_time=1.5,
        client_index=2,
        priority=-1,
        external_req_id="mine",
    )
    assert cheap == whole
