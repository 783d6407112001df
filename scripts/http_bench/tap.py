"""A tap on the wire between a front end and one engine, neither of which knows of it.

It stands in for the front end in the handshake and puts its own address for outputs into INIT. So
frames from the engine pass through it, and it notes what they say; what the front end sends goes to
the engine directly, and takes no longer than without a tap. Frames carry the engine's own time
(CLOCK_MONOTONIC), so what is noted does not depend on the tap's speed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import zmq

from ipc.handshake import Init, engine_identity
from ipc.output import decode_outputs
from ipc.sockets import bind_pull, bind_router, bound_address, connect_dealer, connect_push

POLL_MS = 100


@dataclass(frozen=True, slots=True)
class Frame:
    """What one frame of the engine says."""

    timestamp_s: float
    """When the step ended, or when the abort took effect."""
    num_tokens: dict[str, int]
    """By request id; empty for a frame that is no step's."""
    ended: tuple[str, ...]
    """Requests whose blocks have left them."""


class Tap:
    """Give the front end the engine of rank 0, and note what it says."""

    def __init__(self, handshake_address: str) -> None:
        """`handshake_address` is the front end's."""
        self.frames: list[Frame] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self._identity = engine_identity(0)
        self._front_end = connect_dealer(self._context, handshake_address, self._identity)
        self._engine = bind_router(self._context, "tcp://127.0.0.1:*")
        self._outputs = bind_pull(self._context, "tcp://127.0.0.1:*")
        self._forward: zmq.Socket[bytes] | None = None
        self.port = int(bound_address(self._engine).rpartition(":")[2])
        """Where the engine finds the handshake, on 127.0.0.1."""
        self._is_open = True
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._front_end, self._engine, self._outputs):
            poller.register(socket, zmq.POLLIN)
        while self._is_open:
            for socket, _ in poller.poll(POLL_MS):
                if socket is self._engine:
                    self._front_end.send(self._engine.recv_multipart()[1])
                elif socket is self._front_end:
                    self._engine.send_multipart([self._identity, self._rewritten_init()])
                else:
                    self._relay()
        self._context.destroy(linger=0)

    def _rewritten_init(self) -> bytes:
        init = Init.decode(self._front_end.recv())
        assert len(init.outputs) == 1, f"the front end has {len(init.outputs)} processes, not one"
        self._forward = connect_push(self._context, init.outputs[0])
        return replace(init, outputs=(bound_address(self._outputs),)).encode()

    def _relay(self) -> None:
        assert self._forward is not None, "the engine speaks before INIT"
        frames = self._outputs.recv_multipart()
        self._forward.send_multipart(frames)
        outputs = decode_outputs(frames)
        if outputs.outputs or outputs.finished_requests:
            tokens = {row.request_id: len(row.new_token_ids) for row in outputs.outputs}
            ended = tuple(outputs.finished_requests or ())
            self.frames.append(Frame(outputs.timestamp, tokens, ended))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._thread.join(10)
