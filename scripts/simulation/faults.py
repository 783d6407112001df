"""Fate: engines die or stall, frames are damaged, networks part, clocks jump."""

from __future__ import annotations

from scripts.simulation.actors import Actor
from scripts.simulation.model_request import ModelRequest


class Faults(Actor):
    """What nobody wants."""

    def _on_engine(self, rank: int) -> list[ModelRequest]:
        return [
            one
            for one in self.model.requests
            if one.entry.engine_index == rank and "finished" not in self.world.stages(one)
        ]

    def kill_engine(self, *, rank: int, lost_s: float, exit_first: bool) -> None:
        self.world.had_faults = True
        self.count("engine crash", self._on_engine(rank))
        self.world.fleet.kill(rank, lost_s, exit_first=exit_first)

    def fail_engine(self, *, rank: int) -> None:
        self.world.had_faults = True
        self.count("engine crash", self._on_engine(rank))
        self.world.fleet.fail(rank)

    def terminate_engine(self, *, rank: int) -> None:
        self.world.had_faults = True
        self.count("engine shutdown", self._on_engine(rank))
        self.world.fleet.end(rank)

    def corrupt_frame(self, *, rank: int) -> None:
        self.world.had_faults = True
        self.count("corrupt frame", self._on_engine(rank))
        self.world.fleet.corrupt(rank)

    def stall_engine(self, *, rank: int, duration_s: float) -> None:
        self.world.had_faults = True
        self.world.fleet.engines[rank].stall(duration_s)

    def stall_frontend(self, *, duration_s: float) -> None:
        self.world.had_faults = True
        self.world.departures.is_punctual = False
        self.world.loop.stall(duration_s)

    def partition(self, *, rank: int, way: str, duration_s: float) -> None:
        self.world.had_faults = True
        self.world.fleet.part(rank, way, duration_s)

    def jump_clock(self, *, by_s: float) -> None:
        self.world.had_faults = True
        self.world.departures.is_punctual = False
        self.world.jump_clock(by_s)
