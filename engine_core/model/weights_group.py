"""The process groups over which a trainer, rank 0, broadcasts new weights to engines.

A group is `torch.distributed`'s, beside any default group a member may have. Members meet at a
`TCPStore` that the trainer serves at tcp://master_address:master_port. The keys of group G and
device type d lie under the prefixes G, G/ and d/ (the outermost first): where SGLang's trainers
(slime, OpenRLHF) put them, which make their group with `_new_process_group_helper` on
`PrefixStore(G, store)`. `connect` with rank 0 is a trainer's side; `scripts/trainer_group.py` shows
it in use.

A broadcast is one collective a tensor, in the order in which the update names them, from buffers
of the announced dtype and shape. Buffers are on the CPU with gloo, on the GPU with nccl.

Invariants
- Nothing is registered in `torch.distributed`, so a join that fails leaves nothing behind.
- Nobody is waited for longer than the group or the update says: not for an address that takes
  connections and is silent, which the store itself would await for ever.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from engine_core.model.safetensors_file import TensorInfo
from ipc.weights import TRAINER_TIMEOUT_S, WeightsGroup

_MIN_TIMEOUT_S = 0.001
"""torch takes less for none at all."""
_DEVICE_TYPES = {"gloo": "cpu", "nccl": "cuda"}


class TrainerGroup:
    """A member's end of a group."""

    def __init__(self, backend: Any, store: Store, device: torch.device) -> None:
        self.device = device
        """Where the tensors of a broadcast lie."""
        self._backend = backend
        self._store = store  # kept: rank 0's is the server

    def broadcast(self, tensor: Tensor, timeout_s: float = TRAINER_TIMEOUT_S) -> None:
        """Send a contiguous tensor if this is rank 0, else receive it in place. Returns when that
        is done. Raises RuntimeError; the group is of no use then.
        """
        options = dist.BroadcastOptions()
        options.timeout = timedelta(seconds=max(timeout_s, _MIN_TIMEOUT_S))
        options.rootRank = 0
        options.rootTensor = 0
        self._backend.broadcast([tensor], options).wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def connect(group: WeightsGroup) -> TrainerGroup:
    """Become a member; returns when all members came. Raises ValueError."""
    try:
        device_type = _DEVICE_TYPES[group.backend]
    except KeyError:
        raise ValueError(
            f"backend={group.backend!r} is not supported; choose one of {', '.join(_DEVICE_TYPES)}"
        ) from None
    if not (group.world_size >= 2 and 0 <= group.rank < group.world_size):
        raise ValueError(
            f"rank={group.rank} of world_size={group.world_size}: the world is the trainer and all "
            f"engines, at least 2, and ranks count from 0"
        )
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("backend='nccl' needs a GPU, and there is none here; use backend='gloo'")
    met: Future[TrainerGroup] = Future()

    def meet() -> None:
        try:
            met.set_result(_meet(group, torch.device(device_type)))
        except Exception as error:
            met.set_exception(error)

    # A thread that somebody silent holds for ever costs nothing but itself.
    threading.Thread(target=meet, name="join", daemon=True).start()
    try:
        return met.result(group.timeout_s)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"group_name={group.group_name!r}: not all {group.world_size} members met at "
            f"{group.master_address}:{group.master_port} within {group.timeout_s:g} s: "
            f"{_short(error) or 'it is silent'}"
        ) from None


def _meet(group: WeightsGroup, device: torch.device) -> TrainerGroup:
    timeout = timedelta(seconds=max(group.timeout_s, _MIN_TIMEOUT_S))
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        group.master_address,
        group.master_port,
        group.world_size,
        is_master=group.rank == 0,
        timeout=timeout,
    )
    for prefix in (group.group_name, f"{group.group_name}/", f"{device.type}/"):
        store = PrefixStore(prefix, store)
    return TrainerGroup(_make_backend(group, store, timeout), store, device)


def _make_backend(group: WeightsGroup, store: Store, timeout: timedelta) -> Any:
    if group.backend == "gloo":
        return dist.ProcessGroupGloo(store, group.rank, group.world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, group.rank, group.world_size, options)


def _short(error: Exception) -> str:
    """The first line of an error, without the C++ frames that follow it."""
    return str(error).strip().partition("\n")[0]


class TrainerGroups:
    """The groups that an engine is a member of, by name."""

    def __init__(self) -> None:
        self._groups: dict[str, TrainerGroup] = {}

    def join(self, group: WeightsGroup) -> None:
        """Returns when all members came. Raises ValueError."""
        if group.group_name in self._groups:
            raise ValueError(
                f"group_name={group.group_name!r} is joined already; leave it first, "
                f"or choose another name"
            )
        self._groups[group.group_name] = connect(group)

    def leave(self, group_name: str) -> None:
        """Raises ValueError if there is no such group."""
        self._get(group_name)
        del self._groups[group_name]

    def receive(self, group_name: str, name: str, info: TensorInfo, timeout_s: float) -> Tensor:
        """The next tensor that the trainer sends, within `timeout_s`. Raises ValueError, after
        which the group is left: its members would disagree on what comes next.
        """
        group = self._get(group_name)
        try:
            tensor = torch.empty(info.shape, dtype=info.dtype, device=group.device)
            group.broadcast(tensor, timeout_s)
        except (RuntimeError, MemoryError) as error:
            del self._groups[group_name]
            raise ValueError(
                f"tensor {name!r} was not received in group {group_name!r}, which was left; "
                f"make a new one: {_short(error)}"
            ) from None
        return tensor

    def _get(self, group_name: str) -> TrainerGroup:
        try:
            return self._groups[group_name]
        except KeyError:
            joined = ", ".join(sorted(self._groups)) or "none"
            raise ValueError(
                f"group_name={group_name!r} was not joined; joined groups: {joined}"
            ) from None
