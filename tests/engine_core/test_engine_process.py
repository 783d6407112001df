"""Real engine processes with the fake runner, driven over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from engine_core.fake_runner import expected_tokens
from ipc.codec import pack
from ipc.engine_config import SETUP_ERROR_PREFIX, EngineConfig
from ipc.frames import RequestType
from ipc.handshake import Init, Registration, decode_handshake, engine_identity
from ipc.output import ENGINE_CORE_DEAD, FinishReason, decode_outputs
from ipc.request import EngineCoreRequest, SamplingParams, encode_add
from ipc.sockets import bind_pull, bind_router
from ipc.utility import UtilityCall, encode_utility
from tests.support.scripted_frontend import REPOSITORY, ScriptedFrontend

FAKE = EngineConfig(model="none", runner="fake")
SLOW = EngineConfig(model="none", runner="fake", fake_step_time_ms=20)


@asynccontextmanager
async def engine(config: EngineConfig = FAKE) -> AsyncIterator[ScriptedFrontend]:
    async with ScriptedFrontend() as frontend:
        await frontend.start(config)
        yield frontend


def is_dead_notice(frontend: ScriptedFrontend) -> list[bool]:
    return [frame.outputs is None for frame in frontend.frames]


async def test_an_engine_registers_with_everything_that_front_ends_need() -> None:
    async with engine() as frontend:
        registration = frontend.registrations[0]
    assert registration.dtype == "float32"
    assert registration.caesura_protocol == 1
    assert registration.num_gpu_blocks == 1024
    assert registration.block_size == FAKE.block_size
    assert registration.max_model_len == 4096
    assert registration.data_parallel_rank == 0


async def test_requests_get_the_tokens_that_the_runner_computed() -> None:
    async with engine() as frontend:
        prompts = {f"r{index}": [index + 1, 2, 3] for index in range(20)}
        for request_id, prompt in prompts.items():
            await frontend.add(request_id, prompt, max_tokens=15)
        for request_id, prompt in prompts.items():
            output = await frontend.collect(request_id)
            assert list(output.new_token_ids) == expected_tokens(prompt, 15)
            assert output.finish_reason is FinishReason.LENGTH


async def test_two_engines_of_one_front_end_keep_their_ranks_apart() -> None:
    async with ScriptedFrontend() as frontend:
        await frontend.start(FAKE, num_engines=2)
        await frontend.add("a", [1, 2], rank=0, max_tokens=3)
        await frontend.add("b", [3, 4], rank=1, max_tokens=3)
        await frontend.collect("a")
        await frontend.collect("b")
        assert frontend.registrations[1].data_parallel_rank == 1
        ranks = {
            output.request_id: frame.rank
            for frame in frontend.frames
            if frame.outputs is not None
            for output in frame.outputs.outputs
        }
        assert ranks == {"a": 0, "b": 1}
        engine_indices = {f.outputs.engine_index for f in frontend.frames if f.outputs is not None}
        assert engine_indices == {0, 1}


async def test_L12_malformed_messages_harm_only_their_sender() -> None:
    async with engine(SLOW) as frontend:
        await frontend.add("good", [1, 2, 3], max_tokens=20)
        await frontend.next_output("good")

        bad_add = ["bad", [1], None, {"temperature": "hot"}, None, 0.0, None, None, None]
        for frames in (
            [b"\x09", pack([])],
            [b"", b""],
            [b"\x00"],
            [b"\x00", b"\xc1\xff not msgpack"],
            [b"\x00", pack(bad_add)],
            [b"\x01", pack({"not": "a list"})],
            [b"\x03", pack([0, "no id"])],
            [b"\x02", pack([0, None])],
        ):
            await frontend.send_raw(frames)

        refusal = await frontend.collect("bad")
        assert refusal.finish_reason is FinishReason.ERROR
        assert refusal.error is not None
        assert refusal.error.code == "validation_error"
        assert "temperature" in refusal.error.message

        output = await frontend.collect("good")
        assert output.finish_reason is FinishReason.LENGTH
        assert (await frontend.status()).counters["malformed_messages"] == 8
        assert not any(is_dead_notice(frontend))


async def test_L12_a_malformed_utility_call_is_answered_with_a_failure() -> None:
    async with engine() as frontend:
        await frontend.send_raw([RequestType.UTILITY.frame, pack([0, 2**64 - 1, 7, []])])
        await frontend.status()
        replies = [
            frame.outputs.utility_output
            for frame in frontend.frames
            if frame.outputs is not None and frame.outputs.utility_output is not None
        ]
        assert replies[0].call_id == 2**64 - 1
        assert replies[0].failure_message is not None
        assert "utility.method" in replies[0].failure_message


async def test_L12_a_request_with_a_bad_client_index_is_refused_and_harms_nobody() -> None:
    async with engine() as frontend:
        await frontend.add_request(
            EngineCoreRequest(
                request_id="lost",
                prompt_token_ids=[1],
                sampling_params=SamplingParams(),
                client_index=7,
            )
        )
        await frontend.add("good", [1, 2], max_tokens=4)
        assert (await frontend.collect("good")).finish_reason is FinishReason.LENGTH
        assert (await frontend.collect("lost")).finish_reason is FinishReason.ERROR


async def test_L13_status_is_answered_within_a_step_while_thousands_of_requests_queue() -> None:
    config = EngineConfig(model="none", runner="fake", fake_step_time_ms=100, max_num_seqs=4)
    async with engine(config) as frontend:
        for index in range(3000):
            await frontend.add(f"r{index}", [1, 2, 3], max_tokens=50)
        await frontend.next_output("r0")
        started = time.monotonic()
        status = await frontend.status()
        elapsed_s = time.monotonic() - started
        assert status.num_running == 4
        assert status.num_waiting > 1000
        assert elapsed_s < 0.1 + 0.4, "one step, and room for a busy machine"


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_L1_a_signal_ends_every_request_and_the_engine_exits_with_zero(
    signal_number: signal.Signals,
) -> None:
    config = EngineConfig(model="none", runner="fake", fake_step_time_ms=20, max_num_seqs=2)
    async with engine(config) as frontend:
        request_ids = [f"r{index}" for index in range(6)]
        for request_id in request_ids:
            await frontend.add(request_id, [1, 2, 3], max_tokens=1000)
        await frontend.next_output("r0")
        frontend.processes[0].send_signal(signal_number)
        for request_id in request_ids:
            assert (await frontend.collect(request_id)).finish_reason is FinishReason.ABORT
        assert await asyncio.wait_for(frontend.processes[0].wait(), 5) == 0
        await asyncio.sleep(0.1)
        assert not any(is_dead_notice(frontend))
        assert all(not frontend.unread(request_id) for request_id in request_ids)


async def test_the_end_of_stdin_ends_every_request_and_the_engine_exits_with_zero() -> None:
    async with engine(SLOW) as frontend:
        await frontend.add("a", [1, 2, 3], max_tokens=1000)
        await frontend.next_output("a")
        process = frontend.processes[0]
        assert process.stdin is not None
        process.stdin.close()
        assert (await frontend.collect("a")).finish_reason is FinishReason.ABORT
        assert await asyncio.wait_for(process.wait(), 5) == 0


_FAILING_ENGINE = """
import sys
from engine_core import __main__ as engine, fake_runner

