"""How made-up engines join a front end: Caesura's, vLLM's own in Python, or `vllm-rs`.

Every engine takes each step of the handshake before any engine takes the next, for a front end with
a coordinator lets none go on before all have joined it. The registration has every key that one of
these front ends asks for, and Caesura's, which the others ignore.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from ipc.handshake import CAESURA_PROTOCOL, Hello, Init, Ready, Registration, engine_identity
from ipc.lifecycle import EngineStatus
from ipc.sockets import connect_dealer, connect_push, connect_xsub

NUM_BLOCKS = 1_000_000
MAX_MODEL_LEN = 32_768
MAX_NUM_SEQS = 8192
JOIN_TIMEOUT_S = 300.0
"""How long a front end may take to answer; vLLM's in Python imports for a minute."""

Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class Joined:
    """One engine's sockets; position in the lists is the index of a front-end process."""

    rank: int
    inputs: list[Socket] = field(default_factory=list)
    outputs: list[Socket] = field(default_factory=list)
    others: list[Socket] = field(default_factory=list)
    """The handshake and, where there is one, the coordinator; they must stay open."""


def join(context: zmq.Context[Socket], address: str, num_engines: int) -> list[Joined]:
    """Dial the handshake at `address` with ranks from 0 on; returns when all may be sent requests.

    Raises zmq.Again if the front end stays silent for too long, and WireError for an answer that is
    none.
    """
    context.setsockopt(zmq.RCVTIMEO, int(JOIN_TIMEOUT_S * 1000))
    engines = [Joined(rank) for rank in range(num_engines)]
    handshakes = [connect_dealer(context, address, engine_identity(e.rank)) for e in engines]
    for handshake in handshakes:
        handshake.send(Hello(local=False, headless=True).encode())
    coordinators = []
    for engine, handshake in zip(engines, handshakes, strict=True):
        init = Init.decode(handshake.recv())
        identity = engine_identity(engine.rank)
        engine.inputs = [connect_dealer(context, each, identity) for each in init.inputs]
        engine.outputs = [connect_push(context, each) for each in init.outputs]
        engine.others = [handshake]
        for socket in engine.inputs:
            socket.send(registration(engine.rank, num_engines, init).encode())
        if init.coordinator_input is not None:
            coordinator = connect_xsub(context, init.coordinator_input, identity)
            coordinator.send(b"\x01")
            coordinators.append(coordinator)
            engine.others.append(coordinator)
    for coordinator in coordinators:
        coordinator.recv()
    for handshake in handshakes:
        handshake.send(Ready(local=False, headless=True).encode())
    return engines


def registration(rank: int, num_engines: int, init: Init) -> Registration:
    """An engine with room for everything a benchmark sends."""
    return Registration(
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks=NUM_BLOCKS,
        block_size=32,
        dp_stats_address=init.frontend_stats_publish_address,
        dtype="float32",
        vllm_version="0.32.0",
        world_size=1,
        data_parallel_size=num_engines,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=rank,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_MODEL_LEN,
        instance_id=f"bench-{rank}",
        supports_lora=False,
        max_loras=0,
        caesura_protocol=CAESURA_PROTOCOL,
    )


def utility_result(method: str, num_live: int) -> object:
    """The result of a utility call that a front end makes of its own accord.

    Raises LookupError for any other.
    """
    match method:
        case "caesura_status":
            return EngineStatus(
                state="running",
                num_running=num_live,
                num_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS,
            ).to_wire()
        case "get_supported_tasks":
            return ["generate"]
        case "is_scheduler_paused" | "is_sleeping":
            return False
        case "reset_mm_cache" | "reset_encoder_cache":
            return None
        case _:
            raise LookupError(f"Call to {method} method failed: no attribute {method!r}")
