"""The threads at the engine's sockets, over real ZeroMQ sockets in this process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import zmq

from engine_core.process.intake import Failure, Intake, Received
from engine_core.process.io_threads import Farewell, InputThread, OutputThread
from ipc.abort import Abort, encode_abort
from ipc.frames import InputError
from ipc.handshake import engine_identity
from ipc.output import (
    ENGINE_CORE_DEAD,
    EngineCoreOutput,
    EngineCoreOutputs,
    SchedulerStats,
    decode_outputs,
    encode_outputs,
)
from ipc.sockets import bind_pull, bind_router, connect_dealer, connect_push
from ipc.utility import UtilityReply

ONE_TOKEN = EngineCoreOutputs(outputs=(EngineCoreOutput("a", (1,)),), timestamp=1.0)


@dataclass
class Wired:
    """An output thread with two clients and a coordinator behind it."""

    context: zmq.Context[Any]
    intake: Intake
    thread: OutputThread
    clients: list[zmq.Socket[bytes]]
    coordinator: zmq.Socket[bytes]

    def receive(self, socket: zmq.Socket[bytes]) -> list[bytes]:
        assert socket.poll(2000), "nothing came"
        return socket.recv_multipart()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def wired(context: zmq.Context[Any]) -> Wired:
    name = uuid.uuid4().hex
    addresses = [f"inproc://{name}-{index}" for index in range(3)]
    *clients, coordinator = [bind_pull(context, address) for address in addresses]
    *outputs, copies = [connect_push(context, address) for address in addresses]
    intake = Intake()
    thread = OutputThread(outputs, intake, copies)
    thread.start()
    return Wired(context, intake, thread, clients, coordinator)


def test_frames_go_to_their_client_and_statistics_to_the_coordinator_too(wired: Wired) -> None:
    stats = SchedulerStats(num_running_reqs=3)
    wired.thread.send((1, EngineCoreOutputs(scheduler_stats=stats, timestamp=1.0)))
    wired.thread.send((0, ONE_TOKEN))
    wired.thread.finish(Farewell.IN_ORDER)
    assert decode_outputs(wired.receive(wired.clients[0])).outputs[0].request_id == "a"
    for socket in (wired.clients[1], wired.coordinator):
        received = decode_outputs(wired.receive(socket)).scheduler_stats
        assert received is not None
        assert received.num_running_reqs == 3
    for socket in (*wired.clients, wired.coordinator):
        assert not socket.poll(50), "nothing else comes, no death notice least of all"


@pytest.mark.parametrize("client_index", [-1, 2, 10**9])
def test_L12_a_frame_for_a_client_that_does_not_exist_is_dropped(
    wired: Wired, client_index: int
) -> None:
    wired.thread.send((client_index, ONE_TOKEN))
    wired.thread.send((0, ONE_TOKEN))
    wired.thread.finish(Farewell.IN_ORDER)
    assert wired.receive(wired.clients[0]) == encode_outputs(ONE_TOKEN)
    assert not wired.clients[1].poll(50)
    assert wired.intake.drain() == []


def test_L12_a_result_that_cannot_be_encoded_fails_its_call_alone(wired: Wired) -> None:
    reply = UtilityReply(7, None, object())
    wired.thread.send((0, EngineCoreOutputs(utility_output=reply, timestamp=1.0)))
    wired.thread.send((0, ONE_TOKEN))
    wired.thread.finish(Farewell.IN_ORDER)
    failed = decode_outputs(wired.receive(wired.clients[0])).utility_output
    assert failed is not None
    assert failed.call_id == 7
    assert "cannot be sent" in str(failed.failure_message)
    assert wired.receive(wired.clients[0]) == encode_outputs(ONE_TOKEN)


def test_death_is_told_to_every_client_once_and_last(wired: Wired) -> None:
    wired.thread.send((0, ONE_TOKEN))
    wired.thread.finish(Farewell.DEAD)
    assert wired.receive(wired.clients[0]) == encode_outputs(ONE_TOKEN)
    for client in wired.clients:
        assert wired.receive(client) == [ENGINE_CORE_DEAD]
        assert not client.poll(50)


def test_a_failed_output_thread_tells_the_clients_and_the_step_loop(wired: Wired) -> None:
    wired.thread.send((0, EngineCoreOutputs(outputs=(None,), timestamp=1.0)))  # type: ignore[arg-type]
    [failure] = wired.intake.drain(wait_s=5)
    assert isinstance(failure, Failure)
    wired.thread.finish(Farewell.DEAD)
    for client in wired.clients:
        assert wired.receive(client) == [ENGINE_CORE_DEAD]
        assert not client.poll(50), "once"


def test_L8_messages_reach_the_intake_in_order_with_the_client_they_came_from(
    context: zmq.Context[Any],
) -> None:
    name, identity = uuid.uuid4().hex, engine_identity(0)
    clients = [bind_router(context, f"inproc://{name}-{index}") for index in range(2)]
    inputs = [connect_dealer(context, f"inproc://{name}-{index}", identity) for index in range(2)]
    for socket in inputs:
        socket.send(b"registration")
    for client in clients:
        client.recv_multipart()
    intake = Intake()
    InputThread(inputs, intake).start()
    for number in range(1000):
        clients[0].send_multipart([identity, *encode_abort([f"r{number}"])])
    clients[1].send_multipart([identity, b"?"])
    items: list[Any] = []
    while len(items) < 1001:
        arrived = intake.drain(wait_s=2)
        assert arrived, f"only {len(items)} messages came"
        items += arrived
    aborts = [item.message for item in items if item.client_index == 0]
    assert aborts == [Abort((f"r{number}",)) for number in range(1000)]
    [other] = [item for item in items if item.client_index == 1]
    assert isinstance(other, Received)
    assert isinstance(other.message, InputError)


def test_the_input_thread_ends_with_the_context() -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = connect_dealer(context, f"inproc://{uuid.uuid4().hex}", engine_identity(0))
    intake = Intake()
    thread = InputThread([socket], intake)
    thread.start()
    context.term()  # returns only once the thread has closed its sockets
    thread.join()
    assert intake.drain() == [], "that is no failure"
