"""The front end's side of the handshake as a plain object: order, strangers, repetitions."""

from __future__ import annotations

import pytest

from frontend.engines.handshake import Handshake
from ipc.errors import WireError
from ipc.handshake import Hello, Init, Ready, engine_identity
from tests.support.mock_engine import make_registration

HELLO = Hello(local=True, headless=False).encode()
READY = Ready(local=True, headless=False).encode()
REGISTRATION = make_registration(max_model_len=64).encode()
FIRST, SECOND = engine_identity(0), engine_identity(1)


def handshake(num_engines: int = 2) -> Handshake:
    return Handshake(range(num_engines), lambda rank: Init(("in",), (f"out-{rank}",)))


def test_each_engine_is_told_its_own_addresses() -> None:
    peers = handshake()
    answer = peers.on_handshake(SECOND, HELLO)
    assert answer is not None
    assert Init.decode(answer).outputs == ("out-1",)


@pytest.mark.parametrize("ready_first", [True, False])
def test_ready_and_registration_may_come_in_either_order(ready_first: bool) -> None:
    peers = handshake(1)
    peers.on_handshake(FIRST, HELLO)
    if ready_first:
        assert peers.on_handshake(FIRST, READY) is None
    peers.on_registration(FIRST, REGISTRATION)
    if not ready_first:
        assert peers.missing_ranks == [0]
        assert peers.registrations == {}
        peers.on_handshake(FIRST, READY)
    assert peers.missing_ranks == []
    assert peers.registrations[0].max_model_len == 64


def test_L12_a_stranger_a_repetition_and_a_message_out_of_turn_are_refused_and_harm_nobody() -> (
    None
):
    peers = handshake()
    with pytest.raises(WireError, match=r"rank 7 called.*ranks 0 to 1"):
        peers.on_handshake(engine_identity(7), HELLO)
    with pytest.raises(WireError, match="READY out of turn"):
        peers.on_handshake(FIRST, READY)
    with pytest.raises(WireError, match="registered out of turn"):
        peers.on_registration(FIRST, REGISTRATION)
    peers.on_handshake(FIRST, HELLO)
    with pytest.raises(WireError, match="HELLO again"):
        peers.on_handshake(FIRST, HELLO)
    with pytest.raises(WireError):
        peers.on_handshake(SECOND, b"\xc1")
    with pytest.raises(WireError):
        peers.on_registration(FIRST, b"\x80")
    for identity in (FIRST, SECOND):
        if identity == SECOND:
            peers.on_handshake(identity, HELLO)
        peers.on_registration(identity, REGISTRATION)
        peers.on_handshake(identity, READY)
    assert peers.missing_ranks == []
