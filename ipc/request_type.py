"""The byte that says what an input frame is."""

from __future__ import annotations

from enum import IntEnum


class RequestType(IntEnum):
    """First frame of a front end's message to an engine, one byte."""

    ADD = 0
    ABORT = 1
    START_DP_WAVE = 2
    """Only from a coordinator, and only for mixture-of-experts models."""
    UTILITY = 3

    @property
    def frame(self) -> bytes:
        return bytes([self])
