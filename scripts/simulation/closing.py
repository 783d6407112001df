"""The end of a life: faults have stopped, and all must end in bounded time and leave nothing.

Checks
- `liveness`: every pause ends (by its lease, or by an operator's resume once it holds), so does
  every update, and so does every request.
- `no leaks`: then both sides' books are empty; after a shutdown nobody waits and no task is left.
- `chain`: a continued request has the tokens of an uninterrupted one, if weights did not change.
- `told label`: the front end's word for the weights is the engines'.
- `prompt shutdown`: nothing is waited for that a pause keeps from ending.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from frontend.outputs import AbortCause
from scripts.simulation.oracle import uninterrupted
from scripts.simulation.updating import Updating

if TYPE_CHECKING:
    from scripts.simulation.world import World

SETTLE_TIME_S = 30.0
"""Without faults, everything ends within so long."""
PROMPT_S = 0.3
"""A shutdown of paused engines takes no longer."""
_LOOK_S = 0.02


class Closing:
    """Ends a world's life in order."""

    def __init__(self, world: World, updating: Updating) -> None:
        self._world = world
        self._updating = updating

    async def settle(self) -> None:
        """Wait until everything has ended by itself; but for pauses without a lease, which an
        operator ends once they hold.
        """
        world = self._world
        deadline_s = world.loop.time() + SETTLE_TIME_S
        while world.loop.time() < deadline_s:
            await self._updating.give_up_session()
            world.watch.look()
            state = world.frontend.pause_state.state
            cannot_hold = state == "draining" and not world.frontend.alive_engines
            is_forgotten = (state == "paused" or cannot_hold) and world.watch.lease_ends_s is None
            if is_forgotten and not self._updating.is_under_way:
                await world.watch.resume()
            elif state == "running" and self._is_quiet():
                break
            await asyncio.sleep(_LOOK_S)
        else:
            world.violate("liveness", f"not all has ended; {world.frontend.pause_state}")
        await asyncio.sleep(_LOOK_S)
        self._check_idle()

    def _is_quiet(self) -> bool:
        world = self._world
        registry = world.dispatcher.registry
        is_empty = not (
            world.model.live() or len(registry) or registry.num_ending or world.client.num_calls()
        )
        return is_empty and all(task.done() for task in world.tasks)

    def _check_idle(self) -> None:
        """Nothing lives: the books of both sides are empty (L11)."""
        world = self._world
        registry, admission = world.dispatcher.registry, world.frontend._intake._admission
        left = {
            "live": len(registry),
            "ending": registry.num_ending,
            "in flight": sum(registry.num_in_flight),
            "names": len(registry._by_name),
            "held": len(world.dispatcher.gate),
            "queued": admission.num_queued_requests,
            "queued tokens": admission.num_queued_tokens,
            "calls": world.client.num_calls(),
        }
        if any(left.values()):
            world.violate("no leaks", f"the front end is idle with {left}")
        world.fleet.check_idle()
        told = world.frontend.weight_version
        labels = {ledger.weights.label for ledger in world.fleet.alive}
        if told is not None and labels and labels != {told}:
            world.violate("told label", f"the front end says {told!r}, engines {sorted(labels)}")

    async def shut_down(self, grace_s: float, *, heals: bool) -> None:
        """`heals`: without faults, unless it is in the midst of some."""
        world = self._world
        world.count_all("shutdown")
        world.is_shutting_down = True
        for request in world.model.requests:
            request.allowed_causes.add(AbortCause.SHUTDOWN)
        if heals:
            world.heal()
        state = world.frontend.pause_state
        is_updates = (state.pause_id or "").startswith("weight-update-")  # It ends by itself.
        is_paused = state.state == "paused" and state.lease_left_s is None and not is_updates
        started_s = world.loop.time()
        await world.frontend.shutdown(grace_s)
        took_s = world.loop.time() - started_s
        if is_paused and heals and took_s > PROMPT_S:
            world.violate("prompt shutdown", f"it took {took_s} s while paused")
        await self._finish()

    async def _finish(self) -> None:
        """After a shutdown readers have their terminals, and nobody waits any more."""
        world = self._world
        await asyncio.sleep(1.0)
        for request in world.model.requests:
            if request.held_stream is not None and not request.is_dropped:
                if (output := request.held_stream.take()) is not None:
                    world.model.on_output(request, output)
                request.held_stream.close()
        for task in world.tasks:
            if not task.done():
                world.violate("no leaks", f"{task.get_name()} waits after the shutdown")
            elif not task.cancelled() and (error := task.exception()) is not None:
                world.violate("exception", f"{task.get_name()}: {type(error).__name__}: {error}")
        world.model.check_ends()
        if len(world.dispatcher.registry) or world.client.num_calls():
            world.violate("no leaks", "the registry or the calls are not empty at the end")
        others = asyncio.all_tasks() - {asyncio.current_task()} - set(world.tasks)
        if others:
            names = sorted(str(task.get_coro()) for task in others)
            world.violate("no leaks", f"tasks are left: {names}")
        self._updating.check_end()
        if not world.fleet.all_commits():
            self._check_chains()

    def _check_chains(self) -> None:
        for request in self._world.model.requests:
            if request.earlier and request.last is not None:
                wanted = uninterrupted(request.prompt, len(request.chain))
                if request.chain != wanted:
                    self._world.violate("chain", f"{request}: {request.chain}, not {wanted}")
