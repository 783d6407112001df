"""The log formats, and the brake on lines that a peer can cause."""

from __future__ import annotations

import datetime
import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from ipc.logs import (
    FORMAT_VARIABLE,
    JsonFormatter,
    RateLimitedLog,
    TextFormatter,
    configure_logging,
)
from tests.support.scripted_frontend import REPOSITORY

FORGERY = "a\n2026-01-01 00:00:00.000 ERROR   frontend | x: forged\r\x1b[2K\x85b\u2028c"


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("here").makeRecord(
        "here", logging.WARNING, "file", 1, message, args, None, extra=extra
    )


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    """The JSON form, which is one line."""
    line = JsonFormatter("engine 3").format(record)
    assert len(line.splitlines()) == 1
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def test_a_line_has_time_level_process_and_logger() -> None:
    code = "import logging; from ipc.logs import configure_logging as configure\n"
    code += "configure('engine 3'); logging.getLogger('here').warning('what %s', 'happened')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING engine 3 \| here: what happened\n"
    assert re.fullmatch(line, run.stderr)


def test_a_line_is_an_object_where_the_environment_says_json() -> None:
    code = "import logging; from ipc.logs import configure_logging as configure\n"
    code += "configure('engine 3'); logging.getLogger('here').warning('what %s', 'happened')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={FORMAT_VARIABLE: "json"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stderr) | {"time": ""} == {
        "time": "",
        "level": "WARNING",
        "process": "engine 3",
        "logger": "here",
        "message": "what happened",
    }


def test_the_time_of_an_object_is_in_utc_to_the_millisecond() -> None:
    moment = record("x")
    moment.created, moment.msecs = 1767225599.9996, 999.6
    assert as_json(moment)["time"] == "2025-12-31T23:59:59.999Z"
    assert datetime.datetime.fromisoformat(as_json(moment)["time"]).tzinfo is datetime.UTC


def test_extra_fields_are_fields_of_the_object_and_take_the_place_of_none() -> None:
    line = as_json(record("ended", request_id="r", num_output_tokens=3, level="DEBUG", cause=None))
    assert (line["request_id"], line["num_output_tokens"], line["cause"]) == ("r", 3, None)
    assert line["level"] == "WARNING"


def test_what_json_cannot_hold_is_told_as_text() -> None:
    assert as_json(record("x", where={1}, body=b"\xff"))["where"] == "{1}"


def test_a_traceback_is_a_field_of_the_object() -> None:
    try:
        raise KeyError("deep inside")
    except KeyError as error:
        failed = record("it failed")
        failed.exc_info = (KeyError, error, error.__traceback__)
    assert "KeyError: 'deep inside'" in as_json(failed)["exception"]


def test_an_id_cannot_forge_a_line() -> None:
    named = record("request %s ended", FORGERY, request_id=FORGERY)
    assert as_json(named)["request_id"] == FORGERY
    first, *others = TextFormatter("engine 3").format(named).splitlines()
    assert first.endswith("| here: request a")
    assert len(others) == 1
    assert others[0].startswith("    2026-01-01")
    assert others[0].endswith(r"forged\r\x1b[2K\x85b\u2028c ended")


def test_a_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAESURA_LOG_LEVEL", "loud")
    with pytest.raises(ValueError, match="'LOUD' is no log level; set one of DEBUG"):
        configure_logging("test")


def test_a_format_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAESURA_LOG_FORMAT", "xml")
    with pytest.raises(ValueError, match="'xml' is no log format; set text or json"):
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
