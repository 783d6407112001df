"""What is told of pauses and resumes."""

from __future__ import annotations

from dataclasses import dataclass, field

from frontend.requests.fan_out import EngineOutcome
from frontend.requests.pause_gate import NewcomerRule
from ipc.pause import EngineState, PauseMode


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseState:
    """Whether the engines are paused, and how."""

    state: EngineState
    mode: PauseMode | None
    pause_id: str | None
    for_s: float
    """How long it has been in this state."""
    newcomers: NewcomerRule | None
    num_held: int
    """Requests that wait here for the resume."""
    lease_left_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseReport:
    """What a pause did. A foreign engine does not count, so these are the others' sums."""

    pause_id: str
    state: EngineState
    duration_s: float
    """From the call until the engines stood still."""
    num_aborted: int
    num_kept: int
    """Requests that are frozen with their KV."""
    num_retracted: int
    """Requests whose KV was freed, and that will be recomputed."""
    num_held: int
    """Other requests that wait for the resume, here or in an engine."""
    num_blocks_freed: int
    num_blocks_cached: int
    """Of the freed ones, those that still hold a prefix."""
    engines: dict[int, EngineOutcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeReport:
    """What a resume did."""

    was: EngineState
    """`running`: there was nothing to end."""
    pause_id: str | None
    """Of the pause that it ended."""
    paused_for_s: float
    """Since it last ran, earlier pauses and their draining included."""
    num_released: int
    """Requests that were held here and are on their way."""
    engines: dict[int, EngineOutcome] = field(default_factory=dict)
