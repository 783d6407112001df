"""A trainer's side of `update_weights_from_distributed`: make the group, then broadcast tensors.

    group = init_trainer_group("127.0.0.1", 29600, world_size=1 + num_engines)
    ...                                       # meanwhile engines join: init_weights_update_group
    broadcast_tensors(group, tensors)         # while the engines' update call waits for them

Both calls block until every engine takes part, so make the engines' call and this one at the same
time, from two threads or tasks. `described` is what the engines' update call is told.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine_core.model.weights_group import TrainerGroup, connect
from ipc.weights import TRAINER_TIMEOUT_S, WeightsGroup


def init_trainer_group(
    master_address: str,
    master_port: int,
    world_size: int,
    *,
    group_name: str = "weight_update_group",
    backend: str = "gloo",
    timeout_s: float = TRAINER_TIMEOUT_S,
) -> TrainerGroup:
    """Serve the group's store at an address of this machine, and wait until every engine joined.

    `world_size` counts the trainer and all engines. Raises ValueError.
    """
    group = WeightsGroup(
        master_address=master_address,
        master_port=master_port,
        rank=0,
        world_size=world_size,
        group_name=group_name,
        backend=backend,
        timeout_s=timeout_s,
    )
    return connect(group)


def described(tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[list[int]]]:
    """Names, dtypes and shapes of tensors, in the order in which they will be sent."""
    return (
        list(tensors),
        [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        [list(tensor.shape) for tensor in tensors.values()],
    )


def broadcast_tensors(group: TrainerGroup, tensors: Mapping[str, Tensor]) -> None:
    """Send tensors in order; returns when every engine has them all. Raises RuntimeError."""
    for tensor in tensors.values():
        group.broadcast(tensor.detach().to(group.device).contiguous())
