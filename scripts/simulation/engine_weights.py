"""Weights of one engine, as its inputs say: what is staged, what serves, and under which label.

Checks
- `update answer`: parts, commits and discards succeed and fail as the calls before them demand.
- `labels`: each step's frame names the weights that serve.
- `crossing`: a request that has KV of older weights publishes no block.
That tokens are computed under these weights is the ledger's to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_core.fake_runner import salt_of
from engine_core.jobs import JobDone
from engine_core.weight_updates import DEFAULT_WEIGHT_VERSION
from ipc.utility import UtilityReply
from scripts.simulation.engine_pauses import Violate

if TYPE_CHECKING:
    from engine_core.core import EngineCore

MISSING = "missing"
"""A path with this in it has no weights."""


@dataclass(slots=True, eq=False)
class _Staged:
    """An update that has not taken effect."""

    update_id: str
    paths: list[str] = field(default_factory=list)
    num_loading: int = 0


@dataclass(slots=True)
class EngineWeights:
    """What one engine must know of its weights."""

    rank: int
    core: EngineCore
    violate: Violate
    salt: int = 0
    """The weights of the next step."""
    label: str = DEFAULT_WEIGHT_VERSION
    commits: list[tuple[tuple[str, ...], str | None]] = field(default_factory=list)
    """Updates that have taken effect: their paths, and the label that came with them."""
    _staged: _Staged | None = None
    _loading: dict[int, tuple[_Staged, str]] = field(default_factory=dict)
    """By call: the update and the path of a part."""
    _expected: dict[int, object] = field(default_factory=dict)
    """By call: its result, or None if it must fail."""
    _published: dict[str, int] = field(default_factory=dict)
    """Requests that crossed an update: the blocks that they had published by then."""

    # -- inputs --------------------------------------------------------------------------------

    def stage(self, call_id: int, args: Sequence[Any]) -> None:
        update_id, source = args
        if self._staged is None:
            self._staged = _Staged(update_id)
        if self._staged.update_id != update_id:
            self._expected[call_id] = None
            return
        self._staged.num_loading += 1
        self._loading[call_id] = self._staged, source["path"]

    def finish_stage(self, done: JobDone) -> None:
        staged, path = self._loading.pop(done.job.call_id)
        staged.num_loading -= 1
        self._expected[done.job.call_id] = None
        if self._staged is not staged:
            return
        if MISSING in path:
            self._staged = None
            return
        staged.paths.append(path)
        self._expected[done.job.call_id] = len(staged.paths)

    def commit(self, call_id: int, args: Sequence[Any], running: Sequence[str]) -> None:
        update_id, version = args
        staged = self._staged
        if (
            staged is None
            or staged.update_id != update_id
            or not staged.paths
            or staged.num_loading
        ):
            self._expected[call_id] = None
            return
        self._staged = None
        self.salt = salt_of(*staged.paths)
        self.label = self.label if version is None else version
        self.commits.append((tuple(staged.paths), version))
        self._expected[call_id] = self.label
        inside = self.core._requests
        self._published |= {name: inside[name].num_published_blocks for name in running}

    def discard(self, call_id: int, args: Sequence[Any]) -> None:
        is_there = self._staged is not None and self._staged.update_id == args[0]
        self._expected[call_id] = is_there
        if is_there:
            self._staged = None

    def set_label(self, version: str) -> None:
        self.label = version

    # -- what comes of it ----------------------------------------------------------------------

    def check_reply(self, reply: UtilityReply) -> None:
        """If it answers a call of this book."""
        if reply.call_id not in self._expected:
            return
        expected, told = self._expected.pop(reply.call_id), reply.result
        if isinstance(told, dict):
            told = told["num_tensors"]
        if (reply.failure_message is not None) != (expected is None) or told != expected:
            self.violate("update answer", f"engine {self.rank} told {reply}, true is {expected!r}")

    def check_label(self, version: str | None) -> None:
        """Of a frame with tokens."""
        if version != self.label:
            self.violate("labels", f"engine {self.rank} says {version!r}, not {self.label!r}")

    def forget(self, internal_id: str) -> None:
        """It is recomputed: all its KV is of the present weights."""
        self._published.pop(internal_id, None)

    def after_turn(self) -> None:
        for name, num_published in list(self._published.items()):
            inside = self.core._requests.get(name)
            if inside is None or inside.slot < 0:
                del self._published[name]
            elif inside.num_published_blocks > num_published:
                self.violate("crossing", f"{name} published blocks of mixed weights")

    def check_idle(self) -> None:
        if self._staged is not None or self.core.weights._update is not None:
            self.violate("no leaks", f"engine {self.rank} keeps a staged update")
