"""The engine process: a thin shell that joins the synchronous core to sockets, threads and signals.

Its life: HELLO to the front end, INIT back, load the model, connect, register, READY, serve.
SIGTERM, SIGINT or the end of the launcher end every request with `abort`, send those outputs, and
exit with status 0. An error from which the engine cannot go on is logged with its traceback and
told to every client once, as ENGINE_CORE_DEAD; the status is 1.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import uuid
from dataclasses import dataclass
from types import FrameType

import zmq

from engine_core.core import EngineCore
from engine_core.process.frontend_link import FrontendLink, LinkError
from engine_core.process.intake import Intake, Shutdown
from engine_core.process.io_threads import Farewell, InputThread, OutputThread
from engine_core.process.job_thread import JobThread
from engine_core.process.launcher_watch import LauncherWatch
from engine_core.process.loading import load_core
from engine_core.process.step_loop import StepLoop
from ipc.engine_config import EngineConfig
from ipc.handshake import CAESURA_PROTOCOL, Init, Registration

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002
SPOKEN_VLLM_VERSION = "0.33.0"
"""The protocol we speak, under the name by which front ends know it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine process is started with."""

    handshake_address: str
    rank: int
    local: bool
    """Whether the front end itself started this engine; it checks."""
    config: EngineConfig
    num_local_engines: int
    """Engines that share this machine's cores and memory."""
    data_parallel_size: int


class SetupError(Exception):
    """The engine cannot start as configured; the message is one line for the user."""


def run_engine(options: EngineOptions, launcher_watch: LauncherWatch | None = None) -> int:
    """Run one engine until it is told to end; returns the exit status.

    Raises SetupError if it cannot begin to serve.
    """
    # The input thread gives up the interpreter for each frame; at Python's 5 ms a busy step loop
    # kept an abort behind thousands of frames waiting for seconds.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    intake = Intake()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        link = FrontendLink(context, options.handshake_address, options.rank, local=options.local)
        init = link.say_hello()
        core, dtype = _load(options)
        link.connect(init, _registration(options, core, dtype, init))
    except LinkError as error:
        raise SetupError(str(error)) from error
    # Not before: only the step loop heeds a shutdown, and a coordinator may be long in coming.
    _shut_down_on_signals(intake)
    if launcher_watch is not None:
        launcher_watch.shut_down_first(lambda: intake.put(Shutdown("the launcher is gone")))
    input_thread = InputThread(link.inputs, intake, link.coordinator_input)
    output_thread = OutputThread(link.outputs, intake, link.coordinator_output)
    input_thread.start()
    output_thread.start()
    link.say_ready()
    logger.info("ready: %s", _describe(core, dtype))
    loop = StepLoop(core, intake, output_thread.send, JobThread(intake).start)
    core.bind_thread()
    try:
        loop.run()
    except Exception:
        logger.exception("fatal error; the clients are told, and the engine ends")
        output_thread.finish(Farewell.DEAD)
        status = 1
    else:
        output_thread.finish(Farewell.IN_ORDER)
        status = 0
    link.close()
    context.term()  # Waits until the last frames have left, and ends the input thread.
    return status


def _load(options: EngineOptions) -> tuple[EngineCore, str]:
    try:
        core, dtype = load_core(
            options.config, rank=options.rank, num_local_engines=options.num_local_engines
        )
    except (ValueError, OSError) as error:
        logger.debug("loading failed", exc_info=True)
        raise SetupError(str(error)) from error
    # What was allocated so far stays for good; the collector need not visit it in the middle of a
    # step.
    gc.collect()
    gc.freeze()
    return core, dtype


def _shut_down_on_signals(intake: Intake) -> None:
    def request_shutdown(signal_number: int, frame: FrameType | None) -> None:
        del frame
        intake.put(Shutdown(f"received {signal.Signals(signal_number).name}"))

    signal.signal(signal.SIGTERM, request_shutdown)
    signal.signal(signal.SIGINT, request_shutdown)


def _registration(options: EngineOptions, core: EngineCore, dtype: str, init: Init) -> Registration:
    limits, num_blocks = core.config, core.scheduler.pool.num_blocks
    return Registration(
        max_model_len=limits.max_model_len,
        num_gpu_blocks=num_blocks,
        block_size=limits.block_size,
        dp_stats_address=init.frontend_stats_publish_address,
        dtype=dtype,
        vllm_version=SPOKEN_VLLM_VERSION,
        world_size=1,
        data_parallel_size=options.data_parallel_size,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=options.rank,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        instance_id=f"caesura-{uuid.uuid4().hex}",
        supports_lora=False,
        max_loras=0,
        kv_cache_size_tokens=num_blocks * limits.block_size,
        kv_cache_max_concurrency=num_blocks * limits.block_size / limits.max_model_len,
        caesura_protocol=CAESURA_PROTOCOL,
    )


def _describe(core: EngineCore, dtype: str) -> str:
    limits = core.config
    return (
        f"{core.scheduler.pool.num_blocks} blocks of {limits.block_size} tokens, {dtype}, "
        f"max_model_len {limits.max_model_len}, max_num_seqs {limits.max_num_seqs}, "
        f"max_num_batched_tokens {limits.max_num_batched_tokens}"
    )
