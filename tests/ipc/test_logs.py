"""The log format, and the brake on lines that a peer can cause."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

from ipc.logs import RateLimitedLog, configure_logging
from tests.support.scripted_frontend import REPOSITORY


def test_a_line_has_time_level_process_and_logger() -> None:
    code = "import logging; from ipc.logs import configure_logging as configure\n"
    code += "configure('engine 3'); logging.getLogger('here').warning('what %s', 'happened')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING engine 3 \| here: what happened\n"
    assert re.fullmatch(line, run.stderr)


def test_a_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAESURA_LOG_LEVEL", "loud")
    with pytest.raises(ValueError, match="'LOUD' is no log level; set one of DEBUG"):
        configure_logging("test")


def test_a_flood_becomes_one_line_a_period_with_the_number_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("ipc.logs.time.monotonic", lambda: now)
    log = RateLimitedLog(logging.getLogger("flood"), period_s=1.0)
    for index in range(1000):
        log.warning("bad frame %d", index)
    now = 101.5
    log.warning("bad frame %d", 1000)
    assert caplog.messages == ["bad frame 0", "bad frame 1000 (and 999 more like it)"]
