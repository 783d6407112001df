"""Pauses, cache flushes and weight updates of `Engine`, under SGLang's names.

As in SGLang, an update that fails says so in what it returns; the old weights then serve on. A call
that makes no sense raises.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frontend.async_engine import AsyncEngine
from frontend.errors import (
    EngineTimeoutError,
    InvalidRequestError,
    PauseConflictError,
    PauseInterruptedError,
    UtilityCallError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
from frontend.requests.pause_gate import NewcomerRule
from frontend.requests.pause_reports import PauseReport, ResumeReport
from frontend.sync.loop_thread import LoopThread
from frontend.sync.tensors import safetensors_bytes
from frontend.weights.controls import DEFAULT_GROUP_NAME
from frontend.weights.update import WeightUpdateReport
from ipc.pause import PauseMode

SglangMode = Literal["abort", "retract", "in_place", "wait"]
"""SGLang's pause modes, and `wait`: requests that have begun finish."""

_MODES: dict[str, PauseMode] = {
    "abort": "abort",
    "retract": "retract",
    "in_place": "keep",
    "wait": "wait",
}
_FAILURES = (
    EngineTimeoutError,
    PauseConflictError,
    PauseInterruptedError,
    UtilityCallError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)


@dataclass(frozen=True, slots=True)
class FlushResult:
    """What became of a flush."""

    success: bool
    message: str


class EngineControls:
    """The life-cycle methods of `Engine`. An update needs no flush: what was cached under other
    weights is never used. Where the engine is not paused already, an update pauses it with `mode`;
    by default it waits for the requests that have begun, as SGLang does.
    """

    _engine: AsyncEngine
    _loop_thread: LoopThread

    # -- pauses --------------------------------------------------------------------------------

    def pause_generation(
        self,
        mode: SglangMode = "abort",
        *,
        clear_cache: bool = False,
        newcomers: NewcomerRule = "hold",
        lease_s: float | None = None,
        pause_id: str | None = None,
        timeout_s: float = 60.0,
    ) -> PauseReport:
        """Pause, and return when nothing is in flight: `in_place` freezes requests with their KV.
        Otherwise as `AsyncEngine.pause`.
        """
        return self._loop_thread.run(
            self._engine.pause(
                _mode(mode),
                clear_cache=clear_cache,
                newcomers=newcomers,
                lease_s=lease_s,
                pause_id=pause_id,
                timeout_s=timeout_s,
            )
        )

    def continue_generation(self, pause_id: str | None = None) -> ResumeReport:
        """End the pause; with a `pause_id` only if it is that one, else PauseConflictError."""
        return self._loop_thread.run(self._engine.resume(pause_id))

    def flush_cache(self) -> FlushResult:
        """Empty the prefix cache, unless a request holds blocks."""
        try:
            is_flushed = self._loop_thread.run(self._engine.flush_cache())
        except (EngineTimeoutError, UtilityCallError) as error:
            return FlushResult(False, str(error))
        if is_flushed:
            return FlushResult(True, "the cache was flushed")
        return FlushResult(
            False, "the cache was not flushed, for requests hold blocks; abort or retract them"
        )

    # -- weights -------------------------------------------------------------------------------

    def update_weights_from_disk(
        self,
        model_path: str | Path,
        load_format: str | None = None,
        *,
        weight_version: str | None = None,
        mode: SglangMode = "wait",
        checksum: str | None = None,
        timeout_s: float = 600.0,
    ) -> tuple[bool, str, int]:
        """Take all weights from a model directory. Returns (success, message, 0); SGLang counts
        paused requests in the third place, but always none.
        """
        _check_load_format(load_format)
        success, message = self._update(
            self._engine.update_weights_from_disk(
                model_path,
                version=weight_version,
                mode=_mode(mode),
                checksum=checksum,
                timeout_s=timeout_s,
            )
        )
        return success, message, 0

    def update_weights_from_tensor(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        load_format: str | None = None,
        flush_cache: bool = True,
        *,
        weight_version: str | None = None,
        mode: SglangMode = "wait",
        timeout_s: float = 600.0,
    ) -> tuple[bool, str]:
        """Take some or all weights from (name, tensor) pairs, tensors of NumPy or PyTorch. Returns
        (success, message); `flush_cache` has no effect.
        """
        _check_load_format(load_format)
        return self._update(
            self._engine.update_weights_from_tensors(
                safetensors_bytes(named_tensors),
                version=weight_version,
                mode=_mode(mode),
                timeout_s=timeout_s,
            )
        )

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = DEFAULT_GROUP_NAME,
        flush_cache: bool = True,
        load_format: str | None = None,
        *,
        weight_version: str | None = None,
        mode: SglangMode = "wait",
        timeout_s: float = 600.0,
    ) -> tuple[bool, str]:
        """Take weights that rank 0 of a group broadcasts in this order. Returns (success, message);
        `flush_cache` has no effect.
        """
        _check_load_format(load_format)
        return self._update(
            self._engine.update_weights_from_distributed(
                names,
                dtypes,
                shapes,
                group_name=group_name,
                version=weight_version,
                mode=_mode(mode),
                timeout_s=timeout_s,
            )
        )

    def begin_weight_update(self, selector: Literal["all", "target"] = "all") -> tuple[bool, str]:
        """From now on updates are only staged, until `end_weight_update`. (success, message)"""
        if selector not in ("all", "target"):
            raise InvalidRequestError(
                f"selector={selector!r:.80} is not supported, there is no draft model; leave it out"
            )
        return self._run(self._engine.begin_weight_update(), "the update has begun")

    def end_weight_update(
        self, *, weight_version: str | None = None, mode: SglangMode = "wait"
    ) -> tuple[bool, str]:
        """Let all staged parts take effect together. (success, message)"""
        return self._update(
            self._engine.end_weight_update(version=weight_version, mode=_mode(mode))
        )

    def discard_weight_update(self) -> bool:
        """Drop what is staged; False if nothing is. SGLang has no such method."""
        return self._loop_thread.run(self._engine.discard_weight_update())

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = DEFAULT_GROUP_NAME,
        backend: str = "nccl",
        *,
        timeout_s: float = 300.0,
    ) -> tuple[bool, str]:
        """Join a `torch.distributed` group whose rank 0 is the trainer. `backend` is the trainer's:
        gloo, or nccl where engines have GPUs. (success, message)
        """
        joining = self._engine.init_weights_update_group(
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
            timeout_s=timeout_s,
        )
        return self._run(joining, f"joined the group {group_name}")

    def destroy_weights_update_group(
        self, group_name: str = DEFAULT_GROUP_NAME
    ) -> tuple[bool, str]:
        """Leave a group. (success, message)"""
        leaving = self._engine.destroy_weights_update_group(group_name)
        return self._run(leaving, f"left the group {group_name}")

    def _update(self, update: Coroutine[Any, Any, WeightUpdateReport | None]) -> tuple[bool, str]:
        return self._run(update, "the weights were updated")

    def _run(self, call: Coroutine[Any, Any, object], done: str) -> tuple[bool, str]:
        try:
            self._loop_thread.run(call)
        except _FAILURES as error:
            return False, str(error)
        return True, done


def _mode(mode: str) -> PauseMode:
    if mode not in _MODES:
        raise InvalidRequestError(f"mode={mode!r:.80} is none of {', '.join(_MODES)}")
    return _MODES[mode]


def _check_load_format(load_format: str | None) -> None:
    if load_format not in (None, "auto", "safetensors"):
        raise InvalidRequestError(f"load_format={load_format!r:.80} is not supported; leave it out")
