"""The sockets: private, unbounded, never lingering; a ROUTER knows who is there and who came
back."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from ipc.sockets import (
    bind_pull,
    bind_router,
    bound_address,
    check_address,
    connect_dealer,
    connect_push,
    connect_xsub,
    private_directory,
)

WAIT_MS = 5_000


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def ipc_address() -> Iterator[str]:
    with private_directory() as directory:
        yield f"ipc://{directory}/socket"


def receive(socket: zmq.Socket[Any]) -> list[bytes]:
    assert socket.poll(WAIT_MS), "nothing arrived"
    return socket.recv_multipart()


def test_the_directory_of_ipc_sockets_admits_its_owner_only() -> None:
    directory = private_directory()
    try:
        mode = stat.S_IMODE(Path(directory.name).stat().st_mode)
        assert mode == 0o700
    finally:
        directory.cleanup()
    assert not Path(directory.name).exists()


def test_frames_reach_the_engine_with_an_identity_and_its_outputs_come_back(
    context: zmq.Context[zmq.Socket[bytes]], ipc_address: str
) -> None:
    router = bind_router(context, ipc_address)
    dealer = connect_dealer(context, ipc_address, b"\1\0")
    dealer.send(b"registration")
    assert receive(router) == [b"\1\0", b"registration"]
    router.send_multipart([b"\1\0", b"\0", b"payload", b"aux"])
    assert receive(dealer) == [b"\0", b"payload", b"aux"]

    pull = bind_pull(context, ipc_address + "-output")
    push = connect_push(context, ipc_address + "-output")
    push.send_multipart([b"body", b"aux"])
    assert receive(pull) == [b"body", b"aux"]


def test_an_engine_may_dial_before_its_front_end_binds(
    context: zmq.Context[zmq.Socket[bytes]], ipc_address: str
) -> None:
    dealer = connect_dealer(context, ipc_address, b"\0\0")
    dealer.send(b"HELLO")
    assert receive(bind_router(context, ipc_address)) == [b"\0\0", b"HELLO"]


def test_sending_to_an_engine_that_is_not_there_raises(
    context: zmq.Context[zmq.Socket[bytes]], ipc_address: str
) -> None:
    router = bind_router(context, ipc_address)
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"\7\0", b"\0", b"payload"])
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_L12_a_restarted_engine_takes_its_identity_back(
    context: zmq.Context[zmq.Socket[bytes]], ipc_address: str
) -> None:
    router = bind_router(context, ipc_address)
    first = connect_dealer(context, ipc_address, b"\0\0")
    first.send(b"first")
    assert receive(router) == [b"\0\0", b"first"]
    second = connect_dealer(context, ipc_address, b"\0\0")
    second.send(b"second")
    assert receive(router) == [b"\0\0", b"second"]
    router.send_multipart([b"\0\0", b"for the newcomer"])
    assert receive(second) == [b"for the newcomer"]
    assert not first.poll(50)


def test_a_sender_never_blocks_on_a_reader_that_does_not_read(
    context: zmq.Context[zmq.Socket[bytes]], ipc_address: str
) -> None:
    pull = bind_pull(context, ipc_address)
    push = connect_push(context, ipc_address)
    for _ in range(5_000):  # five times ZeroMQ's default limit on each side
        push.send(b"x", zmq.NOBLOCK)
    for _ in range(5_000):
        assert receive(pull) == [b"x"]


def test_every_socket_has_the_options_of_the_wire(
    context: zmq.Context[zmq.Socket[bytes]], ipc_address: str
) -> None:
    sockets = [
        bind_router(context, ipc_address),
        bind_pull(context, ipc_address + "-output"),
        connect_dealer(context, ipc_address, b"\0\0"),
        connect_push(context, ipc_address + "-output"),
        connect_xsub(context, ipc_address + "-coordinator", b"\0\0"),
    ]
    for socket in sockets:
        assert socket.getsockopt(zmq.LINGER) == 0
        assert socket.getsockopt(zmq.SNDHWM) == 0
        assert socket.getsockopt(zmq.RCVHWM) == 0
    assert sockets[2].getsockopt(zmq.IDENTITY) == b"\0\0"


async def test_the_same_functions_open_asyncio_sockets(ipc_address: str) -> None:
    context = zmq.asyncio.Context()
    try:
        router = bind_router(context, ipc_address)
        dealer = connect_dealer(context, ipc_address, b"\0\0")
        await dealer.send(b"HELLO")
        assert await asyncio.wait_for(router.recv_multipart(), 5) == [b"\0\0", b"HELLO"]
    finally:
        context.destroy(linger=0)


def test_a_free_port_is_chosen_and_told(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    router = bind_router(context, "tcp://127.0.0.1:*")
    address = bound_address(router)
    assert address.startswith("tcp://127.0.0.1:")
    dealer = connect_dealer(context, address, b"\0\0")
    dealer.send(b"HELLO")
    assert receive(router) == [b"\0\0", b"HELLO"]


def test_ipv6_addresses_are_bound_and_dialled(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    try:
        router = bind_router(context, "tcp://[::1]:*")
    except zmq.ZMQError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    dealer = connect_dealer(context, bound_address(router), b"\0\0")
    dealer.send(b"HELLO")
    assert receive(router) == [b"\0\0", b"HELLO"]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:5000",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://:5000",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:http",
        "tcp://127.0.0.1:-1",
        "tcp://::1:5000",
        "udp://127.0.0.1:5000",
        "ipc://",
        "ipc:///" + "x" * 107,
    ],
)
def test_an_address_that_is_none_is_refused_and_named(
    context: zmq.Context[zmq.Socket[bytes]], address: str
) -> None:
    for attach in (bind_router, bind_pull, connect_push):
        with pytest.raises(ValueError) as caught:
            attach(context, address)
        assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:0",
        "tcp://*:5000",
        "tcp://host:*",
        "tcp://[::1]:65535",
        "ipc:///a b",
        "inproc://x",
    ],
)
def test_good_addresses_pass_unchanged(address: str) -> None:
    assert check_address(address) is address


def test_an_address_that_is_taken_raises_and_leaves_no_socket_open() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = bind_router(context, "tcp://127.0.0.1:*")
    with pytest.raises(zmq.ZMQError):
        bind_router(context, bound_address(router))
    with pytest.raises(ValueError):
        bind_router(context, "nowhere")
    router.close()
    context.term()  # would hang if a socket were open
