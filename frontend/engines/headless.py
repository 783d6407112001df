"""Starts engines without a front end: they dial the one at the given address, wherever it is."""

from __future__ import annotations

import logging
import queue
import signal
from collections.abc import Sequence

from frontend.engines.supervisor import EngineSupervisor
from ipc.engine_config import EngineConfig

logger = logging.getLogger(__name__)


def run_engines(
    config: EngineConfig, *, handshake_address: str, ranks: Sequence[int], data_parallel_size: int
) -> int:
    """Run engines until SIGINT or SIGTERM comes or the last of them has ended.

    Returns the exit status: 0 after a signal, else the worst of the engines. Call it on the main
    thread. Raises EngineStartupError if foreign code shadows one of our packages, and ValueError if
    there is no engine to run.
    """
    if not ranks:
        raise ValueError("0 engines are to be started; ask for at least 1")
    # Its put() may be called from a signal handler and from the supervisor's threads alike.
    events: queue.SimpleQueue[tuple[int, int] | signal.Signals] = queue.SimpleQueue()
    supervisor = EngineSupervisor(
        config,
        handshake_address=handshake_address,
        ranks=ranks,
        local=False,
        data_parallel_size=data_parallel_size,
        on_exit=lambda rank, returncode: events.put((rank, returncode)),
    )
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda number, _: events.put(signal.Signals(number)))
    supervisor.start()
    logger.info("started %d engines, which dial %s", len(ranks), handshake_address)
    statuses: list[int] = []
    while len(statuses) < len(ranks):
        event = events.get()
        if isinstance(event, signal.Signals):
            logger.info("ending %d engines: received %s", len(ranks) - len(statuses), event.name)
            supervisor.terminate()
            return 0
        logger.error("%s", supervisor.describe_exit(*event))
        statuses.append(abs(event[1]))
    return max(statuses)
