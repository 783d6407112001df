"""One log format for every process: time, level, process, logger, message, on stderr.

    2026-03-01 12:00:00.123 INFO  engine 0 | engine_core.process.run: ready with 512 blocks

Engines inherit their launcher's stderr format and, through the environment, its level.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

LEVEL_VARIABLE = "CAESURA_LOG_LEVEL"
"""Environment variable that sets the level: DEBUG, INFO (default), WARNING or ERROR."""

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def configure_logging(process_name: str) -> None:
    """Send the root logger to stderr, every line carrying `process_name` ("frontend", "engine 0").

    Raises ValueError when CAESURA_LOG_LEVEL names no level.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in _LEVELS:
        raise ValueError(
            f"{LEVEL_VARIABLE}={level!r} is no log level; set one of {', '.join(_LEVELS)}"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {process_name} | %(name)s: %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)


class RateLimitedLog:
    """Logs the first of a kind at once and then at most one line a period, telling how many it
    swallowed.

    For faults that a peer can cause at will: a flood of bad frames must not become a flood of
    lines. Thread-safe.
    """

    def __init__(self, logger: logging.Logger, *, period_s: float = 1.0) -> None:
        self._logger = logger
        self._period_s = period_s
        self._next_time_s = 0.0
        self._num_swallowed = 0
        self._lock = threading.Lock()

    def warning(self, message: str, *args: object) -> None:
        """Log like `Logger.warning`, or count the call if a line went out within the period."""
        now = time.monotonic()
        with self._lock:
            if now < self._next_time_s:
                self._num_swallowed += 1
                return
            num_swallowed, self._num_swallowed = self._num_swallowed, 0
            self._next_time_s = now + self._period_s
        if num_swallowed:
            message += f" (and {num_swallowed} more like it)"
        self._logger.warning(message, *args)
