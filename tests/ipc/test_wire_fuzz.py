"""L12 on the wire: whatever bytes arrive, a decoder returns a message or raises WireError."""

from __future__ import annotations

from collections.abc import Callable

import msgpack
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ipc.abort import decode_abort
from ipc.codec import pack, unpack
from ipc.errors import WireError
from ipc.frames import InputError, decode_input
from ipc.handshake import Init, Registration, decode_handshake
from ipc.lifecycle import AbortReceipt, EngineStatus
from ipc.output import EngineCoreOutputs, decode_outputs, encode_outputs
from ipc.request import SamplingParams
from tests.support.golden_frames import GOLDEN

Frames = list[bytes]

DECODERS: list[Callable[[Frames], object]] = [
    lambda frames: decode_outputs(frames),
    lambda frames: decode_handshake(frames[0]),
    lambda frames: Init.decode(frames[0]),
    lambda frames: Registration.decode(frames[0]),
    lambda frames: decode_abort(frames[0]),
    lambda frames: SamplingParams.from_wire(unpack(frames[0])),
    lambda frames: AbortReceipt.from_wire(unpack(frames[0])),
    lambda frames: EngineStatus.from_wire(unpack(frames[0])),
]


def decode_every_way(frames: Frames) -> None:
    """Fails by whatever is raised besides the errors that are promised."""
    for decode in DECODERS:
        try:
            decode(frames)
        except WireError as caught:
            refusal = str(caught)
            assert len(refusal) < 1000, refusal
    for kind in range(5):
        try:
            decode_input([bytes([kind]), *frames])
        except InputError as caught:
            sender = caught.client_index
            assert sender is None or sender >= 0, sender


def golden_messages() -> st.SearchStrategy[Frames]:
    return st.sampled_from([[frame.content for frame in frames] for frames in GOLDEN.values()])


@st.composite
def mutated_golden_messages(draw: st.DrawFn) -> Frames:
    """A golden message with a few bytes changed, removed or put in."""
    frames = [bytearray(frame) for frame in draw(golden_messages())]
    for _ in range(draw(st.integers(1, 5))):
        frame = frames[draw(st.integers(0, len(frames) - 1))]
        start = draw(st.integers(0, len(frame)))
        end = start + draw(st.integers(0, 4))
        frame[start:end] = draw(st.binary(max_size=6))
    return [bytes(frame) for frame in frames]


wild_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.builds(msgpack.ExtType, st.just(3), st.binary(max_size=8))
)
wild = st.recursive(
    wild_leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(wild_leaves.filter(lambda key: key == key), inner, max_size=3)
    ),
    max_leaves=12,
)


@st.composite
def golden_messages_with_wild_values(draw: st.DrawFn) -> Frames:
    """A golden message of which one value, at any depth, is replaced by any other."""
    frames = draw(golden_messages())
    try:
        value = unpack(frames[0])
    except WireError:  # a golden frame of which the file holds the beginning only
        return frames
    return [pack(_replace_one(draw, value)), *frames[1:]]


def _replace_one(draw: st.DrawFn, value: object) -> object:
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _replace_one(draw, value[index]), *value[index + 1 :]]
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(list(value)))
        return value | {key: _replace_one(draw, value[key])}
    return draw(wild)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=64), min_size=1, max_size=3))
@example([b"ENGINE_CORE_DEAD"])
@example([b"\x91" * 2_000])
@example([b"\x81\xa1a" * 2_000])
@example([b"\xdd\x00\x10\x00\x00" * 200])
@example([b"\x92\xa1r" + b"\x91" * 900 + b"\xc0"])
def test_L12_random_bytes_raise_nothing_but_wire_errors(frames: Frames) -> None:
    decode_every_way(frames)


@settings(deadline=None, max_examples=400)
@given(mutated_golden_messages())
def test_L12_damaged_frames_raise_nothing_but_wire_errors(frames: Frames) -> None:
    decode_every_way(frames)


@settings(deadline=None, max_examples=400)
@given(golden_messages_with_wild_values())
def test_L12_frames_with_wild_values_raise_nothing_but_wire_errors(frames: Frames) -> None:
    decode_every_way(frames)


@settings(deadline=None, max_examples=300)
@given(wild)
def test_L12_any_value_raises_nothing_but_wire_errors(value: object) -> None:
    decode_every_way([pack(value)])


@settings(deadline=None, max_examples=100)
@given(golden_messages(), st.data())
def test_L12_a_message_cut_anywhere_is_refused(frames: Frames, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(frames[0]) - 1))
    decode_every_way([frames[0][:length], *frames[1:]])


@settings(deadline=None, max_examples=200)
@given(mutated_golden_messages())
def test_L12_what_decodes_can_be_encoded_again_or_is_refused(frames: Frames) -> None:
    try:
        message = decode_outputs(frames)
        encoded = encode_outputs(message, full=True)
    except WireError:
        return
    assert isinstance(decode_outputs(encoded), EngineCoreOutputs)
