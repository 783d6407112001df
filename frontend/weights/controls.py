"""The weight methods of `AsyncEngine`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from frontend.errors import InvalidRequestError, UtilityCallError, WeightUpdateError
from frontend.requests.dispatcher import Dispatcher
from frontend.requests.fan_out import FanOut
from frontend.weights.tensor_file import tensor_file
from frontend.weights.update import WeightUpdateReport
from frontend.weights.updates import WeightUpdates
from ipc.pause import PauseMode
from ipc.weights import (
    CAESURA_JOIN_WEIGHTS_GROUP,
    CAESURA_LEAVE_WEIGHTS_GROUP,
    WeightsGroup,
    WeightSource,
)

DEFAULT_GROUP_NAME = "weight_update_group"
LABEL_TIMEOUT_S = 5.0
LEAVE_GROUP_TIMEOUT_S = 60.0
PAUSE_TIMEOUT_S = 60.0


class WeightControls:
    """Updates of the weights that serve. Each is checked on every engine before anything pauses,
    and takes effect on all of them together, between two steps.

    An update pauses the engines with `mode` and resumes them; if they are paused already, it leaves
    them so, and of the modes only `abort` does anything. Requests that come meanwhile are held.
    Without a `version` the weights keep their label. `checksum` is what the tensors must sum up to.

    The updates raise WeightUpdateError or EngineTimeoutError (nothing was changed),
    WeightUpdateConflictError (another one is on its way), PauseTimeoutError or
    PauseInterruptedError (likewise nothing), EngineDeadError, and WeightUpdateIncompleteError if
    only some engines have the new weights. A caller that gives up while tensors are staged has
    changed nothing; later, the update takes its course.
    """

    _dispatcher: Dispatcher
    _weights: WeightUpdates
    _is_all_local: bool
    """Whether all engines run on this machine."""

    @property
    def weight_version(self) -> str | None:
        """The label of the weights; None if the engines differ or have not told yet."""
        return self._dispatcher.weight_version

    async def update_weights_from_disk(
        self,
        path: str | Path,
        *,
        version: str | None = None,
        mode: PauseMode = "keep",
        checksum: str | None = None,
        timeout_s: float = 600.0,
    ) -> WeightUpdateReport:
        """Take all weights from a model directory, a path on the engines' machines."""
        source = WeightSource(kind="disk", path=str(path), checksum=checksum)
        return await self._update(source, version, mode, timeout_s)

    async def update_weights_from_tensors(
        self,
        safetensors: bytes | Path,
        *,
        version: str | None = None,
        mode: PauseMode = "keep",
        checksum: str | None = None,
        timeout_s: float = 600.0,
    ) -> WeightUpdateReport:
        """Take some or all weights from a safetensors file: its content, or its path on the
        engines' machines. Content reaches local engines through shared memory.
        """
        if isinstance(safetensors, str):
            raise InvalidRequestError(
                f"safetensors={safetensors!r:.80} is a text; give the file's content as bytes, or "
                f"Path(...) of the file"
            )
        if isinstance(safetensors, Path):
            source = WeightSource(kind="file", path=str(safetensors), checksum=checksum)
            return await self._update(source, version, mode, timeout_s)
        if not self._is_all_local:
            raise WeightUpdateError(
                "engines on other machines share no memory with this one; put the tensors on a "
                "file system that they share and give the path"
            )
        self._weights.check_free()
        async with tensor_file(safetensors) as path:
            source = WeightSource(kind="file", path=str(path), checksum=checksum)
            try:
                return await self._update(source, version, mode, timeout_s)
            except WeightUpdateError as error:  # The path is ours; the caller never saw it.
                message = str(error).replace(str(path), "the content")
                raise WeightUpdateError(message) from error

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group_name: str = DEFAULT_GROUP_NAME,
        version: str | None = None,
        mode: PauseMode = "keep",
        timeout_s: float = 600.0,
    ) -> WeightUpdateReport:
        """Take weights that rank 0 of a group broadcasts, in this order. The group is one that
        `init_weights_update_group` joined.
        """
        if not len(names) == len(dtypes) == len(shapes):
            raise InvalidRequestError(
                f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes were given; "
                f"each tensor needs one of each"
            )
        _check_name("group_name", group_name)
        source = WeightSource(
            kind="broadcast",
            group_name=group_name,
            names=tuple(names),
            dtypes=tuple(dtypes),
            shapes=tuple(tuple(shape) for shape in shapes),
            timeout_s=timeout_s,
        )
        return await self._update(source, version, mode, timeout_s)

    async def _update(
        self, source: WeightSource, version: str | None, mode: PauseMode, timeout_s: float
    ) -> WeightUpdateReport:
        _check_version(version)
        return await self._weights.update(source, version=version, mode=mode, timeout_s=timeout_s)

    # -- updates in several parts --------------------------------------------------------------

    async def begin_weight_update(self) -> None:
        """From now on, updates are only staged, until `end_weight_update` makes all of them take
        effect together. A part that fails, or whose caller gives up, discards the whole, and
        those behind it are refused until a new beginning.
        """
        self._weights.begin()

    async def end_weight_update(
        self, *, version: str | None = None, mode: PauseMode = "keep"
    ) -> WeightUpdateReport:
        """Let all parts take effect. Without a `version`, the last one that a part gave counts."""
        _check_version(version)
        return await self._weights.end(version=version, mode=mode, timeout_s=PAUSE_TIMEOUT_S)

    async def discard_weight_update(self) -> bool:
        """Drop what is staged, and stop what is staging; False if nothing is."""
        return await self._weights.discard()

    # -- groups and labels ---------------------------------------------------------------------

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = DEFAULT_GROUP_NAME,
        backend: str = "gloo",
        timeout_s: float = 300.0,
    ) -> None:
        """Join a `torch.distributed` group: the trainer is its rank 0, engine n is `rank_offset +
        n`. Returns when all `world_size` members have come.
        """
        num_engines = len(self._dispatcher.registry.num_in_flight)
        if not 1 <= rank_offset <= world_size - num_engines:
            raise InvalidRequestError(
                f"rank_offset={rank_offset} and {num_engines} engines do not fit "
                f"world_size={world_size}; rank 0 is the trainer's"
            )
        _check_name("group_name", group_name)
        client = self._dispatcher.client
        calls = {}
        for rank in sorted(self._dispatcher.alive_engines):
            group = WeightsGroup(
                master_address=master_address,
                master_port=master_port,
                rank=rank_offset + rank,
                world_size=world_size,
                group_name=group_name,
                backend=backend,
                timeout_s=timeout_s,
            )
            calls[rank] = client.start_call(rank, CAESURA_JOIN_WEIGHTS_GROUP, group.to_wire())
        try:
            await self._all_answer(FanOut(calls), "the call to join a group", timeout_s)
        except BaseException:
            self._call(CAESURA_LEAVE_WEIGHTS_GROUP, group_name)
            raise

    async def destroy_weights_update_group(self, group_name: str = DEFAULT_GROUP_NAME) -> None:
        """Leave a group."""
        _check_name("group_name", group_name)
        calls = self._call(CAESURA_LEAVE_WEIGHTS_GROUP, group_name)
        await self._all_answer(calls, "the call to leave a group", LEAVE_GROUP_TIMEOUT_S)

    async def set_weight_version(self, version: str) -> None:
        """Give the weights another label. Nothing else changes, and no request notices."""
        _check_version(version)
        calls = self._call("set_weight_version", version)
        calls.on_result(lambda rank, _: self._dispatcher.note_weight_version(rank, version))
        await self._all_answer(calls, "the change of a label", LABEL_TIMEOUT_S)

    def _call(self, method: str, *arguments: object) -> FanOut:
        dispatcher = self._dispatcher
        return FanOut.start(dispatcher.client, dispatcher.alive_engines, method, *arguments)

    async def _all_answer(self, calls: FanOut, what: str, timeout_s: float) -> None:
        await calls.wait(timeout_s, until_failure=True)
        try:
            calls.answers(what)
        except UtilityCallError as error:
            raise WeightUpdateError(str(error)) from error


def _check_version(version: str | None) -> None:
    if version is not None:
        _check_name("version", version)


def _check_name(field: str, name: str) -> None:
    """It is logged, and sent."""
    if not (isinstance(name, str) and name and name.isprintable()):
        raise InvalidRequestError(f"{field}={name!a:.80} must be a printable text, not empty")
