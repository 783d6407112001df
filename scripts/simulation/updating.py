"""Weight updates and labels, and what their answers must be.

Checks
- `update`: one succeeds or fails for a reason; when it has succeeded all living engines have its
  weights and its label.
- `all or none`: of one that failed nothing ever takes effect, on any engine; engines that live have
  had the same updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from frontend.errors import (
    EngineDeadError,
    EngineTimeoutError,
    PauseInterruptedError,
    UtilityCallError,
    WeightUpdateConflictError,
    WeightUpdateError,
    WeightUpdateIncompleteError,
)
from scripts.simulation.actors import Actor
from scripts.simulation.engine_weights import MISSING


@dataclass(slots=True, eq=False)
class _Session:
    """An update in several parts, from its beginning to its end."""

    paths: list[str] = field(default_factory=list)
    has_failed: bool = False
    """Then no part is taken, and it takes no effect."""


class Updating(Actor):
    """What a trainer does."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.failed: set[str] = set()
        """Paths that must never take effect."""
        self.is_incomplete = False
        """An update took effect on some engines only, as its caller was told."""
        self._session: _Session | None = None
        self._ending: _Session | None = None
        """The session that a call ends which has not returned."""
        self._running: list[asyncio.Task[None]] = []
        self._was_cancelled = False
        """An update whose caller gave up may still take its course."""
        self._num_drops = 0
        """How often something was discarded, given up or failed: another may have gone with it."""

    # -- whole updates and parts ---------------------------------------------------------------

    def update(
        self, *, path: str, version: str | None, mode: Any, timeout_s: float, kind: str
    ) -> None:
        """A whole update or, in a session, a part of one."""
        self.world.count_all("update")
        update = partial(self._update, path, version, mode, timeout_s, kind)
        self.start("update", self._then_look(update))
        self._running.append(self.world.tasks[-1])

    async def _then_look(self, update: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await update()
        others = [task for task in self._running if not task.done()]
        if others == [asyncio.current_task()] and not self._was_cancelled:
            self.world.watch.check_updated()

    async def _update(
        self, path: str, version: str | None, mode: Any, timeout_s: float, kind: str
    ) -> None:
        # One that ends may be over before its caller hears of it: engines resume last.
        world, session = self.world, self._session
        if session is self._ending:
            session = None
        num_resumes, num_drops = world.watch.num_resumes, self._num_drops
        num_pauses = world.watch.num_pauses
        others = [task for task in self._running if not task.done()]
        is_alone = others == [asyncio.current_task()] and session is None
        update = (
            world.frontend.update_weights_from_disk
            if kind == "disk"
            else world.frontend.update_weights_from_tensors
        )
        source: Any = path if kind == "disk" else Path(path)
        try:
            report = await update(source, version=version, mode=mode, timeout_s=timeout_s)
        except WeightUpdateConflictError as error:
            was_discarded = num_drops != self._num_drops
            is_right = (
                was_discarded or self._was_cancelled or self._was_replaced(num_pauses, num_resumes)
            )
            if is_alone and not is_right:
                world.violate("update", str(error))
            self.failed.add(path)
            return
        except WeightUpdateIncompleteError as error:
            self._note_incomplete(error)
            return
        except asyncio.CancelledError:
            self._was_cancelled = True
            self._note_failure(session)
            raise
        except (WeightUpdateError, EngineTimeoutError, PauseInterruptedError) as error:
            reasons = (
                MISSING in path
                or self._num_drops != num_drops
                or (isinstance(error, EngineTimeoutError) and timeout_s < 1)
                or (
                    (isinstance(error, PauseInterruptedError))
                    and world.watch.num_resumes != num_resumes
                )
            )
            if not (reasons or world.had_faults):
                world.violate("update", f"{path} failed: {error}")
            self.failed.add(path)
            self._note_failure(session)
            return
        except (EngineDeadError, UtilityCallError) as error:
            if not (world.fleet.dead or world.is_shutting_down):
                world.violate("update", f"{path} failed: {error}")
            self.failed.add(path)
            self._note_failure(session)
            return
        if MISSING in path:
            world.violate("update", f"{path} succeeded: {report}")
        if session is None:
            self._check_took_effect([path])
        elif session is self._session:
            session.paths.append(path)
            if session.has_failed or report.num_tensors != len(session.paths):
                world.violate("update", f"{report} of a part of {session}")

    def _note_failure(self, session: _Session | None) -> None:
        """What an update, or a part of this one, has staged goes."""
        self._num_drops += 1
        if session is not None:
            session.has_failed = True
            self.failed.update(session.paths)

    def _note_incomplete(self, error: WeightUpdateIncompleteError) -> None:
        self.is_incomplete = True
        if not (self.world.fleet.dead or self.world.is_shutting_down):
            self.world.violate("update", str(error))

    def _was_replaced(self, num_pauses: int, num_resumes: int) -> bool:
        """Whether an update's own pause gave way to another, or ended, since there were so many."""
        watch = self.world.watch
        return watch.num_pauses >= num_pauses + 2 or watch.num_resumes != num_resumes

    def _check_took_effect(self, parts: list[str]) -> None:
        for ledger in self.world.fleet.alive:
            if tuple(parts) not in (paths for paths, _ in ledger.weights.commits):
                self.world.violate(
                    "update", f"engine {ledger.rank} has {ledger.weights.commits}, not {parts}"
                )

    # -- sessions ------------------------------------------------------------------------------

    def begin_update(self) -> None:
        self.start("begin update", self._begin())

    async def _begin(self) -> None:
        world = self.world
        session = self._session
        is_free = (session is None or session.has_failed) and all(
            task.done() for task in self._running
        )
        try:
            await world.frontend.begin_weight_update()
        except WeightUpdateConflictError as error:
            if is_free and not self._was_cancelled:
                world.violate("update", str(error))
        except EngineDeadError as error:
            if not (world.fleet.dead or world.is_shutting_down):
                world.violate("update", str(error))
        else:
            before = self._session
            if not (before is None or before.has_failed or before is self._ending):
                world.violate("update", "it began twice")
            self._session = _Session()

    def end_update(self, *, version: str | None, mode: Any) -> None:
        self.world.count_all("update")
        self.start("end update", self._then_look(partial(self._end, version, mode)))
        self._running.append(self.world.tasks[-1])

    async def _end(self, version: str | None, mode: Any) -> None:
        world, session, num_resumes = self.world, self._session, self.world.watch.num_resumes
        num_pauses = world.watch.num_pauses
        others = [task for task in self._running if not task.done()]
        is_whole = session is not None and bool(session.paths) and not session.has_failed
        is_ready = is_whole and others == [asyncio.current_task()]
        self._ending = session
        try:
            try:
                await world.frontend.end_weight_update(version=version, mode=mode)
            finally:
                self._ending = None
        except WeightUpdateConflictError as error:
            if self._was_replaced(num_pauses, num_resumes) or (session and session.has_failed):
                self._session = None  # It is over, whatever its end was.
            elif is_ready and not self._was_cancelled:
                world.violate("update", str(error))
            return
        except WeightUpdateIncompleteError as error:
            self._note_incomplete(error)
        except asyncio.CancelledError:
            self._was_cancelled = True
            self._session = None
            raise
        except (
            EngineTimeoutError,
            PauseInterruptedError,
            EngineDeadError,
            UtilityCallError,
        ) as error:
            is_right = (
                world.had_faults or world.is_shutting_down or num_resumes != world.watch.num_resumes
            )
            if not is_right:
                world.violate("update", f"its end failed: {error}")
            if session is not None:
                self.failed.update(session.paths)
        else:
            if session is None or not is_whole:
                world.violate("update", f"{session} took effect")
            else:
                self._check_took_effect(session.paths)
        if self._session is session:
            self._session = None

    def discard_update(self) -> None:
        self.start("discard update", self._discard())

    async def _discard(self) -> None:
        self._num_drops += 1
        session, self._session = self._session, None
        try:
            is_there = await self.world.frontend.discard_weight_update()
        except WeightUpdateConflictError:
            self._session = session
            return
        if is_there and session is not None:
            self.failed.update(session.paths)

    def cancel_update(self) -> None:
        """A caller gives up."""
        for task in self._running:
            if not task.done():
                task.cancel()
                return

    async def give_up_session(self) -> None:
        """What an operator does in the end about a session that nobody ends."""
        if self._session is not None and all(task.done() for task in self._running):
            await self._discard()

    @property
    def is_under_way(self) -> bool:
        return any(not task.done() for task in self._running)

    # -- labels --------------------------------------------------------------------------------

    def label(self, *, version: str) -> None:
        self.world.count_all("label")
        self.start("label", self._label(version))

    async def _label(self, version: str) -> None:
        world = self.world
        try:
            await world.frontend.set_weight_version(version)
        except (EngineTimeoutError, EngineDeadError) as error:
            if not (world.had_faults or world.is_shutting_down):
                world.violate("update", f"a label failed: {error}")

    # -- at the end ----------------------------------------------------------------------------

    def check_end(self) -> None:
        """Nothing is left to happen."""
        world = self.world
        for paths, _ in world.fleet.all_commits():
            if wrong := self.failed.intersection(paths):
                world.violate("all or none", f"{sorted(wrong)} failed, and took effect")
        histories = {tuple(ledger.weights.commits) for ledger in world.fleet.alive}
        if len(histories) > 1 and not self.is_incomplete:
            world.violate("all or none", f"engines had different updates: {sorted(histories)}")
