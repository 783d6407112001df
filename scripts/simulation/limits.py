"""Limits of the product that are too large for small lives: some scenarios lower them."""

from __future__ import annotations

from frontend.requests import abort_queue, pause_gate

_NUM_HELD = pause_gate.MAX_NUM_HELD
_NUM_IDS = abort_queue.MAX_IDS_PER_FRAME


def set_limits(max_num_held: int | None = None, max_ids_per_frame: int | None = None) -> None:
    """None leaves a limit as it is, or restores it."""
    pause_gate.MAX_NUM_HELD = max_num_held or _NUM_HELD
    abort_queue.MAX_IDS_PER_FRAME = max_ids_per_frame or _NUM_IDS
