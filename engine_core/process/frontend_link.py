"""The engine's side of the handshake, and the sockets that come of it.

Order, as the wire wants it: HELLO, INIT, (the model is loaded,) connect, register on every input,
wait for a coordinator if there is one, READY. Everything here runs on the main thread; the sockets
then pass to the I/O threads.
"""

from __future__ import annotations

import math
import time

import zmq

from ipc.errors import WireError
from ipc.handshake import Hello, Init, Ready, Registration, engine_identity
from ipc.sockets import connect_dealer, connect_push, connect_xsub

INIT_TIMEOUT_S = 300.0
COORDINATOR_TIMEOUT_S = 300.0
_SUBSCRIBE_TO_ALL = b"\x01"
_COORDINATOR_READY = b"READY"


class LinkError(Exception):
    """The handshake failed; the message names the address and the remedy."""


class FrontendLink:
    """One engine's connections: to its front end, and to a coordinator if that names one."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, rank: int, *, local: bool
    ):
        """Dials the handshake address. Raises LinkError if that cannot be one."""
        self._context = context
        self._address = address
        self._identity = engine_identity(rank)
        self._local = local
        self.inputs: list[zmq.Socket[bytes]] = []
        self.outputs: list[zmq.Socket[bytes]] = []
        self.coordinator_input: zmq.Socket[bytes] | None = None
        self.coordinator_output: zmq.Socket[bytes] | None = None
        try:
            self._handshake = connect_dealer(context, address, self._identity)
        except (ValueError, zmq.ZMQError) as error:
            raise LinkError(f"cannot dial the front end at {address!r}: {error}") from None

    def say_hello(self) -> Init:
        """Announce this engine; returns the addresses to dial. Raises LinkError."""
        self._handshake.send(Hello(self._local, not self._local).encode())
        if not self._handshake.poll(int(INIT_TIMEOUT_S * 1000)):
            raise LinkError(
                f"no front end answered at {self._address} within {INIT_TIMEOUT_S:.0f} s; "
                "is the address right?"
            )
        payload = self._handshake.recv_multipart()[-1]
        try:
            return Init.decode(payload)
        except WireError as error:
            raise LinkError(f"the front end at {self._address} sent a bad INIT: {error}") from None

    def connect(self, init: Init, registration: Registration) -> None:
        """Dial everything that INIT names and register. Raises LinkError."""
        try:
            if init.coordinator_input is not None and init.coordinator_output is not None:
                self.coordinator_input = connect_xsub(
                    self._context, init.coordinator_input, self._identity
                )
                self.coordinator_output = connect_push(self._context, init.coordinator_output)
            for address in init.inputs:
                self.inputs.append(connect_dealer(self._context, address, self._identity))
            for address in init.outputs:
                self.outputs.append(connect_push(self._context, address))
        except (ValueError, zmq.ZMQError) as error:
            raise LinkError(
                f"the front end named an address that cannot be dialled: {error}"
            ) from None
        for socket in self.inputs:
            socket.send(registration.encode())
        if self.coordinator_input is not None:
            self._join_coordinator(self.coordinator_input)

    def _join_coordinator(self, socket: zmq.Socket[bytes]) -> None:
        """Subscribe and wait until the coordinator has heard of every engine."""
        socket.send(_SUBSCRIBE_TO_ALL)
        deadline = time.monotonic() + COORDINATOR_TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            if socket.poll(math.ceil(left_s * 1000)) and socket.recv_multipart() == [
                _COORDINATOR_READY
            ]:
                return
        raise LinkError(f"the coordinator did not say READY within {COORDINATOR_TIMEOUT_S:.0f} s")

    def say_ready(self) -> None:
        """Tell the front end that requests may come."""
        self._handshake.send(Ready(self._local, not self._local).encode())

    def close(self) -> None:
        """Close the handshake socket; the others belong to the I/O threads by now."""
        self._handshake.close()
