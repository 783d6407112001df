"""A scripted engine: the engine's side of the wire over real ZeroMQ sockets.

A test of a front end opens it, reads what the front end sent, and answers by hand:

    async with MockEngine(handshake_address) as engine:
        request = await engine.next_add()
        await engine.send_tokens(request.request_id, [11, 12])
        await engine.send_tokens(request.request_id, [13], finish=FinishReason.LENGTH)
        await engine.expect_silence(0.1)

or lets `AutoAnswers` play a whole engine (tests/support/auto_answers.py).

Invariants
- Every frame that arrives is kept in `received`, in order and with its time.
- Nothing is sent that the test did not ask for, with two exceptions. `caesura_status`, the front
  end's heartbeat, is answered at once and does not show up in `next_utility`. And a Caesura engine
  confirms each end once (`finished_requests`): of live ids in an ABORT frame as that arrives
  (`confirms_aborts=False` leaves it to `confirm`), of others in the frame of their terminal.
- Every wait is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import zmq.asyncio

from ipc.abort import Abort
from ipc.frames import InputError, decode_input
from ipc.handshake import (
    CAESURA_PROTOCOL,
    Hello,
    Init,
    Ready,
    Registration,
    engine_identity,
)
from ipc.lifecycle import CAESURA_STATUS, EngineStatus
from ipc.output import (
    ENGINE_CORE_DEAD,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    encode_outputs,
)
from ipc.request import EngineCoreRequest
from ipc.sockets import connect_dealer, connect_push
from ipc.utility import UtilityCall, UtilityReply

Message = EngineCoreRequest | Abort | UtilityCall | InputError
"""What a frame from the front end decodes to; InputError is a frame that does not decode."""

NUM_BLOCKS = 1024
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class ReceivedFrame:
    """One message from the front end, as it came."""

    time_s: float
    """Monotonic clock at arrival."""
    frames: tuple[bytes, ...]
    """Type byte, payload, auxiliary frames."""
    message: Message


def make_registration(rank: int = 0, **changes: Any) -> Registration:
    """What an engine tells of itself; `changes` are fields of `Registration`."""
    values: dict[str, Any] = {
        "max_model_len": 4096,
        "num_gpu_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "dp_stats_address": None,
        "dtype": "float32",
        "vllm_version": "0.32.0",
        "world_size": 1,
        "data_parallel_size": 1,
        "data_parallel_rank": rank,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "instance_id": f"mock-{rank}",
        "supports_lora": False,
        "max_loras": 0,
    }
    return Registration(**(values | changes))


class MockEngine:
    """One engine of a front end under test.

    `start` plays a correct handshake; a test of a wrong one calls its steps (`say`, `receive_init`,
    `connect`, `register`) in an order of its own.
    """

    def __init__(
        self,
        handshake_address: str,
        *,
        rank: int = 0,
        local: bool = False,
        caesura: bool = True,
        confirms_aborts: bool = True,
        registration: Mapping[str, Any] | None = None,
    ) -> None:
        """Not yet started.

        `caesura=False` makes it a foreign engine, a plain vLLM; `registration` replaces values of
        the map it registers with.
        """
        self.rank = rank
        self.caesura = caesura
        self.init: Init | None = None
        """The addresses it was given, once it connected."""
        self.received: list[ReceivedFrame] = []
        self.on_message: Callable[[Message], None] | None = None
        """If set, takes every message in place of `next_add`, `next_abort`, `next_utility`."""
        self.confirms_aborts = caesura and confirms_aborts
        self._live: set[str] = set()
        self._handshake_address = handshake_address
        self._local = local
        self._registration = dict(registration or {})
        self._identity = engine_identity(rank)
        self._context = zmq.asyncio.Context()
        self._handshake: zmq.asyncio.Socket | None = None
        self._inputs: list[zmq.asyncio.Socket] = []
        self._outputs: list[zmq.asyncio.Socket] = []
        self._readers: list[asyncio.Task[None]] = []
        self._unread_adds: asyncio.Queue[EngineCoreRequest] = asyncio.Queue()
        self._unread_aborts: asyncio.Queue[list[str]] = asyncio.Queue()
        self._unread_utilities: asyncio.Queue[UtilityCall] = asyncio.Queue()
        self._unread_errors: list[InputError] = []

    # ── handshake ─────────────────────────────────────────────────────────────────────────────────

    async def start(self, timeout_s: float = 10.0) -> None:
        """HELLO, INIT, registration on every input, READY; from then on frames are received."""
        await self.say("HELLO")
        self.connect(await self.receive_init(timeout_s))
        await self.register()
        await self.say("READY")

    async def say(self, status: str) -> None:
        """Send HELLO or READY on the handshake socket."""
        if self._handshake is None:
            self._handshake = connect_dealer(self._context, self._handshake_address, self._identity)
        greeting = {"HELLO": Hello, "READY": Ready}[status](self._local, not self._local)
        await self._handshake.send(greeting.encode())

    async def receive_init(self, timeout_s: float = 10.0) -> Init:
        """The front end's answer to HELLO: which addresses to dial."""
        assert self._handshake is not None, "say HELLO first"
        return Init.decode(await asyncio.wait_for(self._handshake.recv(), timeout_s))

    def connect(self, init: Init) -> None:
        """Dial every input and output address, and begin to receive."""
        self.init = init
        self._inputs = [
            connect_dealer(self._context, address, self._identity) for address in init.inputs
        ]
        self._outputs = [connect_push(self._context, address) for address in init.outputs]
        self._readers = [
            asyncio.create_task(self._read(client_index, socket))
            for client_index, socket in enumerate(self._inputs)
        ]

    async def register(self, payload: bytes | None = None) -> None:
        """Announce this engine on every input socket; `payload` replaces a right registration."""
        if payload is None:
            protocol = CAESURA_PROTOCOL if self.caesura else None
            changes = {"caesura_protocol": protocol} | self._registration
            payload = make_registration(self.rank, **changes).encode()
        for socket in self._inputs:
            await socket.send(payload)

    # ── what the front end sent ───────────────────────────────────────────────────────────────────

    @property
    def adds(self) -> list[EngineCoreRequest]:
        return [r.message for r in self.received if isinstance(r.message, EngineCoreRequest)]

    @property
    def aborts(self) -> list[list[str]]:
        """One list of ids for each Abort frame."""
        return [list(r.message.request_ids) for r in self.received if isinstance(r.message, Abort)]

    @property
    def utilities(self) -> list[UtilityCall]:
        """Calls, without the heartbeats."""
        calls = (r.message for r in self.received if isinstance(r.message, UtilityCall))
        return [call for call in calls if call.method != CAESURA_STATUS]

    async def next_add(self, timeout_s: float = 5.0) -> EngineCoreRequest:
        return await asyncio.wait_for(self._unread_adds.get(), timeout_s)

    async def next_abort(self, timeout_s: float = 5.0) -> list[str]:
        """The ids of the next Abort frame."""
        return await asyncio.wait_for(self._unread_aborts.get(), timeout_s)

    async def next_utility(self, timeout_s: float = 5.0) -> UtilityCall:
        return await asyncio.wait_for(self._unread_utilities.get(), timeout_s)

    async def expect_silence(self, duration_s: float) -> None:
        """Assert that nothing is unread and nothing arrives for so long (heartbeats excepted)."""
        await asyncio.sleep(duration_s)
        unread: list[object] = list(self._unread_errors)
        for queue in (self._unread_adds, self._unread_aborts, self._unread_utilities):
            while not queue.empty():
                unread.append(queue.get_nowait())
        assert not unread, f"engine {self.rank} expected silence but received {unread}"

    async def _read(self, client_index: int, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = tuple(await socket.recv_multipart())
            try:
                message: Message = decode_input(list(frames))
            except InputError as error:
                message = error
            self.received.append(ReceivedFrame(time.monotonic(), frames, message))
            if isinstance(message, EngineCoreRequest):
                self._live.add(message.request_id)
            if self.on_message is not None:
                self.on_message(message)
            elif isinstance(message, EngineCoreRequest):
                self._unread_adds.put_nowait(message)
            elif isinstance(message, Abort):
                self._unread_aborts.put_nowait(list(message.request_ids))
                if self.confirms_aborts:
                    await self.confirm(message.request_ids, client_index)
            elif isinstance(message, InputError):
                self._unread_errors.append(message)
            elif message.method == CAESURA_STATUS and self.caesura:
                await self.reply(message, self.make_status().to_wire())
            else:
                self._unread_utilities.put_nowait(message)

    def make_status(self, **values: Any) -> EngineStatus:
        """The status of an idle engine, with `values` replaced."""
        idle: dict[str, Any] = {
            "state": "running",
            "num_running": 0,
            "num_waiting": 0,
            "num_blocks": NUM_BLOCKS,
            "num_free_blocks": NUM_BLOCKS,
            "num_cached_blocks": 0,
            "num_steps": 0,
            "weight_version": "default",
            "integrity_errors": (),
            "counters": {},
        }
        return EngineStatus(**(idle | values))

    # ── what it answers ───────────────────────────────────────────────────────────────────────────

    async def send_tokens(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        finish: FinishReason | None = None,
        stop_reason: int | str | None = None,
        client_index: int = 0,
    ) -> None:
        """One output of one request, in a frame of its own."""
        output = EngineCoreOutput(
            request_id, token_ids, finish_reason=finish, stop_reason=stop_reason
        )
        await self.send(EngineCoreOutputs(outputs=[output]), client_index)

    async def send(self, outputs: EngineCoreOutputs, client_index: int = 0) -> None:
        """One frame, stamped with this engine's rank and the time."""
        ended = [
            output.request_id
            for output in outputs.outputs
            if output.finish_reason is not None and output.request_id in self._live
        ]
        if ended and self.caesura and outputs.finished_requests is None:
            outputs = replace(outputs, finished_requests=ended)
        self._live.difference_update(outputs.finished_requests or ())
        stamped = replace(outputs, engine_index=self.rank, timestamp=time.monotonic())
        await self._outputs[client_index].send_multipart(encode_outputs(stamped))

    async def confirm(self, request_ids: Sequence[str], client_index: int = 0) -> None:
        """Tell that these requests ended and hold no blocks any more."""
        await self.send(EngineCoreOutputs(finished_requests=request_ids), client_index)

    async def send_frame(self, *frames: bytes, client_index: int = 0) -> None:
        """Raw bytes on the output socket: for what no correct engine would send."""
        await self._outputs[client_index].send_multipart(frames)

    async def reply(
        self, call: UtilityCall, result: object = None, *, failure: str | None = None
    ) -> None:
        """Answer a utility call."""
        reply = UtilityReply(call.call_id, failure, result)
        await self.send(EngineCoreOutputs(utility_output=reply), call.client_index)

    async def die(self) -> None:
        """The last words of an engine that meets a fatal error; its sockets stay open."""
        for socket in self._outputs:
            await socket.send(ENGINE_CORE_DEAD)

    async def go_deaf(self) -> None:
        """Close the input sockets only: whatever is sent to this engine fails from now on."""
        await self._stop_reading()
        for socket in self._inputs:
            socket.close(linger=0)
        self._inputs.clear()

    async def _stop_reading(self) -> None:
        for reader in self._readers:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        self._readers.clear()

    async def vanish(self) -> None:
        """Close every socket without a word, as a killed process does."""
        await self._stop_reading()
        self._outputs.clear()
        self._context.destroy(linger=0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.vanish()