def fail(self, batch):
    raise ValueError("the model exploded")

fake_runner.FakeRunner.execute = fail
sys.exit(engine.main())
"""


async def test_L12_a_fatal_error_is_told_to_the_clients_once_and_the_status_is_one() -> None:
    async with ScriptedFrontend() as frontend:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _FAILING_ENGINE),
            *("--handshake", frontend.handshake_address, "--local", "--die-with-stdin"),
            *("--config", FAKE.to_json()),
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        frontend.processes[0] = process
        await frontend.accept(1)
        await frontend.add("a", [1, 2, 3])
        _, stderr = await asyncio.wait_for(process.communicate(), 10)
        await asyncio.sleep(0.1)
        assert process.returncode == 1
        assert is_dead_notice(frontend).count(True) == 1
        assert is_dead_notice(frontend)[-1], "nothing follows the notice"
        assert b"Traceback" in stderr
        assert b"the model exploded" in stderr


async def test_every_client_is_answered_on_its_own_socket_and_a_coordinator_is_joined() -> None:
    """Two front-end processes and a coordinator, played by hand with plain sockets."""
    context = zmq.asyncio.Context()
    async with ScriptedFrontend() as frontend, asyncio.timeout(20):
        directory = frontend.handshake_address.removesuffix("handshake")
        handshake = bind_router(context, f"{directory}by-hand")
        inputs = [bind_router(context, f"{directory}in-{index}") for index in range(2)]
        outputs = [bind_pull(context, f"{directory}out-{index}") for index in range(2)]
        stats = bind_pull(context, f"{directory}stats")
        coordinator = context.socket(zmq.XPUB)
        coordinator.bind(f"{directory}waves")
        frontend.handshake_address = f"{directory}by-hand"
        await frontend.spawn(FAKE, 3)

        identity, hello = await handshake.recv_multipart()
        assert identity == engine_identity(3)
        decode_handshake(hello)
        init = Init(
            inputs=tuple(f"{directory}in-{index}" for index in range(2)),
            outputs=tuple(f"{directory}out-{index}" for index in range(2)),
            coordinator_input=f"{directory}waves",
            coordinator_output=f"{directory}stats",
            frontend_stats_publish_address="tcp://127.0.0.1:9",
        )
        await handshake.send_multipart([identity, init.encode()])
        for socket in inputs:
            sender, payload = await socket.recv_multipart()
            assert sender == identity
            assert Registration.decode(payload).dp_stats_address == "tcp://127.0.0.1:9"
        assert await coordinator.recv() == b"\x01"
        assert not await handshake.poll(200), "READY has to wait for the coordinator"
        await coordinator.send(b"READY")
        assert b"READY" in (await handshake.recv_multipart())[1]
        await coordinator.send_multipart([b"\x02", pack([0, None])])

        for index, socket in enumerate(inputs):
            request = EngineCoreRequest(
                request_id=f"of-client-{index}",
                prompt_token_ids=[1, 2, 3],
                sampling_params=SamplingParams(max_tokens=1),
                client_index=index,
            )
            await socket.send_multipart([identity, *encode_add(request)])
            call = UtilityCall(index, 5 + index, "get_supported_tasks")
            await socket.send_multipart([identity, *encode_utility(call)])
        for index, socket in enumerate(outputs):
            request_ids: list[str] = []
            call_ids: list[int] = []
            while not (request_ids and call_ids):
                message = decode_outputs(await socket.recv_multipart())
                assert message.engine_index == 3
                request_ids += [output.request_id for output in message.outputs]
                if message.utility_output is not None:
                    call_ids.append(message.utility_output.call_id)
            assert request_ids == [f"of-client-{index}"]
            assert call_ids == [5 + index]
        copy = decode_outputs(await stats.recv_multipart())
        assert copy.scheduler_stats is not None
        assert not copy.outputs
        frontend.processes[3].terminate()
        assert await frontend.processes[3].wait() == 0
        for socket in outputs:
            assert not await socket.poll(50) or await socket.recv_multipart() != [ENGINE_CORE_DEAD]
    context.destroy(linger=0)


async def test_a_signal_ends_an_engine_that_still_waits_for_its_coordinator() -> None:
    context = zmq.asyncio.Context()
    async with ScriptedFrontend() as frontend, asyncio.timeout(20):
        directory = frontend.handshake_address.removesuffix("handshake")
        handshake = bind_router(context, f"{directory}by-hand")
        coordinator = context.socket(zmq.XPUB)
        coordinator.bind(f"{directory}waves")
        frontend.handshake_address = f"{directory}by-hand"
        await frontend.spawn(FAKE, 0)
        identity, _ = await handshake.recv_multipart()
        init = Init(
            inputs=(f"{directory}in",),
            outputs=(f"{directory}out",),
            coordinator_input=f"{directory}waves",
            coordinator_output=f"{directory}stats",
        )
        await handshake.send_multipart([identity, init.encode()])
        assert await coordinator.recv() == b"\x01"
        frontend.processes[0].terminate()
        status = await asyncio.wait_for(frontend.processes[0].wait(), 5)
    assert status == -signal.SIGTERM
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rank", "70000"], "70000 is no rank"),
        (["--config", "{"], "not JSON"),
        (["--config", '{"model": "x", "colour": 1}'], "unknown engine configuration key 'colour'"),
        (["--config", '{"model": "x", "dtype": "int3"}'], "dtype='int3' is not supported"),
        (["--config", '{"model": "x", "block_size": 0}'], "block_size=0"),
        (["--handshake", "carrier-pigeon"], "carrier-pigeon"),
        (["--colour"], "--colour"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line_with_status_two(
    arguments: list[str], complaint: str
) -> None:
    command = [sys.executable, "-P", "-m", "engine_core"]
    command += ["--handshake", "ipc:///tmp/nobody", "--config", FAKE.to_json(), *arguments]
    run = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 2
    assert complaint in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (EngineConfig(model="/no/such/directory"), "/no/such/directory"),
        (
            EngineConfig(model="none", runner="fake", max_num_batched_tokens=8, max_num_seqs=9),
            "max_num_batched_tokens=8 is below max_num_seqs=9",
        ),
        (
            EngineConfig(model="none", runner="fake", num_gpu_blocks_override=2, block_size=16),
            "the KV cache holds 32 tokens",
        ),
    ],
)
async def test_what_cannot_be_loaded_is_told_in_one_line_with_status_two(
    config: EngineConfig, complaint: str
) -> None:
    async with ScriptedFrontend() as frontend:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "engine_core", "--local"),
            *("--handshake", frontend.handshake_address, "--config", config.to_json()),
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        frontend.processes[0] = process
        with pytest.raises(AssertionError, match="ended with status 2"):
            await frontend.accept(1)
        assert process.stderr is not None
        lines = (await process.stderr.read()).decode().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(SETUP_ERROR_PREFIX)
        assert complaint in lines[0]
