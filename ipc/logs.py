"""One log format for every process, on stderr: a line of text or a JSON object for each record.

    2026-03-01 12:00:00.123 INFO    engine 0 | engine_core.process.run: ready with 512 blocks
    {"time":"2026-03-01T12:00:00.123Z","level":"INFO","process":"engine 0",...}

The fields that a record was given as `extra` follow in the JSON form. Engines take level and format
from their launcher, through the environment.

Invariant: a record cannot pass for two, whatever a peer wrote into it. In text, control characters
are shown as escapes and further lines are indented.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time

LEVEL_VARIABLE = "CAESURA_LOG_LEVEL"
"""Environment variable that sets the level: DEBUG, INFO (default), WARNING or ERROR."""
FORMAT_VARIABLE = "CAESURA_LOG_FORMAT"
"""Environment variable that sets the format: text (default) or json."""

LOG_FORMATS = ("text", "json")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def configure_logging(process_name: str) -> None:
    """Send the root logger to stderr, every line carrying `process_name` ("frontend", "engine 0").

    Raises ValueError when CAESURA_LOG_LEVEL names no level or CAESURA_LOG_FORMAT no format.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in _LEVELS:
        raise ValueError(
            f"{LEVEL_VARIABLE}={level!r} is no log level; set one of {', '.join(_LEVELS)}"
        )
    log_format = os.environ.get(FORMAT_VARIABLE, "text")
    if log_format not in LOG_FORMATS:
        raise ValueError(
            f"{FORMAT_VARIABLE}={log_format!r} is no log format; set {' or '.join(LOG_FORMATS)}"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(process_name) if log_format == "json" else TextFormatter(process_name)
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """For people. Extra fields are left out: what people need is in the message."""

    def __init__(self, process_name: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {process_name} | %(name)s: %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_ESCAPES)


class JsonFormatter(logging.Formatter):
    """For programs. `time` is in UTC, as in RFC 3339; a traceback is `exception`."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        for name, value in vars(record).items():
            if name not in _RECORD_FIELDS:
                line.setdefault(name, value)
        return json.dumps(line, separators=(",", ":"), default=str)


_RECORD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime"}
"""What every record has; the rest was given as `extra`."""

_CONTROL_CHARACTERS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROL_CHARACTERS} | {
    ord("\t"): "\t",
    ord("\n"): "\n    ",
}


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
        self._log(logging.WARNING, message, *args)

    def info(self, message: str, *args: object) -> None:
        """The same at level INFO."""
        self._log(logging.INFO, message, *args)

    def _log(self, level: int, message: str, *args: object) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._next_time_s:
                self._num_swallowed += 1
                return
            num_swallowed, self._num_swallowed = self._num_swallowed, 0
            self._next_time_s = now + self._period_s
        if num_swallowed:
            message += f" (and {num_swallowed} more like it)"
        self._logger.log(level, message, *args)
