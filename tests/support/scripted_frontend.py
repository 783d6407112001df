"""A scripted front end: the front end's side of the wire, driving real engine processes.

    async with ScriptedFrontend() as frontend:
        await frontend.start(EngineConfig(model="none", runner="fake"))
        await frontend.add("a", [1, 2, 3], max_tokens=4)
        first = await frontend.next_output("a")
        rest = await frontend.collect("a")
        receipt = await frontend.utility(CAESURA_ABORT, ["a"], "test")

It binds the handshake, the input and, for each engine, an output socket of its own, as Caesura's
front end does.

Invariants
- Outputs are kept by request id, in order; each can be awaited once.
- Every frame from an engine is in `frames`, with its time.
- Every wait is bounded, and the engines it spawned end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq.asyncio

from ipc.abort import encode_abort
from ipc.engine_config import EngineConfig
from ipc.handshake import Hello, Init, Registration, decode_handshake, engine_identity, rank_of
from ipc.lifecycle import CAESURA_STATUS, EngineStatus
from ipc.logs import LEVEL_VARIABLE
from ipc.output import EngineCoreOutput, EngineCoreOutputs, decode_outputs, is_dead
from ipc.request import EngineCoreRequest, SamplingParams, encode_add
from ipc.sockets import bind_pull, bind_router, private_directory
from ipc.utility import UtilityCall, UtilityReply, encode_utility

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class EngineFrame:
    """One message from an engine, as it came."""

    time_s: float
    """Monotonic clock at arrival."""
    rank: int
    outputs: EngineCoreOutputs | None
    """None is ENGINE_CORE_DEAD."""


class UtilityError(Exception):
    """An engine answered a utility call with a failure message."""


class ScriptedFrontend:
    """One front-end process (client index 0) with one or more engines."""

    def __init__(self) -> None:
        self.frames: list[EngineFrame] = []
        self.registrations: dict[int, Registration] = {}
        self.processes: dict[int, asyncio.subprocess.Process] = {}
        self._directory = private_directory()
        self._context = zmq.asyncio.Context()
        self.handshake_address = self._address("handshake")
        self._handshake = bind_router(self._context, self.handshake_address)
        self._input = bind_router(self._context, self._address("input"))
        self._outputs: dict[int, zmq.asyncio.Socket] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._request_outputs: dict[str, asyncio.Queue[EngineCoreOutput]] = defaultdict(
            asyncio.Queue
        )
        self._replies: dict[int, asyncio.Future[UtilityReply]] = {}
        self._call_ids = itertools.count(1)

    # ── start and end ─────────────────────────────────────────────────────────────────────────────

    async def start(
        self, config: EngineConfig, num_engines: int = 1, timeout_s: float = 60.0
    ) -> None:
        """Spawn engines of ranks 0 to `num_engines - 1` and take each through its handshake."""
        for rank in range(num_engines):
            await self.spawn(config, rank)
        await self.accept(num_engines, timeout_s)

    async def spawn(self, config: EngineConfig, rank: int) -> None:
        """Start an engine process; `accept` then waits for it."""
        # -P keeps the working directory off the engine's path, so the repository has to be named.
        self.processes[rank] = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "engine_core", "--handshake", self.handshake_address),
            *("--rank", str(rank), "--local", "--die-with-stdin", "--config", config.to_json()),
            env={LEVEL_VARIABLE: "WARNING"} | os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=asyncio.subprocess.PIPE,
        )

    async def accept(self, num_engines: int, timeout_s: float = 60.0) -> None:
        """Play the handshake with this many engines: HELLO, INIT, READY and registration."""
        async with asyncio.timeout(timeout_s):
            num_ready = 0
            while num_ready < num_engines:
                identity, payload = await self._receive_from_starting_engine(self._handshake)
                if isinstance(decode_handshake(payload), Hello):
                    await self._welcome(rank_of(identity))
                else:
                    num_ready += 1
            for _ in range(num_engines):
                identity, payload = await self._receive_from_starting_engine(self._input)
                self.registrations[rank_of(identity)] = Registration.decode(payload)

    async def _receive_from_starting_engine(self, socket: zmq.asyncio.Socket) -> list[bytes]:
        while not await socket.poll(100):
            for rank, process in self.processes.items():
                assert process.returncode is None, (
                    f"engine {rank} ended with status {process.returncode} before it was ready"
                )
        return await socket.recv_multipart()

    async def _welcome(self, rank: int) -> None:
        address = self._address(f"output-{rank}")
        self._outputs[rank] = bind_pull(self._context, address)
        self._readers.append(asyncio.create_task(self._read(rank)))
        init = Init(inputs=(self._address("input"),), outputs=(address,))
        await self._handshake.send_multipart([engine_identity(rank), init.encode()])

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the engines (their stdin closes), wait for them, close every socket."""
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes.values():
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                process.kill()
                await process.wait()
        for reader in self._readers:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        self._context.destroy(linger=0)
        self._directory.cleanup()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    # ── to the engine ─────────────────────────────────────────────────────────────────────────────

    async def add(
        self, request_id: str, prompt_token_ids: Sequence[int], *, rank: int = 0, **sampling: Any
    ) -> None:
        """Send an ADD; `sampling` are the fields of SamplingParams."""
        await self.add_request(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt_token_ids),
                sampling_params=SamplingParams(**sampling),
                arrival_time=time.time(),
            ),
            rank=rank,
        )

    async def add_request(self, request: EngineCoreRequest, *, rank: int = 0) -> None:
        await self.send_raw(encode_add(request), rank=rank)

    async def abort(self, request_ids: Sequence[str], *, rank: int = 0) -> None:
        """Send one ABORT frame. No output follows it."""
        await self.send_raw(encode_abort(list(request_ids)), rank=rank)

    async def utility(
        self, method: str, *args: object, rank: int = 0, timeout_s: float = 10.0
    ) -> object:
        """Call a utility method and wait for its result.

        Raises UtilityError with the engine's failure message.
        """
        call_id = next(self._call_ids)
        self._replies[call_id] = asyncio.get_running_loop().create_future()
        await self.send_raw(encode_utility(UtilityCall(0, call_id, method, args)), rank=rank)
        reply = await asyncio.wait_for(self._replies[call_id], timeout_s)
        del self._replies[call_id]
        if reply.failure_message is not None:
            raise UtilityError(reply.failure_message)
        return reply.result

    async def status(self, *, rank: int = 0) -> EngineStatus:
        """The engine's `caesura_status`."""
        return EngineStatus.from_wire(await self.utility(CAESURA_STATUS, rank=rank))

    async def send_raw(self, frames: Sequence[bytes], *, rank: int = 0) -> None:
        """Type byte, payload and auxiliary frames as they are, right or wrong."""
        await self._input.send_multipart([engine_identity(rank), *frames])

    # ── from the engine ───────────────────────────────────────────────────────────────────────────

    async def next_output(self, request_id: str, timeout_s: float = 10.0) -> EngineCoreOutput:
        """The next output of a request."""
        return await asyncio.wait_for(self._request_outputs[request_id].get(), timeout_s)

    async def collect(self, request_id: str, timeout_s: float = 10.0) -> EngineCoreOutput:
        """Wait for a request's terminal output; returns it with all not yet awaited tokens."""
        token_ids: list[int] = []
        async with asyncio.timeout(timeout_s):
            while True:
                output = await self._request_outputs[request_id].get()
                token_ids.extend(output.new_token_ids)
                if output.finish_reason is not None:
                    return output._replace(new_token_ids=token_ids)

    def unread(self, request_id: str) -> list[EngineCoreOutput]:
        """Outputs of a request that arrived and were not awaited."""
        queue = self._request_outputs[request_id]
        return [queue.get_nowait() for _ in range(queue.qsize())]

    async def _read(self, rank: int) -> None:
        socket = self._outputs[rank]
        while True:
            frames = await socket.recv_multipart()
            if is_dead(frames):
                self.frames.append(EngineFrame(time.monotonic(), rank, None))
                continue
            outputs = decode_outputs(frames)
            self.frames.append(EngineFrame(time.monotonic(), rank, outputs))
            for output in outputs.outputs:
                self._request_outputs[output.request_id].put_nowait(output)
            reply = outputs.utility_output
            # A reply nobody waits for any more came after its call timed out.
            if reply is not None and reply.call_id in self._replies:
                self._replies[reply.call_id].set_result(reply)

    def _address(self, name: str) -> str:
        return f"ipc://{self._directory.name}/{name}"
